"""What a result file says about where it comes from."""
import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

__all__ = ['describe']


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as lines:
            return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(*packages: str) -> dict[str, Any]:
    """Machine, versions, date and command, as every committed result carries them."""
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'command': shlex.join(['python', '-m', *_module(), *sys.argv[1:]]),
        'machine': f'{_processor()}, {os.cpu_count()} cores, {platform.system()}',
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        'versions': {name: version(name) for name in ('cmr-layers', 'torch', 'timm', 'einops', *packages)},
    }


def _module() -> list[str]:
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    return [spec.name] if spec else [sys.argv[0]]
