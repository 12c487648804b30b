"""Why does CME gain what it gains? How much of what it sees, and of its gates, changes within a clip.

    python -m benchmarks.motion.gates --out benchmarks/results/motion-gates-cpu.json --seeds 5

CME pools each frame before it compares frames. When a thing moves over a ground that goes on, features move with it,
and their mean over the frame stays. So of the variance over clips and frames, the share that lies within clips is
taken, for features at a place, for their means over the frame, and for gates. Reads networks that the study has left in
its folder.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe, result_file
from benchmarks.motion.fit import normalise
from benchmarks.motion.maps import inputs_of
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import trained
from benchmarks.motion.size import SIZES, Size
from benchmarks.motion.task import Task
from benchmarks.motion.tasks import TASKS
from cmr_layers import CME

__all__ = ['main', 'measure', 'within']

CLIPS = 200


def within(values: Tensor) -> float:
    """Share of the variance of (B, T, ...) that is within clips, the variance being summed over what follows T."""
    values = values.double()
    inside = values.var(1, correction=0).mean(0).sum()
    return float(inside / values.var((0, 1), correction=0).sum())


@torch.no_grad()
def measure(model: torch.nn.Module, clips: Tensor) -> list[dict[str, float]]:
    """Of each CME, as the network runs through them: the shares for what it sees, and the mean of its gates."""
    layers = [module for module in model.modules() if isinstance(module, CME)]
    with inputs_of(model, CME) as inputs:
        model(normalise(clips))
    found = []
    for layer, x in zip(layers, inputs):
        x = x.unflatten(0, (-1, layer.num_frames))
        gates = layer.gate(x)
        found.append({'place': round(within(x), 4), 'pooled': round(within(x.mean((3, 4))), 4),
                      'gates': round(within(gates), 4), 'mean': round(gates.mean().item(), 4)})
    return found


def _of(folder: Path, row: str, seed: int, size: Size, task: Task) -> dict[str, Any]:
    clips, _ = task.test(seed, CLIPS, ROWS[row].num_frames, size.side, size.device)
    return {'task': task.name, 'row': row, 'seed': seed,
            'layers': measure(trained(folder, row, seed, size, task), clips)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    parser.add_argument('--size', choices=list(SIZES), default='cpu', help='default: %(default)s')
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=['movers'], help='default: movers')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='ROW', default=['cme'], help='default: cme')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='SEED', default=[0], help='default: 0')
    args = parser.parse_args(argv)
    folder = args.folder or Path(f'motion-study-{args.size}')
    try:
        networks = [_of(folder, row, seed, SIZES[args.size], TASKS[task])
                    for task in args.tasks for row in args.rows for seed in args.seeds]
    except FileNotFoundError as error:
        parser.error(f'argument --folder: must have the networks of a study, got {str(folder)!r}: {error}')
    args.out.write_text(json.dumps({**describe(), 'clips': CLIPS, 'networks': networks}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
