"""What a result file says about where it comes from."""
import argparse
import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ['describe', 'positive', 'result_file']


def result_file(text: str) -> Path:
    """An argument of argparse's: a file that can be written, which is better known before measuring than after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {str(path.parent)!r}')
    return path


def positive(text: str) -> int:
    """An argument of argparse's: a positive int."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive int, got {text!r}')
    return int(text)


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
        'command': shlex.join(['python', *_module(), *sys.argv[1:]]),
        'machine': f'{_processor()}, {os.cpu_count()} cores, {platform.system()}',
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        'versions': {name: version(name) for name in ('cmr-layers', 'torch', 'timm', 'einops', *packages)},
    }


def _module() -> list[str]:
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    return ['-m', spec.name.removesuffix('.__main__')] if spec else [sys.argv[0]]
