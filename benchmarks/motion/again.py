"""Do runs of a result file again and compare: all numbers have to be the same, but for times.

    python -m benchmarks.motion.again --out benchmarks/results/motion-cpu.json --rows tim all
    python -m benchmarks.motion.again --out benchmarks/results/motion-cpu.json --maps    # write Figure 5's numbers anew

On another processor or version of PyTorch sums are rounded otherwise, and training amplifies that.
"""
import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import read_json
from benchmarks.motion.maps import localisation
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import run, trained
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import save
from benchmarks.motion.tasks import TASKS

__all__ = ['differences', 'main']

TIMES = {'seconds', 'machine', 'date', 'torch'}


def differences(found: dict[str, Any], size: str, folder: Path) -> list[str]:
    """Names of the entries of a run that are not the same when it is done again."""
    again = run(folder, found['row'], found['seed'], SIZES[size], TASKS[found['task']])
    return [name for name in found if name not in TIMES and again.get(name) != found[name]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='result file')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='ROW', default=['tim', 'all'])
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--maps', action='store_true', help='of networks that are still in --folder')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    args = parser.parse_args(argv)
    results = read_json(args.out)
    if results is None:
        parser.error(f'argument --out: must be a result file, got {str(args.out)!r}')
    torch.set_num_threads(1)
    size = results['size']
    if args.maps:
        for found in results['runs']:
            if 'maps' in found:
                model = trained(args.folder or Path(f'motion-study-{size}'), found['row'], found['seed'], SIZES[size])
                found['maps'] = localisation(model, found['seed'], SIZES[size])
        save(args.out, results)
        return 0
    chosen = [found for found in results['runs'] if found['row'] in args.rows and found['seed'] == args.seed]
    missing = set(args.rows) - {found['row'] for found in chosen}
    if missing:
        parser.error(f'argument --rows: must be rows that --out has with seed {args.seed}, got {sorted(missing)}')
    wrong = 0
    for found in chosen:
        with tempfile.TemporaryDirectory() as folder:
            names = differences(found, size, Path(folder))
        outcome = f'differs in {names}' if names else 'is the same'
        print(found['task'], found['row'], found['seed'], outcome, flush=True)
        wrong += bool(names)
    return int(wrong > 0)


if __name__ == '__main__':
    sys.exit(main())
