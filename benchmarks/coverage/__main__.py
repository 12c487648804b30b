"""Try ``adapt`` on every network of timm, and on those of torchvision, transformers and open_clip.

    python -m benchmarks.coverage --out benchmarks/results/coverage.json     # hours; goes on where it stopped
    python -m benchmarks.coverage --only timm --device meta --names 'vit_*' --journal vit.jsonl

What was found is appended to the journal, one line for each network, so a run that was stopped goes on. Networks of
timm with the same modules, but for widths and depths, have one representative that is measured; the others take its
verdict. A network that has a line in the journal is not tried again.
"""
import argparse
import fnmatch
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.coverage.check import check
from benchmarks.coverage.others import PACKAGES, installed, networks
from benchmarks.coverage.summary import summary
from benchmarks.coverage.timm_names import build, families, sizes, structure
from benchmarks.coverage.values import check_values
from benchmarks.machine import describe, output_file, positive, result_file, write

_Line = dict[str, Any]


class TooLong(BaseException):
    """No Exception, which the package could take for a network that does not run."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise a TooLong after so many seconds, where the system has such an alarm."""
    def ring(*_: Any) -> None:
        raise TooLong(f'it took longer than {seconds} s')

    if not hasattr(signal, 'SIGALRM'):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Journal:
    """What was found so far, a line for each network."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[_Line] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]
        self.done = {(line['package'], line['device'], line['name']) for line in self.lines}

    def try_one(self, package: str, device: str, name: str, seconds: int, measure: Callable[[], _Line],
                **more: Any) -> None:
        """Measure a network, unless it was. What it raises is its result."""
        if (package, device, name) in self.done:
            return
        start = time.perf_counter()
        try:
            with limit(seconds):
                found = measure()
        except (Exception, TooLong) as error:
            found = {'verdict': 'not built', 'reason': f'{type(error).__name__}: {" ".join(str(error).split())[:240]}'}
        line = {'package': package, 'device': device, 'name': name, **more, **found,
                'seconds': round(time.perf_counter() - start, 1)}
        self.lines.append(line)
        self.done.add((package, device, name))
        with self.path.open('a') as file:
            file.write(json.dumps(line) + '\n')
        print(f'{len(self.lines):>5}  {package} {device} {name}: {found["verdict"]}', file=sys.stderr, flush=True)


def sweep_meta(journal: Journal, wanted: Callable[[str], bool], seconds: int) -> None:
    """All names of timm, without values."""
    seen = {line['structure']: line['name'] for line in journal.lines
            if line['device'] == 'meta' and 'structure' in line and 'as' not in line}

    def measure(name: str) -> _Line:
        model = build(name)
        same = structure(model)
        origin = {'structure': same, 'parameters': sum(p.numel() for p in model.parameters())}
        if same in seen:
            return {**origin, 'as': seen[same], 'verdict': 'as'}
        found = check(model, None, sizes(model))
        seen[same] = name
        return {**origin, **found}

    order = [(number, family, name) for family, names in families().items() for number, name in enumerate(names)]
    for _, family, name in sorted(order):  # all families early
        if wanted(name):
            journal.try_one('timm', 'meta', name, seconds, partial(measure, name), family=family)


def sweep_values(journal: Journal, wanted: Callable[[str], bool], seconds: int) -> None:
    """The smallest network of each family of timm, with values."""
    size = {line['name']: line['parameters'] for line in journal.lines
            if line['package'] == 'timm' and line['device'] == 'meta' and 'parameters' in line}
    for family, names in families().items():
        known = [name for name in names if wanted(name)]
        if known:
            name = min(known, key=lambda name: size.get(name, float('inf')))
            journal.try_one('timm', 'cpu', name, seconds, partial(check_values, name), family=family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', nargs='+', default=['*'], metavar='PATTERN', help='names of networks, with * and ?')
    parser.add_argument('--only', choices=['timm', *PACKAGES], help='the networks of one package')
    parser.add_argument('--device', choices=['meta', 'cpu'], help='timm without values, or all packages with values')
    parser.add_argument('--journal', type=output_file, default=Path('coverage.jsonl'), help='what was found so far')
    parser.add_argument('--seconds', type=positive, default=300, help='the most for one network')
    parser.add_argument('--out', type=result_file, help='write the result there, as JSON')
    args = parser.parse_args()
    journal = Journal(args.journal)

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in args.names)

    if args.only in (None, 'timm'):
        if args.device in (None, 'meta'):
            sweep_meta(journal, wanted, args.seconds)
        if args.device in (None, 'cpu'):
            sweep_values(journal, wanted, args.seconds)
    for package in PACKAGES if args.device in (None, 'cpu') else ():
        if args.only in (None, package):
            for name, measure in networks(package).items():
                if wanted(name):
                    journal.try_one(package, 'cpu', name, args.seconds, measure)
    results = summary(journal.lines)
    print(json.dumps(results['timm']['total']))
    if args.out:
        write(args.out, {**describe(*installed()), **results})


if __name__ == '__main__':
    main()
