"""Choose the learning rate, on the row TIM alone and with seeds that the study does not have.

All trials see as many clips as a run. Those that the file has are not repeated.

    python -m benchmarks.motion.search --out benchmarks/results/motion-search-cpu.json
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, result_file, write
from benchmarks.motion.processes import cores, processes
from benchmarks.motion.run import image_weights, run
from benchmarks.motion.size import SIZES, add_size, kept, study_folder

__all__ = ['SEEDS', 'TRIALS', 'main']

TRIALS = ((8, 1e-3), (8, 2e-3), (8, 4e-3))  # clips of an update, largest rate
SEEDS = (100, 101)


def _run(folder: Path, size: str, seed: int, batch: int, rate: float) -> dict[str, Any]:
    found = SIZES[size]
    updates = found.recipe.updates * found.recipe.batch // batch
    recipe = found.recipe._replace(lr=rate, batch=batch, updates=updates)
    made = run(folder, 'tim', seed, found._replace(recipe=recipe, every=max(1, updates // 5)))
    return {name: made[name] for name in ('task', 'row', 'seed', 'seconds', 'losses', 'curve')} | {
        'lr': rate, 'batch': batch}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    add_size(parser)
    args = parser.parse_args(argv)
    folder = study_folder(args.size)
    folder.mkdir(exist_ok=True)
    clips = SIZES[args.size].recipe.updates * SIZES[args.size].recipe.batch
    found = kept(parser, args.out, args.size, 'trials')
    other = {made['curve'][-1][0] for made in found} - {clips}
    if other:
        parser.error(f'argument --out: must have trials of {clips} clips, got some of {sorted(other)}')
    done = {(made['seed'], made['batch'], made['lr']) for made in found}
    wanted = [(seed, *trial) for trial in TRIALS for seed in SEEDS if (seed, *trial) not in done]
    try:
        with processes(cores(SIZES[args.size].device)) as pool:
            for image in [pool.submit(image_weights, folder, 'resnet', SIZES[args.size], seed) for seed in SEEDS]:
                image.result()
            for made in [pool.submit(_run, folder, args.size, *trial) for trial in wanted]:
                found.append(made.result())
                about = describe('numpy', 'scikit-image')
                write(args.out, {**about, 'size': args.size, 'trials': found}, lines='trials')
    except KeyboardInterrupt:
        print('search: interrupted; the same command goes on', file=sys.stderr)
        return 130
    for trial in TRIALS:
        points = [made['curve'][-1] for made in found if (made['batch'], made['lr']) == trial]
        print(*trial, [f'{right / clips:.1%}' for _, clips, _, right in points])
    return 0


if __name__ == '__main__':
    sys.exit(main())
