"""Areas, estimates and counts, against definitions."""
import math

import pytest
import torch
from scipy import stats

from benchmarks.motion.maps import area, moving
from benchmarks.motion.statistics import difference, mean
from benchmarks.motion.task import counts, pairs


def test_area_is_the_share_of_pairs_in_order():
    values = torch.tensor([3., 1, 2, 2, 5, 0])
    inside = torch.tensor([True, False, True, False, True, False])
    found = [(a > b) + .5 * (a == b) for a in values[inside] for b in values[~inside]]
    assert area(values, inside) == pytest.approx(float(sum(found)) / len(found))
    assert area(values, values > 2.5) == 1 and area(-values, values > 2.5) == 0
    assert area(torch.ones(6), inside) == .5
    assert math.isnan(area(values, torch.zeros(6, dtype=torch.bool)))


def test_clips_for_maps_move_all_the_time():
    made = moving(5, 40)
    assert len(made.labels) == 5 and made.labels.max() < 8
    assert (made.actor.flatten(2).amax(2) > .5).float().mean() > .9  # a distractor may cover it


@pytest.mark.parametrize('values', [[.5, .6, .4, .7, .55], [.1, .3]])
def test_intervals_are_students(values):
    found = mean(values)
    low, high = stats.t.interval(.95, len(values) - 1, sum(values) / len(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


def test_differences_are_paired_by_seeds():
    values, base = {0: .5, 1: .7, 2: .9, 3: 0}, {0: .4, 1: .55, 2: .8, 7: 1}
    found = difference(values, base)
    low, high = stats.ttest_rel([.5, .7, .9], [.4, .55, .8]).confidence_interval()
    assert (found.low, found.high, found.seeds) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3), 3)
    assert found.verdict == 'holds' and difference(base, values).verdict == 'reversed'
    assert difference({0: .5, 1: .1, 2: .5}, {0: .4, 1: .3, 2: .4}).verdict == 'undecided'
    assert difference({0: .5, 1: .1}, {0: .4, 1: .3}).verdict == 'two seeds'
    assert difference({0: .5}, {0: .4}).verdict == 'one seed'
    assert difference({0: .5}, {1: .5}) is None
    assert difference({0: .5}, {0: .4}).show(True) == '+10.0'  # of one seed there is no interval


def test_a_share_is_shown_within_0_and_100():
    assert mean([.9, 1., .95]).show() == '95.0 (82.6 to 100.0)'
    assert mean([.1, 0., .05]).show() == '5.0 (0.0 to 17.4)'
    assert mean([.1, 0., .05]).show(True) == '+5.0 (-7.4 to +17.4)'


def test_of_two_seeds_both_values_are_shown_in_their_order():
    """An interval of Student's t with one degree of freedom would be thirteen times as wide."""
    found = mean([1., .9])
    assert found.show() == '95.0 (100.0, 90.0)' and found.ends == (.9, 1.)
    assert mean([.1, 0.]).show(True) == '+5.0 (+10.0, +0.0)'
    assert mean([.1, 0., .05]).ends == (mean([.1, 0., .05]).low, mean([.1, 0., .05]).high)


def test_a_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match='values must be one to 20 numbers, got 0'):
        mean([])


def test_counts_of_a_confusion():
    table = [[5, 1, 0, 2], [3, 4, 1, 0], [0, 0, 6, 2], [1, 0, 3, 4]]
    assert counts(table, pairs(4)) == [32, 5 + 1 + 3 + 4 + 6 + 2 + 3 + 4, 19]
    assert counts(table, (0, 0, 0, 1)) == [32, 5 + 1 + 0 + 3 + 4 + 1 + 0 + 0 + 6 + 4, 19]
