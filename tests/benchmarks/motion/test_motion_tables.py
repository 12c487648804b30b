"""What docs/motion.md says of a result file."""
import json
import re
from pathlib import Path

import pytest

from benchmarks.motion import plot, results, show, tables
from benchmarks.motion.__main__ import main
from benchmarks.motion.latency import measure
from benchmarks.motion.rows import GROUPS
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import save
from benchmarks.plots import stale


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """A small study of real runs."""
    folder = tmp_path_factory.mktemp('study')
    out = folder / 'motion.json'
    assert main(['--out', str(out), '--folder', str(folder / 'networks'), '--size', 'smoke', '--seeds', '0', '1',
                 '--jobs', '1', '--groups', 'table4', 'table6', 'alone']) == 0
    return json.loads(out.read_text())


def cells(text):
    lines = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
    return {line[0]: line for line in lines}


def test_a_table_has_shares_and_differences_within_seeds(found):
    shown = cells(tables.render_group(found, 'table6'))
    assert list(shown)[2:] == ['TIM', 'TIM + MEM', 'TIM + PEM', 'TIM + CME', 'TIM + SME', 'TIM + CME&SME']
    right = {row: [results.right(run) for run in results.runs_of(found, row).values()] for row in ('tim', 'sme')}
    line = shown['TIM + SME']
    assert line[1] == '0, 1' and line[2].startswith(f'{50 * sum(right["sme"]):.1f} (')
    assert line[3].startswith(f'{50 * (sum(right["sme"]) - sum(right["tim"])):+.1f} (')
    assert line[-1] == '50.6' and shown['TIM'][3] == ''


def test_a_table_is_of_the_seeds_that_all_of_its_rows_have(found):
    """Else its shares would be of easier seeds in some rows, and of harder ones in others."""
    without = [run for run in found['runs'] if (run['row'], run['seed']) != ('mem', 1)]
    shown = cells(tables.render_group({**found, 'runs': without}, 'table6'))
    alone = cells(tables.render_group({**found, 'runs': [run for run in found['runs'] if run['seed'] == 0]}, 'table6'))
    assert shown == alone and shown['TIM'][1] == '0'
    assert cells(tables.render_group({**found, 'runs': without}, 'table4'))['TIM'][1] == '0, 1'  # it has no MEM
    apart = [run for run in found['runs'] if run['seed'] == (run['row'] == 'tim')]
    assert tables.render_group({**found, 'runs': apart}, 'table6') == 'not measured yet: no seed has all of these rows'
    other = [{**run, 'task': 'ego'} for run in apart]
    assert tables.render_real({**found, 'runs': other}, 'ego') == 'not measured yet: no seed has all of these rows'


def test_measures_are_what_they_are_called(found):
    run = found['runs'][0]
    clips = sum(map(sum, run['confusion']))
    assert results.right(run) == sum(run['confusion'][i][i] for i in range(12)) / clips
    assert results.group(run) * results.direction(run) == pytest.approx(results.right(run))
    parts = [results.of_group(i)(run) * sum(map(sum, run['confusion'][2 * i:2 * i + 2])) for i in range(6)]
    assert sum(parts) == pytest.approx(results.right(run) * clips)
    assert results.swept('step', 5.)(run) == run['sweeps']['step'][-1][3] / run['sweeps']['step'][-1][1]
    assert results.after(1)(run) == run['curve'][1][3] / run['curve'][1][1]


def test_the_order_is_a_coin_toss_for_a_network_that_sees_none():
    """It takes the three orders of playback for each other; frozen clips and double speed have no other order."""
    table = [[20, 20, 20, 0, 0]] * 3 + [[0, 0, 0, 60, 0], [0, 0, 0, 0, 60]]
    run = {'task': 'playback', 'confusion': table}
    assert results.direction(run) == pytest.approx(1 / 3) and results.right(run) == pytest.approx(3 / 5)
    assert results.group(run) == 1


def test_rows_that_are_missing_are_named(found):
    assert 'Not measured yet' not in tables.render_group(found, 'table6')
    text = tables.render_group(found, 'faults')
    assert text.endswith('Not measured yet: CME hands on its input, gates of shuffled frames, SME hands on its input, '
                         'SME of shuffled frames.')


@pytest.mark.parametrize('right, verdict', [
    ((20, 21, 20), '**holds**'), ((8, 9, 8), 'undecided'), ((1, 2, 1), '**reversed**'), ((20, 21), 'two seeds'),
    ((20,), 'one seed')])
def test_a_claim_is_decided_by_its_interval(found, right, verdict):
    """SME's right answers of 24 in each seed, beside TIM's. Of less than three seeds nothing is decided."""
    third = [{**run, 'seed': 2} for run in found['runs'] if run['seed'] == 1]
    runs = [run for run in found['runs'] + third if run['seed'] < len(right)]
    made = json.loads(json.dumps({**found, 'runs': runs}))
    base = (11, 6, 9) if verdict == 'undecided' else (10, 11, 10)
    for run in made['runs']:
        if run['row'] in ('tim', 'sme'):
            count = (right if run['row'] == 'sme' else base)[run['seed']]
            run['confusion'] = [[0] * 12 for _ in range(12)]
            run['confusion'][0][0], run['confusion'][0][5] = count, 24 - count
    line = next(line for line in tables.render_claims(made).splitlines() if 'TIM + SME over TIM |' in line)
    assert verdict in line


@pytest.mark.parametrize('name', tables.SECTIONS)
def test_all_sections_can_be_shown_whole_and_without_some_rows(found, name):
    text = tables.SECTIONS[name](found)
    assert 'nan' not in text or 'maps' in name
    few = {**found, 'runs': [run for run in found['runs'] if run['row'] in ('tim', 'all') and run['seed'] == 0]}
    assert isinstance(tables.SECTIONS[name](few), str)


def test_method_counts_what_was_done(found):
    text = tables.render_method(found)
    recipe = SIZES['smoke'].recipe
    assert f'{recipe.updates * recipe.batch} clips, {recipe.batch} an update' in text
    assert f'{len(found["runs"])} runs' in text


def test_plots_carry_what_they_show(found, tmp_path):
    shown, path = plot.curves(found), tmp_path / 'curves.svg'
    assert stale(shown, path)
    plot.draw_curves(found, path)
    assert not stale(shown, path) and 'CME&amp;SME' in path.read_text()
    latency = {'rows': measure(['plain', 'all'], 2, 32, SIZES['smoke'].shape, 'cpu')}
    assert latency['rows']['tim']['ratio']['median'] == 1
    (base, *_), (both, *_, points) = plot.costs(found, latency)  # the plain one would press the others together
    assert (base, both) == ('tim', 'all') and points == results.difference_of(found, 'all', 'tim')
    plot.draw_costs(found, latency, tmp_path / 'costs.svg')
    assert not stale(plot.costs(found, latency), tmp_path / 'costs.svg')
    line = cells(plot.render_costs(found, latency))['2']
    assert line[1] == 'TIM + CME&SME' and line[3].split()[0] == f'{100 * points.mean:+.1f}' and line[4] == '0, 1'
    other = {**found, 'runs': [run for run in found['runs'] if run['seed'] == 0]}
    assert stale(plot.curves(other), path)


def test_every_group_has_a_place_on_the_page():
    page = (Path(tables.__file__).parents[2] / 'docs/motion.md').read_text()
    for name in tables.SECTIONS:
        assert len(re.findall(rf'<!-- {name} -->', page)) == 1
    assert {f'motion-{name}' for name in GROUPS} <= set(tables.SECTIONS)


def test_seeds_are_named_since_only_the_same_ones_can_be_compared(found):
    runs = [{**run, 'seed': seed} for run in found['runs'] if run['seed'] == 0 for seed in (0, 1, 2, 5)]
    shown = cells(tables.render_group({**found, 'runs': runs}, 'table6'))
    assert shown['TIM'][1] == '0, 1, 2, 5'
    shown = cells(tables.render_group({**found, 'runs': [run for run in runs if run['seed'] < 5]}, 'table6'))
    assert shown['TIM'][1] == '0 to 2'


def test_the_tables_of_a_users_file_are_printed(found, tmp_path, capsys):
    file = tmp_path / 'motion.json'
    save(file, found)
    assert show.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert tables.render_group(found, 'table6') in text and '## claims' in text
    assert '## table5' not in text and '## real-ego' not in text  # not measured
    assert '## curve' in text and '## maps' in text
    save(file, {**found, 'runs': []})
    with pytest.raises(SystemExit):
        show.main([str(file)])
    assert 'must have runs, got' in capsys.readouterr().err
    (tmp_path / 'other.json').write_text('{"rows": 1}')
    for name, wanted in (('none.json', 'which is not there'), ('other.json', 'which has rows')):
        with pytest.raises(SystemExit):
            show.main([str(tmp_path / name)])
        assert wanted in capsys.readouterr().err
