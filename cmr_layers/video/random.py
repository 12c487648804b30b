"""Random numbers that follow from where they are used, so that no process or worker has a state to restore."""
import numpy as np
import torch

__all__ = ['generator_of']


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of random numbers that follows from some numbers, such as a seed, an epoch and an index.

    Args:
        numbers: Ints >= 0.

    Example:
        >>> torch.rand((), generator=generator_of(0, 3, 7)) == torch.rand((), generator=generator_of(0, 3, 7))
        tensor(True)
    """
    # neighbours among the numbers have nothing in common in the state, which cannot be said of sums and products
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
