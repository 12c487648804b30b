"""The committed results keep to what theory says, and notice faults."""
import json
from pathlib import Path

import pytest

from benchmarks.motion.paths import LEVELS
from benchmarks.motion.results import difference_of, direction, estimate, right, runs_of
from benchmarks.motion.rows import MAIN
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import as_dict

RESULTS = json.loads((Path(__file__).parents[3] / 'benchmarks/results/motion-cpu.json').read_text())


def test_they_are_of_the_size_that_is_there():
    assert RESULTS['settings'] == json.loads(json.dumps(as_dict(SIZES['cpu'])))


@pytest.mark.parametrize('row', MAIN)
def test_tables_4_and_6_have_five_seeds_and_their_curves(row):
    runs = runs_of(RESULTS, row)
    assert sorted(runs)[:5] == [0, 1, 2, 3, 4]
    assert all(len(run['curve']) >= 5 and run['sweeps'] for run in runs.values())


@pytest.mark.parametrize('row', ['plain', 'only_cme'])
def test_without_an_order_no_network_exceeds_the_level_of_theory(row):
    found = estimate(RESULTS, row)
    assert found.mean < LEVELS.frames
    order = estimate(RESULTS, row, direction)  # a coin's toss
    assert order.low - .02 < .5 < order.high + .02


def test_temporal_layers_do():
    assert estimate(RESULTS, 'tim').low > LEVELS.frame
    assert estimate(RESULTS, 'tim', direction).low > .7
    assert difference_of(RESULTS, 'tim', 'plain').verdict == 'holds'


@pytest.mark.parametrize('broken, base', [('broken_cme', 'tim'), ('broken_sme', 'plain')])
def test_a_broken_layer_is_its_baseline(broken, base):
    runs, wanted = runs_of(RESULTS, broken), runs_of(RESULTS, base)
    assert runs and all(runs[seed]['confusion'] == wanted[seed]['confusion'] for seed in runs)


def test_an_sme_of_shuffled_frames_sees_no_order():
    order = estimate(RESULTS, 'shuffled_sme', direction)
    assert order.low - .02 < .5 < order.high + .02
    assert max(right(found) for found in runs_of(RESULTS, 'shuffled_sme').values()) < LEVELS.frames


def test_what_the_page_says_of_the_map_and_of_gates():
    assert difference_of(RESULTS, 'sme', 'mapless').verdict == 'undecided'
    for row in ('mem', 'pem', 'cme', 'sme', 'all'):
        assert difference_of(RESULTS, row, 'tim').verdict == 'undecided'
        if row in ('cme', 'sme', 'all'):
            assert difference_of(RESULTS, f'{row}_long', 'tim_long').verdict == 'undecided'
    assert difference_of(RESULTS, 'cme_long', 'tim_long').high < .045  # the paper's gain
    assert difference_of(RESULTS, 'only_sme', 'plain').verdict == 'holds'
    assert difference_of(RESULTS, 'only_cme', 'plain').verdict == 'undecided'
    gates = json.loads((Path(__file__).parents[3] / 'benchmarks/results/motion-gates-cpu.json').read_text())
    for network in gates['networks']:
        blind = network['layers'][:4 if network['row'] == 'only_cme' else 1]  # where nothing compares frames before
        assert all(max(layer['pooled_decoded'], layer['gates_decoded']) < .2 for layer in blind)
        assert network['row'] == 'only_cme' or network['layers'][2]['gates_decoded'] > .2
        for layer in network['layers'][:2]:
            assert layer['gates'] < layer['pooled'] / 2 < layer['place'] / 3
