"""The runtime benchmark compares what it says, and its statistics, tables and files hold. Speed is not tested."""
import json
import math
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import candidates, timing
from benchmarks.candidates import Setting
from benchmarks.runtime import __main__ as cli
from benchmarks.runtime import measure as measuring
from benchmarks.runtime import models, plan, plot, render
from cmr_layers import CME, SME, TIM, released
from cmr_layers.ops import state

ROOT = Path(__file__).parents[1]
BASE = Setting('cpu', 'fp32', 1, 64, 'channels_last')


# Intervals

def test_what_does_not_vary_has_no_width():
    entry = timing.bootstrap([[2., 2.], [2., 2., 2.]])
    assert entry == {'median': 2, 'low': 2, 'high': 2, 'passes': 2, 'rounds': 5}


def test_passes_that_differ_make_the_interval_as_wide_as_they_are_apart():
    steady = timing.bootstrap([[1., 1.01], [.99, 1.]])
    apart = timing.bootstrap([[1., 1.01], [1.2, 1.21]])
    assert steady['high'] - steady['low'] < .03
    assert apart['low'] <= 1.01 and apart['high'] >= 1.2
    rounds_only = timing.bootstrap([[1., 1.01, 1.2, 1.21] * 5])
    assert rounds_only['high'] - rounds_only['low'] < apart['high'] - apart['low'] + 1e-9


def test_bootstrap_is_the_same_every_time_and_takes_passes_of_any_length():
    values = [[random.Random(i).random() for _ in range(n)] for i, n in enumerate((3, 7, 5))]
    entry = timing.bootstrap(values)
    assert entry == timing.bootstrap(values)
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
        entry = timing.bootstrap(values, resamples=300)
        covered += entry['low'] <= 1 <= entry['high']
    assert 80 <= covered <= 99


def test_ratios_are_taken_within_rounds():
    slow = [[1., 10.], [5.]]
    assert timing.interval([[2., 20.], [10.]], slow) == {'median': 2, 'low': 2, 'high': 2, 'passes': 2, 'rounds': 3}
    with pytest.raises(ValueError, match=r'within rounds, got \[2, 1\] and \[1, 2\] of them'):
        timing.interval(slow, [[1.], [1., 2.]])
    with pytest.raises(ValueError, match=r'passes with rounds, got \[2, 0\]'):
        timing.bootstrap([[1., 2.], []])


def test_peak_of_host_memory():
    def two():
        return torch.ones(250, 1000).add(1).sum()

    def four():
        x = torch.ones(250, 1000)
        y = x.add(1)
        return (y * 2 + x).sum()
    assert timing.peak_host_bytes(two) == pytest.approx(2e6, rel=.01)
    assert timing.peak_host_bytes(four) == pytest.approx(4e6, rel=.01)


# What is compared

def layers(name):
    with torch.device('meta'):
        model = models.MODELS[name].build(8)
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (CME, TIM, SME))


@pytest.mark.parametrize(('name', 'counts'), [
    ('tsn', (0, 0, 0)), ('tim', (0, 16, 0)), ('cme', (16, 16, 0)), ('sme', (0, 16, 4)), ('cmr', (16, 16, 4)),
    ('all-all', (16, 16, 16)), ('first-all', (4, 16, 16)), ('first-first', (4, 16, 4)), ('r4', (16, 16, 4))])
def test_rows_hold_the_layers_that_they_name(name, counts):
    assert layers(name) == counts


@pytest.mark.parametrize(('name', 'reduction'), [('r1', 1), ('r4', 4), ('cmr', 8), ('r16', 16)])
def test_reductions(name, reduction):
    with torch.device('meta'):
        model = models.MODELS[name].build(8)
    assert {m.reduction for m in model.modules() if isinstance(m, CME)} == {(reduction, reduction)}


def test_released_row_is_the_released_variant():
    with torch.device('meta'):
        model = models.MODELS['released'].build(8)
    assert sum(isinstance(m, released.CME) for m in model.modules()) == 16


def test_the_papers_figures():
    # Table 7, and where Table 5 repeats it
    assert {name: (m.latency, m.throughput, m.accuracy) for name, m in models.TABLE_7.items() if m.throughput} == {
        'tsm': (12.3, 107.3, 45.6), 'tei': (20.4, 78.5, 47.4), 'stm': (14.7, 93.2, 49.2), 'tdrl': (63.8, 49.5, 49.8),
        'cme': (18.9, 75.2, 50.6), 'sme': (16.3, 72.6, 50.6), 'cmr': (21.4, 61.8, 51.3)}
    assert [models.PLACEMENTS[name].latency for name in ('all-all', 'first-all', 'first-first')] == [30.4, 26.5, 17.4]
    assert [models.PLACEMENTS[name].accuracy for name in ('all-all', 'first-all', 'first-first')] == [51, 51.2, 50.4]
    assert [models.REDUCTIONS[name].accuracy for name in ('r1', 'r4', 'r16')] == [47.3, 50.6, 50.3]
    assert models.TABLE_7['gsm'].accuracy is None  # of another backbone in the paper


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_studies_hold_what_they_promise(device):
    base = Setting(device, 'fp16', 1, 224, 'channels_last')
    found = {study.name: study for study in plan.studies(list(plan.STUDIES), base, 3, 4)}
    assert list(found) == list(plan.STUDIES)
    for name, study in found.items():
        assert len(set(study.candidates)) == len(study.candidates)
        assert {c.mode for c in study.candidates} <= set(plan.ON[device])
        if name != 'scale-layers':
            at = {}
            for c in study.candidates:
                at.setdefault((c.mode, c.setting, c.width), set()).add(c.model)
            assert all(group >= set(plan.BASES) for group in at.values()), name  # a ratio for everyone
    assert {c.model for c in found['latency'].candidates if c.mode == 'eager'} == set(models.TABLE_7)
    assert {c.setting.batch for c in found['latency'].candidates} == {1}
    assert {c.setting.batch for c in found['throughput'].candidates} == {8}
    assert {c.setting.frames for c in found['frames'].candidates} == {16}
    assert set(models.OFF_THE_SHELF) <= {c.model for c in found['frames'].candidates}
    assert {*models.PLACEMENTS, *models.REDUCTIONS, 'cmr'} <= {c.model for c in found['placement'].candidates}
    assert all(c.training for c in found['training'].candidates)
    assert {c.setting.layout for c in found['precision'].candidates} == {'channels_last', 'contiguous'}
    assert {c.setting.dtype for c in found['precision'].candidates} >= (
        {'fp32', 'bf16'} if device == 'cpu' else {'fp32', 'tf32', 'fp16', 'bf16'})
    assert {c.setting.frames for c in found['scale-frames'].candidates} == {4, 8, 16, 32, 64}
    assert found['modes'].passes == 1 and found['latency'].passes == 3


def test_clips_of_eight_frames_leave_out_who_takes_sixteen():
    study, = plan.studies(['latency'], BASE, 1, 1)
    names = {c.model for c in study.candidates}
    assert 'r3d_18' in names and not {'s3d', 'mvit_v2_s'} & names


def test_a_choice_of_models_keeps_what_ratios_are_taken_to():
    study, = plan.studies(['latency'], BASE, 1, 1, ['cmr'], ['eager'])
    assert [(c.model, c.mode) for c in study.candidates] == [('tsn', 'eager'), ('tsm', 'eager'), ('cmr', 'eager')]


@pytest.mark.parametrize('name', ['r3d_18', 's3d'])
def test_torchvisions_networks_get_their_axes(name):
    model = measuring.build(name, 16)
    x = torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, model(x[None]))
        torch.testing.assert_close(y, model.network(x.movedim(1, 0)[None]))  # (C, T, H, W)


# Folding

@pytest.mark.parametrize(('name', 'left'), [
    ('tsn', 0), ('tei', 0), ('stm', 0), ('tdrl', 0), ('tea', 0), ('gsm', 32), ('cmr', 0), ('released', 0),
    ('r3d_18', 0)])
def test_folded_networks_compute_the_same(name, left):
    model = measuring.build(name, 4)
    x = torch.randn(8, 3, 64, 64)
    folded = candidates.fold(model, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == left  # GSM stands between conv3 and its batch norm


class Tricky(nn.Module):
    """Convolutions whose batch norm can't be part of them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        y = self.norm1(self.conv1(x).relu_())             # in place: the same tensor, with other values
        return self.norm3(self.conv2(self.norm2(self.conv2(y))))  # one convolution, two norms


def test_nothing_else_is_folded():
    model = candidates.trained(Tricky)
    x = torch.randn(2, 4, 3, 3)
    folded = candidates.fold(model, x)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 3
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x))


def test_networks_are_built_alike():
    first, second = (measuring.build('stm', 8).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# One pass

def study(*pairs, rounds=2, training=False):
    return plan.Study('latency', tuple(plan.Candidate(*pair, BASE, training=training) for pair in pairs), 1, rounds)


def test_a_pass_measures_time_error_and_memory():
    ticks = []
    entries = measuring.measure(
        study(('tsn', 'eager'), ('cmr', 'eager'), ('cmr', 'folded')), 0, timing.Deadline(60), partial(ticks.append, 1))
    assert [(e['model'], e['mode']) for e in entries] == [('tsn', 'eager'), ('cmr', 'eager'), ('cmr', 'folded')]
    assert len(ticks) == 3 * (1 + 2)
    for e in entries:
        assert len(e['samples']) == 2 and min(e['samples']) > 0
        assert e['error'] < 1e-5 and e['memory_bytes'] > 8 * 64 * 16 * 16 * 4  # an activation, at least
        assert Setting.of(e) == BASE
    assert entries[0]['error'] == entries[1]['error'] == 0 != entries[2]['error']
    later = measuring.measure(study(('tsn', 'eager')), 1, timing.Deadline(60))
    assert 'error' not in later[0] and len(later[0]['samples']) == 2


def test_a_pass_of_training():
    entry, = measuring.measure(study(('tim', 'fused'), training=True), 0, timing.Deadline(60))
    assert len(entry['samples']) == 2 and 'error' not in entry and entry['memory_bytes'] > 100e6  # gradients


def test_who_fails_says_so_and_the_others_go_on(monkeypatch, capsys):
    def broken(**kwargs):
        raise RuntimeError('no such luck\nand more')
    monkeypatch.setitem(models.MODELS, 'tsm', models.MODELS['tsm']._replace(build=broken))
    first, second = measuring.measure(study(('tsm', 'eager'), ('tsn', 'eager')), 0, timing.Deadline(60))
    assert first['missing'] == 'RuntimeError: no such luck' and 'samples' not in first
    assert len(second['samples']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_wrong_results_are_no_candidate(monkeypatch, capsys):
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * math.nan
    monkeypatch.setitem(
        models.MODELS, 'tsm', models.MODELS['tsm']._replace(
            build=lambda **_: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Broken(3, 3))))
    entry, = measuring.measure(study(('tsm', 'eager')), 0, timing.Deadline(60))
    assert entry['missing'].startswith('FloatingPointError') and 'samples' not in entry


def test_who_computes_something_else_is_not_timed(monkeypatch, capsys):
    class Other(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * (1.01 if state.path == 'auto' else 1)
    monkeypatch.setitem(models.MODELS, 'tsm', models.MODELS['tsm']._replace(build=lambda **_: Other()))
    eager, fused = measuring.measure(study(('tsm', 'eager'), ('tsm', 'fused')), 0, timing.Deadline(60))
    assert eager['error'] == 0
    assert fused['missing'] == 'ArithmeticError: off by 1e-02 of the largest logit' and 'samples' not in fused


def test_there_is_no_time_left():
    first, second = measuring.measure(study(('tsn', 'eager'), ('tsm', 'eager')), 0, timing.Deadline(-1))
    assert first['missing'] == second['missing'] == measuring.NO_TIME


def test_tf32_is_allowed_where_it_is_meant_and_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for dtype, allowed in (('fp32', (False, False)), ('tf32', (True, True)), ('fp16', before)):
        with measuring.precision(BASE._replace(dtype=dtype)):
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == allowed
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# Tables

def entry(model, mode='fused', samples=(1., 1.), setting=BASE, width=1, **more):
    return {**setting._asdict(), 'model': model, 'mode': mode, 'width': width, 'training': False,
            'samples': list(samples), **more}


def results(*passes, study='latency', device='cpu', **more):
    units = [{'study': study, 'pass': i, 'date': '', 'entries': list(entries)} for i, entries in enumerate(passes)]
    return {
        'date': '2001-02-03T04:05:06+00:00', 'command': 'python -m something', 'machine': 'M', 'gpu': 'G', 'threads': 2,
        'versions': {'torch': '1.2'}, 'device': device, 'base': BASE._asdict(), 'passes': len(passes), 'rounds': 2,
        'quick': False, **more, 'units': units}


def cells(text):
    """Rows and head of a table."""
    head, _, *rows = [
        [cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line.startswith('|')]
    return rows, head


def test_table_7_has_our_ratios_beside_the_papers():
    r = results(
        [entry('tsn', samples=[1., 2.]), entry('tsm', samples=[2., 4.]), entry('cmr', samples=[3., 6.])],
        [entry('tsn', samples=[1., 1.]), entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.])])
    eight = BASE._replace(batch=8)
    r['units'].append({'study': 'throughput', 'pass': 0, 'date': '', 'entries': [
        entry('tsm', samples=[4., 4.], setting=eight), entry('cmr', samples=[5., 5.], setting=eight)]})
    rows, head = cells(render.table_7(r))
    cmr = dict(zip(head, rows[-1]))
    assert rows[-1][0] == 'baseline+CME&SME'
    assert cmr['latency, ms'] == '3000.0 [3000.0, 3750.0]'
    assert rows[-1][head.index('to ResNet-50')] == '3.00 (3.00-3.00)'
    assert head[0] == 'fused mode'
    at = head.index('to TSM')
    assert rows[-1][at:at + 2] == ['1.50 (1.50-1.50)', '1.74']  # 21.4 / 12.3
    assert head[at + 2] == 'throughput, clips/s'
    assert rows[-1][at + 2:] == ['1.60 [1.60, 1.60]', '', '0.80 (0.80-0.80)', '0.58', '51.3']  # 4 / 5; 61.8 / 107.3


def test_ratios_are_of_passes_that_both_have():
    r = results([entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.])], [entry('cmr', samples=[300., 300.])])
    ms = render.measured(r, 'latency')
    assert render.ratio(ms[1], ms[0]) == {'median': 1.5, 'low': 1.5, 'high': 1.5, 'passes': 1, 'rounds': 2}
    assert render.ratio(ms[1], None) is None


def test_what_is_missing_says_why():
    broken = entry('cmr')
    del broken['samples']
    r = results([entry('tsm'), {**broken, 'missing': 'OutOfMemoryError: much'}])
    rows, _ = cells(render.table_7(r))
    assert rows[-1][1] == '(OutOfMemoryError: much)'


def test_host_bound_and_device_bound_are_told_apart():
    r = results([entry('tsm', samples=[1., 1.], host=[.2, .2]), entry('cmr', samples=[1., 1.], host=[.99, .98])],
                device='cuda')
    rows, head = cells(render.table_7(r))
    assert [row[head.index('bound by (host, ms)')] for row in rows] == ['device (200.00)', 'host (985.00)']
    assert render.measured(results([entry('tsm')]), 'latency')[0].host_time() is None


def test_exponents_are_those_of_power_laws():
    def at(frames, power):
        return entry('cmr', samples=[frames ** power, 3 * frames ** power], setting=BASE._replace(frames=frames))
    r = results([at(t, 1.5) for t in (4, 8, 16)], study='scale-frames')
    _, axis = render.AXES['scale-frames']
    fitted = render.exponent(render.measured(r, 'scale-frames'), axis)
    assert [fitted[key] for key in ('median', 'low', 'high')] == pytest.approx([1.5] * 3)
    rows, head = cells(render.scaling(r, 'scale-frames'))
    assert head[2:] == ['4 frames', '8 frames', '16 frames', 'exponent', 'of the last step']
    assert rows[0][-2:] == ['1.50 (1.50-1.50)'] * 2
    assert render.exponent(render.measured(r, 'scale-frames')[:1], axis) is None


def test_every_section_renders_with_and_without_results():
    for name, (names, _) in render.SECTIONS.items():
        empty = render.section({**results(), 'units': []}, name)
        assert empty.startswith('not measured yet: `python -m benchmarks.runtime --device cpu --studies')
        full = results([entry('tsn'), entry('tsm'), entry('cmr', memory_bytes=2_000_000, error=1e-7)], study=names[0])
        if name == 'modes':
            full['units'][0]['entries'].append(entry('cmr', 'folded'))
        text = render.section(full, name)
        assert text.startswith('| ') and 'python -m something' in text and 'passes: ' in text


def test_another_run_is_compared_with_the_intervals():
    old = results([entry('tsm', samples=[1., 1.]), entry('cme', samples=[1.4, 1.6]), entry('cmr', samples=[1.4, 1.6]),
                   entry('sme', samples=[1.4, 1.6])])
    new = results([entry('tsm', samples=[1., 1.]), entry('cme', samples=[1.5, 1.5]), entry('cmr', samples=[1.55, 1.85]),
                   entry('sme', samples=[2., 2.])])
    found = render.compare(new, old)
    assert (found.inside, found.overlapping, found.apart) == (1, 1, 1)
    assert '3 ratios: 1 inside, 1 overlapping, 1 apart' in found.text
    same = render.compare(old, old)
    assert (same.inside, same.overlapping, same.apart) == (3, 0, 0)


# The plot

def test_plot_shows_what_was_measured_and_knows_when_it_is_stale(tmp_path):
    r = results([entry('tsn'), entry('tsm', samples=[2., 2.]), entry('cmr', samples=[3., 3.]), entry('r3d_18')])
    point = next(p for p in plot.points(r) if p.name == 'cmr')
    assert (point.ratio, point.paper, point.accuracy) == (1.5, pytest.approx(21.4 / 12.3), 51.3)
    path = tmp_path / 'plot.svg'
    assert plot.stale(r, path)
    plot.draw(r, path)
    text = path.read_text()
    assert all(label in text for label in ('TSM', 'baseline+CME&amp;SME', 'R3D-18', '2001-02-03'))
    assert not plot.stale(r, path)
    r['units'][0]['entries'][2]['samples'] = [4., 4.]
    assert plot.stale(r, path)


# The command

def run(*args):
    return subprocess.run(
        [sys.executable, '-m', 'benchmarks.runtime', '--device', 'cpu', *map(str, args)], cwd=ROOT, capture_output=True,
        text=True)


@pytest.mark.parametrize(('args', 'words'), [
    (['--studies', 'speed'], list(plan.STUDIES)),
    (['--models', 'resnet'], ['tsm', 'cmr', 'r3d_18']),
    (['--modes', 'fast'], list(plan.MODES)),
    (['--device', 'cpu', '--modes', 'graph'], list(plan.ON['cpu'])),
    (['--device', 'cpu', '--dtype', 'tf32'], ['fp32, fp16, bf16']),
    (['--dtype', 'fp8'], ['fp32', 'tf32', 'fp16', 'bf16']),
    (['--passes', '0'], ["must be a positive int, got '0'"]),
    (['--size', '32'], ['64 or more, got 32']),
    (['--studies', 'latency', '--models', 's3d'], ['s3d is in none of the studies latency; it takes 16 frames']),
    (['--studies', 'placement', '--models', 'gsm'], ['gsm is in none of the studies placement']),
    (['--studies', 'frames', '--models', 's3d', '--size', '112'], ['it takes frames of 224x224']),
    (['--against', 'no.json'], ['--against', 'No such file', 'no.json']),
    (['--against', 'pyproject.toml'], ['pyproject.toml is no JSON']),
    (['--against', 'benchmarks/results/flops.json'], ['flops.json is no result file of benchmarks.runtime']),
    (['--out', 'no/such/x.json'], ["there is no folder 'no/such'"]),
    (['--studies', 'throughput', '--modes', 'eager'], ['nothing is left to measure']),
])
def test_bad_arguments_fail_at_once_and_list_the_choices(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['runtime', *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['runtime', '--device', 'cpu', *map(str, args)])
    return cli.main()


def test_a_run_goes_on_where_its_file_ends(tmp_path, monkeypatch, capsys):
    out, asked = tmp_path / 'r.json', []

    def fake(study, number, deadline, tick):
        asked.append((study.name, number))
        return [entry(c.model, c.mode, setting=c.setting, width=c.width) for c in study.candidates]
    monkeypatch.setattr(cli, 'measure', fake)
    args = ['--studies', 'latency', 'placement', '--models', 'cmr', '--size', '64', '--rounds', '2', '--out', out]
    assert main(monkeypatch, *args, '--passes', '1') == 0
    assert asked == [('latency', 0), ('placement', 0)]
    assert main(monkeypatch, *args, '--passes', '2') == 0
    assert asked[2:] == [('latency', 1), ('placement', 1)]  # and not the first pass again
    saved = json.loads(out.read_text())
    assert [(unit['study'], unit['pass']) for unit in saved['units']] == [
        ('latency', 0), ('placement', 0), ('latency', 1), ('placement', 1)]
    saved['units'][1]['entries'][0]['missing'] = measuring.NO_TIME
    out.write_text(json.dumps(saved))
    assert main(monkeypatch, *args, '--passes', '2') == 0
    assert asked[4:] == [('placement', 0)]
    capsys.readouterr()
    assert main(monkeypatch, *args, '--passes', '2', '--rounds', '3') == 2  # later --rounds wins
    assert 'has rounds 2, this run 3: choose another file, or --fresh' in capsys.readouterr().err
    assert main(monkeypatch, *args, '--passes', '1', '--rounds', '3', '--fresh') == 0
    assert len(json.loads(out.read_text())['units']) == 2


def test_what_a_file_has_is_not_overwritten(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'r.json'
    missing = set()

    def fake(study, *_):
        found = [entry(c.model, c.mode, setting=c.setting) for c in study.candidates]
        for e in found:
            if e['model'] in missing:
                del e['samples']
                e['missing'] = measuring.NO_TIME
        return found
    monkeypatch.setattr(cli, 'measure', fake)
    args = ['--studies', 'latency', '--size', '64', '--rounds', '2', '--passes', '1', '--out', out, '--models']
    missing |= {'cmr'}
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0
    assert 'no time was left for: latency, pass 1: cmr, eager' in capsys.readouterr().err
    before = out.read_text()
    assert main(monkeypatch, *args, 'tei') == 2  # other models
    assert 'has other models or modes of the study latency: choose another file' in capsys.readouterr().err
    missing |= {'tdrl'}
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0  # it got less far than before
    assert out.read_text() == before
    missing.clear()
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0
    assert all('samples' in e for e in json.loads(out.read_text())['units'][0]['entries'])
    assert main(monkeypatch, *args, 'tdrl') == 0  # a part of what is there


def test_results_of_two_machines_are_not_mixed(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'r.json'
    monkeypatch.setattr(cli, 'measure', lambda study, *_: [
        entry(c.model, c.mode, setting=c.setting) for c in study.candidates])
    args = ['--studies', 'latency', '--models', 'cmr', '--size', '64', '--rounds', '2', '--passes', '1', '--out', out]
    assert main(monkeypatch, *args) == 0
    saved = json.loads(out.read_text())
    out.write_text(json.dumps({**saved, 'machine': 'another'}))
    assert main(monkeypatch, *args) == 2
    assert 'has machine "another", this run' in capsys.readouterr().err
    assert json.loads(out.read_text())['machine'] == 'another'


def test_no_progress_bar_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    with pytest.raises(ImportError, match=re.escape('pip install "cmr-layers[bench]"')):
        cli.bar(1, 0)


def test_no_plot_without_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=re.escape('pip install "cmr-layers[bench]"')):
        plot.draw(results(), tmp_path / 'x.svg')


def test_quick_run_and_one_against_it(tmp_path):
    out = tmp_path / 'r.json'
    args = ['--quick', '--studies', 'latency', 'scale-layers', '--models', 'cmr', 'layer cme']
    done = run(*args, '--out', out)
    assert done.returncode == 0, done.stderr
    saved = json.loads(out.read_text())
    assert [unit['study'] for unit in saved['units']] == ['latency', 'scale-layers']
    for e in saved['units'][0]['entries']:
        assert e['error'] < 1e-4 and len(e['samples']) == 2
    assert 'smoke run, no numbers to quote' in done.stdout
    assert 'python -m benchmarks.runtime --device cpu' in done.stdout
    assert 'latency, pass 1 of 1' in done.stderr
    again = run(*args, '--out', out, '--against', out)  # everything is there: nothing is measured, all ratios agree
    assert again.returncode == 0, again.stderr
    assert re.search(r'\d+ ratios: \d+ inside, 0 overlapping, 0 apart', again.stdout)
