"""How the benchmarks measure: rounds, clocks, intervals, memory. How fast anything is, is not tested."""
import collections
import gc
import math
import random
import time
import types

import pytest
import torch

from benchmarks.runtime import interval, timing
from benchmarks.runtime.memory import peak_bytes
from benchmarks.runtime.workshop import relative_error

# Rounds and clocks

def sleeper(seconds, log=None, name=None):
    def call():
        if log is not None:
            log.append(name)
        time.sleep(seconds)
    return call


def test_every_candidate_is_called_once_a_round_in_shuffled_order():
    log = []
    samples = timing.interleave({name: sleeper(0, log, name) for name in 'abcd'}, 'cpu', rounds=12, seconds=60)
    rounds = [log[i:i + 4] for i in range(0, len(log), 4)]
    assert len(rounds) == 12 and all(sorted(order) == list('abcd') for order in rounds)
    assert len(set(map(tuple, rounds))) > 3
    assert {name: len(values) for name, values in samples.time.items()} == dict.fromkeys('abcd', 12)
    assert samples.host == {}


def test_the_order_is_the_same_in_every_run():
    def order(seed):
        log = []
        timing.interleave({name: sleeper(0, log, name) for name in 'abcd'}, 'cpu', 6, 60, seed)
        return log
    assert order(0) == order(0) != order(1)


def test_times_are_seconds_of_a_call():
    samples = timing.interleave({'short': sleeper(.002), 'long': sleeper(.02)}, 'cpu', rounds=5, seconds=60)
    assert all(.002 <= value for value in samples.time['short'])
    assert all(.02 <= value for value in samples.time['long'])
    assert interval.interval([samples.time['long']], [samples.time['short']])['median'] > 1.5


@pytest.mark.parametrize(('rounds', 'done'), [(9, 5), (3, 3)])
def test_budget_ends_the_rounds_but_not_before_five(rounds, done):
    samples = timing.interleave({'a': sleeper(.01)}, 'cpu', rounds, seconds=0)
    assert len(samples.time['a']) == done


class Machine:
    """A host and a device that works through what the host launches, by a clock of their own."""

    def __init__(self):
        self.host = self.device = 0.

    def launch(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self):
        self.host = max(self.host, self.device)

    def event(self, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace(elapsed_time=lambda end: (end.at - event.at) * 1e3)
        event.record = lambda: setattr(event, 'at', max(self.host, self.device))
        return event


def test_on_cuda_host_and_device_can_be_told_apart(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(torch.cuda, 'Event', machine.event)
    monkeypatch.setattr(torch.cuda, 'synchronize', machine.synchronize)
    monkeypatch.setattr(timing, 'time', types.SimpleNamespace(perf_counter=lambda: machine.host))
    launches = collections.Counter()

    def call(name, host, device):
        def run():
            launches[name] += 1
            machine.launch(host, device)
        return run

    samples = timing.interleave({
        'device-bound': call('device-bound', 10e-6, 100e-6), 'host-bound': call('host-bound', 100e-6, 10e-6),
        'long': call('long', 2e-3, 5e-3), 'tiny': call('tiny', 1e-9, 1e-9)}, 'cuda', rounds=6, seconds=60)
    assert samples.time['device-bound'] == pytest.approx([100e-6] * 6)
    assert samples.host['device-bound'] == pytest.approx([10e-6] * 6)
    assert samples.time['host-bound'] == pytest.approx([100e-6] * 6)
    assert samples.host['host-bound'] == pytest.approx([100e-6] * 6)
    # what the host does before the device has anything to do is charged to nobody, even to a sample of one call
    assert samples.time['long'] == pytest.approx([5e-3] * 6) and samples.host['long'] == pytest.approx([2e-3] * 6)
    # four milliseconds of calls, one if it takes longer, and no more than a thousand, and one before them; three are
    # for warming up, three to find that out
    assert launches['long'] == 6 + 6 * 2
    assert launches['device-bound'] == pytest.approx(6 + 6 * 41, abs=6)
    assert launches['tiny'] == 6 + 6 * 1001


def test_nothing_to_time():
    with pytest.raises(ValueError, match='there must be candidates and rounds, got 0 and 5'):
        timing.interleave({}, 'cpu', 5, 1)
    with pytest.raises(ValueError, match='got 1 and 0'):
        timing.interleave({'a': sleeper(0)}, 'cpu', 0, 1)


def test_no_collection_of_garbage_in_a_sample_and_the_collector_is_put_back():
    seen = []
    timing.interleave({'a': lambda: seen.append(gc.isenabled())}, 'cpu', 5, 60)
    assert seen == [False] * 5 and gc.isenabled()


def test_inputs_are_rotated():
    seen = []
    call = timing.rotate(lambda x, y: seen.append((x, y)), [[1, 2], [3, 4]])
    for _ in range(3):
        call()
    assert seen == [(1, 2), (3, 4), (1, 2)]


# Intervals

def test_what_does_not_vary_has_no_width():
    entry = interval.bootstrap([[2., 2.], [2., 2., 2.]])
    assert entry == {'median': 2, 'low': 2, 'high': 2, 'passes': 2, 'rounds': 5}


def test_passes_that_differ_make_the_interval_as_wide_as_they_are_apart():
    steady = interval.bootstrap([[1., 1.01], [.99, 1.]])
    apart = interval.bootstrap([[1., 1.01], [1.2, 1.21]])
    assert steady['high'] - steady['low'] < .03
    assert apart['low'] <= 1.01 and apart['high'] >= 1.2
    rounds_only = interval.bootstrap([[1., 1.01, 1.2, 1.21] * 5])
    assert rounds_only['high'] - rounds_only['low'] < apart['high'] - apart['low'] + 1e-9


def test_bootstrap_is_the_same_every_time_and_takes_passes_of_any_length():
    values = [[random.Random(i).random() for _ in range(n)] for i, n in enumerate((3, 7, 5))]
    entry = interval.bootstrap(values)
    assert entry == interval.bootstrap(values)
    pooled = sorted(value for rounds in values for value in rounds)
    assert entry['median'] == pytest.approx(pooled[7])
    assert pooled[0] <= entry['low'] < entry['median'] < entry['high'] <= pooled[-1]


def test_the_interval_covers_the_truth():
    # noise of passes and of rounds: 95% is asymptotic, five passes come short of it, but not by much
    covered = 0
    for seed in range(100):
        r = random.Random(seed)
        shifts = [r.gauss(0, .02) for _ in range(5)]
        values = [[math.exp(shift + r.gauss(0, .02)) for _ in range(4)] for shift in shifts]
        entry = interval.bootstrap(values, resamples=300)
        covered += entry['low'] <= 1 <= entry['high']
    assert 80 <= covered <= 99


def test_ratios_are_taken_within_rounds():
    # a machine that gets ten times slower: the ratio does not notice, the quotient of medians would
    slow = [[1., 10.], [5.]]
    assert interval.interval([[2., 20.], [10.]], slow) == {'median': 2, 'low': 2, 'high': 2, 'passes': 2, 'rounds': 3}
    with pytest.raises(ValueError, match=r'within rounds, got \[2, 1\] and \[1, 2\] of them'):
        interval.interval(slow, [[1.], [1., 2.]])
    with pytest.raises(ValueError, match=r'passes with rounds, got \[2, 0\]'):
        interval.bootstrap([[1., 2.], []])


def test_how_an_interval_is_shown():
    entry = {'median': 3, 'low': 2, 'high': 4}
    assert interval.show(entry) == '3.00 (2.00-4.00)'
    assert interval.show(entry, 1e3, 0) == '3000 (2000-4000)'
    assert interval.show(None) == ''


# Memory and errors

def test_peak_of_host_memory():
    def two():
        return torch.ones(250, 1000).add(1).sum()

    def four():
        x = torch.ones(250, 1000)
        y = x.add(1)
        return (y * 2 + x).sum()
    assert peak_bytes(two, 'cpu') == pytest.approx(2e6, rel=.01)
    assert peak_bytes(four, 'cpu') == pytest.approx(4e6, rel=.01)


def test_relative_error_is_of_the_worst_tensor():
    truth = [torch.tensor([1., -4.], dtype=torch.float64), torch.tensor([10.], dtype=torch.float64)]
    got = [torch.tensor([1., -3.]), torch.tensor([11.])]
    assert relative_error(got, truth) == .25
    assert relative_error(truth, truth) == 0
    with pytest.raises(ValueError):
        relative_error(got, truth[:1])
    with pytest.raises(FloatingPointError):  # not the worst by comparison
        relative_error([got[0], torch.tensor([float('nan')])], truth)
