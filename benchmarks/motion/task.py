"""What a network is to learn."""
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.motion.paths import Levels

__all__ = ['DATA', 'Clips', 'Task', 'counts', 'kept', 'make_task', 'pairs']

Clips = tuple[Tensor, Tensor]  # uint8, (B, T, 3, S, S), and their labels, (B,)
DATA = Path('motion-data')  # what is recorded or decoded once


class Task(NamedTuple):
    """Clips and their classes.

    Attributes:
        name: In results.
        classes: Their names.
        groups: A number for each class. Classes of one group have the same frames, in another order.
        levels: What theory allows.
        train: From (seed, batch, num_frames, side, device) to batches without end.
        test: From (seed, count, num_frames, side, device) to test clips.
    """
    name: str
    classes: tuple[str, ...]
    groups: tuple[int, ...]
    levels: Levels
    train: Callable[[int, int, int, int, str], Iterator[Clips]]
    test: Callable[[int, int, int, int, str], Clips]


def make_task(
        name: str, classes: tuple[str, ...], groups: tuple[int, ...], levels: Levels,
        make: Callable[[int, tuple[int, ...], str, int, int, str], Clips],
) -> Task:
    """A task of what ``make`` makes of (count, seed, split, num_frames, side, device).

    Batches of a seed are the same for all rows, and no two of them have the same random numbers. Each seed has test
    clips of its own, so that an interval over seeds is one over test clips, too.
    """
    def train(seed: int, batch: int, num_frames: int, side: int, device: str) -> Iterator[Clips]:
        i = 0
        while True:
            yield make(batch, (0, seed, i), 'train', num_frames, side, device)
            i += 1

    @lru_cache(maxsize=2)
    def test(seed: int, count: int, num_frames: int, side: int, device: str) -> Clips:
        return make(count, (1, seed), 'val', num_frames, side, device)

    return Task(name, classes, groups, levels, train, test)


def kept(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Arrays that are made once and read from :data:`DATA` from then on."""
    file = DATA / f'{name}.npz'
    if not file.exists():
        made = make()
        DATA.mkdir(exist_ok=True)
        part = file.with_suffix('.part.npz')
        np.savez(part, **made)
        part.replace(file)
    with np.load(file) as found:
        return dict(found)


def pairs(classes: int) -> tuple[int, ...]:
    """Groups of classes 2 m and 2 m + 1."""
    return tuple(i // 2 for i in range(classes))


def counts(confusion: list[list[int]], groups: tuple[int, ...]) -> list[int]:
    """Clips, those whose group is right, and those whose class is right."""
    cells = [(groups[i] == groups[j], i == j, n) for i, row in enumerate(confusion) for j, n in enumerate(row)]
    return [sum(n for *_, n in cells), sum(n for group, _, n in cells if group), sum(n for _, same, n in cells if same)]
