"""Train networks with and without the layers on tasks of motion, and compare them.

    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json                    # all rows, see --seeds
    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json --groups table4    # the rows of a table
    python -m benchmarks.motion --out benchmarks/results/motion-cpu.json --seeds 5 6        # other seeds
    python -m benchmarks.motion --out benchmarks/results/motion-gpu.json --size gpu --minutes 8.5

The same command goes on where it was interrupted. A run (a row and a seed) takes one thread; --jobs runs are side by
side. Needs the extra [motion].
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import positive, result_file
from benchmarks.motion.rows import GROUPS, MAIN, ROWS
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import study
from benchmarks.motion.tasks import TASKS

SEEDS = 5  # of the main rows on the task movers


def _rows(groups: Sequence[str] | None, task: str) -> Sequence[str]:
    if not groups and task != 'movers':
        return MAIN
    return list(dict.fromkeys(row for group in groups or GROUPS for row in GROUPS[group]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file; runs that it has are not repeated')
    parser.add_argument('--folder', type=Path, help='for networks; by default, motion-study-SIZE')
    parser.add_argument('--size', choices=list(SIZES), default='cpu', help='how large; default: %(default)s')
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=['movers'], help='default: movers')
    parser.add_argument('--groups', nargs='+', choices=list(GROUPS), metavar='GROUP',
                        help=f'rows of these tables, of {", ".join(GROUPS)}; default: all of movers, table4 and table6 '
                             'of other tasks')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), metavar='ROW',
                        help=f'only these, of {", ".join(ROWS)}')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='SEED',
                        help='all runs of a seed are of one kind of machine; default: 0 to 4 for the rows of Tables '
                             '4 and 6 on movers, 0 for the others, under three hours on two cores')
    parser.add_argument('--jobs', type=positive, help='runs side by side; default: the CPU cores, one on a GPU')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no run that would end later')
    args = parser.parse_args(argv)
    if args.seeds and min(args.seeds) < 0:
        parser.error(f'argument --seeds: must be 0 or more, got {min(args.seeds)}')
    keys = [(task, row, seed) for seed in args.seeds or range(SEEDS) for task in args.tasks
            for row in args.rows or _rows(args.groups, task)
            if args.seeds or seed < (SEEDS if task == 'movers' and row in MAIN else 1)]
    jobs = args.jobs or (os.cpu_count() or 1 if SIZES[args.size].device == 'cpu' else 1)
    try:
        left = study(
            args.out, args.folder or Path(f'motion-study-{args.size}'), keys, args.size, jobs, args.minutes)
    except (ImportError, OSError, ValueError) as error:
        print(f'motion: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('motion: interrupted; the same command goes on', file=sys.stderr)
        return 130
    if left:
        print(f'{len(left)} runs are left; the same command goes on')
    return 0


if __name__ == '__main__':
    sys.exit(main())
