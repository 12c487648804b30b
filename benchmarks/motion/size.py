"""How large the study is: on a CPU's two cores, and on a GPU."""
import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import results_at
from benchmarks.motion.fit import Recipe

__all__ = ['SIZES', 'Size', 'add_size', 'kept', 'study_folder']


class Size(NamedTuple):
    """All that rows have in common.

    Attributes:
        shape: Arguments of timm's ResNet that make it as large as it is.
        deep: Its blocks where some of a stage's blocks have a layer and others have not (Table 5).
        side: Pixels of a frame's side.
        recipe: Training on clips.
        stills: Training of the image network before.
        test: Test clips.
        curve: Test clips of the learning curve, and of each value of a knob.
        every: Updates between two points of the learning curve.
        maps: Test clips for Figure 5.
        device: Where.
    """
    shape: dict[str, Any]
    deep: tuple[int, ...]
    side: int
    recipe: Recipe
    stills: Recipe
    test: int
    curve: int
    every: int
    maps: int
    device: str


SIZES: dict[str, Size] = {
    'cpu': Size(
        shape=dict(layers=(1, 1, 1, 1), channels=(12, 24, 48, 96), stem_type='deep', stem_width=12),
        deep=(2, 2, 2, 2), side=40, recipe=Recipe(updates=2000, batch=8, lr=2e-3),
        stills=Recipe(updates=600, batch=128, lr=5e-3),
        test=1500, curve=300, every=400, maps=100, device='cpu'),
    'gpu': Size(
        shape=dict(layers=(3, 4, 6, 3)), deep=(3, 4, 6, 3), side=112,
        recipe=Recipe(updates=2000, batch=32, lr=1e-3, amp=True),
        stills=Recipe(updates=1000, batch=256, lr=2e-3, amp=True),
        test=2000, curve=500, every=400, maps=100, device='cuda'),
    # what the tests run
    'smoke': Size(
        shape=dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_type='deep', stem_width=8), deep=(2, 1, 1, 1),
        side=40,
        recipe=Recipe(updates=4, batch=4), stills=Recipe(updates=2, batch=8), test=24, curve=12, every=2, maps=2,
        device='cpu'),
}


def add_size(parser: argparse.ArgumentParser) -> None:
    """The argument --size of all commands of the study."""
    def here(text: str) -> str:
        if text in SIZES and SIZES[text].device == 'cuda' and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"must be 'cpu' or 'smoke' where PyTorch finds no GPU, got {text!r}")
        return text

    parser.add_argument('--size', type=here, choices=list(SIZES), default='cpu', help='how large; default: %(default)s')


def study_folder(size: str, folder: Path | None = None) -> Path:
    """Where the networks of a study are, if nobody says."""
    return folder or Path(f'motion-study-{size}')


def kept(parser: argparse.ArgumentParser, path: Path, size: str, key: str) -> list[Any]:
    """What a result file of this size has under a key, nothing if there is no file.

    Another file, or one of another size, is an error of the parser's argument --out.
    """
    try:
        found = results_at(path, 'size', key) or {'size': size, key: []}
    except ValueError as error:
        parser.error(f'argument --out: {error}')
    if found['size'] != size:
        parser.error(f'argument --out: must be a new file or one of size {size!r}, got one of {found["size"]!r}')
    entries: list[Any] = found[key]
    return entries
