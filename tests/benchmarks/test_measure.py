"""One pass of the benchmarks: what is built is folded, checked, timed, and left out with its reason."""
import contextlib
import math
from functools import partial

import pytest
import torch
from benchmark_results import BASE
from fake_cuda import fake_cuda
from torch import nn

from benchmarks.runtime import measure as measuring
from benchmarks.runtime import models, operators, plan, workshop
from benchmarks.runtime.candidate import Candidate, Setting
from benchmarks.runtime.journal import Journal
from benchmarks.runtime.results import NO_TIME
from benchmarks.runtime.timing import Deadline
from benchmarks.runtime.workshop import Workshop
from cmr_layers.ops import path as ops_path

THIN = .25  # of the width of a ResNet-50


def study(*pairs, rounds=2, training=False, width=THIN, name='latency', setting=BASE):
    return plan.Study(name, tuple(Candidate(*pair, setting, width, training) for pair in pairs), 1, rounds)


def measure(given, number=0, seconds=600, tick=lambda: None, journal=None):
    return measuring.measure(given, number, Deadline(seconds), tick, journal)


# Building

def test_networks_are_built_alike_and_hide_no_term():
    first, second = (workshop.build('cmr', 8, THIN) for _ in range(2))
    for (key, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert not any(m.training for m in first.modules())
    for name, m in first.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert all(t.unique().numel() > 1 for t in (m.weight, m.bias, m.running_mean, m.running_var)), name


@pytest.mark.parametrize(('name', 'left'), [
    ('tsn', 0), ('tei', 0), ('stm', 0), ('tdrl', 0), ('tea', 0), ('gsm', 32), ('cmr', 0), ('released', 0)])
def test_folded_candidates_compute_the_same(name, left):
    c = Candidate(name, 'folded', BASE._replace(frames=4), 1 if name == 'tea' else THIN)  # Res2Net splits its width
    shop = Workshop()
    assert measuring._error(c, shop.run(c), shop) < 1e-4
    folded = shop.network(c, True)
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == left  # GSM stands between conv3 and its batch norm
    assert not any(m.training for m in folded.modules())  # or graphed would refuse it


def test_networks_are_shared_among_those_that_do_not_change_them():
    shop = Workshop()
    one = Candidate('tsn', 'unfolded', BASE, THIN)
    network = shop.network(one, False)
    assert shop.network(one._replace(setting=BASE._replace(batch=4, size=128)), False) is network
    for other in (one._replace(width=.5), one._replace(setting=BASE._replace(frames=4)),
                  one._replace(setting=BASE._replace(layout='contiguous'))):
        assert shop.network(other, False) is not network
    assert shop.network(one, True) is not network


def test_inputs_of_a_layer_do_not_fit_a_cache_and_are_as_a_relu_leaves_them():
    shop = Workshop()
    c = Candidate('layer cme', 'unfolded', BASE._replace(size=14))
    xs = shop.inputs(c)  # of 6.4 MB each
    assert sum(x.nbytes for x in xs) >= workshop.CACHE_BYTES and min(x.min() for x in xs) == 0
    assert len({x.data_ptr() for x in xs}) == len(xs) and xs[0].is_contiguous(memory_format=torch.channels_last)
    assert len(shop.inputs(c._replace(model='tsn'))) == 4


# One pass

def test_a_pass_measures_time_error_and_memory():
    ticks = []
    pairs = ('tsn', 'reference'), ('cmr', 'unfolded'), ('cmr', 'folded')
    entries = measure(study(*pairs), tick=partial(ticks.append, 1))
    assert [(e['model'], e['mode']) for e in entries] == list(pairs)
    assert len(ticks) == 3 * (1 + 2)
    for e in entries:
        assert len(e['samples']) == 2 and min(e['samples']) > 0
        assert 0 < e['error'] < 1e-5 and e['memory_bytes'] > 8 * 16 * 16 * 16 * 4  # an activation, at least
        assert Setting.of(e) == BASE and 'held_bytes' not in e
    later, = measure(study(('tsn', 'reference')), number=1)
    assert 'error' not in later and 'memory_bytes' not in later and len(later['samples']) == 2


def test_a_pass_of_training():
    tsn, cmr, reference = measure(
        study(('tsn', 'unfolded'), ('cmr', 'unfolded'), ('cmr', 'reference'), training=True, rounds=1))
    assert len(cmr['samples']) == 1 and 'error' not in cmr
    assert tsn['memory_bytes'] < cmr['memory_bytes'] < reference['memory_bytes']
    numbers = sum(p.numel() for p in workshop.build('tsn', 8, THIN).parameters())
    assert tsn['held_bytes'] == pytest.approx(2 * 4 * numbers, rel=.05)  # the weights, as many numbers of momentum


@pytest.mark.parametrize('name', ['cme_tim 64', 'cme_tim_conv 64', 'sme 256', 'motion_conv 256'])
def test_a_pass_of_an_operator(name):
    op = operators.CASES[name].op
    for training in operators.PASSES[op]:
        given = study((name, 'reference'), (name, 'unfolded'), training=training, width=1, name='operators',
                      setting=BASE._replace(size=2, frames=4))
        for e in measure(given, number=0):
            assert e['error'] < (1e-3 if training else 1e-5) and len(e['samples']) == 2, e


def test_floors_come_from_a_pass():
    for e in measure(study(('copy', 'unfolded'), ('product', 'unfolded'), width=1, name='operators',
                           setting=BASE._replace(size=2))):
        assert e['error'] < 1e-5 and len(e['samples']) == 2


# Who is left out

def replaced(monkeypatch, build):
    monkeypatch.setitem(models.MODELS, 'tsm', models.MODELS['tsm']._replace(build=build))


def test_who_fails_says_so_and_the_others_go_on(monkeypatch, capsys):
    def broken(**kwargs):
        raise RuntimeError('no such luck\nand more')
    replaced(monkeypatch, broken)
    first, second = measure(study(('tsm', 'reference'), ('tsn', 'reference')))
    assert first['missing'] == 'RuntimeError: no such luck' and 'samples' not in first
    assert len(second['samples']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_wrong_results_are_no_candidate(monkeypatch, capsys):
    class Broken(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * math.nan
    replaced(monkeypatch, lambda **_: Broken())
    entry, = measure(study(('tsm', 'reference')))
    assert entry['missing'].startswith('FloatingPointError') and 'samples' not in entry


def test_who_computes_something_else_is_not_timed(monkeypatch, capsys):
    class Other(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * (1.01 if ops_path.forced == 'auto' else 1)
    replaced(monkeypatch, lambda **_: Other())
    reference, unfolded = measure(study(('tsm', 'reference'), ('tsm', 'unfolded')))
    assert reference['error'] < 1e-6
    assert unfolded['missing'] == 'ArithmeticError: off by 1e-02 of the largest logit' and 'samples' not in unfolded


def test_there_is_no_time_left():
    first, second = measure(study(('tsn', 'reference'), ('tsm', 'reference')), seconds=-1)
    assert first['missing'] == second['missing'] == NO_TIME


def test_compiling_leaves_time_for_the_rounds():
    # what it takes is a guess before the first of them: two minutes
    unfolded, compiled = measure(study(('tsn', 'unfolded'), ('tsn', 'compiled')), seconds=110)
    assert 'samples' in unfolded and compiled['missing'] == NO_TIME


def test_tf32_is_allowed_where_it_is_meant_and_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for dtype, allowed in (('fp32', (False, False)), ('tf32', (True, True)), ('fp16', before)):
        with workshop.precision(BASE._replace(dtype=dtype)):
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == allowed
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# Who costs the process its life, on a GPU that is none

CUDA = BASE._replace(device='cuda', frames=2, size=8)


class Waits(nn.Module):
    """Its forward waits for the device, which no graph can capture."""

    def forward(self, x):
        return x.mean((2, 3)) * x.new_ones(1).item()


def graphs(*names):
    return study(*((name, 'graph') for name in names), setting=CUDA, width=1, name='frames')


def test_a_capture_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    replaced(monkeypatch, lambda **_: Waits())
    with fake_cuda():
        first, bad, last = measure(graphs('layer tim', 'tsm', 'layer shift'))
    assert 'not permitted when stream is capturing' in bad['missing']
    assert len(first['samples']) == len(last['samples']) == 2


@pytest.mark.slow
def test_a_capture_that_poisons_the_process_is_the_last_of_it(monkeypatch, capsys, tmp_path):
    replaced(monkeypatch, lambda **_: Waits())
    poisoned, path = [], tmp_path / 'r.journal'

    def can_capture():
        poisoned.append(True)
        return False
    monkeypatch.setattr(measuring, 'can_capture', can_capture)
    journal = Journal(path)
    with fake_cuda(), pytest.raises(measuring.ProcessLost, match=r'tsm, graph .*not permitted') as lost:
        measure(graphs('layer tim', 'tsm', 'layer shift'), journal=journal)
    first, bad, last = lost.value.entries
    assert poisoned == [True] and last['missing'] == NO_TIME
    assert len(first['samples']) == 2  # what was captured before can be replayed
    # a fresh process leaves it alone, and has the rest
    with fake_cuda():
        first, again, last = measure(graphs('layer tim', 'tsm', 'layer shift'), journal=Journal(path))
    assert again['missing'] == bad['missing'] and len(first['samples']) == len(last['samples']) == 2
    assert poisoned == [True]


@pytest.mark.slow
def test_a_device_that_is_lost_while_it_is_timed_leaves_all_to_the_next_process(monkeypatch, capsys):
    def lost(*args):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
    monkeypatch.setattr(measuring.timing, 'interleave', lost)
    monkeypatch.setattr(measuring, 'can_capture', lambda: False)
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
        with pytest.raises(RuntimeError, match='illegal memory access'):  # it does answer: somebody else's fault
            measure(graphs('layer tim'))
        monkeypatch.setattr(measuring, '_lives', lambda: False)
        with pytest.raises(measuring.ProcessLost, match='while frames was timed') as reason:
            measure(graphs('layer tim', 'layer shift'))
    assert [e['missing'] for e in reason.value.entries] == [NO_TIME] * 2


def test_who_ends_two_processes_is_not_tried_a_third_time(tmp_path):
    path, c = tmp_path / 'r.journal', Candidate('tsm', 'graph', CUDA)
    for _ in range(2):
        journal = Journal(path)
        assert not journal.failed
        left = journal.attempt(c)
        left.__enter__()  # and the process ends
    assert Journal(path).failed == {c: 'its process ended 2 times before it was ready'}
    assert not Journal(path).anew().failed
    with contextlib.suppress(ValueError), Journal(path).attempt(c):
        raise ValueError
    assert not Journal(path).attempts  # an exception is no end
    Journal(path).close()
    assert not path.exists()


def test_a_layer_in_a_graph_is_swept_over_all_its_inputs(monkeypatch):
    c, shop = Candidate('layer cme', 'graph', CUDA._replace(size=2)), Workshop()
    with fake_cuda():
        sweep, inputs = shop.run(c), shop.inputs(c)
        assert sweep.calls == len(inputs) > 1
        assert measuring._error(c, sweep, shop) < .01
        calls, interleave = [], measuring.timing.interleave

        def count(candidates, *args):
            calls.extend(candidates)
            samples = interleave(candidates, *args)
            return samples._replace(time={key: [2. * sweep.calls] * 2 for key in samples.time})
        monkeypatch.setattr(measuring.timing, 'interleave', count)
        entry, = measure(plan.Study('layers', (c,), 1, 2))
    assert entry['samples'] == [2., 2.] and calls == [c]  # seconds of one call
