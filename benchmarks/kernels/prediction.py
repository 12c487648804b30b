"""The prediction of a network's inference: its kernels by stage, their sums, and what they add to the plain network."""
import math
from typing import Any

from .model import CACHE, LAUNCH, MEMORY, MEMORY_PEAK, Prediction, predict
from .network import launches, places

__all__ = ['PLAIN', 'predict_network']

# Microseconds of the plain ResNet-50 in half precision as a CUDA graph, at least and at most, by batch. Assumed: nobody
# has measured it with this package.
PLAIN = {1: (550., 1000.), 8: (3200., 5300.)}
# Kernels that take in what the plain network has, too. What that takes there: of a convolution the floor over an
# efficiency, of the sum and the ReLU at the end of a block one pass, as torch.compile makes of them.
CONVOLUTIONS, SUMS = ('_gated_conv_kernel',), ('_end_mean_kernel', '_end_similarity_kernel')
EFFICIENCY, SHORTEST_CONVOLUTION = .65, 2.

_Row = dict[str, Any]


def predict_batch(
        batch: int, kernels: list[str] | None = None, stages: list[str] | None = None, mode: str = 'folded',
) -> list[_Row]:
    """A row for each kernel and stage, in the order of their first launches.

    Args:
        batch: Clips. One is read from the second-level cache, more come from memory.
        kernels: Only kernels whose name holds one of these.
        stages: Only frames of 'channels x height', such as '256x56'.
        mode: 'folded' or 'fused', as :func:`.network.launches` knows them.
    """
    found = launches(batch, mode=mode)
    rows: dict[tuple[Any, ...], _Row] = {}
    for launch, place in zip(found, places(found)):
        if (kernels and not any(name in launch.name for name in kernels)) or (stages and place not in stages):
            continue
        weight = launch.buffers.get('weight')
        key = launch.name, place, launch
        if key not in rows:
            outputs = {'outputs': weight.shape[0]} if weight else {}
            rows[key] = {'batch': batch, 'kernel': launch.name, 'frames': place, **outputs, 'launches': 0,
                         **_rounded(predict(launch, batch > 1))}
        rows[key]['launches'] += 1
    return list(rows.values())


def _rounded(prediction: Prediction) -> _Row:
    return {name: round(value, 2) if isinstance(value, float) else value
            for name, value in prediction._asdict().items()}


def summary(rows: list[_Row]) -> _Row:
    """Sums over a batch's rows, by kernel and in all, and the predicted ratio to the plain network."""
    kernels: dict[str, _Row] = {}
    for row in rows:
        sums = kernels.setdefault(row['kernel'], {'time': 0., 'floor': 0., 'launches': 0})
        sums['launches'] += row['launches']
        for name in ('time', 'floor'):
            sums[name] = round(sums[name] + row['launches'] * row[name], 2)
    total = {name: round(sum(sums[name] for sums in kernels.values()), 2) for name in ('time', 'floor', 'launches')}
    added = total['time'] - math.fsum(row['launches'] * _in_plain(row) for row in rows)
    plain = PLAIN.get(rows[0]['batch']) if rows else None
    ratios = {'plain': list(plain), 'ratio': [round(1 + added / time, 2) for time in reversed(plain)]} if plain else {}
    return {'kernels': kernels, **total, 'added': round(added, 2), **ratios}


def _in_plain(row: _Row) -> float:
    """Microseconds of the plain network that a launch replaces."""
    if row['kernel'] in CONVOLUTIONS:
        return float(max(SHORTEST_CONVOLUTION, row['floor'] / EFFICIENCY))
    if row['kernel'] in SUMS:
        return float(LAUNCH + row['floor'] * MEMORY_PEAK / (CACHE if row['batch'] == 1 else MEMORY))
    return 0.


def predict_network(
        batches: list[int], kernels: list[str] | None = None, stages: list[str] | None = None, mode: str = 'folded',
) -> dict[str, Any]:
    """What ``--predict`` writes: rows and sums of each batch."""
    rows = {batch: predict_batch(batch, kernels, stages, mode) for batch in batches}
    return {'mode': mode, 'rows': [row for batch in batches for row in rows[batch]],
            'sums': {str(batch): summary(rows[batch]) for batch in batches}}
