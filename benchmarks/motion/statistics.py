"""Shares of right answers over seeds, and differences that are paired by them."""
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ['Estimate', 'difference', 'mean']

# two-sided 95% quantiles of Student's t, by degrees of freedom
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
      2.131, 2.120, 2.110, 2.101, 2.093)


class Estimate(NamedTuple):
    """A mean over seeds, its 95% interval by Student's t, and what it is the mean of, in the order of the seeds."""
    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.values)

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; of two seeds the smaller and the larger value, as t of one degree of freedom says nothing."""
        return (min(self.values), max(self.values)) if self.seeds < 3 else (self.low, self.high)

    def show(self, sign: bool = False) -> str:
        """In percent, within 0 and 100, or in points with a sign. Of two seeds, both values in their order."""
        def text(value: float) -> str:
            return f'{100 * value:{"+" if sign else ""}.1f}'

        if self.seeds == 1:
            return text(self.mean)
        if self.seeds == 2:
            return f'{text(self.mean)} ({", ".join(map(text, self.values))})'
        low, high = (self.low, self.high) if sign else (max(self.low, 0), min(self.high, 1))
        return f'{text(self.mean)} ({text(low)} to {text(high)})'

    @property
    def verdict(self) -> str:
        """Of a difference that is claimed to be positive."""
        if self.seeds < 3:
            return ['one seed', 'two seeds'][self.seeds - 1]
        return 'holds' if self.low > 0 else 'reversed' if self.high < 0 else 'undecided'


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds.

    Raises:
        ValueError: There are no values, or more than 20.
    """
    n = len(values)
    if not 0 < n <= len(_T):
        raise ValueError(f'values must be one to {len(_T)} numbers, got {n}')
    middle = sum(values) / n
    if n == 1:
        return Estimate(middle, -math.inf, math.inf, (middle,))
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1))
    margin = _T[n - 1] * spread / math.sqrt(n)
    return Estimate(middle, middle - margin, middle + margin, tuple(values))


def difference(values: dict[int, float], base: dict[int, float]) -> Estimate | None:
    """Of two rows, by seed, over the seeds that both have; None if there are none."""
    seeds = sorted(values.keys() & base.keys())
    return mean([values[seed] - base[seed] for seed in seeds]) if seeds else None
