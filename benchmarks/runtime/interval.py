"""Medians and their intervals: the one statistic of all tables."""
import math
from collections.abc import Sequence

import torch

__all__ = ['bootstrap', 'interval', 'show']

Passes = Sequence[Sequence[float]]  # for each pass, a number for each round


def bootstrap(values: Passes, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Median of what the rounds of several passes have, and a 95% interval by a bootstrap in two steps.

    What is drawn with replacement is passes first and then their rounds. Rounds of one pass share the memory that the
    networks got and the hour, so they alone would promise more than another run keeps.

    Args:
        values: For each pass, a number for each round.
        resamples: How often to draw.
        seed: Of the draws.

    Returns:
        ``median`` over all rounds, ``low`` and ``high``, ``passes`` and ``rounds``.
    """
    lengths = [len(rounds) for rounds in values]
    if not lengths or 0 in lengths:
        raise ValueError(f'there must be passes with rounds, got {lengths} of them')
    table = torch.full((len(lengths), max(lengths)), math.nan, dtype=torch.float64)
    for row, rounds in zip(table, values):
        row[:len(rounds)] = torch.tensor(rounds, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    passes = torch.randint(len(lengths), (resamples, len(lengths)), generator=generator)
    counts = torch.tensor(lengths)[passes].unsqueeze(-1)
    chosen = (torch.rand(*passes.shape, max(lengths), generator=generator) * counts).long()
    drawn = table[passes.unsqueeze(-1), chosen]
    drawn = drawn.masked_fill(torch.arange(max(lengths)) >= counts, math.nan)  # as many rounds as the pass has
    medians = drawn.flatten(1).nanquantile(.5, 1)
    low, high = medians.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()
    return {
        'median': table.nanquantile(.5).item(), 'low': low, 'high': high, 'passes': len(lengths),
        'rounds': sum(lengths)}


def interval(values: Passes, base: Passes) -> dict[str, float]:
    """:func:`bootstrap` of the ratios within the rounds."""
    lengths = [len(rounds) for rounds in values], [len(rounds) for rounds in base]
    if lengths[0] != lengths[1]:
        raise ValueError(f'ratios are taken within rounds, got {lengths[0]} and {lengths[1]} of them')
    return bootstrap([[v / b for v, b in zip(*rounds)] for rounds in zip(values, base)])


def show(entry: dict[str, float] | None, scale: float = 1, digits: int = 2) -> str:
    """``median (low-high)``, as every table has it."""
    if entry is None:
        return ''
    median, low, high = (f'{entry[key] * scale:.{digits}f}' for key in ('median', 'low', 'high'))
    return f'{median} ({low}-{high})'
