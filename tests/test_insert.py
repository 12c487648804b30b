"""insert and restore: any place of any convolutional network, found by name, with the channels that flow there."""
import copy
import pickle
import re
from functools import partial

import pytest
import timm
import torch
from helpers import anatomy, assert_same, randomize_layers, values
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, insert, restore, set_num_frames, temporal_keys
from cmr_layers.clip import ClipLayer

T = 4
LAYERS = {'CME': CME, 'SME': SME, 'TIM': TIM}


class Block(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv, self.act = nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Net(nn.Module):
    """8, 12 and 16 channels, a head, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(nn.Sequential(Block(8, 8), Block(8, 12)), nn.Sequential(Block(12, 16), Block(16,
            16)))
        self.head = nn.Linear(16, 5)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def net():
    return Net().eval()


def images(*shape):
    return torch.randn(*(shape or (2 * T, 3, 16, 16)))


# What flows where

PLACES = [
    ('mobilenetv3_small_050', 'blocks.*.0', 'before'), ('efficientnet_lite0', 'blocks.*', 'after'),
    ('regnetx_002', 's[1-4]', 'before'), ('regnetx_002', 's?.b1.conv2', 'after'), ('convnext_atto', 'stages.*',
        'after'),
    ('convnext_atto', 'stages.*.blocks.*', 'before'), ('repvgg_a0', 'stages.*', 'after'),
    ('densenet121', 'features.denseblock*', 'after'), ('densenet121', 'features.denseblock1.denselayer*.conv1',
        'before'),
    ('vgg11', 'features.*', 'before'), ('ghostnet_100', 'blocks.*', 'after'), ('inception_v3', 'Mixed_*', 'after'),
    ('ese_vovnet19b_slim', 'stages.*', 'before'), ('dla34', 'level?', 'after'), ('resnetv2_50', 'stages.*.blocks.0',
        'before'),
    ('rexnet_100', 'features.*', 'after'), ('repvit_m0_9', 'stages.*', 'after'),
]


@pytest.mark.parametrize('name, at, where', PLACES, ids=['-'.join(p) for p in PLACES])
def test_channels_are_those_that_flow(name, at, where):
    model = timm.create_model(name, device='meta').eval()
    x = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    seen, handles = {}, []
    for n, m in model.named_modules():
        def look(m, args, out, n=n):
            seen[n] = args[0] if where == 'before' else out
        handles.append(m.register_forward_hook(look))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    before, keys = anatomy(model), list(model.state_dict())
    report = insert(model, TIM, at, where=where, num_frames=T)
    assert len(report) > 2 and report.model == type(model).__name__
    wanted = [n for n, _ in model.named_modules() if re.fullmatch(
        at.replace('.', r'\.').replace('*', '[^.]*').replace('?', '[^.]'), n) and not n.endswith('tim')]
    assert len(wanted) == len(report)
    for n, i in zip(wanted, report, strict=True):
        assert i.channels == seen[n].shape[1] == model.get_submodule(i.name).channels
        assert i.at == n or i.at.startswith(f'{n}.')    # a Sequential gives its first or last module
        assert (i.kind, i.where) == ('TIM', where) and i.num_parameters == 3 * i.channels
        assert seen[i.at].shape == seen[n].shape
    ran = []
    for i in report:
        model.get_submodule(i.name).register_forward_hook(lambda m, args, out, i=i: ran.append(i.name))
    with torch.no_grad():
        model(torch.empty(T, *x.shape[1:], device='meta'))
    assert sorted(ran) == sorted(i.name for i in report)    # each once
    for i in report:
        model.get_submodule(i.name)._forward_hooks.clear()
    temporal = temporal_keys(model)
    assert [key for key in model.state_dict() if key not in temporal] == keys
    restore(model)
    assert anatomy(model) == before and list(model.state_dict()) == keys


@pytest.mark.parametrize('name, at', [
    ('mobilenetv3_small_050', 'blocks.*'), ('regnetx_002', 's?.b1'), ('efficientnet_lite0', ['blocks.1', 'conv_head']),
    ('ghostnet_050', 'blocks.*.0'), ('repvgg_a0', 'stages.0.*'), ('convnext_atto', 'stages.*')])
def test_an_sme_is_the_identity_and_restore_leaves_nothing(name, at):
    model, x = timm.create_model(name, num_classes=5).eval(), images(T, 3, 64, 64)
    with torch.no_grad():
        want, before, state = model(x), anatomy(model), values(model)
        insert(model, SME, at, num_frames=T)
        assert torch.equal(model(x), want) and torch.equal(model(x[:1]), restore(copy.deepcopy(model))(x[:1]))
        assert not torch.equal(randomize_layers(model)(x), want)
        restore(model)
        assert anatomy(model) == before
        assert_same(state, model.state_dict())
        assert torch.equal(model(x), want)


# What it computes

@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('where', ['before', 'after'])
def test_the_layer_acts_before_or_after_its_module(kind, where):
    model, x = net(), images()
    report = insert(model, LAYERS[kind], 'blocks.1.0', where=where, num_frames=T)
    randomize_layers(model)
    got = model(x)
    layer = model.get_submodule(report.insertions[0].name)
    assert isinstance(layer, LAYERS[kind]) and layer.channels == (12 if where == 'before' else 16)
    restore(model)
    y = model.blocks[0](model.stem(x))
    y = model.blocks[1][0](layer(y)) if where == 'before' else layer(model.blocks[1][0](y))
    torch.testing.assert_close(got, model.head(model.blocks[1][1](y).mean((2, 3))))


@pytest.mark.parametrize('where', ['before', 'after'])
def test_several_layers_at_one_place_run_in_the_order_they_came(where):
    model, x = net(), images()
    names = [insert(model, layer, 'blocks.1.0', where=where, num_frames=T).insertions[0].name for layer in (TIM, CME,
        CME)]
    assert names == ['blocks.1.0.tim', 'blocks.1.0.cme', 'blocks.1.0.cme2']
    randomize_layers(model)
    got = model(x)
    tim, cme, cme2 = (model.get_submodule(n) for n in names)
    restore(model)
    y = model.blocks[0](model.stem(x))
    if where == 'before':
        y = model.blocks[1][0](cme2(cme(tim(y))))
    else:
        y = cme2(cme(tim(model.blocks[1][0](y))))
    torch.testing.assert_close(got, model.head(model.blocks[1][1](y).mean((2, 3))))


def test_names_do_not_clash_with_the_networks_own():
    model = net()
    model.blocks[0][0].cme = nn.Identity()
    state = list(model.state_dict())
    insert(model, CME, 'blocks.0.0', where='before')
    assert isinstance(model.blocks[0][0].cme, nn.Identity) and isinstance(model.blocks[0][0].cme2, CME)
    restore(model)
    assert hasattr(model.blocks[0][0], 'cme') and not hasattr(model.blocks[0][0], 'cme2')
    assert list(model.state_dict()) == state


def test_a_plain_sequential():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1)).eval(), images()
    want = model(x)
    report = insert(model, SME, ['0', '2'], num_frames=T)
    assert [(i.name, i.at, i.channels) for i in report] == [('0.sme', '0', 8), ('2.sme', '2', 12)]
    assert torch.equal(model(x), want) and len(model) == 3
    restore(model)
    assert [n for n, _ in model.named_modules()] == ['', '0', '1', '2']


@pytest.mark.parametrize('where, at, channels', [('before', 'blocks.0.0.conv', 8), ('after', 'blocks.1.1.act', 16)])
def test_a_sequential_stands_for_its_first_or_last_module(where, at, channels):
    model = net()
    i, = insert(model, TIM, 'blocks', where=where, num_frames=T)
    assert (i.at, i.channels) == (at.rpartition('.')[0], channels)
    assert [type(m) for m in model.blocks] == [nn.Sequential] * 2


@pytest.mark.parametrize('where', ['before', 'after'])
def test_grad_checkpointing_runs_the_layer_at_a_sequential(where):
    model, x = timm.create_model('mobilenetv3_small_050', num_classes=5).eval(), images(T, 3, 32, 32)
    plain = model(x)
    report = insert(model, TIM, ['blocks.1', 'blocks.4'], where=where, num_frames=T)
    randomize_layers(model)
    want, counts = model(x), []
    for i in report:
        model.get_submodule(i.name).register_forward_hook(lambda *args: counts.append(1))
    model.set_grad_checkpointing(True)
    got = model(x)
    torch.testing.assert_close(got, want)
    assert len(counts) == 2 and not torch.allclose(got, plain)
    got.sum().backward()
    assert all(model.get_submodule(i.name).weight.grad.any() for i in report)


def test_a_stage_that_runs_all_its_children_does_not_run_the_layer_as_one_more():
    # timm's RegStage does; the layer has to live elsewhere
    model, x, counts = timm.create_model('regnetx_002', num_classes=5).eval(), images(T, 3, 32, 32), []
    want = model(x)
    i, = insert(model, TIM, 's2', num_frames=T, init='identity', gain=2.)
    layer = model.get_submodule(i.name)
    layer.register_forward_hook(lambda *args: counts.append(1))
    s3 = model.s3
    seen = []
    s3.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    assert len(counts) == 1
    restore(model)
    assert torch.equal(model(x), want)
    assert torch.equal(seen[0], 2 * seen[1])


def test_densenet_blocks_take_lists_and_give_tensors():
    model, x = timm.create_model('densenet121', num_classes=5).eval(), images(T, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        report = insert(model, SME, 'features.denseblock*', num_frames=T)
        # a ModuleDict would run the layer, or hand it out, so the nearest module above holds it
        assert [i.at for i in report] == [f'features.denseblock{i}' for i in (1, 2, 3, 4)]
        assert all(not isinstance(model.get_submodule(i.name.rpartition('.')[0]), (nn.ModuleDict, nn.Sequential))
                   for i in report)
        assert torch.equal(model(x), want)
        assert not torch.equal(randomize_layers(model)(x), want)
        assert torch.equal(restore(model)(x), want)
    with pytest.raises(ValueError, match=r"the input of at='features.denseblock1.denselayer1' must be one tensor"):
        insert(model, SME, 'features.denseblock1.denselayer1', where='before')


def test_clips_and_set_num_frames():
    model = net()
    insert(model, CME, 'blocks.0', num_frames=T)
    randomize_layers(model)
    x = images(2, T, 3, 16, 16)
    y = ClipModel(model, T)(x)
    assert y.shape == (2, 5) and not torch.allclose(y, ClipModel(model, T)(x.roll(1, 0)))
    torch.testing.assert_close(y[1:], ClipModel(model, T)(x[1:]))
    assert set_num_frames(ClipModel(model, T), 2)(x.flatten(0, 1)).shape == (4, 5)


def test_one_step_trains_layer_and_network():
    model = net().train()
    insert(model, CME, 'blocks.*.0', where='before', num_frames=T)
    randomize_layers(model)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if not n.startswith('unused'))


@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_have_layers_of_their_own(how):
    model, x = net(), images()
    plain = model(x)
    insert(model, TIM, 'blocks.*', num_frames=T)
    randomize_layers(model)
    want, twin = model(x), how(model)
    with torch.no_grad():
        model.blocks[0][1].tim.weight.zero_()
    assert torch.equal(twin(x), want)
    assert torch.equal(restore(twin)(x), plain) and not torch.equal(model(x), want)


def test_compile_is_one_graph():
    torch._dynamo.reset()
    model, x = net(), images()
    for layer in (CME, TIM, SME):
        insert(model, layer, 'blocks.1.0', num_frames=T)
    randomize_layers(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x))
    torch._dynamo.reset()


# Names

@pytest.mark.parametrize('at, found', [
    ('blocks.0.1', ['blocks.0.1']), (['blocks.1.0', 'stem'], ['stem', 'blocks.1.0']),
    (('stem', 'stem', 'ste?'), ['stem']), ('blocks.*.0', ['blocks.0.0', 'blocks.1.0']),
    ('blocks.[!0].*', ['blocks.1.0', 'blocks.1.1']), ('*.*.*.conv', [f'blocks.{i}.{j}.conv' for i in (0, 1) for j in (0,
        1)]),
    (re.compile(r'blocks\.\d\.1'), ['blocks.0.1', 'blocks.1.1']), (re.compile(r'(stem|blocks\.0\.0)'), ['stem',
        'blocks.0.0']),
    ([re.compile('stem'), 'blocks.0.0'], ['stem', 'blocks.0.0']),
    (['blocks.0', 'blocks.0.1'], ['blocks.0.1']),    # one place, not two
], ids=str)
def test_names_patterns_regular_expressions_and_lists(at, found):
    assert [i.at for i in insert(net(), TIM, at)] == found


@pytest.mark.parametrize('at', ['block', 'blocks.0.*.*.*', 'Stem', '', '*.stem', re.compile('tem'),
    re.compile('blocks.0.')], ids=str)
def test_error_nothing_matches(at):
    model = net()
    before = anatomy(model)
    text = re.escape(repr(getattr(at, 'pattern', at)))
    with pytest.raises(ValueError, match=f'^at={text} matches no module of Net; it has .*, ...$'):
        insert(model, TIM, at)
    assert anatomy(model) == before


def test_error_nothing_matches_names_what_the_model_has():
    with pytest.raises(
            ValueError, match=r"^at='steem' matches no module of Net; it has stem, blocks, head, unused, \.\.\.$"):
        insert(net(), TIM, 'steem')
    with pytest.raises(
            ValueError, match=r"^at='blocks\.2' matches no module of Net; it has blocks\.0, blocks\.1, \.\.\.$"):
        insert(net(), TIM, 'blocks.2')


@pytest.mark.parametrize('at', [[], ()], ids=str)
def test_error_an_empty_list_of_names(at):
    with pytest.raises(ValueError, match=r'^at'):
        insert(net(), TIM, at)


# Layers

@pytest.mark.parametrize('layer, kwargs', [
    (partial(CME, reduction=4), {}), (CME, {'reduction': 4}), (lambda c, num_frames, **dd: CME(c, num_frames, 4, **dd),
        {})])
def test_layer_arguments(layer, kwargs):
    model = net()
    i, = insert(model, layer, 'blocks.1.1', num_frames=T, **kwargs)
    made = model.get_submodule(i.name)
    assert i.kind == 'CME' and i.name == 'blocks.1.1.cme' and made.reduction == (4, 4) and made.num_frames == T
    assert i.num_parameters == 3 * 4 * 16


def test_gate_init_opens_the_gates():
    model, x = net(), images()
    want = model(x)
    i, = insert(model, CME, 'stem', num_frames=T, gate_init=.98)
    gate = model.get_submodule(i.name).gate(images(T, 8, 2, 2))
    torch.testing.assert_close(gate, torch.full_like(gate, .98))
    torch.testing.assert_close(model(x), want, rtol=.2, atol=.05)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_the_layer_takes_the_modules_dtype_and_device(dtype):
    model = net().to(dtype)
    i, = insert(model, SME, 'blocks.0.0.act', num_frames=T)    # a ReLU has no dtype, so the model's
    assert model.get_submodule(i.name).conv.weight.dtype == dtype
    assert model(images().to(dtype)).dtype == dtype
    mixed = net()
    mixed.stem.to('meta')
    with pytest.raises(ValueError, match='could not run'):
        insert(mixed, SME, 'blocks.0.0')


def test_modes_and_frozen_parameters_stay():
    model = Net().train()
    model.blocks[0].eval()
    for p in model.stem.parameters():
        p.requires_grad_(False)
    before = anatomy(model)
    insert(model, SME, ['blocks.0', 'blocks.1'])
    assert not model.blocks[0][1].sme.training and model.blocks[1][1].sme.bn.training
    assert [p.requires_grad for p in model.stem.parameters()] == [False, False]
    restore(model)
    assert anatomy(model) == before


@pytest.mark.parametrize('at, kwargs, error, message', [
    ('stem', {'reductoin': 4}, TypeError, 'reductoin'),
    ('stem', {'reduction': 0}, ValueError, '^reduction must be a positive int, got 0$'),
    ('stem', {'gate_init': 1.5}, ValueError, '^gate_init must lie between 0 and 1, or be None, got 1.5$'),
    ('stem', {'num_frames': 0}, ValueError, '^num_frames must be a positive int, got 0$'),
    ('stem', {'where': 'inside'}, ValueError, "^where must be one of 'before', 'after', got 'inside'$"),
    (['stem', 'nothing'], {}, ValueError, "^at='nothing' matches no module"),
    (['stem', 'head'], {}, ValueError, (
        r"^the output of at='head' must be one tensor, \(N, C, H, W\), .*, with N frames and always the same C; it is "
        r'\[2, 5\] for 2 images of 224x224; \[1, 5\] for 1 image of 224x448$')),
    (['stem', 'unused'], {}, ValueError, "^at='unused' does not run in a forward pass of the model; wanted a module"),
    (['stem', 3], {}, TypeError, '^at must be a name, a pattern, a compiled regular expression or a list of these'),
    ('stem', {'example_input': 3}, TypeError, r'^example_input must be a tensor \(1, C, H, W\), got int$'),
    ('stem', {'example_input': torch.zeros(1, 2, 8, 8)}, ValueError, (
        r'^the model could not run on images of shape \[2, 2, 8, 8\] to find its channels: .* Pass one that it can '
        'run on as example_input$')),
], ids=str)
def test_error_leaves_the_network_alone(at, kwargs, error, message):
    model = Net().train()
    before, state = anatomy(model), values(model)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        insert(model, CME, at, **kwargs)
    assert anatomy(model) == before
    assert_same(state, model.state_dict())


@pytest.mark.parametrize('layer, message', [
    (CME(8), '^layer must be a class such as CME'), ('CME', "^layer must be a class such as CME .*, got 'CME'$"),
    (lambda c, num_frames, **dd: nn.Identity(), '^layer must make a CME, SME or TIM, got Identity$')])
def test_error_layer(layer, message):
    model = net()
    before = anatomy(model)
    with pytest.raises(TypeError, match=message):
        insert(model, layer, 'stem')
    assert anatomy(model) == before


def test_error_the_channels_must_be_the_same_in_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 8, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(self.act(x)))

    with pytest.raises(ValueError, match=(
            r"^the output of at='act' must be one tensor, .* same C; it is \[2, 3, 224, 224\] for 2 images of ")):
        insert(Twice(), TIM, 'act')
    model = Twice()
    assert insert(model, TIM, 'conv').insertions[0].channels == 8


def test_a_module_that_runs_twice_with_the_same_channels():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    model, x = Twice(), images()
    i, = insert(model, TIM, 'conv', num_frames=T)
    got = model(x)
    tim = model.get_submodule(i.name)
    restore(model)
    torch.testing.assert_close(got, tim(model.conv(tim(model.conv(x)))))


def test_error_inputs_by_keyword_are_seen_as_none():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(3, 8)

        def forward(self, x):
            return self.block(x=x)

    with pytest.raises(ValueError, match=r"^the input of at='block' must be one tensor .* it is not positional "):
        insert(Keyword(), TIM, 'block', where='before')
    assert insert(Keyword(), TIM, 'block').insertions[0].channels == 8


def test_error_no_module_to_hold_the_layer():
    model = nn.ModuleDict({'0': nn.Conv2d(3, 8, 1)})
    with pytest.raises(ValueError):
        insert(model, TIM, '0')    # a ModuleDict has no forward



# The report, and undoing

def test_report():
    report = insert(net(), SME, 'blocks.*', num_frames=T)
    lines = str(report).splitlines()
    assert lines[0].startswith('Net: 2 SME for clips of 4 frames, ') and lines[1:] == [
        '  blocks.0.1.sme    12 channels, after blocks.0.1',
        '  blocks.1.1.sme    16 channels, after blocks.1.1']
    assert len(report) == 2 and [i.kind for i in report] == ['SME', 'SME']


def test_restore_takes_out_what_several_calls_put_in():
    model, x = net(), images()
    before, state, want = anatomy(model), values(model), model(x)
    insert(model, CME, 'blocks.*', where='before')
    insert(model, TIM, 'blocks.*')
    insert(model, SME, ['stem', 'blocks.0.0.act'])
    assert sum(isinstance(m, ClipLayer) for m in model.modules()) == 6
    assert restore(model) is model and anatomy(model) == before and torch.equal(model(x), want)
    assert_same(state, model.state_dict())
    with pytest.raises(ValueError, match=(
            r'^model \(Net\) holds nothing that insert\(\) or retrofit\(\) put in$')):
        restore(model)
    assert len(insert(model, CME, 'blocks.*')) == 2
