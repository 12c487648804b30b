"""What a result file says about where it comes from."""
import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cmr_layers.version import __version__

__all__ = [
    'COMMAND', 'describe', 'launcher', 'not_negative', 'output_file', 'positive', 'read_json', 'result_file',
    'results_at', 'write']

COMMAND = 'CMR_LAYERS_BENCHMARK_COMMAND'  # the command that made others start; it is the one to repeat
# What takes the place of a GPU in a rehearsal: the path of the program that stages it. Nothing else knows of it.
REHEARSAL: str | None = None


def launcher() -> list[str]:
    """How a process of this benchmark starts another: a rehearsal stays one."""
    return [sys.executable, *filter(None, [REHEARSAL])]


def read_json(path: Path) -> dict[str, Any] | None:
    """A result file; None if there is none, or no whole one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, results: dict[str, Any], lines: str | None = None) -> None:
    """A result file, whole or not at all. The list of the key ``lines`` comes last, each of its entries on a line."""
    text = json.dumps({key: value for key, value in results.items() if key != lines}, indent=1)
    if lines:
        entries = ',\n  '.join(map(json.dumps, results[lines]))
        text = f'{text[:-2]},\n "{lines}": [\n  {entries}\n ]\n}}'
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    part.write_text(f'{text}\n')
    os.replace(part, path)


def results_at(path: Path, *keys: str) -> dict[str, Any] | None:
    """A result file that has these keys; None if there is no file, or an empty one.

    Raises:
        ValueError: Another file is there.
    """
    found = read_json(path)
    if path.exists() and path.stat().st_size and (found is None or not found.keys() >= set(keys)):
        has = 'no JSON object' if found is None else f'{", ".join(sorted(found)) or "nothing"}'
        raise ValueError(f'must be a result file that has {", ".join(keys)}, got {str(path)!r}, which has {has}')
    return found


def output_file(text: str) -> Path:
    """An argument of argparse's: a file that can be written, which is better known before measuring than after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {str(path.parent)!r}')
    if path.is_dir():
        raise argparse.ArgumentTypeError(f'must be a file, got the folder {text!r}')
    return path


def result_file(text: str) -> Path:
    """The same for results: what is there and is none of them is not overwritten."""
    path = output_file(text)
    if path.is_file() and path.stat().st_size and read_json(path) is None:
        raise argparse.ArgumentTypeError(
            f'must be a new file or a result file, got {text!r}, which is none that can be read')
    return path


def positive(text: str) -> int:
    """An argument of argparse's: a positive int."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a positive int, got {text!r}')
    return int(text)


def not_negative(text: str) -> int:
    """An argument of argparse's: an int of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be an int of 0 or more, got {text!r}')
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
        **({'rehearsal': True} if REHEARSAL else {}),
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'command': os.environ.get(COMMAND) or shlex.join(['python', *_module(), *sys.argv[1:]]),
        'machine': f'{_processor()}, {os.cpu_count()} cores, {platform.system()}',
        'capability': torch.backends.cpu.get_cpu_capability(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'python': platform.python_version(),
        # the package's own is read from it: on a borrowed machine it may be there without being installed
        'versions': {'cmr-layers': __version__, **{
            name: version(name) for name in ('torch', 'timm', 'einops', *packages)}},
    }


def _module() -> list[str]:
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    return ['-m', spec.name.removesuffix('.__main__')] if spec else [sys.argv[0]]
