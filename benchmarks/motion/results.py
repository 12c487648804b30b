"""What a result file says, by row and seed."""
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import results_at
from benchmarks.motion.statistics import Estimate, difference, mean
from benchmarks.motion.task import counts
from benchmarks.motion.tasks import TASKS

__all__ = [
    'KEYS', 'Measure', 'Runs', 'after', 'difference_of', 'direction', 'estimate', 'group', 'of_group', 'paired', 'read',
    'right', 'runs_of', 'swept']

Runs = dict[int, dict[str, Any]]  # by seed
Measure = Callable[[dict[str, Any]], float]
KEYS = ('size', 'settings', 'runs')  # of a study's file


def read(path: Path) -> dict[str, Any]:
    """The result file of a study.

    Raises:
        ValueError: There is none, or another file.
    """
    found = results_at(path, *KEYS)
    if found is None:
        raise ValueError(f'must be a result file, got {str(path)!r}, which is not there or empty')
    return found


def runs_of(results: dict[str, Any], row: str, task: str = 'movers') -> Runs:
    """The runs of a row."""
    return {found['seed']: found for found in results['runs'] if (found['row'], found['task']) == (row, task)}


def paired(results: dict[str, Any], rows: Iterable[str], task: str = 'movers') -> dict[str, Any]:
    """The results of the seeds that all of some rows have, so that their means are of the same seeds."""
    of_rows = [set(runs_of(results, row, task)) for row in rows]
    seeds = set.intersection(*of_rows) if of_rows else set()
    return {**results, 'runs': [found for found in results['runs'] if found['seed'] in seeds]}


def _counts(found: dict[str, Any]) -> list[int]:
    return counts(found['confusion'], TASKS[found['task']].groups)


def right(found: dict[str, Any]) -> float:
    """Share of clips whose class is right."""
    clips, _, both = _counts(found)
    return both / clips


def group(found: dict[str, Any]) -> float:
    """Share of clips whose group is right: the motion, played either way."""
    clips, motion, _ = _counts(found)
    return motion / clips


def direction(found: dict[str, Any]) -> float:
    """Share of clips whose order is right, of those whose group is, but for groups of one class, where it always is."""
    table, groups = found['confusion'], TASKS[found['task']].groups
    ordered = [i for i, number in enumerate(groups) if groups.count(number) > 1]
    both = sum(table[i][i] for i in ordered)
    motion = sum(table[i][j] for i in ordered for j in ordered if groups[i] == groups[j])
    share: float = both / max(motion, 1)
    return share


def of_group(number: int) -> Measure:
    """Share of right classes, of the clips of one group."""
    def measure(found: dict[str, Any]) -> float:
        table, groups = found['confusion'], TASKS[found['task']].groups
        mine = [i for i, g in enumerate(groups) if g == number]
        share: float = sum(table[i][i] for i in mine) / sum(sum(table[i]) for i in mine)
        return share
    return measure


def swept(knob: str, value: float) -> Measure:
    """Share of right classes with a knob at a value."""
    def measure(found: dict[str, Any]) -> float:
        _, clips, _, both = next(point for point in found['sweeps'][knob] if point[0] == value)
        share: float = both / clips
        return share
    return measure


def after(point: int) -> Measure:
    """Share of right classes at a point of the learning curve."""
    def measure(found: dict[str, Any]) -> float:
        _, clips, _, both = found['curve'][point]
        share: float = both / clips
        return share
    return measure


def estimate(results: dict[str, Any], row: str, measure: Measure = right, task: str = 'movers') -> Estimate | None:
    """Mean over seeds; None without runs."""
    runs = runs_of(results, row, task)
    return mean([measure(found) for found in runs.values()]) if runs else None


def difference_of(
        results: dict[str, Any], row: str, base: str, measure: Measure = right, task: str = 'movers',
) -> Estimate | None:
    """Row less base, paired by seeds; None without common seeds."""
    pair = [{seed: measure(found) for seed, found in runs_of(results, name, task).items()} for name in (row, base)]
    return difference(*pair)
