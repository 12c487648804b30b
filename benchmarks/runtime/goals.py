"""The goals: limits on ratios, and what was measured of them."""
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.markdown import table
from benchmarks.runtime import interval
from benchmarks.runtime.candidate import MODES, ON
from benchmarks.runtime.models import MODELS
from benchmarks.runtime.results import NO_TIME, Measured, Results, everything, ratio

__all__ = ['GOALS', 'Goal', 'Verdict', 'best_baseline', 'judge', 'render']


class Goal(NamedTuple):
    """A limit on a ratio. Where several modes are named, the fastest of them counts, on both sides."""
    name: str
    device: str
    batch: int
    modes: Sequence[str]        # of `cmr`
    base: str
    base_modes: Sequence[str]
    limit: float
    what: str = 'inference'     # or 'training', 'memory'


_GRAPHS = ('graph', 'compiled-graph')
_FUSED = {device: tuple(mode for mode in modes if MODES[mode].path == 'auto') for device, modes in ON.items()}
_COMPILED_REFERENCE = ('compiled-reference', 'compiled-reference-graph')
GOALS = (
    Goal('latency as a CUDA graph, to the baseline in its best mode', 'cuda', 1, _GRAPHS, 'tsn', _FUSED['cuda'], 1.3),
    Goal('time in its best mode, to the baseline in its best mode', 'cuda', 8, _FUSED['cuda'], 'tsn', _FUSED['cuda'],
         1.25),
    Goal('fused to reference, as built', 'cuda', 1, ['unfolded'], 'cmr', ['reference'], .5),
    Goal('fused to reference, as built', 'cuda', 8, ['unfolded'], 'cmr', ['reference'], .5),
    Goal('fused in its best mode to the compiled reference', 'cuda', 1, _FUSED['cuda'], 'cmr', _COMPILED_REFERENCE, 1),
    Goal('fused in its best mode to the compiled reference', 'cuda', 8, _FUSED['cuda'], 'cmr', _COMPILED_REFERENCE, 1),
    Goal('fused to the released variant on the reference path', 'cuda', 8, ['unfolded'], 'released', ['reference'], .4),
    Goal('training step, to the baseline', 'cuda', 8, ['unfolded'], 'tsn', ['unfolded'], 1.4, 'training'),
    Goal('peak memory of a training step, to the baseline', 'cuda', 8, ['unfolded'], 'tsn', ['unfolded'], 1.25,
         'memory'),
    Goal('folded, to the baseline in its best mode', 'cpu', 1, ['folded'], 'tsn', _FUSED['cpu'], 1.3),
)


class Verdict(NamedTuple):
    goal: Goal
    dtype: str = ''
    of: str = ''                             # what was divided by what
    ratio: dict[str, float] | None = None    # None: not measured
    reached: bool | None = None


def best(ms: Iterable[Measured], model: str, modes: Sequence[str]) -> Measured | None:
    """The fastest of a network's modes that was measured."""
    found = [(m.median(), m) for m in ms if m.model == model and m.mode in modes]
    timed = [(median, m) for median, m in found if median is not None]
    return min(timed, key=lambda pair: pair[0], default=(0, None))[1]


def judge(results: Sequence[Results]) -> list[Verdict]:
    """Every goal with what was measured, in the files of all devices."""
    verdicts = []
    for goal in GOALS:
        ms: list[Measured] = []
        for file in results:
            base = file['base']
            ms += [
                m for m in everything(file) if m.training == (goal.what != 'inference') and m.width == 1
                and m.setting._asdict() == {**base, 'device': goal.device, 'batch': goal.batch}]
        m, other = best(ms, 'cmr', goal.modes), best(ms, goal.base, goal.base_modes)
        known = {m.mode for m in ms if m.model == goal.base and (m.time or m.missing not in (None, NO_TIME))}
        found = ratio(m, other) if known.issuperset(goal.base_modes) else None  # else nobody knows the best of them
        if m and other and found and goal.what == 'memory':
            found = _memory(m, other)
        if m and other and found:
            of = f'{MODELS[m.model].label}, {m.mode} / {MODELS[other.model].label}, {other.mode}'
            verdicts.append(Verdict(goal, m.setting.dtype, of, found, found['median'] <= goal.limit))
        else:
            verdicts.append(Verdict(goal))
    return verdicts


def _memory(m: Measured, base: Measured) -> dict[str, float] | None:
    """Ratio of all memory in use, weights and the optimizer's state among it. It does not vary."""
    if m.memory is None or base.memory is None or m.held is None or base.held is None:
        return None
    return interval.bootstrap([[(m.memory + m.held) / (base.memory + base.held)]])


def render(results: Sequence[Results]) -> str:
    """The goals as Markdown, the measured ratio beside each."""
    rows = []
    for goal, dtype, of, found, reached in judge(results):
        where = ', '.join(filter(None, [goal.device, dtype, f'batch {goal.batch}']))
        measured = [interval.show(found), 'yes' if reached else 'no', of] if found else ['not measured yet', '', '']
        rows.append([goal.name, where, f'<= {goal.limit:g}', *measured])
    return table(['goal', 'where', 'limit', 'measured ratio', 'reached', 'of'], rows)


def best_baseline(ms: Iterable[Measured], like: Measured) -> Measured | None:
    """The baseline in its best mode, in a candidate's setting."""
    return best((m for m in ms if m.setting == like.setting), 'tsn', _FUSED[like.setting.device])
