"""Choose batch and learning rate, on the row TIM alone and with seeds that the study does not have.

All trials see as many clips. Those that the file has are not repeated.

    python -m benchmarks.motion.search --out benchmarks/results/motion-search-cpu.json
"""
import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, read_json, result_file
from benchmarks.motion.run import image_weights, run
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import save, start

__all__ = ['SEEDS', 'TRIALS', 'main']

TRIALS = ((8, 1e-3), (8, 2e-3), (8, 4e-3))  # clips of an update, largest rate
CLIPS = 16_000
SEEDS = (100, 101)


def _run(folder: Path, size: str, seed: int, batch: int, rate: float) -> dict[str, Any]:
    found = SIZES[size]
    recipe = found.recipe._replace(lr=rate, batch=batch, updates=CLIPS // batch)
    made = run(folder, 'tim', seed, found._replace(recipe=recipe, every=CLIPS // batch // 5))
    return {name: made[name] for name in ('task', 'row', 'seed', 'seconds', 'losses', 'curve')} | {
        'lr': rate, 'batch': batch}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    parser.add_argument('--size', choices=list(SIZES), default='cpu')
    args = parser.parse_args(argv)
    folder = Path(f'motion-study-{args.size}')
    folder.mkdir(exist_ok=True)
    jobs = os.cpu_count() or 1 if SIZES[args.size].device == 'cpu' else 1
    found = (read_json(args.out) or {'runs': []})['runs']
    done = {(made['seed'], made['batch'], made['lr']) for made in found}
    wanted = [(seed, *trial) for trial in TRIALS for seed in SEEDS if (seed, *trial) not in done]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), start) as pool:
        for image in [pool.submit(image_weights, folder, 'resnet', SIZES[args.size], seed) for seed in SEEDS]:
            image.result()
        for made in [pool.submit(_run, folder, args.size, *trial) for trial in wanted]:
            found.append(made.result())
            save(args.out, {**describe('numpy', 'scikit-image'), 'size': args.size, 'runs': found})
    for trial in TRIALS:
        points = [made['curve'][-1] for made in found if (made['batch'], made['lr']) == trial]
        print(*trial, [f'{right / clips:.1%}' for _, clips, _, right in points])
    return 0


if __name__ == '__main__':
    sys.exit(main())
