"""The order in which the processes of a run see the videos of an epoch."""
from typing import Any, Iterator, Tuple

import torch
from torch.utils.data import Sampler

from ..checks import check_positive
from .random import generator_of

__all__ = ['EpochSampler']


class EpochSampler(Sampler[Tuple[int, int]]):
    """Yields (epoch, i) for :class:`VideoDataset`, this process's share of an epoch.

    The epoch travels with each index because a dataset in a persistent worker never hears of a new one.

    In training an epoch is a permutation of the videos that follows from seed and epoch alone. Process r of R takes
    every R-th video from the r-th on, so R processes with batches of b see what one process with batches of R b sees.
    All get equally many; at most R - 1 videos of the permutation are left for another epoch. In evaluation each video
    comes exactly once over all processes, in order, and a process may have one more than another.

    Args:
        size: Number of videos.
        train: Whether to permute them.
        seed: Seed of the permutations.
        rank: Number r of this process.
        world_size: Number R of processes.

    Attributes:
        epoch: The epoch, see :meth:`set_epoch`.
        start: Videos of this process's share that are left out at the beginning, for a run that goes on within an
            epoch. :meth:`set_epoch` sets it to 0.

    Raises:
        ValueError: An argument is out of its range, or training has fewer videos than processes.

    Example:
        >>> list(EpochSampler(5, train=False, rank=1, world_size=2))
        [(0, 1), (0, 3)]
        >>> sampler = EpochSampler(5, train=True)
        >>> sampler.set_epoch(3, start=2)
        >>> len(sampler), {epoch for epoch, _ in sampler}
        (3, {3})
    """

    def __init__(self, size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.world_size = check_positive('size', size), check_positive('world_size', world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f'rank must be in [0, world_size={world_size}), got {rank!r}')
        if train and size < world_size:
            raise ValueError(f'size must be at least world_size={world_size} in training, got {size}')
        self.train, self.seed, self.rank = train, seed, rank
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, from 0, and how many videos of this process's share it begins after."""
        for name, value in (('epoch', epoch), ('start', start)):
            if value < 0:
                raise ValueError(f'{name} must be an int >= 0, got {value!r}')
        self.epoch, self.start = epoch, start

    def _share(self) -> Any:
        if not self.train:
            return range(self.rank, self.size, self.world_size)
        order = torch.randperm(self.size, generator=generator_of(self.seed, self.epoch)).tolist()
        return order[self.rank:self.size - self.size % self.world_size:self.world_size]

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        return ((self.epoch, i) for i in self._share()[self.start:])

    def __len__(self) -> int:
        size = self.size - self.size % self.world_size if self.train else self.size
        return max(0, len(range(self.rank, size, self.world_size)) - self.start)
