"""How long each row takes as a ResNet-50, side by side: what accuracy is plotted against.

    python -m benchmarks.motion.latency --out benchmarks/results/motion-latency-cpu.json

One clip of 224x224 pixels, channels_last, in inference without folding. Ratios are to TIM, within rounds. Variants of
the paper's layers run the plain form of the equations, which is slower than the layers' own path.
"""
import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.machine import describe, positive, result_file, results_at, write
from benchmarks.motion.rows import ROWS, build, image_network
from benchmarks.runtime.interval import interval
from benchmarks.runtime.timing import interleave

__all__ = ['main', 'measure']

SHAPE = dict(layers=(3, 4, 6, 3))
BASE = 'tim'
NETWORKS = [name for name, row in ROWS.items()
            if row.longer == 1 and not row.frozen and row.image != 'untrained'
            and not name.startswith(('broken_', 'shuffled_'))]


def measure(rows: Sequence[str], rounds: int, size: int, shape: dict[str, Any], device: str) -> dict[str, Any]:
    """Time rows, and TIM beside them: seconds in the median, and the ratio to TIM with its interval."""
    kinds = {ROWS[name].image for name in (BASE, *rows)}
    weights = {kind: image_network(kind, 6, shape).state_dict() for kind in kinds}
    calls = {}
    for name in dict.fromkeys((BASE, *rows)):
        model = build(name, 174, shape, weights[ROWS[name].image], seed=0).to(device).eval()
        frames = torch.randn(ROWS[name].num_frames, 3, size, size, device=device)
        calls[name] = partial(model, frames.contiguous(memory_format=torch.channels_last))
        with torch.inference_mode():
            calls[name]()
    with torch.inference_mode():
        samples = interleave(calls, device, rounds, float('inf')).time
    return {name: {'seconds': torch.tensor(times).median().item(), 'ratio': interval([times], [samples[BASE]])}
            for name, times in samples.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='default: %(default)s')
    parser.add_argument('--rounds', type=positive, default=15, help='samples of each row; default: %(default)s')
    parser.add_argument('--pixels', type=positive, default=224, help='side of a frame; default: %(default)s')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=NETWORKS, metavar='ROW',
                        help='default: all but those that are another row, trained otherwise')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error("argument --device: must be 'cpu' where PyTorch finds no GPU, got 'cuda'")
    try:
        results_at(args.out, 'rounds', 'size', 'rows')
    except ValueError as error:
        parser.error(f'argument --out: {error}')
    rows = measure(args.rows, args.rounds, args.pixels, SHAPE, args.device)
    write(args.out, {**describe(), 'device': args.device, 'threads': torch.get_num_threads(), 'rounds': args.rounds,
                     'size': args.pixels, 'rows': rows})
    print(f'{len(rows)} rows: {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
