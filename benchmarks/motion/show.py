"""Print the tables of a result file, as Markdown.

    python -m benchmarks.motion.show motion.json
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.motion.results import read
from benchmarks.motion.tables import SECTIONS

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='JSON file that python -m benchmarks.motion has written')
    args = parser.parse_args(argv)
    try:
        results = read(args.results)
    except ValueError as error:
        parser.error(f'argument results: {error}')
    if not results['runs']:
        parser.error(f'argument results: must have runs, got {str(args.results)!r}, which has none')
    for name, render in SECTIONS.items():
        text = render(results)
        if text.count('\n') != 1 and not text.startswith('not measured yet'):  # one break: a table without rows
            print(f'## {name.removeprefix("motion-")}\n\n{text}\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
