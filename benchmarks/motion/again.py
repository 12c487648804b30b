"""Do runs of a result file again and compare: all numbers have to be the same, but for times.

    python -m benchmarks.motion.again --out benchmarks/results/motion-cpu.json --rows tim all
    python -m benchmarks.motion.again --out benchmarks/results/motion-cpu.json --maps    # add numbers for Figure 5

On another processor or version of PyTorch sums are rounded otherwise, and training amplifies that.
"""
import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import not_negative
from benchmarks.motion.maps import localisation
from benchmarks.motion.results import read
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import network_file, run, trained
from benchmarks.motion.size import SIZES, study_folder
from benchmarks.motion.study import save
from benchmarks.motion.tasks import TASKS

__all__ = ['add_maps', 'differences', 'main']

TIMES = {'seconds', 'machine', 'date', 'torch'}
TOLERANCE = .001  # of a map's number, for other machines


def differences(found: dict[str, Any], size: str, folder: Path) -> list[str]:
    """Names of the entries of a run that are not the same when it is done again."""
    again = run(folder, found['row'], found['seed'], SIZES[size], TASKS[found['task']])
    return [name for name in found if name not in TIMES and again.get(name) != found[name]]


def add_maps(found: dict[str, Any], size: str, folder: Path) -> None:
    """Add the maps that a run does not have.

    Raises:
        ValueError: The network is not that of the run: it has other numbers for the maps that the run has.
    """
    made = localisation(trained(folder, found['row'], found['seed'], SIZES[size]), found['seed'], SIZES[size])
    for name in made.keys() & found['maps'].keys():
        if max(abs(one - other) for one, other in zip(made[name], found['maps'][name])) > TOLERANCE:
            raise ValueError(f'--folder must have the networks of the runs, got {str(folder)!r}, whose row '
                             f'{found["row"]} of seed {found["seed"]} has {made[name]} for {name} where its run has '
                             f'{found["maps"][name]}')
    found['maps'] = {**made, **found['maps']}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='result file')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='ROW', default=['tim', 'all'],
                        help='default: tim all')
    parser.add_argument('--seed', type=not_negative, default=0, help='default: %(default)s')
    parser.add_argument('--maps', action='store_true',
                        help='run nothing; add maps that runs do not have, whatever their row and seed, where --folder '
                             'has their network')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    args = parser.parse_args(argv)
    try:
        results = read(args.out)
    except ValueError as error:
        parser.error(f'argument --out: {error}')
    torch.set_num_threads(1)
    size = results['size']
    if args.maps:
        folder = study_folder(size, args.folder)
        mapped = [found for found in results['runs'] if found.get('maps')]
        there = [found for found in mapped if network_file(folder, found['row'], found['seed']).exists()]
        if not there:
            parser.error(f'argument --folder: must have networks of runs that have maps, got {str(folder)!r}')
        for found in there:
            add_maps(found, size, folder)
        save(args.out, results)
        print(f'{len(there)} of {len(mapped)} runs that have maps have a network in {folder}')
        return 0
    chosen = [found for found in results['runs'] if found['row'] in args.rows and found['seed'] == args.seed]
    missing = set(args.rows) - {found['row'] for found in chosen}
    if missing:
        parser.error(f'argument --rows: must be rows that --out has with seed {args.seed}, got {sorted(missing)}')
    wrong = 0
    for found in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            names = differences(found, size, Path(temporary))
        outcome = f'differs in {names}' if names else 'is the same'
        print(found['task'], found['row'], found['seed'], outcome, flush=True)
        wrong += bool(names)
    return int(wrong > 0)


if __name__ == '__main__':
    sys.exit(main())
