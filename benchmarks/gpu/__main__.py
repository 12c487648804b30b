"""Everything that a GPU has to be asked, in one command that may be cut off at any time.

    python -m benchmarks.gpu                # nine minutes of it; run it again, and it goes on with what is missing

In this order: machine and versions; the kernels' tests, and a small case under compute-sanitizer; each kernel beside
its floor; Table 7 and what the goals are judged by, in fp16 and bf16; a training step; all else that
:mod:`benchmarks.runtime` has. Each step is a process of its own that ends by itself or is ended. A step that fails or
hangs costs the others nothing, and is tried again behind those that no call has tried. At the end the pages are written
anew. :mod:`.steps` has the time of each step.
"""
import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu.process import GRACE, Outcome, run
from benchmarks.gpu.steps import ROOT, STEPS, Place, Step
from benchmarks.machine import positive, read_json, write

RESULTS = ROOT / 'benchmarks/results'
PAGES = 15.     # seconds to write the pages
LEAST = 20.     # seconds that a step is begun for
ATTEMPTS = 3    # failures and endings of a step that did all that it could


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=9., help='of one call; default: %(default)g')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the results; default: benchmarks/results')
    parser.add_argument('--steps', nargs='+', choices=[step.name for step in STEPS], metavar='STEP',
                        default=[step.name for step in STEPS], help=f'only these: {", ".join(s.name for s in STEPS)}')
    parser.add_argument('--size', type=positive, default=224, help='height and width of frames; default: %(default)s')
    parser.add_argument('--frames', type=positive, default=8, help='of a clip; default: %(default)s')
    parser.add_argument('--rounds', type=positive, default=15, help='samples of a candidate; default: %(default)s')
    parser.add_argument('--number', type=positive, help='so many operators only, of those whose kernels are timed')
    parser.add_argument('--tests', nargs='+', default=[], metavar='TEST', help='these instead of all of the kernels')
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f'argument --minutes: must be more than 0, got {args.minutes:g}')
    if args.size < 64:
        parser.error(f'argument --size: must be 64 or more, got {args.size}')
    if not args.out.is_dir():
        parser.error(f'argument --out: there is no folder {str(args.out)!r}')
    if not torch.cuda.is_available():
        parser.error('there is no CUDA device here, and nothing else to measure; docs/performance.md has a rehearsal')
    if machine.REHEARSAL and args.out.resolve().is_relative_to(RESULTS):
        parser.error(f'argument --out: a rehearsal measures nothing, and may not write to {RESULTS.name}')
    return args


def main() -> int:
    start = time.monotonic()
    args = parse()
    ends = start + 60 * args.minutes
    place = Place(args.out.resolve(), args.size, args.frames, args.rounds, args.number, tuple(args.tests))
    os.chdir(ROOT)
    for folder in (place.folder / 'logs', place.caches):
        folder.mkdir(parents=True, exist_ok=True)
    (place.folder / '.gitignore').write_text('.gitignore\ncaches/\nlogs/\nahead-*\n*.jsonl\n*.done\n*.part\n')
    state_file = place.folder / 'state.json'
    state: dict[str, dict[str, Any]] = read_json(state_file) or {}
    steps = [step for step in STEPS if step.name in args.steps]
    tried = {name for name, found in state.items() if found['how'] != 'ok'}
    for step in sorted(steps, key=lambda step: step.name in tried):  # what went wrong before comes last
        if not step.left(place):
            continue
        before = state.get(step.name, {'attempts': 0})
        if before['attempts'] >= ATTEMPTS:
            print(f'{step.name}: it went wrong {ATTEMPTS} times; remove {state_file.name} to try again', flush=True)
            continue
        seconds = min(step.seconds, ends - PAGES - time.monotonic())
        if seconds < min(LEAST, step.seconds):
            break
        found = outcome(step, place, seconds)
        left = step.left(place)
        state[step.name] = {
            'how': found.how, 'status': found.status, 'seconds': round(found.seconds, 1), 'left': left,
            'attempts': before['attempts'] + int(found.how != 'ok' and left)}
        write(state_file, state)
        print(f'{step.name}: {found.how} in {found.seconds:.0f} s{", more is left" * left}', flush=True)
    pages(place)
    return report(steps, place, state)


def outcome(step: Step, place: Place, seconds: float) -> Outcome:
    """Run a step; of several processes the first is the step's own, and the others help."""
    jobs = step.jobs(place, max(1., seconds - GRACE))
    variables = {'TORCHINDUCTOR_CACHE_DIR': str(place.caches / 'inductor'),
                 'TRITON_CACHE_DIR': str(place.caches / 'triton'), 'PYTHONUNBUFFERED': '1',
                 machine.COMMAND: 'python -m benchmarks.gpu'}
    if len(jobs) > 1:
        variables.update(TORCHINDUCTOR_COMPILE_THREADS='3', OMP_NUM_THREADS='2')
    return run(jobs, place.folder / 'logs', ROOT, variables)[jobs[0].name]


def pages(place: Place) -> None:
    """Write the pages anew from what is there, if it is where they look for it."""
    if place.results != RESULTS:
        print(f'the pages show {RESULTS.relative_to(ROOT)} alone, and were left as they are', flush=True)
        return
    subprocess.run([sys.executable, '-m', 'benchmarks.report'], cwd=ROOT, check=False)


def report(steps: Sequence[Step], place: Place, state: dict[str, dict[str, Any]]) -> int:
    """Say what is left and what went wrong; the status of the command."""
    left = [step.name for step in steps if step.left(place)]
    print(f'left: {", ".join(left)}; run the command again' if left else 'nothing is left to do')
    wrong = [name for name, found in state.items() if found['how'] != 'ok']
    failed = (read_json(place.folder / 'check.json') or {}).get('failed')
    sanitizer = read_json(place.folder / 'small.json')
    if sanitizer:
        print(f'compute-sanitizer: {sanitizer["outcome"]}', file=sys.stderr)
    if failed:
        print(f'{failed} tests failed: see check.json', file=sys.stderr)
    if wrong:
        print(f'see {place.folder.name}/logs for {", ".join(wrong)}', file=sys.stderr)
    return int(bool(wrong or failed))


if __name__ == '__main__':
    sys.exit(main())
