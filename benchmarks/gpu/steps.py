"""What a call runs, in the order of its worth, and for how long.

One call of nine minutes has to be enough for everything up to Table 7. Nobody has seen these times; they are estimates
for an H100 with 16 cores, in seconds:

================ ======= ========================================================================================
step             allowed estimate
================ ======= ========================================================================================
about                 25 10: a process takes 6 to import PyTorch and timm and 2 to 3 to reach the device
check, ahead,        130 1,200 tests, most of them less than .1 behind a compiler's .5, in 6 processes; beside them
warm                     32 networks at 30 to 40 in 4 processes of 3 threads each (34 to compile a narrow CMR for a
                         CPU was measured, 4.4 to find it in the caches), and 70 kernels at .7 in 2 processes. Who is
                         not ready is ended. What it made stays, and what it did not make is compiled where it is
                         timed.
small                 40 15 to 40: a process under compute-sanitizer is 10 to 50 times slower, the case takes .2
kernels               45 8 to start; 250 launches at 2 graphs and .03 each: 15
table-7              170 8 to start; 9 networks built, folded and checked at 4: 36; 40 candidates that compile nothing
                         at .5: 20; 18 networks from the caches at 4.5: 80; 64 candidates for 16 rounds of 8 ms: 8
table-7-bf16         110 8 to start; 8 networks at 3: 24; 32 candidates at .5: 16; 16 from the caches at 4: 64, of
                         which those of least worth may have to wait for the next call
training              60 8 to start; 4 networks' steps at 4: 16; 4 for 16 rounds of 50 ms: 4
rest                 all 9 studies, three passes: about 25 minutes
================ ======= ========================================================================================

Up to the bf16 half of Table 7 that is 520 of 540 seconds, if every step takes all that it is allowed, and 15 are kept
for the pages. What a step leaves goes to those behind it.
"""
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.process import Job
from benchmarks.machine import launcher, read_json
from benchmarks.runtime.__main__ import parse
from benchmarks.runtime.plan import MEASURED_FIRST
from benchmarks.runtime.results import read, unfinished

__all__ = ['ROOT', 'STEPS', 'Place', 'Step']

ROOT = Path(__file__).parents[2]  # where every command runs
START = 25.  # seconds of a run of benchmarks.runtime that are not its own: imports, the tables, the last candidate
FIRST_MODES = 'unfolded', 'graph', 'compiled-graph'
SHARES = 4


def said(path: object) -> object:
    """How a command names a file: results that are committed name no path of a machine."""
    return path.relative_to(ROOT) if isinstance(path, Path) and path.is_relative_to(ROOT) else path


class Place(NamedTuple):
    """Where results go, and how large what is measured is: a rehearsal has small frames."""
    results: Path
    size: int = 224
    frames: int = 8
    rounds: int = 15
    number: int | None = None   # of operators whose kernels are timed; None: all
    tests: tuple[str, ...] = ()  # instead of all tests of the kernels

    @property
    def folder(self) -> Path:
        """Of what no page shows, and what only this command writes."""
        return self.results / 'gpu'

    @property
    def caches(self) -> Path:
        """What compilers made. It is of no use on another machine."""
        return self.folder / 'caches'

    def runtime(self, kind: str) -> list[str]:
        """The arguments of a run of :mod:`benchmarks.runtime`."""
        return [*RUNS[kind], '--device', 'cuda', '--size', str(self.size), '--frames', str(self.frames), '--rounds',
                str(self.rounds), '--out', str(said(self.results / _file(kind)))]


class Step(NamedTuple):
    """Something that is measured or checked.

    Attributes:
        name: In the logs and on the screen.
        seconds: How long it may take in one call.
        jobs: The commands that run side by side, given so many seconds.
        left: Whether there is anything left to do.
    """
    name: str
    seconds: float
    jobs: Callable[[Place, float], Sequence[Job]]
    left: Callable[[Place], bool]


_TABLE_7 = ['--studies', 'latency', 'throughput', '--passes', '1']
RUNS = {
    'table-7': _TABLE_7,
    'table-7-bf16': [*_TABLE_7, '--dtype', 'bf16', '--models', *MEASURED_FIRST, '--modes', *FIRST_MODES],
    'training': ['--studies', 'training', '--passes', '1'],
    'rest': ['--passes', '3'],
}


def _file(kind: str) -> str:
    return 'runtime-cuda-bf16.json' if kind.endswith('bf16') else 'runtime-cuda.json'


def _module(name: str, *args: object) -> list[str]:
    return [*launcher(), '-m', f'benchmarks.{name}', *(str(said(arg)) for arg in args)]


def _incomplete(file: str) -> Callable[[Place], bool]:
    return lambda place: not (read_json(place.folder / file) or {}).get('complete')


def _about(place: Place, seconds: float) -> list[Job]:
    return [Job('about', _module('gpu.about', '--out', place.folder / 'about.json'), seconds)]


def _check(place: Place, seconds: float) -> list[Job]:
    """The tests, and beside them the compilers, which a later step would wait for."""
    jobs = []
    if _incomplete('check.json')(place):
        mine = max(1., seconds - START / 2)
        jobs.append(Job('check', _module(
            'gpu.check', '--out', place.folder / 'check.json', '--seconds', mine, *place.tests), seconds))
    if _runtime_left('table-7')(place) or _runtime_left('table-7-bf16')(place):
        runs = [shlex.join(place.runtime(kind)) for kind in ('table-7', 'table-7-bf16')]
        jobs += [
            Job(f'ahead-{share}', _module(
                'gpu.ahead', '--out', place.folder / f'ahead-{share}.json', '--seconds', max(1., seconds - START),
                '--share', share, SHARES, '--', *runs), seconds)
            for share in range(1, SHARES + 1) if _incomplete(f'ahead-{share}.json')(place)]
    if _incomplete('kernels.json')(place):
        jobs += [
            Job(f'warm-{dtype}', _module('gpu.kernels', '--dtype', dtype, *_kernels_of(place, seconds)), seconds)
            for dtype in ('fp16', 'bf16')]
    return jobs


def _kernels_of(place: Place, seconds: float) -> list[object]:
    number = [] if place.number is None else ['--number', place.number]
    return ['--seconds', max(5., seconds - START / 2), '--size', place.size, '--frames', place.frames, *number]


def _kernels(place: Place, seconds: float) -> list[Job]:
    return [Job('kernels', _module(
        'gpu.kernels', '--out', place.folder / 'kernels.json', *_kernels_of(place, seconds)), seconds)]


def _small(place: Place, seconds: float) -> list[Job]:
    return [Job('small', _module('gpu.small', '--out', place.folder / 'small.json'), seconds)]


def _runtime(kind: str) -> Callable[[Place, float], list[Job]]:
    def jobs(place: Place, seconds: float) -> list[Job]:
        minutes = max(1., seconds - START) / 60
        return [Job(kind, _module('runtime', *place.runtime(kind), '--minutes', f'{minutes:.2f}'), seconds)]
    return jobs


def _runtime_left(kind: str) -> Callable[[Place], bool]:
    def left(place: Place) -> bool:
        args, _, plan = parse(place.runtime(kind))
        units: list[dict[str, Any]] = read(args.out)['units'] if args.out.exists() else []
        return bool(unfinished(units, plan))
    return left


STEPS = (
    Step('about', 25, _about, lambda place: not (place.folder / 'about.json').exists()),
    Step('check', 130, _check, _incomplete('check.json')),
    Step('small', 40, _small, _incomplete('small.json')),
    Step('kernels', 45, _kernels, _incomplete('kernels.json')),
    Step('table-7', 170, _runtime('table-7'), _runtime_left('table-7')),
    Step('table-7-bf16', 110, _runtime('table-7-bf16'), _runtime_left('table-7-bf16')),
    Step('training', 60, _runtime('training'), _runtime_left('training')),
    Step('rest', 3600, _runtime('rest'), _runtime_left('rest')),
)
