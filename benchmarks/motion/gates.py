"""Why does CME gain what it gains? How much of what it sees, and of its gates, changes within a clip.

    python -m benchmarks.motion.gates --out benchmarks/results/motion-gates-cpu.json --seeds 5

CME pools each frame before it compares frames. When a thing moves over a ground that goes on, features move with it,
and their mean over the frame stays. So of the variance over clips and frames, the share that lies within clips is
taken, for features at a place, for their means over the frame, and for gates. Clips are those of Figure 5, whose bar
is visible and moves in every frame. Reads networks that the study has left in its folder.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe, result_file, write
from benchmarks.motion.fit import normalise
from benchmarks.motion.maps import inputs_of, moving
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import trained
from benchmarks.motion.size import SIZES
from cmr_layers import CME

__all__ = ['main', 'measure', 'within']

CLIPS = 200
#: Rows with the paper's CME, or a variant of it.
GATED = ['cme', 'all', 'only_cme', 'cme_sme', 'shuffled_cme', 'similar', 'alone', 'softmax_t', 'even', 'r1', 'r4',
         'r16']


def within(values: Tensor) -> float:
    """Share of the variance of (B, T, ...) that is within clips, summed over what follows T; nan where nothing varies.

    What all clips have in common at a time, such as what TIM's zero padding does to the last frame, tells nothing on
    motion, and is taken off before. 1 - 1/T is the share of frames that have nothing to do with each other.
    """
    values = values.double() - values.double().mean(0)
    return float(values.var(1, correction=0).mean(0).sum() / values.var((0, 1), correction=0).sum())


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    parser.add_argument('--size', choices=list(SIZES), default='cpu', help='default: %(default)s')
    parser.add_argument('--rows', nargs='+', choices=GATED, metavar='ROW', default=['cme'],
                        help=f'of {", ".join(GATED)}; default: cme')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='SEED', default=[0], help='default: 0')
    args = parser.parse_args(argv)
    size, folder = SIZES[args.size], args.folder or Path(f'motion-study-{args.size}')
    networks: list[dict[str, Any]] = []
    for row, seed in dict.fromkeys((row, seed) for row in args.rows for seed in args.seeds):
        try:
            model = trained(folder, row, seed, size)
        except FileNotFoundError:
            parser.error(f'argument --folder: must have the networks of a study, got {str(folder)!r}, which has none '
                         f'of row {row} and seed {seed}')
        clips = moving(CLIPS, size.side, seed).clips.to(size.device)
        networks.append({'row': row, 'seed': seed, 'num_frames': ROWS[row].num_frames, 'layers': measure(model, clips)})
    write(args.out, {**describe(), 'size': args.size, 'clips': CLIPS, 'networks': networks})
    return 0


if __name__ == '__main__':
    sys.exit(main())
