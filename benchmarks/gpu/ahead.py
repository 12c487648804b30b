"""Compiles networks before they are timed, in several processes beside the tests.

One network takes the compiler most of a minute. What it makes lies in a folder of caches, where the process that times
the network finds it in seconds. Nothing is timed here, so nobody minds that the device is shared.
"""
import argparse
import shlex
import sys
import time
import traceback

from benchmarks.machine import positive, read_json, result_file, write
from benchmarks.runtime.__main__ import parse
from benchmarks.runtime.candidate import Candidate
from benchmarks.runtime.measure import prepare
from benchmarks.runtime.results import environment
from benchmarks.runtime.workshop import Workshop


def compiled(arguments: list[list[str]]) -> list[Candidate]:
    """What the first passes of several runs of :mod:`benchmarks.runtime` compile, each once, and not captured."""
    found = []
    for argv in arguments:
        for study in parse(argv)[2]:
            for c in study.of_pass(0).candidates:
                if c.compiles:
                    found.append(c._replace(mode=c.mode.removesuffix('-graph')))
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='say there what is compiled')
    parser.add_argument('--seconds', type=float, required=True, help='begin nothing later')
    parser.add_argument('--share', type=positive, nargs=2, required=True, metavar=('I', 'N'), help='every N-th, from I')
    parser.add_argument('runs', nargs='+', help='arguments of benchmarks.runtime, one string for each run')
    args = parser.parse_args()
    limit, (share, shares) = time.monotonic() + args.seconds, args.share
    done = (read_json(args.out) or {'done': []})['done']
    todo = compiled([shlex.split(run) for run in args.runs])[share - 1::shares]
    for c in todo:
        name = f'{c.model}, {c.mode}, {c.setting.label}'
        if name in done:
            continue
        if time.monotonic() > limit:
            return 0
        try:
            prepare('cuda')
            shop = Workshop()
            shop.run(c)(shop.inputs(c)[0])
        except Exception:  # who times it will say so
            traceback.print_exc()
        done.append(name)
        write(args.out, {**environment(), 'complete': len(done) == len(todo), 'done': done})
    write(args.out, {**environment(), 'complete': True, 'done': done})
    return 0


if __name__ == '__main__':
    sys.exit(main())
