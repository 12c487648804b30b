"""The tables of docs/motion.md."""
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from typing import Any

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
    paired,
    right,
    runs_of,
    swept,
)
from benchmarks.motion.rows import BASES, GROUPS, MAIN, ROWS
from benchmarks.motion.statistics import Estimate, mean
from benchmarks.motion.tasks import TASKS

__all__ = [
    'SECTIONS', 'claims', 'curved', 'render_claims', 'render_gates', 'render_group', 'render_method', 'render_search',
    'seed_names']

_Results = dict[str, Any]
CURVED = ('plain', 'cme_sme', 'tim', 'cme', 'sme', 'all', 'mem', 'pem')

#: Top-1 on Something-Something V1 in the paper's tables 3 to 6, for 8 frames and ResNet-50.
PAPER = {
    'plain': 18.1, 'cme_sme': 43.5, 'tim': 46.1, 'all': 51.3, 'mem': 47.4, 'pem': 48.7, 'cme': 50.6, 'sme': 50.6,
    'deep': 51.3, 'all_all': 51.0, 'first_all': 51.2, 'first_first': 50.4, 'r1': 47.3, 'r4': 50.6, 'r16': 50.3}


def _show(found: Estimate | None, sign: bool = False) -> str:
    return found.show(sign) if found else ''


def seed_names(seeds: Iterable[int]) -> str:
    """Numbers of seeds: what is beside each other in a table is only of the same ones."""
    found = sorted(seeds)
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f'{found[0]} to {found[-1]}'
    return ', '.join(map(str, found))


def _has(results: _Results, row: str, task: str = 'movers') -> bool:
    return bool(runs_of(results, row, task))


def render_group(results: _Results, name: str, task: str = 'movers') -> str:
    """Some rows: shares of right answers, differences, and what is right of an answer."""
    rows = [row for row in GROUPS[name] if _has(results, row, task)]
    missing = [row for row in GROUPS[name] if row not in rows]
    if GROUPS[name][0] in missing:
        return 'not measured yet'
    lines = _lines(results, {row: BASES[row] if BASES.get(row) in rows else rows[0] for row in rows}, task)
    if not lines:
        return _NO_SEED
    head = ['', 'seeds', 'right, %', 'difference, points', 'to', 'which motion, %', 'its order, % (chance 50)',
            'parameters, thousands']
    if task == 'movers' and any(row in PAPER for row in rows):
        head.append('paper, top-1, %')
        lines = [[*line, f'{PAPER[row]}' if row in PAPER else ''] for row, line in zip(rows, lines)]
    left = ', '.join(ROWS[row].label for row in missing)
    return table(head, lines) + (f'\n\nNot measured yet: {left}.' if missing else '')


_NO_SEED = 'not measured yet: no seed has all of these rows'


def _lines(results: _Results, bases: dict[str, str], task: str) -> list[list[str]]:
    """Of rows, each with what it is compared with, over the seeds that all of them have; none if there are none."""
    results = paired(results, bases, task)
    return [_line(results, row, base, task) for row, base in bases.items() if results['runs']]


def _line(results: _Results, row: str, base: str, task: str) -> list[str]:
    runs = runs_of(results, row, task)
    compared = ['', ''] if row == base else [
        _show(difference_of(results, row, base, right, task), True), ROWS[base].label]
    return [ROWS[row].label, seed_names(runs), _show(estimate(results, row, right, task)), *compared,
            _show(estimate(results, row, group, task)), _show(estimate(results, row, direction, task)),
            f'{next(iter(runs.values()))["parameters"] / 1000:.0f}']


_TABLES = {'table4': 'Table 4', 'table6': 'Table 6', 'table5': 'Table 5', 'table3': 'Table 3'}


def claims() -> list[tuple[str, str, str]]:
    """All orders of two rows in the paper's tables 3 to 6: where, the better row, the worse row."""
    found: dict[tuple[str, str], str] = {}
    for name, where in _TABLES.items():
        for pair in combinations(GROUPS[name], 2):
            better, worse = sorted(pair, key=PAPER.__getitem__, reverse=True)
            if PAPER[better] > PAPER[worse]:
                found.setdefault((better, worse), where)
    return [(where, *pair) for pair, where in found.items()]


def render_claims(results: _Results) -> str:
    """Each order of the paper, and whether it holds here. An interval that has zero in it decides nothing."""
    lines = []
    for where, better, worse in claims():
        found = difference_of(results, better, worse)
        if found:
            bold = '**' if found.verdict in ('holds', 'reversed') else ''
            lines.append([
                where, f'{ROWS[better].label} over {ROWS[worse].label}', f'{PAPER[better] - PAPER[worse]:+.1f}',
                _show(found, True), f'{bold}{found.verdict}{bold}'])
    return table(['paper', 'claim', 'paper, points', 'here, points', ''], lines)


def curved(results: _Results) -> tuple[list[str], _Results]:
    """The rows that curves are drawn of, as far as they were measured, and the results of their common seeds."""
    rows = [row for row in CURVED if _has(results, row)]
    return rows, paired(results, rows)


def _shares(results: _Results, head: str, measures: dict[str, Measure]) -> str:
    """Right answers of the rows of Tables 4 and 6 by something, without intervals."""
    rows, results = curved(results)
    if not results['runs']:
        return _NO_SEED
    lines = [[ROWS[row].label, *(f'{100 * found.mean:.1f}' if found else '' for found in (
        estimate(results, row, measure) for measure in measures.values()))] for row in rows]
    return table([head, *measures], lines)


def render_motions(results: _Results) -> str:
    """Where a row is right: by motion."""
    return _shares(results, 'right, %', {name: of_group(i) for i, name in enumerate(MOTIONS)})


def render_gains(results: _Results) -> str:
    """What a layer adds to TIM, by motion."""
    rows = [row for row in ('mem', 'pem', 'cme', 'sme', 'all') if _has(results, row)]
    return table(['points over TIM', *MOTIONS], [
        [ROWS[row].label, *(_show(difference_of(results, row, 'tim', of_group(i)), True) for i in range(len(MOTIONS)))]
        for row in rows])


def render_sweep(results: _Results, knob: str) -> str:
    """Right answers by the value of a knob."""
    return _shares(results, f'right, %, at {knob}', {f'{value:g}': swept(knob, value) for value in SWEEPS[knob]})


def render_sweep_gains(results: _Results) -> str:
    """What the layers add to TIM by the value of each knob."""
    rows = [row for row in ('cme', 'sme', 'all') if _has(results, row)]
    return table(['points over TIM, at', *(ROWS[row].label for row in rows)], [
        [f'{knob} {value:g}', *(_show(difference_of(results, row, 'tim', swept(knob, value)), True) for row in rows)]
        for knob, values in SWEEPS.items() for value in values])


def render_curve(results: _Results) -> str:
    """Right answers by the number of training clips."""
    rows, results = curved(results)
    if not results['runs']:
        return _NO_SEED
    seen = [point[0] for point in next(iter(runs_of(results, rows[0]).values()))['curve']]
    return table(['right, %, after training clips', *(f'{clips:,}' for clips in seen)], [
        [ROWS[row].label, *(_show(estimate(results, row, after(i))) for i in range(len(seen)))] for row in rows])


def render_order(results: _Results, task: str) -> str:
    """Which motion, and of those its order, by the number of training clips: TIM, and SME with and without its map."""
    rows = [row for row in GROUPS['mapless'] if _has(results, row, task)]
    results = paired(results, rows, task)
    lines, seen = [], []
    for row in rows if results['runs'] else ():
        curves = [found['curve'] for found in runs_of(results, row, task).values()]
        seen = [f'{points[0][0]:,}' for points in zip(*curves)]
        lines.append([ROWS[row].label, seed_names(runs_of(results, row, task)), *(
            f'{100 * mean([p[2] / p[1] for p in points]).mean:.0f}, '
            f'{100 * mean([p[3] / max(p[2], 1) for p in points]).mean:.0f}' for points in zip(*curves))])
    head = ['which motion, %, and its order, %, after training clips', 'seeds', *seen]
    return table(head, lines) if lines else _NO_SEED


_MAPS = {'difference': "difference of the frames' pixels", 'sme': "SME's map, 1 - s",
         'sme_input': 'what SME gets, the norm of x', 'sme_term': "what SME's convolution gets, the norm of x (1 - s)",
         'cme_top': "CME's ten most opened channels", 'cme_bottom': "CME's ten least opened channels"}


def render_maps(results: _Results) -> str:
    """Figure 5 with a number."""
    lines = []
    for row in ('only_sme', 'only_cme', 'cme_sme', 'sme', 'cme', 'all'):
        runs = {seed: found for seed, found in runs_of(results, row).items() if found.get('maps')}
        for name, what in _MAPS.items():
            having = {seed: found for seed, found in runs.items() if name in found['maps']}
            if having and (name != 'difference' or row == 'all'):
                lines.append([
                    '' if name == 'difference' else ROWS[row].label, what, seed_names(having),
                    *(_show(mean([found['maps'][name][i] for found in having.values()])) for i in (0, 1))])
    return table(['', 'map', 'seeds', 'finds the bar, % (chance 50)', 'finds all things, % (chance 50)'], lines)


def render_real(results: _Results, task: str) -> str:
    """The rows of Tables 4 and 6 on another task."""
    rows = [row for row in MAIN if _has(results, row, task)]
    if 'tim' not in rows:
        return (f'not measured yet: `python -m benchmarks.motion --tasks {task} '
                f'--out benchmarks/results/motion-cpu.json`')
    lines = _lines(results, dict.fromkeys(rows, 'tim'), task)
    if not lines:
        return _NO_SEED
    groups = TASKS[task].groups
    chance = max(groups.count(number) for number in groups)
    head = ['', 'seeds', 'right, %', 'difference, points', 'to', 'which of those that differ without order, %',
            f'its order, % (chance {100 // chance} where there are {chance})', 'parameters, thousands']
    return table(head, lines) + (
        f'\n\nWithout the order of the frames, at most {TASKS[task].levels.frames:.0%} can be right.')


def render_method(results: _Results) -> str:
    """How it was measured."""
    settings = results['settings']
    recipe, stills = settings['recipe'], settings['stills']
    runs = results['runs']
    images = [found['image'] for found in runs if ROWS[found['row']].image != 'untrained']
    hours = sum(found['seconds'] for found in runs) / 3600
    machines: dict[str, set[int]] = {}
    for found in runs:
        machines.setdefault(f'{found["machine"]}, torch {found["torch"]}', set()).add(found['seed'])
    where = '; '.join(f'seeds {seed_names(seeds)}: {name}' for name, seeds in machines.items())
    dates = sorted({found['date'] for found in runs})
    commands = ', '.join(f'`{each}`' for each in results.get('commands', [results['command']]))
    return (
        f'Training: {recipe["updates"] * recipe["batch"]:,} clips, {recipe["batch"]} an update, none twice (three '
        f'times as many in the rows of more clips); AdamW, weight decay {recipe["weight_decay"]}, one cycle to a '
        f'learning rate of {recipe["lr"]:g}, for all rows. Before it, {stills["updates"] * stills["batch"]:,} single '
        f'frames whose label is the shape of the things ({min(images):.0%} to {max(images):.0%} right). Frames of '
        f'{settings["side"]}x{settings["side"]} pixels. Tests: {settings["test"]:,} clips of each seed, for curves '
        f'{settings["curve"]}. {len(runs)} runs of all tasks, {hours:.1f} hours of training on one core each, '
        f'{" to ".join(dict.fromkeys((dates[0], dates[-1])))}; {where}. Commands: {commands}.')


def render_search(results: _Results) -> str:
    """How the learning rate was chosen."""
    trials: dict[tuple[int, float], dict[int, float]] = {}
    for found in results['trials']:
        _, clips, _, both = found['curve'][-1]
        trials.setdefault((found['batch'], found['lr']), {})[found['seed']] = both / clips
    seeds = sorted({found['seed'] for found in results['trials']})
    head = ['clips of an update', 'largest learning rate', *(f'right, %, seed {seed}' for seed in seeds), 'mean']
    return table(head, [
        [f'{batch}', f'{rate:g}', *(f'{100 * shares[seed]:.1f}' for seed in seeds),
         f'{100 * sum(shares.values()) / len(shares):.1f}'] for (batch, rate), shares in sorted(trials.items())])


def render_gates(results: _Results) -> str:
    """How much of what a CME sees, and of its gates, changes within a clip, and what they know of its class."""
    found: dict[str, list[_Results]] = {}
    for network in results['networks']:
        found.setdefault(network['row'], []).append(network)
    lines = []
    for row, networks in found.items():
        for i in range(len(networks[0]['layers'])):
            layers = [network['layers'][i] for network in networks]
            seeds = seed_names(network['seed'] for network in networks)
            lines.append([ROWS[row].label, f'{i + 1}', seeds, *(
                _show(mean([layer[name] for layer in layers]))
                for name in ('place', 'pooled', 'gates', 'pooled_decoded', 'gates_decoded'))])
    return table(['', 'CME', 'seeds', 'features at a place, %', 'their means over the frame, %', 'gates, %',
                  f'class from the means, % (chance {100 / results["classes"]:.1f})', 'class from the gates, %'], lines)


SECTIONS: dict[str, Callable[[_Results], str]] = {
    'motion-method': render_method,
    'motion-claims': render_claims,
    **{f'motion-{name}': partial(render_group, name=name) for name in GROUPS},
    **{f'motion-ego-{name}': partial(render_group, name=name, task='ego') for name in ('mapless', 'longer')},
    'motion-ego-order': partial(render_order, task='ego'),
    'motion-motions': render_motions,
    'motion-gains': render_gains,
    'motion-curve': render_curve,
    **{f'motion-{knob}': partial(render_sweep, knob=knob) for knob in SWEEPS},
    'motion-sweep-gains': render_sweep_gains,
    'motion-maps': render_maps,
    **{f'motion-real-{name}': partial(render_real, task=name) for name in TASKS if name != 'movers'},
}
