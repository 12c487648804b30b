"""What a network is to learn."""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.motion.paths import Levels

__all__ = ['DATA', 'Clips', 'Task', 'counts', 'pairs']

Clips = tuple[Tensor, Tensor]  # uint8, (B, T, 3, S, S), and their labels, (B,)

DATA = Path('motion-data')  # what is recorded or decoded once


def pairs(classes: int) -> tuple[int, ...]:
    """Groups of classes 2 m and 2 m + 1."""
    return tuple(i // 2 for i in range(classes))


def counts(confusion: list[list[int]], groups: tuple[int, ...]) -> list[int]:
    """Clips, those whose group is right, and those whose class is right."""
    cells = [(groups[i] == groups[j], i == j, n) for i, row in enumerate(confusion) for j, n in enumerate(row)]
    return [sum(n for *_, n in cells), sum(n for group, _, n in cells if group), sum(n for _, same, n in cells if same)]


class Task(NamedTuple):
    """Clips and their classes.

    Attributes:
        name: In results.
        classes: Their names.
        groups: A number for each class. Classes of one group have the same frames, in another order.
        levels: What theory allows.
        train: From (seed, batch, num_frames, side, device) to batches without end.
        test: From (count, num_frames, side, device) to test clips.
    """
    name: str
    classes: tuple[str, ...]
    groups: tuple[int, ...]
    levels: Levels
    train: Callable[[int, int, int, int, str], Iterator[Clips]]
    test: Callable[[int, int, int, str], Clips]
