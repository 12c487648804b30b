"""The benchmarks' tables show what was measured: ratios, goals, floors, exponents, comparisons, the plot."""
import re

import pytest
from benchmark_results import BASE, cells, entry, missing, results

from benchmarks.plots import stale
from benchmarks.runtime import goals, operators, plan, plot, tables
from benchmarks.runtime.compare import compare
from benchmarks.runtime.results import NO_TIME, measured, ratio

EIGHT = BASE._replace(batch=8)


def unit(study, *entries, number=0):
    return {'study': study, 'pass': number, 'date': '', 'entries': list(entries)}


def rows_by(text, *keys):
    rows, head = cells(text)
    found = [dict(zip(head, row)) for row in rows]
    return {tuple(row[key] for key in keys): row for row in found}


# Networks

def test_table_7_has_our_ratios_beside_the_papers():
    r = results(
        [entry('tsn', samples=[1., 1.]), entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.])],
        [entry('tsn', samples=[1., 1.]), entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.])])
    r['units'].append(unit('throughput', entry('tsm', samples=[4., 4.], setting=EIGHT),
                           entry('cmr', samples=[5., 5.], setting=EIGHT)))
    rows, head = cells(tables.table_7(r))
    assert head[0] == 'unfolded mode'
    assert rows[-1] == [
        'baseline+CME&SME', '3000.0 (3000.0-3000.0)', '3.00 (3.00-3.00)', '1.50 (1.50-1.50)', '1.74',  # 21.4 / 12.3
        '1.60 (1.60-1.60)', '', '0.80 (0.80-0.80)', '0.58', '51.3']  # 4 / 5; 61.8 / 107.3


def test_ratios_are_of_passes_that_both_have():
    r = results([entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.])], [entry('cmr', samples=[300., 300.])])
    ms = measured(r, 'latency')
    assert ratio(ms[1], ms[0]) == {'median': 1.5, 'low': 1.5, 'high': 1.5, 'passes': 1, 'rounds': 2}
    assert ratio(ms[1], None) is None


def test_what_is_missing_says_why():
    rows, _ = cells(tables.table_7(results([entry('tsm'), missing('cmr')])))
    assert rows[-1][1] == '(OutOfMemoryError: much)'


def test_host_bound_and_device_bound_are_told_apart():
    r = results([entry('tsm', samples=[1., 1.], host=[.2, .2]), entry('cmr', samples=[1., 1.], host=[.99, .98])],
                device='cuda')
    rows, head = cells(tables.table_7(r))
    assert [row[head.index('bound by (host, ms)')] for row in rows] == ['device (200.00)', 'host (985.00)']
    assert measured(results([entry('tsm')]), 'latency')[0].host_time() is None


def test_modes_stand_beside_the_baseline_in_the_same_mode_and_in_its_best():
    text = tables.modes(results([
        entry('tsn', samples=[2., 20.]), entry('tsn', 'frozen', [1., 10.]), entry('cmr', samples=[3., 30.]),
        entry('cmr', 'folded', [2.5, 25.], memory_bytes=2_000_000, error=1e-7), missing('cmr', 'frozen')]))
    found = rows_by(text, '', 'mode')
    cmr = found['baseline+CME&SME', 'unfolded']
    assert cmr['to the baseline, same mode'] == '1.50 (1.50-1.50)'
    assert cmr['to the baseline in its best mode'] == '3.00 (3.00-3.00) (frozen)'
    folded = found['baseline+CME&SME', 'folded']
    assert folded['to itself, unfolded'] == '0.83 (0.83-0.83)' and folded['to the baseline, same mode'] == ''
    assert folded['peak MB'] == '2' and folded['largest error'] == '1e-07'
    assert found['baseline+CME&SME', 'frozen']['ms'] == '(OutOfMemoryError: much)'


def test_training_shows_memory_with_and_without_what_is_held():
    r = results([entry('tsn', training=True, memory_bytes=100_000_000, held_bytes=50_000_000),
                 entry('cmr', training=True, samples=[2., 2.], memory_bytes=120_000_000, held_bytes=60_000_000)],
                study='training')
    _, cmr = cells(tables.training(r))[0]
    assert cmr == [
        'baseline+CME&SME', 'unfolded', '2000.0 (2000.0-2000.0)', '2.00 (2.00-2.00)', '', '120', '1.20', '180']


# Operators

def test_operators_stand_beside_their_reference_and_their_floor():
    setting = BASE._replace(size=16)
    numbers = 8 * 16 * 16
    copy = operators.RATES['copy'].work(numbers, 4)  # in a second: so many bytes a second
    forms = [entry('cme_tim_conv 256', mode, samples, setting, training=True, memory_bytes=1_000_000, error=2e-7)
             for mode, samples in (('reference', [4., 4.]), ('unfolded', [2., 2.]))]
    r = results([entry('copy', setting=setting), entry('product', setting=setting), *forms,
                 missing('cme_tim_conv 256', 'compiled-reference', NO_TIME, setting=setting, training=True)],
                study='operators')
    (row,), head = cells(tables.operators(r))
    row = dict(zip(head, row))
    floor = operators.floor_bytes(operators.CASES['cme_tim_conv 256'], numbers, 4, True) / copy
    assert row['operator'] == 'cme_tim_conv, forward + backward' and row['frames of'] == '256x16x16 to 64'
    assert row['fused, ms'] == '2000.0 (2000.0-2000.0)' and row['reference, ms'] == '4000.0 (4000.0-4000.0)'
    assert row['compiled reference, ms'] == '(no time left)' and row['to compiled'] == ''
    assert row['fused to reference'] == '0.50 (0.50-0.50)'
    assert float(row['floor, ms']) == pytest.approx(floor * 1e3, abs=.01) and row['bound by'] == 'bytes'
    assert row['to its floor'].startswith(f'{2 / floor:.2f}')
    assert row['peak MB: fused, reference, compiled'] == '1, 1, -' and row['largest error of fused'] == '2e-07'
    assert f'a copy moves {copy * 1e-9:.1f} (' in tables.operators(r)


# Scaling

def test_exponents_are_those_of_power_laws():
    def at(frames, power):
        return entry('cmr', samples=[frames ** power, 3 * frames ** power],
                     setting=BASE._replace(frames=frames, size=32))
    r = results([at(t, 1.5) for t in (4, 8, 16)], study='scaling')
    _, axis = tables._AXES['frames']
    fitted = tables.exponent(measured(r, 'scaling'), axis)
    assert [fitted[key] for key in ('median', 'low', 'high')] == pytest.approx([1.5] * 3)
    rows, head = cells(tables.scaling(r, 'scaling', 'frames'))
    assert head[2:] == ['4 frames', '8 frames', '16 frames', 'exponent', 'of the last step']
    assert rows[0][-2:] == ['1.50 (1.50-1.50)'] * 2
    assert tables.exponent(measured(r, 'scaling')[:1], axis) is None


def test_the_point_where_the_axes_cross_is_measured_once_and_on_all_of_them():
    points = [set(plan.scaled(BASE, axis)) for axis in plan.AXES]
    (setting, width), = set.intersection(*points)
    r = results([entry('cmr', setting=at, width=w) for at, w in set.union(*points)], study='scaling')
    for axis in plan.AXES:
        rows, head = cells(tables.scaling(r, 'scaling', axis))
        assert [cell for cell in rows[0] if cell] == rows[0] and len(head) == 2 + len(plan.scaled(BASE, axis)) + 2
    assert (setting.frames, setting.batch, width) == (8, 1, 1)


# Goals

def judged(*files):
    return {verdict.goal.name: verdict for verdict in goals.judge(files)}


def test_goals_compare_within_rounds_and_with_the_best_mode():
    def run(cmr):
        return results([entry('tsn', samples=[4., 40., 4.]), entry('tsn', 'frozen', [2., 20., 2.]),
                        entry('tsn', 'folded', [3., 30., 3.]), missing('tsn', 'compiled'),
                        entry('cmr', 'folded', cmr), entry('cmr', samples=[1., 1., 1.])])
    verdict = goals.judge([run([3., 30., 3.])])[-1]
    assert verdict.of == 'baseline+CME&SME, folded / ResNet-50 (TSN), frozen'
    assert verdict.ratio == {'median': 1.5, 'low': 1.5, 'high': 1.5, 'passes': 1, 'rounds': 3}
    assert verdict.reached is False
    assert goals.judge([run([2.2, 22., 2.2])])[-1].reached is True


def test_goals_that_were_not_measured_say_so():
    modes = [entry('tsn', mode) for mode in ('unfolded', 'folded', 'compiled', 'frozen')]
    file = results([*modes, entry('cmr', 'folded')])
    assert [verdict.ratio is None for verdict in goals.judge([file])] == [goal.device == 'cuda' for goal in goals.GOALS]
    without = results([*modes[:-1], entry('cmr', 'folded')])  # the best mode of the baseline is not known
    for unknown in (without, results([*modes[:-1], missing('tsn', 'frozen', NO_TIME), entry('cmr', 'folded')])):
        assert all(verdict.ratio is None for verdict in goals.judge([unknown]))
    lines = goals.render([file]).splitlines()[2:]
    assert ['not measured yet' in line for line in lines] == [goal.device == 'cuda' for goal in goals.GOALS]
    assert goals.render([]).count('not measured yet') == len(goals.GOALS)


def test_training_goals_take_time_and_all_memory():
    setting = EIGHT._replace(device='cuda')
    file = results([
        entry('tsn', setting=setting, training=True, samples=[1., 2.], memory_bytes=60, held_bytes=40),
        entry('cmr', setting=setting, training=True, samples=[1.3, 2.6], memory_bytes=70, held_bytes=60),
        entry('cmr', 'reference', setting=setting, training=True, samples=[.1, .2])], study='training', device='cuda')
    found = judged(file)
    assert found['training step, to the baseline'].ratio['median'] == pytest.approx(1.3)
    assert found['training step, to the baseline'].reached
    assert found['peak memory of a training step, to the baseline'].ratio['median'] == 1.3
    assert not found['peak memory of a training step, to the baseline'].reached


# All of them

def whole(device='cpu'):
    """A file with every study in it."""
    base = BASE._replace(size=224, device=device)
    more = {'memory_bytes': 2_000_000, 'error': 1e-7, **({'host': [.1, .1]} if device == 'cuda' else {})}
    return {**results(base=base, device=device), 'units': [
        unit(study.name, *(entry(c.model, c.mode, setting=c.setting, width=c.width, training=c.training, **more)
                           for c in study.candidates))
        for study in plan.studies(list(plan.STUDIES), base, 1, 2)]}


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_section_renders_with_and_without_results(device):
    file = whole(device)
    for name in tables.SECTIONS:
        empty = tables.section({**file, 'units': []}, name)
        assert empty.startswith(f'not measured yet: `python -m benchmarks.runtime --device {device} --studies')
        text = tables.section(file, name)
        assert 'python -m something' in text and 'passes: ' in text and 'M, 2 threads' in text
        assert ('G, host M' in text) == (device == 'cuda')
    assert sum(verdict.ratio is not None for verdict in goals.judge([file])) == (8 if device == 'cuda' else 1)
    text = tables.render(file)
    assert all(study in text for study in plan.STUDIES.values())


def test_every_time_and_ratio_has_its_interval():
    timed, file = re.compile(r'\bms\b|^to |fused to|clips/s'), whole()
    for name in ('table-7', 'placement', 'modes', 'operators', 'training', 'frames', 'precision'):
        rows, head = cells(tables.section(file, name))
        for title, column in zip(head, zip(*rows)):
            if timed.search(title) and "paper's" not in title and title != 'floor, ms':
                assert all(re.fullmatch(r'([\d.]+ \([\d.]+-[\d.]+\)( \(\w+\))?)?', cell) for cell in column), title


def test_one_number_for_one_question():
    """No model has two times in one mode and setting, whatever the page."""
    seen = {}
    for u in whole()['units']:
        for e in u['entries']:
            key = tuple((name, e[name]) for name in sorted(e) if name not in ('samples', 'memory_bytes', 'error'))
            assert seen.setdefault(key, u['study']) == u['study'], key


# Another run, and the plot

def test_another_run_is_compared_with_the_intervals():
    old = results([entry('tsm', samples=[1., 1.]), entry('cme', samples=[1.4, 1.6]), entry('cmr', samples=[1.4, 1.6]),
                   entry('sme', samples=[1.4, 1.6])])
    new = results([entry('tsm', samples=[1., 1.]), entry('cme', samples=[1.5, 1.5]), entry('cmr', samples=[1.55, 1.85]),
                   entry('sme', samples=[2., 2.])])
    found = compare(new, old)
    assert (found.inside, found.overlapping, found.apart) == (1, 1, 1)
    assert '3 ratios: 1 inside, 1 overlapping, 1 apart' in found.text
    same = compare(old, old)
    assert (same.inside, same.overlapping, same.apart) == (3, 0, 0)


def test_operators_are_compared_by_their_ratios_to_the_reference():
    def run(fused):
        return results([entry('sme 256', 'reference', [2., 2.]), entry('sme 256', samples=fused)], study='operators')
    assert compare(run([1., 1.]), run([.9, 1.1])).inside == 1
    assert compare(run([1., 1.]), run([1.5, 1.5])).apart == 1


def test_plot_shows_what_was_measured_and_knows_when_it_is_stale(tmp_path):
    r = results([entry('tsn'), entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.]), entry('r3d_18')])
    point = next(p for p in plot.points(r) if p.name == 'cmr')
    assert (point.ratio, point.paper, point.accuracy) == (1.5, pytest.approx(21.4 / 12.3), 51.3)
    path = tmp_path / 'plot.svg'
    assert stale(plot.points(r), path)
    plot.draw(r, path)
    text = path.read_text()
    assert all(label in text for label in ('TSM', 'baseline+CME&amp;SME', 'R3D-18', '2001-02-03'))
    assert not stale(plot.points(r), path)
    r['units'][0]['entries'][2]['samples'] = [4., 4.]
    assert stale(plot.points(r), path)
