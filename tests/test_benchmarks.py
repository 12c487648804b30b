"""The benchmarks measure what they say: the method, the floors, the tables. How fast anything is, is not tested."""
import collections
import itertools
import json
import random
import re
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomize
from torch import nn

from benchmarks import candidates, networks, ops, report, timing
from benchmarks.runtime import render

ROOT = Path(__file__).parents[1]


# The method

def sleeper(seconds, log=None, name=None):
    def call():
        if log is not None:
            log.append(name)
        time.sleep(seconds)
    return call


def test_every_candidate_is_called_once_a_round_in_shuffled_order():
    log = []
    samples = timing.interleave({name: sleeper(0, log, name) for name in 'abcd'}, 'cpu', rounds=12, seconds=60)
    assert log[:4] == list('abcd')  # untimed
    rounds = [log[i:i + 4] for i in range(4, len(log), 4)]
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
    assert timing.ratio(samples.time['long'], samples.time['short'])['median'] > 1.5


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
        'long': call('long', 10e-6, 5e-3), 'tiny': call('tiny', 1e-9, 1e-9)}, 'cuda', rounds=6, seconds=60)
    assert samples.time['device-bound'] == pytest.approx([100e-6] * 6, rel=.05)
    assert samples.host['device-bound'] == pytest.approx([10e-6] * 6)
    assert samples.time['host-bound'] == pytest.approx([100e-6] * 6, rel=.05)
    assert samples.host['host-bound'] == pytest.approx([100e-6] * 6)
    # a millisecond of calls, one if it takes longer, and no more than a thousand; three are for warming up, three to
    # find that out
    assert launches['long'] == 6 + 6
    assert launches['device-bound'] == pytest.approx(6 + 6 * 10, abs=6)
    assert launches['tiny'] == 6 + 6 * 1000


def test_nothing_to_time():
    with pytest.raises(ValueError, match='there must be candidates and rounds, got 0 and 5'):
        timing.interleave({}, 'cpu', 5, 1)
    with pytest.raises(ValueError, match='got 1 and 0'):
        timing.interleave({'a': sleeper(0)}, 'cpu', 0, 1)


def test_no_collection_of_garbage_in_a_sample_and_the_collector_is_put_back():
    import gc
    seen = []
    timing.interleave({'a': lambda: seen.append(gc.isenabled())}, 'cpu', 5, 60)
    assert seen[1:] == [False] * 5 and gc.isenabled()


def test_ratios_are_paired():
    # a machine that gets ten times slower: the ratio does not notice, the quotient of medians would
    base = [1., 1., 10., 10., 10.]
    values = [2., 2., 20., 20., 20.]
    assert timing.ratio(values, base) == {'median': 2, 'q1': 2, 'q3': 2, 'rounds': 5}
    unpaired = random.Random(0).sample(values, 5)
    assert timing.ratio(unpaired, base)['q3'] > 2
    with pytest.raises(ValueError, match='within rounds, got 1 and 2'):
        timing.ratio([1.], [1., 2.])


def test_summary_and_how_it_is_shown():
    entry = timing.summary([5., 1., 3., 2., 4.])
    assert entry == {'median': 3, 'q1': 2, 'q3': 4, 'rounds': 5}
    assert timing.summary([7.]) == {'median': 7, 'q1': 7, 'q3': 7, 'rounds': 1}
    assert timing.show(entry) == '3.00 [2.00, 4.00]'
    assert timing.show(entry, 1e3, 0) == '3000 [2000, 4000]'
    assert timing.show(None) == ''


def test_inputs_are_rotated():
    seen = []
    call = timing.rotate(lambda x, y: seen.append((x, y)), [[1, 2], [3, 4]])
    for _ in range(3):
        call()
    assert seen == [(1, 2), (3, 4), (1, 2)]


def test_saved_bytes_counts_each_storage_once_and_not_what_is_there_anyway():
    x = torch.randn(10, 10, requires_grad=True)
    w = torch.randn(10, 10, requires_grad=True)
    # x @ w keeps x and w; exp keeps its result; the square keeps that same result again, twice
    assert timing.saved_bytes(lambda: (x @ w).exp().square().sum().backward(), [x, w]) == 400
    assert timing.saved_bytes(lambda: (x @ w).exp().square().sum().backward()) == 1200
    assert timing.saved_bytes(lambda: x[:5].exp()) == 200


def test_relative_error_is_of_the_worst_tensor():
    truth = [torch.tensor([1., -4.], dtype=torch.float64), torch.tensor([10.], dtype=torch.float64)]
    got = [torch.tensor([1., -3.]), torch.tensor([11.])]
    assert timing.relative_error(got, truth) == .25
    assert timing.relative_error(truth, truth) == 0
    with pytest.raises(ValueError):
        timing.relative_error(got, truth[:1])
    with pytest.raises(FloatingPointError):  # not the worst by comparison
        timing.relative_error([got[0], torch.tensor([float('nan')])], truth)


# The operators

@pytest.mark.parametrize(('op', 'backward', 'width', 'bytes_', 'flops'), [
    # 2 clips of 8 frames of 16x3x3 in two bytes: X = 16 * 16 * 9 * 2 = 4608 bytes
    ('front', False, 4, 3 * 4608, 0),
    ('front', True, 4, 7 * 4608, 0),
    # Y = 4608 / 4; the product has 16 * 9 pixels, 16 * 4 multiply-adds each
    ('front_conv', False, 4, 2 * 4608 + 1152, 2 * 144 * 64),
    ('front_conv', True, 4, 4 * 4608 + 3 * 1152, 6 * 144 * 64),
    ('sme', False, 16, 3 * 4608, 2 * 144 * 256),
    ('motion_conv', True, 16, 8 * 4608, 6 * 144 * 256),
])
def test_floors(op, backward, width, bytes_, flops):
    case = ops.Case(op, backward, 16, 3, width, 2)
    assert ops.floor_bytes(case, 2) == bytes_
    assert ops.floor_flops(case) == flops


def test_cases_are_the_inputs_of_the_blocks_of_a_resnet50():
    model = timm.create_model('resnet50', device='meta')
    front, motion = collections.Counter(), collections.Counter()
    size = 56
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            front[block.conv1.in_channels, size, block.conv1.out_channels] += 1
            size //= block.conv2.stride[0]
        motion[block.conv3.out_channels, size, block.conv3.out_channels] += 1
    assert set(ops.FRONT) <= set(front)
    assert {channels for channels, *_ in ops.FRONT} == {channels for channels, *_ in front}
    assert set(ops.MOTION) == set(motion)


def test_cases_cover_operators_passes_and_batches():
    cases = ops.cases(list(ops.FUNCTIONS), [1, 8])
    assert len(set(cases)) == len(cases) == 2 * (10 + 10 + 4 + 4)
    assert {case.backward for case in cases if case.op == 'sme'} == {False}
    assert len(ops.cases(['sme'], [1], quick=True)) == 1


def test_compiling_leaves_time_for_the_rows_that_are_left():
    planner = ops.Planner(1, 'cuda')  # 60 s: a compilation is taken for 30 s, a row for 2
    assert planner.may_compile(10) and not planner.may_compile(16)
    planner.note('compile', 5)
    planner.note('row', 5)
    assert planner.may_compile(10) and not planner.may_compile(12)
    planner.note('row', 200)
    assert not planner.may_measure()


# The networks

def test_goals_name_what_is_measured():
    for goal in networks.GOALS:
        assert {goal.network, goal.base} <= set(networks.NETWORKS)
        assert set(goal.modes) | set(goal.base_modes) <= set(networks.MODES[goal.device])
        if goal.what != 'inference':
            assert {goal.network, goal.base} <= set(networks.TRAINED)
        planned = networks.plan(goal.device, networks.MODES[goal.device])
        for label, modes in ((goal.network, goal.modes), (goal.base, goal.base_modes)):
            assert all((label, mode) in planned for mode in modes)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_what_has_to_be_compiled_comes_last(device):
    pairs = networks.plan(device, networks.MODES[device])
    compiled = [mode in networks.COMPILED for _, mode in pairs]
    assert compiled == sorted(compiled) and len(set(pairs)) == len(pairs)


def test_the_plain_network_is_the_mean_over_the_frames_and_folds_exactly():
    torch.manual_seed(0)
    model = randomize(networks.build('resnet50')).double()
    x = torch.randn(2 * networks.FRAMES, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(want, model.network(x).view(2, networks.FRAMES, -1).mean(1))
        folded = candidates.fold(model, x)
        torch.testing.assert_close(folded(x), want)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # it was a copy
    assert not any(m.training for m in folded.modules())  # or graphed would refuse it


def test_networks_are_built_alike_and_hide_no_term():
    first, second = (networks.build('cmr_resnet50') for _ in range(2))
    for (key, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert not first.training
    for name, m in first.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert all(t.unique().numel() > 1 for t in (m.weight, m.bias, m.running_mean, m.running_var)), name


def seconds(*values):
    return {'seconds': timing.summary(values), 'samples': list(values), 'error': 1e-7}


ENVIRONMENT = {
    'date': '2001-02-03T04:05:06+00:00', 'command': 'python -m something', 'machine': 'M', 'gpu': 'G', 'threads': 2,
    'versions': {'torch': '1.2', 'triton': '3.4'}}


def setting(device='cpu', **candidates):
    return {
        **ENVIRONMENT, 'device': device, 'dtype': 'fp32', 'batch': 1, 'size': 224, 'layout': 'channels_last',
        'inference': {key.replace('_', ', '): entry for key, entry in candidates.items()}}


def test_goals_compare_within_rounds_and_with_the_best_mode():
    entry = setting(
        plain_eager=seconds(4., 40., 4.), plain_folded=seconds(2., 20., 2.), cmr_folded=seconds(3., 30., 3.))
    verdict = networks.judge([entry])[-1]
    assert verdict['of'] == 'cmr, folded / plain, folded'
    assert verdict['ratio'] == {'median': 1.5, 'q1': 1.5, 'q3': 1.5, 'rounds': 3}
    assert verdict['reached'] is False
    entry['inference']['cmr, folded'] = seconds(2.2, 22., 2.2)
    assert networks.judge([entry])[-1]['reached'] is True


def test_goals_that_were_not_measured_say_so():
    verdicts = networks.judge([setting(plain_folded=seconds(1.), cmr_folded=seconds(1.))])
    assert len(verdicts) == len(networks.GOALS)
    assert [verdict['ratio'] is None for verdict in verdicts] == [goal.device == 'cuda' for goal in networks.GOALS]
    lines = networks.render_goals(verdicts).splitlines()[2:]
    assert ['not measured yet' in line for line in lines] == [goal.device == 'cuda' for goal in networks.GOALS]


def test_settings_are_added_to_those_of_a_file():
    old = [setting(plain_eager=seconds(1.)), {**setting('cuda'), 'dtype': 'fp16'}]
    new = [setting(plain_eager=seconds(2.))]
    assert networks.merge(old, new) == [old[1], new[0]]


def test_training_goals_take_time_and_memory():
    entry = {**setting('cuda'), 'batch': 8, 'training': {
        'plain': {**seconds(1., 2.), 'memory_bytes': 100}, 'cmr': {**seconds(1.3, 2.6), 'memory_bytes': 130}}}
    found = {verdict['name']: verdict for verdict in networks.judge([entry]) if verdict['ratio']}
    assert found['training step, to plain']['ratio']['median'] == pytest.approx(1.3)
    assert found['training step, to plain']['reached']
    assert found['peak memory of a training step, to plain']['ratio']['median'] == 1.3
    assert not found['peak memory of a training step, to plain']['reached']


# The tables

def cells(table):
    lines = [line for line in table.splitlines() if line.startswith('|')]
    head, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row)) for row in rows]


def ops_results(device='cpu'):
    def variant(*values):
        return {
            'seconds': timing.summary(values), 'over_floor': timing.summary(values), 'error': 2e-7,
            'bytes_per_second': timing.summary([1e9 / value for value in values]), 'memory_bytes': 3_000_000,
            **({'host_seconds': timing.summary(values)} if device == 'cuda' else {})}
    return {
        **ENVIRONMENT, 'device': device, 'dtype': 'fp32', 'layout': 'channels_last',
        'rates': {'copy': timing.summary([1e9, 2e9, 3e9]), 'product': timing.summary([1e12, 2e12, 3e12])},
        'rows': [{
            **ops.Case('front_conv', True, 256, 56, 64, 1)._asdict(),
            'variants': {
                'dispatched': variant(.001, .002, .003), 'reference': variant(.002, .004, .006),
                'compiled reference': {'missing': 'no time to compile'}},
            'ratios': {'reference': timing.ratio([.001, .002, .003], [.002, .004, .006])}}]}


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_table_of_operators(device):
    text = ops.render(ops_results(device))
    row, = cells(text)
    assert row['operator'] == 'front_conv, forward + backward' and row['block input'] == '256x56x56 to 64'
    assert row['dispatched, ms'] == '2.00 [1.50, 2.50]' and row['reference, ms'] == '4.00 [3.00, 5.00]'
    assert row['compiled reference, ms'] == '(no time to compile)' and row['dispatched / compiled'] == ''
    assert row['dispatched / reference'] == '0.50 [0.50, 0.50]'
    assert '3.0, 3.0, -' in row.values()
    assert ('host, ms' in row) == any('peak MB' in key for key in row) == (device == 'cuda')
    assert '2.0 [1.5, 2.5] GB/s' in text and '2.00 [1.50, 2.50] TFLOP/s' in text
    assert 'python -m something' in text and 'M, 2 threads' in text
    assert ('G, host M' in text) == (device == 'cuda')


def test_table_of_networks():
    entry = setting(plain_eager=seconds(2., 4.), plain_folded=seconds(1., 2.), cmr_eager=seconds(3., 6.),
                    cmr_frozen={'missing': 'no time to compile'})
    entry['training'] = {
        'plain': {**seconds(1., 2.), 'memory_bytes': 100e6}, 'cmr': {**seconds(2., 4.), 'memory_bytes': 150e6}}
    text = networks.render({'settings': [entry]})
    inference, training = text.split('| training step')
    rows = {row['network, mode']: row for row in cells(inference)}
    assert rows['cmr, eager']['ms'] == '4500.00 [3750.00, 5250.00]'
    assert rows['cmr, eager']['to plain, same mode'] == '1.50 [1.50, 1.50]'
    assert rows['cmr, eager']['to plain, best mode (folded)'] == '3.00 [3.00, 3.00]'
    assert rows['cmr, frozen']['ms'] == '(no time to compile)'
    assert '| cmr | 3000.00 [2500.00, 3500.00] | 2.00 [2.00, 2.00] | 150 | 1.50 |' in training


def test_every_time_and_ratio_has_its_quartiles():
    entry = setting(plain_eager=seconds(2., 4.), cmr_eager=seconds(3., 6.), cmr_folded=seconds(3., 6.))
    tables = [ops.render(ops_results()), networks.render({'settings': [entry]}),
              networks.render_goals(networks.judge([entry]))]
    timed = re.compile(r'\bms\b|to plain|dispatched / |GB/s|ratio')
    for row in itertools.chain(*map(cells, tables)):
        for head, cell in row.items():
            if timed.search(head) and cell and cell[0] != '(' and cell != 'not measured yet':
                assert re.fullmatch(r'[\d.]+ \[[\d.]+, [\d.]+\]', cell), (head, cell)


def kernel(name, sm, reg, failures=()):
    return {'kernel': name, 'sm': sm, 'reg': reg, 'shared': 100 * reg, 'stack': 0, 'tensor_cores': ['HMMA'],
            'failures': list(failures)}


def test_table_of_kernels_has_the_worst_variant():
    rows = cells(report.render_kernels({
        **ENVIRONMENT, 'kernels': [kernel('_a', 80, 10), kernel('_a', 80, 30), kernel('_a', 90, 20, ['no HGMMA'])]}))
    assert [row['variants'] for row in rows] == ['2', '1']
    assert rows[0]['registers, at most'] == '30' and rows[0]['bytes of shared memory, at most'] == '3000'
    assert [row['checks'] for row in rows] == ['ok', '1 fail']


# The page

RUNTIME_NAMES = [
    'counts', *(f'{device}-{name}' for device in ('cpu', 'cuda') for name in ('plot', *render.SECTIONS)), 'repeated']
NAMES = ['ops-cpu', 'ops-cuda', 'networks-cpu', 'networks-cuda', 'goals', 'kernels']


def run(module, *args):
    return subprocess.run(
        [sys.executable, '-m', f'benchmarks.{module}', *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_what_has_no_results_says_which_command_makes_them(tmp_path):
    rendered = report.sections(tmp_path)
    assert sorted(rendered) == sorted(NAMES)
    for name in set(NAMES) - {'goals'}:
        module, file = name.split('-')[0], f'{name}.json'
        assert re.fullmatch(rf'not measured yet: `python -m benchmarks\.{module}.* --out benchmarks/results/{file}`',
                            rendered[name])
    assert rendered['goals'].count('not measured yet') == len(networks.GOALS)
    rendered = report.runtime_sections(tmp_path)
    assert sorted(rendered) == sorted(RUNTIME_NAMES) and all('not measured yet' in text for text in rendered.values())


def test_pages_are_rewritten_between_their_markers(tmp_path, monkeypatch, capsys):
    page, readme, results = tmp_path / 'docs/performance.md', tmp_path / 'README.md', tmp_path / 'benchmarks/results'
    runtime = tmp_path / 'docs/benchmarks.md'
    page.parent.mkdir()
    results.mkdir(parents=True)
    page.write_text(''.join(f'<!-- {name} -->\nOLD TEXT\n<!-- /{name} -->\nMore of {name}.\n' for name in NAMES))
    runtime.write_text(''.join(f'<!-- {name} -->\nOLD TEXT\n<!-- /{name} -->\n' for name in RUNTIME_NAMES))
    readme.write_text('<!-- goals -->\nOLD TEXT\n<!-- /goals -->\n')
    (results / 'ops-cpu.json').write_text(json.dumps(ops_results()))
    monkeypatch.setattr(report, 'stale_pages', partial(report.stale_pages, tmp_path))
    monkeypatch.setattr(report, 'stale_plots', partial(report.stale_plots, tmp_path))

    def main(*args):
        monkeypatch.setattr(sys, 'argv', ['report', *args])
        return report.main()

    assert main('--check') == 1 and 'OLD TEXT' in page.read_text()
    error = capsys.readouterr().err
    assert all(f'{name} is stale' in error for name in ('performance.md', 'benchmarks.md', 'README.md'))
    assert main() == 0
    text = page.read_text()
    assert 'OLD TEXT' not in text + readme.read_text() + runtime.read_text()
    assert 'front_conv, forward + backward' in text
    assert all(f'More of {name}.' in text for name in NAMES)
    assert main('--check') == 0
    assert main() == 0 and page.read_text() == text


def test_the_pages_show_the_committed_results():
    assert not report.stale_pages() and not report.stale_plots()


@pytest.mark.parametrize('text', [
    '', '<!-- a -->', '<!-- /a --> <!-- a -->', '<!-- a --><!-- /a --><!-- a --><!-- /a -->'])
def test_page_without_its_markers(text):
    with pytest.raises(ValueError, match='there must be one <!-- a --> and one <!-- /a --> after it'):
        report.replace(text, {'a': 'new'})


@pytest.mark.parametrize(('module', 'args', 'wanted'), [
    ('ops', ['--ops', 'conv'], list(ops.FUNCTIONS)),
    ('ops', ['--dtype', 'fp8'], list(timing.DTYPES)),
    ('ops', ['--device', 'tpu'], ['cpu', 'cuda']),
    ('ops', ['--layout', 'nhwc'], ['channels_last', 'contiguous']),
    ('ops', ['--batch', '0'], ['1 or more']),
    ('networks', ['--modes', 'fast'], [*networks.MODES['cpu'], *networks.MODES['cuda']]),
    ('networks', ['--device', 'cpu', '--modes', 'graph'], list(networks.MODES['cpu'])),
    ('networks', ['--rounds', '0'], ['more than 0']),
    ('networks', ['--minutes', '-1'], ['more than 0']),
    ('networks', ['--add'], ['--out']),
    ('networks', ['--out', 'no/such/folder/x.json'], ["there is no folder 'no/such/folder'"]),
    ('ops', ['--out', 'no/such/folder/x.json'], ["there is no folder 'no/such/folder'"]),
])
def test_bad_arguments_fail_at_once_and_list_the_choices(module, args, wanted, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [module, *args])
    with pytest.raises(SystemExit) as stop:
        {'ops': ops, 'networks': networks}[module].main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in wanted), error


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
@pytest.mark.parametrize('module', [ops, networks])
def test_no_device(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', '--device', 'cuda'])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and 'choose cpu' in capsys.readouterr().err


# End to end

def test_quick_run_of_the_operators(tmp_path):
    done = run('ops', '--quick', '--device', 'cpu', '--ops', 'front', 'sme', '--out', tmp_path / 'ops.json')
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'ops.json').read_text())
    assert len(results['rows']) == 3 and results['rows_left_out'] == 0
    for row in results['rows']:
        assert list(row['variants']) == list(ops.VARIANTS)
        assert all(variant['error'] < 1e-4 and variant['seconds']['median'] > 0 for variant in row['variants'].values())
        assert list(row['ratios']) == ['reference', 'compiled reference']
        assert row['floor_seconds'] > 0
    assert cells(done.stdout) == cells(ops.render(results))


def test_quick_run_of_the_networks(tmp_path):
    out = tmp_path / 'networks.json'
    done = run('networks', '--quick', '--device', 'cpu', '--out', out)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    entry, = results['settings']
    assert len(entry['inference']) == 9 and list(entry['training']) == list(networks.TRAINED)
    assert all(candidate['error'] < 1e-4 for candidate in entry['inference'].values())
    assert results['goals'] == networks.judge(results['settings'])
    memory = {label: trained['memory_bytes'] for label, trained in entry['training'].items()}
    assert memory['plain'] < memory['cmr'] < memory['cmr reference']
    assert 'smoke run' in done.stdout
