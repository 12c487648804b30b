"""Result files: units of entries, one for each pass of each study; written, read, gone on with."""
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import describe, write
from benchmarks.runtime import interval
from benchmarks.runtime.candidate import Candidate, Setting
from benchmarks.runtime.models import MODELS, Model
from benchmarks.runtime.plan import STUDIES, Study

__all__ = [
    'NO_TIME', 'Measured', 'Results', 'candidates_of', 'covers', 'environment', 'everything', 'find', 'measured',
    'origin', 'ratio', 'read', 'resume', 'save', 'unfinished']

NO_TIME = 'no time left'  # why an entry is missing that another run may have

Results = dict[str, Any]
_IDENTITY = ('machine', 'gpu', 'threads', 'versions', 'base', 'rounds', 'quick')
_HOST_BOUND = .9  # the host needs so much of the time for the launches alone


# Files

def environment() -> dict[str, Any]:
    """As :func:`benchmarks.machine.describe`, with what else a time depends on."""
    found = {**describe(*['triton'] * (find_spec('triton') is not None)), 'threads': torch.get_num_threads()}
    if torch.cuda.is_available():
        found['versions'].update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    return found


def origin(results: Results) -> str:
    """What :func:`environment` put into a result, in a line."""
    versions = results['versions']
    packages = ', '.join(f'{name} {versions[name]}' for name in ('torch', 'triton') if name in versions)
    where = f'{results["machine"]}, {results["threads"]} threads'
    if results['device'] == 'cuda':
        where = f'{results["gpu"]}, host {where}'
    smoke = 'smoke run, no numbers to quote; ' if results['quick'] else ''
    return f'{smoke}{results["date"][:10]}, {where}, {packages}: `{results["command"]}`'


def read(path: Path) -> Results:
    """A result file of this benchmark.

    Raises:
        OSError: It can't be read.
        ValueError: It is something else.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(results, dict) or not results.keys() >= {*_IDENTITY, 'units'}:
        raise ValueError(f'{path} is no result file of benchmarks.runtime')
    return results


def resume(path: Path, head: dict[str, Any], plan: list[Study]) -> list[dict[str, Any]]:
    """Units of an unfinished file. Numbers of two machines are never mixed, and none are overwritten.

    Raises:
        OSError, ValueError: It can't be read, it was measured elsewhere or otherwise, or a study has other candidates
            there: what was not interleaved is not put side by side.
    """
    old = read(path)
    otherwise = 'choose another file, or --fresh to overwrite it'
    for key in _IDENTITY:
        if old[key] != head[key]:
            raise ValueError(
                f'{path} has {key} {json.dumps(old[key])}, this run {json.dumps(head[key])}: {otherwise}')
    planned = {study.name: study for study in plan}
    for unit in old['units']:
        study = planned.get(unit['study'])
        if study and not covers(unit, study) and not candidates_of(unit) <= set(study.candidates):
            raise ValueError(f'{path} has other models or modes of the study {study.name}: {otherwise}')
    head['date'] = old['date']
    if head['command'] not in old['command'].split(' && '):  # all that made the file
        head['command'] = f'{old["command"]} && {head["command"]}'
    else:
        head['command'] = old['command']
    units: list[dict[str, Any]] = old['units']
    return units


def save(path: Path, head: dict[str, Any], units: list[dict[str, Any]]) -> None:
    """The result file, a line for each unit."""
    write(path, {**head, 'units': units}, lines='units')


def candidates_of(unit: dict[str, Any] | None) -> set[Candidate]:
    """What a unit has results of; that a candidate failed is one, too."""
    return {Candidate.of(e) for e in (unit or {'entries': ()})['entries'] if e.get('missing') != NO_TIME}


def covers(unit: dict[str, Any] | None, study: Study) -> bool:
    """Whether a finished unit has all that is wanted of it."""
    return unit is not None and candidates_of(unit).issuperset(study.of_pass(unit['pass']).candidates)


def unfinished(units: Iterable[dict[str, Any]], plan: Iterable[Study]) -> list[tuple[Study, int]]:
    """Passes of studies that lack something: the first of all studies, then the second, ..."""
    finished = {(unit['study'], unit['pass']): unit for unit in units}
    plan = list(plan)
    return [
        (study, number) for number in range(max(study.passes for study in plan)) for study in plan
        if number < study.passes and not covers(finished.get((study.name, number)), study)]


# What is in them

class Measured(NamedTuple):
    """A candidate over all passes. ``time`` and ``host`` are seconds, by pass and round."""
    model: str
    mode: str
    setting: Setting
    width: float
    training: bool
    time: dict[int, list[float]]
    host: dict[int, list[float]]
    error: float | None = None
    memory: int | None = None  # bytes, at most, beyond what was in use before the call
    held: int | None = None    # bytes of weights and what an optimizer keeps
    missing: str | None = None

    @property
    def row(self) -> Model:
        return MODELS[self.model]

    def summary(self) -> dict[str, float] | None:
        """Median time with its interval, in seconds."""
        return interval.bootstrap(list(self.time.values())) if self.time else None

    def median(self) -> float | None:
        """Median time, in seconds."""
        return statistics.median(itertools.chain(*self.time.values())) if self.time else None

    def host_time(self) -> float | None:
        """Seconds that the host takes for the launches, median; None on a CPU."""
        return statistics.median(itertools.chain(*self.host.values())) if self.host else None

    def host_bound(self) -> bool:
        """Whether a GPU waits for its host."""
        host, time = self.host_time(), self.median()
        return host is not None and time is not None and host > _HOST_BOUND * time


def measured(results: Results, study: str) -> list[Measured]:
    """The candidates of a study, in the order in which they were planned."""
    found: dict[Candidate, Measured] = {}
    for unit in results['units']:
        if unit['study'] != study:
            continue
        for entry in unit['entries']:
            c = Candidate.of(entry)
            m = found.get(c) or Measured(c.model, c.mode, c.setting, c.width, c.training, {}, {})
            m = m._replace(
                error=entry.get('error', m.error), memory=entry.get('memory_bytes', m.memory),
                held=entry.get('held_bytes', m.held), missing=entry.get('missing', m.missing))
            if 'samples' in entry:
                m.time[unit['pass']] = entry['samples']
            if 'host' in entry:
                m.host[unit['pass']] = entry['host']
            found[c] = m
    return list(found.values())


def everything(results: Results) -> list[Measured]:
    """The candidates of all studies."""
    return [m for study in STUDIES for m in measured(results, study)]


def find(ms: Iterable[Measured], like: Measured | None = None, **fields: Any) -> Measured | None:
    """The one of these fields, and of the setting, mode and so on of another."""
    if like is not None:
        keys = ('model', 'mode', 'setting', 'width', 'training')
        fields = {**{key: getattr(like, key) for key in keys}, **fields}
    return next((m for m in ms if all(getattr(m, key) == value for key, value in fields.items())), None)


def ratio(m: Measured | None, base: Measured | None) -> dict[str, float] | None:
    """Ratio of times in the passes that both have, with its interval."""
    both: Sequence[int] = sorted(m.time.keys() & base.time.keys()) if m and base else []
    if m is None or base is None or not both:
        return None
    return interval.interval([m.time[i] for i in both], [base.time[i] for i in both])
