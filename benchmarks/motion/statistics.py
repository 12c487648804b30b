"""Shares of right answers over seeds, and differences that are paired by them."""
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ['Estimate', 'difference', 'mean']

# two-sided 95% quantiles of Student's t, by degrees of freedom
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
      2.131, 2.120, 2.110, 2.101, 2.093)


class Estimate(NamedTuple):
    """A mean over seeds and its 95% interval, by Student's t."""
    mean: float
    low: float
    high: float
    seeds: int

    def show(self, sign: bool = False) -> str:
        """In percent, within 0 and 100, or in points with a sign. Of two seeds, both values."""
        plus = '+' if sign else ''
        ends = (self.low, self.high) if sign else (max(self.low, 0), min(self.high, 1))
        if self.seeds == 2:
            ends = self.ends
        mean, low, high = (f'{100 * value:{plus}.1f}' for value in (self.mean, *ends))
        return {1: mean, 2: f'{mean} ({low}, {high})'}.get(self.seeds, f'{mean} ({low} to {high})')

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, but of two seeds their values: Student's t of one degree of freedom says nothing."""
        half = (self.high - self.low) / 2 / _T[1]
        return (self.mean - half, self.mean + half) if self.seeds == 2 else (self.low, self.high)

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
        return Estimate(middle, -math.inf, math.inf, 1)
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1))
    margin = _T[n - 1] * spread / math.sqrt(n)
    return Estimate(middle, middle - margin, middle + margin, n)


def difference(values: dict[int, float], base: dict[int, float]) -> Estimate | None:
    """Of two rows, by seed, over the seeds that both have; None if there are none."""
    seeds = sorted(values.keys() & base.keys())
    return mean([values[seed] - base[seed] for seed in seeds]) if seeds else None
