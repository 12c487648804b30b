"""What the benchmarks compare: the rows of the tables, the operators' shapes and floors, the studies."""
import collections

import pytest
import timm
import torch
from benchmark_results import BASE

from benchmarks.runtime import goals, models, operators, plan
from benchmarks.runtime.candidate import MODES, ON, Candidate
from benchmarks.runtime.workshop import build
from cmr_layers import CME, SME, TIM, released

# Rows


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


def test_torchvisions_networks_get_their_axes():
    model = build('r3d_18', 4)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, model(x[None]))
        torch.testing.assert_close(y, model.network(x.movedim(1, 0)[None]))  # (C, T, H, W)


# Operators

@pytest.mark.parametrize(('op', 'backward', 'outputs', 'bytes_', 'flops'), [
    # 2 clips of 8 frames of 16x3x3 in two bytes: X = 16 * 16 * 9 * 2 = 4608 bytes
    ('cme_tim', False, 16, 3 * 4608, 0),
    ('cme_tim', True, 16, 7 * 4608, 0),
    # Y = 4608 / 4; the product has 16 * 9 pixels, 16 * 4 multiply-adds each
    ('cme_tim_conv', False, 4, 2 * 4608 + 1152, 2 * 144 * 64),
    ('cme_tim_conv', True, 4, 4 * 4608 + 3 * 1152, 6 * 144 * 64),
    ('sme', False, 16, 3 * 4608, 2 * 144 * 256),
    ('motion_conv', True, 16, 8 * 4608, 6 * 144 * 256),
])
def test_floors(op, backward, outputs, bytes_, flops):
    case = operators.Case(op, 16, 3, outputs)
    assert operators.floor_bytes(case, 2 * 8 * 3 ** 2, 2, backward) == bytes_
    assert operators.floor_flops(case, 2 * 8 * 3 ** 2, backward) == flops


def test_what_rates_are_taken_from_does_the_work_that_it_says():
    x = torch.randn(8, operators.RATES['product'].channels, 2, 2)
    product = operators.RATES['product'](8)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = product(x.contiguous(memory_format=layout))
        assert y.numel() == x.numel() and y._base is None  # the product's, and not a copy's
    assert operators.RATES['product'].work(8 * 4, 4) == 2 * 32 * y.shape[1] ** 2
    frames = torch.randn(8, operators.RATES['copy'].channels, 2, 2)
    copy = operators.RATES['copy'](8)
    assert torch.equal(copy(frames), frames) and copy(frames).data_ptr() == copy(frames).data_ptr() != frames.data_ptr()
    assert operators.RATES['copy'].work(8 * 4, 4) == 2 * frames.nbytes


def test_operators_have_the_shapes_of_the_blocks_of_a_resnet50():
    model = timm.create_model('resnet50', device='meta')
    blocks, stages = collections.Counter(), collections.Counter()
    size = 56
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            blocks[block.conv1.in_channels, size, block.conv1.out_channels] += 1
            size //= block.conv2.stride[0]
        stages[block.conv3.out_channels, size] += 1
    found = {op: {case[1:] for case in operators.CASES.values() if case.op == op} for op in operators.PASSES}
    assert found['cme_tim_conv'] <= set(blocks)
    assert {channels for channels, *_ in found['cme_tim_conv']} == {channels for channels, *_ in blocks}
    assert found['cme_tim'] == {(channels, size, channels) for channels, size, _ in found['cme_tim_conv']}
    assert found['sme'] == found['motion_conv'] == {(channels, size, channels) for channels, size in stages}


# Studies

def test_modes_are_what_can_be_done_to_a_network_where():
    assert set(ON['cpu']) == {'reference', 'unfolded', 'folded', 'compiled', 'frozen', 'compiled-reference'}
    assert set(ON['cuda']) == set(MODES) - {'frozen'}
    assert {mode for mode in MODES if MODES[mode].path == 'reference'} == {
        'reference', 'compiled-reference', 'compiled-reference-graph'}


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_studies_hold_what_they_promise(device):
    base = BASE._replace(device=device, size=224)
    found = {study.name: study for study in plan.studies(list(plan.STUDIES), base, 3, 6)}
    assert list(found) == list(plan.STUDIES)
    for name, study in found.items():
        assert {c.mode for c in study.candidates} <= set(ON[device])
        at = {}
        for c in study.candidates:
            at.setdefault((c.mode, c.setting, c.width, c.training), set()).add(c.model)
        if name == 'backbones':  # each beside itself
            assert all(group == set(models.BACKBONES) for key, group in at.items() if MODES[key[0]].path == 'auto')
        elif name not in ('layers', 'operators'):
            assert all(group >= set(plan.BASES) for key, group in at.items() if MODES[key[0]].path == 'auto'), name
    every = [c for study in found.values() for c in study.candidates]
    assert len(set(every)) == len(every)  # one number for one question
    latency = found['latency'].candidates
    assert {c.model for c in latency if c.mode == 'reference'} == set(models.TABLE_7)
    assert {*models.PLACEMENTS, *models.REDUCTIONS} <= {c.model for c in latency}
    assert {c.mode for c in latency if c.model == 'cmr'} == set(ON[device])
    assert {c.setting for c in latency} == {base}
    assert {c.setting.batch for c in found['throughput'].candidates} == {8}
    assert {c.setting.frames for c in found['frames'].candidates} == {16}
    assert set(models.OFF_THE_SHELF) <= {c.model for c in found['frames'].candidates}
    assert all(c.training for c in found['training'].candidates)
    assert {c.setting.layout for c in found['precision'].candidates} == {'channels_last', 'contiguous'}
    assert {c.setting.dtype for c in found['precision'].candidates} >= (
        {'fp32', 'bf16'} if device == 'cpu' else {'fp32', 'tf32', 'bf16'})
    for axis in plan.AXES:
        points = plan.scaled(base, axis)
        assert len(points) > 2 and set(points) <= {(c.setting, c.width) for c in found['scaling'].candidates}
    assert {c.setting.frames for c in found['layers'].candidates} == {4, 8, 16, 32, 64}


def test_operators_are_measured_forward_and_backward_in_three_forms_each_by_itself():
    study, = plan.studies(['operators'], BASE._replace(size=224), 1, 6)
    groups = study.groups()
    assert [c for group in groups for c in group.candidates] == list(study.candidates)
    for group in groups[len(operators.RATES):]:
        assert [c.mode for c in group.candidates] == ['reference', 'unfolded', 'compiled-reference']
        assert len({(c.model, c.training, c.setting) for c in group.candidates}) == 1
    assert len(groups) == 2 + 2 * (5 + 5) + 4 + 4
    assert {c.training for c in study.candidates if c.model.startswith('sme')} == {False}
    assert {c.setting.size for c in study.candidates if c.model.endswith(' 2048')} == {7}
    assert study.rounds > 6 and plan.studies(['latency'], BASE, 1, 6)[0].groups()[0].name == 'latency'


def test_what_is_compiled_comes_last_and_in_the_first_pass_only():
    study, = plan.studies(['latency'], BASE, 3, 4)
    assert study.of_pass(0) == study and {study.first_pass(c) for c in study.candidates} == {0}
    compiled = [c.compiles for c in study.of_pass(0).candidates]
    assert compiled == sorted(compiled) and any(compiled)
    assert study.of_pass(1).candidates == tuple(c for c in study.candidates if not c.compiles)


CUDA = BASE._replace(device='cuda', size=224)


@pytest.mark.parametrize('name', plan.STUDIES)
def test_on_cuda_the_first_pass_has_what_is_worth_most_and_the_second_the_rest(name):
    study, = plan.studies([name], CUDA, 3, 4)
    first, second, third = (study.of_pass(number).candidates for number in range(3))
    assert {*first, *second} == set(study.candidates)
    assert all((c in first) == (study.first_pass(c) == 0) for c in study.candidates)
    assert all(c.compiles for c in set(first) - set(second))  # nothing is compiled twice
    assert set(third) == {c for c in study.candidates if not c.compiles}
    if name in ('latency', 'throughput'):
        at = {(c.model, c.mode) for c in first}
        assert at >= {(model, mode) for model in ('tsn', 'tsm', 'tei', 'stm', 'tdrl', 'cme', 'sme', 'cmr')
                      for mode in ('unfolded', 'graph', 'compiled-graph')}
        compiled = [c.compiles for c in first]
        assert compiled == sorted(compiled) and [c.model for c in first][:5] == ['tsn', 'tsn', 'tsn', 'cmr', 'cmr']
        assert len(first) < 35


def test_on_cuda_all_goals_are_judged_after_the_first_pass():
    first = {c for study in plan.studies(list(plan.STUDIES), CUDA, 3, 4) for c in study.of_pass(0).candidates}
    for goal in (goal for goal in goals.GOALS if goal.device == 'cuda'):
        for model, modes in (('cmr', goal.modes), (goal.base, goal.base_modes)):
            for mode in modes:
                wanted = Candidate(model, mode, CUDA._replace(batch=goal.batch), 1, goal.what != 'inference')
                assert wanted in first, (goal, wanted)


def test_on_cuda_a_choice_that_leaves_the_first_pass_nothing_has_one_all_the_same():
    study, = plan.studies(['latency'], CUDA, 3, 4, ['gsm'], ['folded'])
    assert [c.model for c in study.of_pass(0).candidates] == ['tsn']  # of Table 7, and judged
    study, = plan.studies(['latency'], CUDA, 3, 4, ['gsm'], ['reference'])
    assert study.of_pass(0) == study and len(study.candidates) == 3


def test_on_cuda_captures_that_may_fail_come_last():
    for name in ('latency', 'frames'):
        study, = plan.studies([name], CUDA, 3, 4)
        shelf = [c.model in models.OFF_THE_SHELF and c.mode == 'graph' for c in study.of_pass(1).candidates]
        assert shelf == sorted(shelf)
    assert study.candidates[-1].model == 'mvit_v2_s'
    study, = plan.studies(['layers'], CUDA, 3, 4)
    assert {c.mode for c in study.candidates} == {'graph'}


def test_clips_of_eight_frames_leave_out_who_takes_sixteen():
    study, = plan.studies(['latency'], BASE, 1, 1)
    names = {c.model for c in study.candidates}
    assert 'r3d_18' in names and not {'s3d', 'mvit_v2_s'} & names


def test_a_choice_of_models_keeps_what_ratios_and_floors_are_taken_to():
    study, = plan.studies(['latency'], BASE, 1, 1, ['cmr'], ['reference'])
    assert [(c.model, c.mode) for c in study.candidates] == [
        ('tsn', 'reference'), ('tsm', 'reference'), ('cmr', 'reference')]
    study, = plan.studies(['latency', 'operators'], BASE, 1, 1, ['sme 256'], ['reference'])
    assert [(c.model, c.mode) for c in study.candidates] == [
        ('copy', 'unfolded'), ('product', 'unfolded'), ('sme 256', 'reference')]


def test_goals_name_what_is_measured():
    assert len(goals.GOALS) == 10
    for goal in goals.GOALS:
        base = BASE._replace(device=goal.device, size=224)
        planned = {
            (c.model, c.mode, c.training) for study in plan.studies(list(plan.STUDIES), base, 1, 1)
            for c in study.candidates if c.setting == base._replace(batch=goal.batch)}
        for model, modes in (('cmr', goal.modes), (goal.base, goal.base_modes)):
            assert all((model, mode, goal.what != 'inference') in planned for mode in modes), goal
