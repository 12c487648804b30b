"""The tables of docs/motion.md."""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.markdown import table
from benchmarks.motion.movers import SWEEPS
from benchmarks.motion.paths import MOTIONS
from benchmarks.motion.results import (
    Measure,
    after,
    difference_of,
    direction,
    estimate,
    group,
    of_group,
    right,
    runs_of,
    swept,
)
from benchmarks.motion.rows import GROUPS, ROWS
from benchmarks.motion.statistics import Estimate
from benchmarks.motion.tasks import TASKS

__all__ = ['SECTIONS', 'render_claims', 'render_group', 'render_method', 'render_search']

_Results = dict[str, Any]
MAIN = ('plain', 'cme_sme', 'tim', 'cme', 'sme', 'all')

#: Top-1 on Something-Something V1 in the paper's tables 3 to 6, for 8 frames and ResNet-50.
PAPER = {
    'plain': 18.1, 'cme_sme': 43.5, 'tim': 46.1, 'all': 51.3, 'mem': 47.4, 'pem': 48.7, 'cme': 50.6, 'sme': 50.6,
    'deep': 51.3, 'all_all': 51.0, 'first_all': 51.2, 'first_first': 50.4, 'r1': 47.3, 'r4': 50.6, 'r16': 50.3, 'tsm': 45.6,
    'stm': 49.2, 'tdrl': 49.8}


def _show(found: Estimate | None, sign: bool = False) -> str:
    return found.show(sign) if found else ''


def _has(results: _Results, row: str, task: str = 'movers') -> bool:
    return bool(runs_of(results, row, task))


def render_group(results: _Results, name: str, task: str = 'movers', paper: bool = True) -> str:
    """A table of the paper: shares of right answers, the difference to the first row, and what is right of it."""
    base, *_ = rows = [row for row in GROUPS[name] if _has(results, row, task)] or ['']
    if base != GROUPS[name][0]:
        return 'not measured yet'
    paper = paper and any(row in PAPER for row in rows)
    head = ['', 'seeds', 'right, %', f'difference to {ROWS[base].label}, points', 'which motion, %',
            'its order, % (chance 50)', 'parameters, thousands']
    if task == 'playback':
        head[4:6] = ['which group, %', 'its order, % (chance 33 for the one that has three)']
    lines = []
    for row in rows:
        runs = runs_of(results, row, task)
        lines.append([
            ROWS[row].label, str(len(runs)), _show(estimate(results, row, right, task)),
            '' if row == base else _show(difference_of(results, row, base, right, task), True),
            _show(estimate(results, row, group, task)), _show(estimate(results, row, direction, task)),
            f'{next(iter(runs.values()))["parameters"] / 1000:.0f}'])
        if paper:
            lines[-1].append(f'{PAPER[row]}' if row in PAPER else '')
    return table([*head, *(['paper, Something-Something V1'] if paper else [])], lines)


class Claim(NamedTuple):
    """That one row is better than another."""
    where: str
    better: str
    worse: str


CLAIMS = [
    Claim('Table 4', 'cme_sme', 'plain'), Claim('Table 4', 'tim', 'cme_sme'), Claim('Table 4', 'all', 'tim'),
    Claim('Table 6', 'mem', 'tim'), Claim('Table 6', 'pem', 'mem'), Claim('Table 6', 'cme', 'pem'),
    Claim('Table 6', 'cme', 'tim'), Claim('Table 6', 'sme', 'tim'), Claim('Table 6', 'all', 'cme'),
    Claim('Table 6', 'all', 'sme'),
    Claim('Table 3', 'all', 'r1'), Claim('Table 3', 'all', 'r4'), Claim('Table 3', 'all', 'r16'),
    Claim('Table 5', 'deep', 'first_first'), Claim('Table 5', 'deep', 'all_all'), Claim('Table 7', 'all', 'stm'), Claim('Table 7', 'all', 'tdrl'),
    Claim('Table 7', 'mem', 'tsm'),
]
_PAPER_TEI = 47.4  # TIM + MEM is TEINet


def render_claims(results: _Results) -> str:
    """Each order of the paper, and whether it holds here. An interval that has zero in it decides nothing."""
    lines = []
    for where, better, worse in CLAIMS:
        found = difference_of(results, better, worse)
        if found:
            lines.append([
                where, f'{ROWS[better].label} over {ROWS[worse].label}', f'{PAPER[better] - PAPER[worse]:+.1f}',
                _show(found, True), f'**{found.verdict}**' if found.verdict != 'undecided' else found.verdict])
    return table(['paper', 'claim', 'paper, points', 'here, points', ''], lines)


def render_motions(results: _Results) -> str:
    """Where a row is right: by motion."""
    rows = [row for row in dict.fromkeys((*MAIN, 'only_cme', 'only_sme', 'mem', 'pem')) if _has(results, row)]
    lines = [[ROWS[row].label, *(f'{100 * found.mean:.1f}' if found else '' for found in (
        estimate(results, row, of_group(i)) for i in range(len(MOTIONS))))] for row in rows]
    return table(['right, %', *(f'{name}' for name in MOTIONS)], lines)


def render_gains(results: _Results) -> str:
    """What a layer adds to TIM, by motion."""
    rows = [row for row in ('mem', 'pem', 'cme', 'sme', 'all') if _has(results, row)]
    return table(['points over TIM', *MOTIONS], [
        [ROWS[row].label, *(_show(difference_of(results, row, 'tim', of_group(i)), True) for i in range(len(MOTIONS)))]
        for row in rows])


def render_sweep(results: _Results, knob: str) -> str:
    """Right answers by the value of a knob."""
    rows = [row for row in (*MAIN, 'mem', 'pem') if _has(results, row)]
    return table([f'right, %, at {knob}', *(f'{value:g}' for value in SWEEPS[knob])], [
        [ROWS[row].label, *(f'{100 * found.mean:.1f}' if found else '' for found in (
            estimate(results, row, swept(knob, value)) for value in SWEEPS[knob]))] for row in rows])


def render_sweep_gains(results: _Results) -> str:
    """What the layers add to TIM by the value of each knob."""
    rows = [row for row in ('cme', 'sme', 'all') if _has(results, row)]
    return table(['points over TIM, at', *(ROWS[row].label for row in rows)], [
        [f'{knob} {value:g}', *(_show(difference_of(results, row, 'tim', swept(knob, value)), True) for row in rows)]
        for knob, values in SWEEPS.items() for value in values])


def render_curve(results: _Results) -> str:
    """Right answers by the number of training clips."""
    rows = [row for row in (*MAIN, 'mem', 'pem') if _has(results, row)]
    if not rows:
        return 'not measured yet'
    seen = [point[0] for point in next(iter(runs_of(results, rows[0]).values()))['curve']]
    return table(['right, %, after training clips', *(f'{clips:,}' for clips in seen)], [
        [ROWS[row].label, *(_show(estimate(results, row, after(i))) for i in range(len(seen)))] for row in rows])


_MAPS = {'difference': "difference of the frames' pixels", 'sme': "SME's map, 1 - s",
         'cme_top': "CME's ten most opened channels", 'cme_bottom': "CME's ten least opened channels"}


def render_maps(results: _Results) -> str:
    """Figure 5 with a number."""
    lines = []
    for row in ('only_sme', 'only_cme', 'cme_sme', 'sme', 'cme', 'all'):
        runs = {seed: found for seed, found in runs_of(results, row).items() if found.get('maps')}
        for name, what in _MAPS.items():
            if runs and name in next(iter(runs.values()))['maps'] and (name != 'difference' or row == 'all'):
                lines.append([
                    '' if name == 'difference' else ROWS[row].label, what,
                    *(_show(estimate(results, row, _area(name, i))) for i in (0, 1))])
    return table(['', 'map', 'finds the actor, % (chance 50)', 'finds all things, %'], lines)


def _area(name: str, which: int) -> Measure:
    return lambda found: found['maps'][name][which]


def render_real(results: _Results, task: str) -> str:
    """The rows of Tables 4 and 6 on another task."""
    rows = [row for row in dict.fromkeys((*GROUPS['table4'], *GROUPS['table6'])) if _has(results, row, task)]
    if 'tim' not in rows:
        return 'not measured yet: `python -m benchmarks.motion --tasks ' + task + '`'
    levels = TASKS[task].levels
    lines = [[ROWS[row].label, str(len(runs_of(results, row, task))), _show(estimate(results, row, right, task)),
              '' if row == 'tim' else _show(difference_of(results, row, 'tim', right, task), True),
              _show(estimate(results, row, group, task)), _show(estimate(results, row, direction, task))]
             for row in rows]
    return table(['', 'seeds', 'right, %', 'difference to TIM, points', 'which, of those with the same frames, %',
                  'its order, %'], lines) + (
        f'\n\nWithout the order of the frames, at most {levels.frames:.0%} can be right.')


def render_method(results: _Results) -> str:
    """How it was measured."""
    settings = results['settings']
    _, _, side, recipe, stills, test, curve, *_ = settings
    updates, batch, rate, decay, *_ = recipe
    runs = results['runs']
    machines = sorted({found['machine'] for found in runs})
    images = [found['image'] for found in runs if ROWS[found['row']].image == 'resnet']
    hours = sum(found['seconds'] for found in runs) / 3600
    dates = sorted({found['date'] for found in runs})
    torch = ', '.join(sorted({found['torch'] for found in runs}))
    return (
        f'Training: {updates * batch:,} clips, {batch} an update, none twice; AdamW, weight decay {decay}, one cycle '
        f'to a learning rate of {rate:g}, for all rows. Before it, {stills[0] * stills[1]:,} single frames whose label '
        f'is the shape of the things ({min(images):.0%} to {max(images):.0%} right). Frames of {side}x{side} pixels. '
        f'Tests: {test:,} clips, for curves {curve}. {len(runs)} runs, {hours:.1f} hours of training on one core '
        f'each; {", ".join(machines)}; {dates[0]} to {dates[-1]}; torch {torch}. '
        f'Command: `{results["command"]}`.')


def render_search(results: _Results) -> str:
    """How batch and learning rate were chosen."""
    trials: dict[tuple[int, float], dict[int, float]] = {}
    for found in results['runs']:
        _, clips, _, both = found['curve'][-1]
        trials.setdefault((found['batch'], found['lr']), {})[found['seed']] = both / clips
    seeds = sorted({found['seed'] for found in results['runs']})
    head = ['clips of an update', 'largest learning rate', *(f'right, %, seed {seed}' for seed in seeds), 'mean']
    return table(head, [
        [f'{batch}', f'{rate:g}', *(f'{100 * shares[seed]:.1f}' for seed in seeds),
         f'{100 * sum(shares.values()) / len(shares):.1f}'] for (batch, rate), shares in sorted(trials.items())])


SECTIONS: dict[str, Callable[[_Results], str]] = {
    'motion-method': render_method,
    'motion-claims': render_claims,
    **{f'motion-{name}': partial(render_group, name=name) for name in GROUPS},
    'motion-motions': render_motions,
    'motion-gains': render_gains,
    'motion-curve': render_curve,
    **{f'motion-{knob}': partial(render_sweep, knob=knob) for knob in SWEEPS},
    'motion-sweep-gains': render_sweep_gains,
    'motion-maps': render_maps,
    **{f'motion-real-{name}': partial(render_real, task=name) for name in TASKS if name != 'movers'},
}
