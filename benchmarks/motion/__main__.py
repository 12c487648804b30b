"""Train networks with and without the layers on tasks of motion, and compare them.

    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json                    # all rows, see --seeds
    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json --groups table4    # the rows of a table
    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json --seeds 5 6        # other seeds
    python -m benchmarks.motion --out benchmarks/results/motion-gpu.json --size gpu --minutes 8.5

The same command goes on where it was interrupted. A run (a row and a seed) takes one thread; --jobs runs are side by
side. Needs the extra [motion].
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import not_negative, positive, result_file
from benchmarks.motion.processes import cores
from benchmarks.motion.rows import GROUPS, MAIN, ROWS
from benchmarks.motion.size import SIZES, add_size, study_folder
from benchmarks.motion.study import study
from benchmarks.motion.tasks import TASKS

SEEDS = 5  # of the main rows on the task movers


def _rows(rows: Sequence[str], groups: Sequence[str], task: str) -> Sequence[str]:
    if not rows and not groups:
        if task != 'movers':
            return MAIN
        groups = list(GROUPS)
    return list(dict.fromkeys([*rows, *(row for group in groups for row in GROUPS[group])]))


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text!r}')
    return value


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f'must be a folder, got the file {text!r}')
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.motion', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file; runs that it has are not repeated')
    parser.add_argument('--folder', type=_folder, help='for networks; by default, motion-study-SIZE')
    add_size(parser)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=['movers'], help='default: movers')
    parser.add_argument('--groups', nargs='+', choices=list(GROUPS), metavar='GROUP', default=[],
                        help=f'rows of these tables, of {", ".join(GROUPS)}; default: all of movers, table4 and table6 '
                             'of other tasks')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='ROW', default=[],
                        help=f'these rows, of {", ".join(ROWS)}')
    parser.add_argument('--seeds', type=not_negative, nargs='+', metavar='SEED',
                        help='all runs of a seed are of one kind of machine; default: 0 to 4 for the rows of Tables '
                             '4 and 6 on movers, 0 for the others, under three hours on two cores')
    parser.add_argument('--jobs', type=positive, help='runs side by side; default: the CPU cores, one on a GPU')
    parser.add_argument('--minutes', type=_minutes, default=float('inf'), help='begin no run that would end later')
    args = parser.parse_args(argv)
    keys = [(task, row, seed) for seed in args.seeds or range(SEEDS) for task in args.tasks
            for row in _rows(args.rows, args.groups, task)
            if args.seeds or seed < (SEEDS if task == 'movers' and row in MAIN else 1)]
    jobs = args.jobs or cores(SIZES[args.size].device)
    try:
        left = study(args.out, study_folder(args.size, args.folder), keys, args.size, jobs, args.minutes)
    except (ImportError, OSError, ValueError) as error:
        print(f'motion: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('motion: interrupted; the same command goes on', file=sys.stderr)
        return 130
    if left:
        print(f'{len(left)} runs are left; the same command goes on')
    print(f'tables: python -m benchmarks.motion.show {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
