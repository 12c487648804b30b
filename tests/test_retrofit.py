"""retrofit: every ResNet of timm, torchvision and transformers, bit for bit the same at its start and after restore."""
import copy
import importlib
import io
import math
import pickle
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from helpers import anatomy, assert_same, image_net, randomize, values
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, CMRBlock, restore, retrofit, set_num_frames, temporal_keys
from cmr_layers.clip import ClipLayer

T = 4
MODULES = ('resnet', 'res2net', 'resnest', 'sknet')
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
LAYERS = (CME, SME, TIM)
TORCHVISION = [
    'resnet18', 'resnet34', 'resnet50', 'resnext50_32x4d', 'resnext101_64x4d', 'wide_resnet50_2']


def images(*shape, **kwargs):
    return torch.randn(*(shape or (2 * T, 3, 32, 32)), **kwargs)


# Every ResNet of timm

def test_timm_has_no_fewer_resnets_than_when_this_was_written():
    assert len(NAMES) >= 103


def kinds():
    """Of the networks that differ in nothing but the depth of their stages, the one of the fewest blocks."""
    found = {}

    def look(variant, pretrained=False, **kwargs):
        layers = kwargs.pop('layers')
        entry = repr(sorted(kwargs.items(), key=str)), module
        found[entry] = min(found.get(entry, (9999, '')), (sum(layers), variant))

    for module in MODULES:
        with pytest.MonkeyPatch.context() as patch:
            builder = importlib.import_module(f'timm.models.{module}')
            create, = (name for name in vars(builder) if re.match('_create_(sk)?res', name))
            patch.setattr(builder, create, look)
            for name in timm.list_models(module=module):
                getattr(builder, name)()
    return sorted(name for _, name in found.values())


def test_networks_of_every_kind_are_tried():
    assert len(kinds()) > 50 and {'resnet18', 'resnet26', 'seresnet50', 'resnest14d', 'skresnet18'} <= set(kinds())


@pytest.mark.parametrize('name', kinds())
def test_every_kind_of_resnet_of_timm(name):
    model = timm.create_model(name, device='meta')
    assert isinstance(model, ResNet)
    stages = [[f'layer{i}.{j}' for j in range(len(getattr(model, f'layer{i}')))] for i in (1, 2, 3, 4)]
    blocks = [block for stage in stages for block in stage]
    before, keys = anatomy(model), list(model.state_dict())
    channels, handles = {}, []    # what really reaches the blocks and leaves them
    for block in blocks:
        def look(m, args, out, block=block):
            channels[block] = args[0].shape[1], out.shape[1]
        handles.append(model.get_submodule(block).register_forward_hook(look))
    report = retrofit(model, num_frames=T)
    for handle in handles:
        handle.remove()
    assert [(i.kind, i.name, i.channels, i.where) for i in report] == [
        row for stage in stages for block in stage for row in (
            ('CME', f'{block}.cme', channels[block][0], 'before'), ('TIM', f'{block}.tim', channels[block][0],
                'before'),
            *([('SME', f'{block}.sme', channels[block][1], 'after')] if block == stage[0] else []))]
    assert all(type(model.get_submodule(i.name)).__name__ == i.kind for i in report)
    assert all(model.get_submodule(i.name).channels == i.channels for i in report)
    temporal = temporal_keys(model)
    assert [key for key in model.state_dict() if key not in temporal] == keys
    assert all(v.is_meta for v in model.state_dict().values())
    assert restore(model) is model
    assert anatomy(model) == before and list(model.state_dict()) == keys


# One network of each class of blocks, with numbers

REAL = [
    'resnet10t', 'resnet18', 'resnet26', 'resnetblur50', 'resnetaa50', 'resnet50_gn', 'seresnet50',
        'seresnext26t_32x4d',
    'ecaresnet50d_pruned', 'res2net50_14w_8s', 'resnest14d', 'skresnet18']


@pytest.mark.parametrize('name', REAL)
def test_identity_start_and_restore_bit_for_bit(name):
    narrow = {} if name.endswith(('pruned', 'gn')) else {'channels': (64, 32, 32, 32)}
    model = randomize(timm.create_model(name, num_classes=5, zero_init_last=False, **narrow)).eval()
    still, clip = images(1, 3, 32, 32), images(T, 3, 32, 32)
    before, state = anatomy(model), values(model)
    with torch.no_grad():
        wants = model(still), model(clip)
        retrofit(model, num_frames=T)
        for x, want in zip((still, clip), wants, strict=True):
            assert torch.equal(model(x), want)
        # and the layers are really in the way
        randomize(model)
        with_layers = model(clip)
        assert not torch.allclose(with_layers, wants[1])
        model.load_state_dict(state, strict=False)
        other = model(clip)
        assert not torch.allclose(other, wants[1])
        restore(model)
        assert anatomy(model) == before
        assert_same(state, model.state_dict())
        assert torch.equal(model(clip), wants[1])


@pytest.mark.parametrize('placed', [{}, {'cme': 'none'}, {'sme': 'all'}, {'cme': 'first'}, {'tim': 'all',
    'cme': 'none'},
                                    {'cme': 'none', 'tim': 'none'}, {'tim': 'first', 'cme': 'first'}], ids=str)
def test_identity_start_with_other_placements(placed):
    model, x = image_net(), images()
    clip, still = model(x), model(x[:1])
    retrofit(model, num_frames=T, **placed)
    assert torch.equal(model(x), clip) and torch.equal(model(x[:1]), still)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_new_layers_take_the_networks_dtype(dtype):
    model, x = image_net().to(dtype), images().to(dtype)
    want = model(x)
    retrofit(model, num_frames=T)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model(x), want) and want.dtype == dtype


def test_identity_start_in_training_mode():
    model, x = image_net().train(), images()
    twin = copy.deepcopy(model)
    retrofit(model, num_frames=T)
    assert torch.equal(model(x), twin(x))
    for key, v in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], v), key    # the running statistics


def test_hooks_of_others_stay():
    model, calls = image_net(), []
    model.layer1[0].conv1.register_forward_pre_hook(lambda m, args: calls.append('pre'))
    model.layer1[0].register_forward_hook(lambda m, args, out: calls.append('post'))
    retrofit(model, num_frames=T)
    restore(model)
    calls.clear()
    model(images())
    assert calls == ['pre', 'post']


# The family

@pytest.mark.parametrize('start', ['identity', 'shift', 'paper'])
@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_it_is_its_cousin_in_the_family(name, start):
    model = image_net(name)
    retrofit(model, num_frames=T, start=start)
    randomize(model)
    kwargs = {'num_classes': 5, 'num_frames': T, 'channels': (64, 16, 16, 16) if name == 'resnet18' else (16, 8, 8, 8)}
    cousin = timm.create_model(f'cmr_{name}', **kwargs).eval()
    cousin.load_state_dict(model.state_dict(), strict=True)
    x = images(2, T, 3, 32, 32)
    want = cousin(x)
    torch.testing.assert_close(ClipModel(model, T)(x), want)
    randomize(cousin)
    assert not torch.allclose(cousin(x), want)
    model.load_state_dict(cousin.state_dict(), strict=True)
    torch.testing.assert_close(ClipModel(model, T)(x), cousin(x))


def test_every_name_of_the_family_has_its_cousins_keys():
    for name in ('resnet34', 'resnet50d', 'resnext50_32x4d', 'wide_resnet50_2', 'seresnet50'):
        model, cousin = timm.create_model(name, device='meta'), timm.create_model(f'cmr_{name}', device='meta')
        retrofit(model)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k,
            v in cousin.state_dict().items()}


def test_a_block_is_the_familys_block():
    model = image_net('resnet26')
    retrofit(model, num_frames=T)
    randomize(model)
    block = model.layer2[0]
    ours = CMRBlock(
        64, 8, 2, nn.Sequential(nn.Conv2d(64, 32, 1, 2, bias=False), nn.BatchNorm2d(32)), num_frames=T).eval()
    ours.load_state_dict(block.state_dict(), strict=True)
    x = images(2 * T, 64, 6, 6)
    torch.testing.assert_close(block(x), ours(x))


@pytest.mark.parametrize('name', ['resnet18', 'resnet26'])
@pytest.mark.parametrize('index', [0, 1])
def test_a_block_is_the_composition_of_its_parts(name, index):
    model = image_net(name)
    retrofit(model, num_frames=T, sme='all')
    randomize(model)
    block = model.layer2[index]
    x = images(2 * T, block.cme.channels, 6, 6)
    got = block(x)
    cme, tim, sme = block.cme, block.tim, block.sme
    restore(model)
    assert type(block) is (BasicBlock if name == 'resnet18' else Bottleneck)
    shortcut = x if block.downsample is None else block.downsample(x)
    y = block.act1(block.bn1(block.conv1(tim(cme(x)))))
    y = block.bn2(block.conv2(y))
    if name == 'resnet26':
        y = block.bn3(block.conv3(F.relu(y)))
    torch.testing.assert_close(got, sme(F.relu(y + shortcut)))
    assert (got < 0).any()


# Starts

def test_identity_start_in_numbers():
    model = image_net()
    retrofit(model, num_frames=T)
    for m in model.modules():
        if isinstance(m, CME):
            assert (m.gate(images(T, m.channels, 2, 2)) == .5).all() and m.b3 is None
            assert m.w1.any() and m.w2.any()
        elif isinstance(m, TIM):
            assert torch.equal(m.weight, torch.tensor([0., 2., 0.]).expand_as(m.weight))
        elif isinstance(m, SME):
            assert not m.bn.weight.any() and not m.bn.bias.any() and m.conv.weight.any()
    restore(model)
    retrofit(model, num_frames=T, cme='none')
    assert all(torch.equal(m.weight[:, 0, 1], torch.ones(m.channels)) for m in model.modules() if isinstance(m, TIM))


def test_paper_start_is_the_layers_start_alone():
    model = image_net()
    torch.manual_seed(5)
    report = retrofit(model, num_frames=T, start='paper')
    torch.manual_seed(5)
    for insertion in report:
        alone = {'CME': CME, 'SME': SME, 'TIM': TIM}[insertion.kind](insertion.channels, num_frames=T)
        assert_same(alone.state_dict(), model.get_submodule(insertion.name).state_dict())
    tim = model.layer2[0].tim
    assert tim.weight[:8, 0].tolist() == [[0., 0., 1.]] * 8 and tim.weight[8:16, 0].tolist() == [[1., 0., 0.]] * 8
    assert not any(key.endswith('b3') for key in model.state_dict())


def test_without_tim_the_residual_branch_sees_98_percent():
    model, x = image_net(), images()
    twin = copy.deepcopy(model)
    retrofit(model, num_frames=T, tim='none')
    gate = torch.tensor(math.log(.98 / .02)).sigmoid()
    for m in twin.modules():
        if isinstance(m, BasicBlock):
            m.conv1.register_forward_pre_hook(lambda m, args: (args[0] * gate,))
    got = model(x)
    torch.testing.assert_close(got, twin(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, restore(model)(x), rtol=1e-4, atol=1e-4)
    assert abs(float(gate) - .98) < 1e-6


def test_tim_in_first_blocks_only_leaves_98_percent_to_the_others():
    model = image_net()
    retrofit(model, num_frames=T, tim='first')
    for block in (model.layer1[0], model.layer3[0]):
        assert (block.cme.gate(images(T, block.cme.channels, 2, 2)) == .5).all() and (block.tim.weight[:, 0,
            1] == 2).all()
    gate = model.layer3[1].cme.gate(images(T, 16, 2, 2))
    torch.testing.assert_close(gate, torch.full_like(gate, .98))
    assert type(model.layer3[1].tim) is nn.Identity


def test_a_batch_norm_in_training_mode_absorbs_the_factor_one_half():
    model, x = image_net().double(), images(4 * T, 3, 64, 64, dtype=torch.float64)
    twin = copy.deepcopy(model)
    retrofit(model, num_frames=T, tim='none', sme='none', start='paper')
    for m in model.modules():
        if isinstance(m, CME):
            nn.init.zeros_(m.w3)    # gates of exactly 1/2
    assert not torch.allclose(model(x), twin(x), rtol=.01, atol=.01)
    torch.testing.assert_close(model.train()(x), twin.train()(x), rtol=1e-3, atol=1e-3)


# Training, saving, compiling

def test_three_steps_change_every_parameter():
    model = image_net().double().train()
    retrofit(model, num_frames=T)
    before = values(model)
    clip_model = ClipModel(model, T)
    optimizer = torch.optim.SGD(clip_model.parameters(), .05)
    x, target = images(4, T, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(clip_model(x), target).backward()
        optimizer.step()
    assert not [key for key, v in model.state_dict().items() if torch.equal(v, before[key])]


def test_a_frozen_backbone_stays_frozen_and_the_layers_train():
    model = image_net().double()
    for p in model.parameters():
        p.requires_grad_(False)
    names = [n for n, _ in model.named_parameters()]
    retrofit(model, num_frames=T)
    model(images(dtype=torch.float64)).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grads[n] is None for n in names)
    assert all(grads[n] is not None for n in grads if n not in names)


@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'torch.save'])
def test_copies_have_layers_of_their_own_and_can_be_restored(how):
    model, x = image_net(), images()
    plain = model(x)
    retrofit(model, num_frames=T)
    randomize(model)
    temporal = temporal_keys(model)
    image_state = {key: v for key, v in model.state_dict().items() if key not in temporal}
    want = model(x)
    if how == 'deepcopy':
        twin = copy.deepcopy(model)
    elif how == 'pickle':
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, TIM):
                m.weight.zero_()
    assert torch.equal(twin(x), want) and not torch.equal(model(x), want)
    restore(twin)
    assert not any(isinstance(m, ClipLayer) or m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert_same(image_state, twin.state_dict())
    assert len(temporal_keys(model)) > 0 and plain.shape == twin(x).shape
    assert_same(image_state, restore(model).state_dict())


def test_state_dict_through_a_file():
    model, other, x, file = image_net(), image_net(), images(), io.BytesIO()
    retrofit(model, num_frames=T)
    randomize(model)
    torch.save(model.state_dict(), file)
    file.seek(0)
    retrofit(other, num_frames=T)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), model(x))


def test_another_module_in_a_layers_place_is_used():
    model, x = image_net(), images()
    want = model(x)
    retrofit(model, num_frames=T, cme='none', sme='none', start='paper')
    for m in model.modules():
        if hasattr(m, 'tim'):
            m.tim = nn.Identity()
    assert torch.equal(model(x), want)


def test_set_num_frames_and_clip_model():
    model, x = image_net(), images()
    retrofit(model, num_frames=T)
    randomize(model)
    two = ClipModel(model, T)(x)
    assert two.shape == (2, 5)
    torch.testing.assert_close(two, model(x).unflatten(0, (2, T)).mean(1))
    clip_model = set_num_frames(ClipModel(model, T), 8)
    assert clip_model(x).shape == (1, 5)
    assert {m.num_frames for m in model.modules() if isinstance(m, ClipLayer)} == {8}
    with pytest.raises(ValueError, match='whole number of clips'):
        clip_model(images(12, 3, 32, 32))


def test_grad_checkpointing_runs_the_layers():
    model, x = image_net(), images()
    retrofit(model, num_frames=T)
    randomize(model)
    want = model(x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x), want)


def shallow():
    """A block in each stage: deeper networks take a compiler longer, and have nothing else in them."""
    return randomize(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(64, 16, 16, 16))).eval()


def test_compile_is_one_graph():
    torch._dynamo.reset()
    model, x = shallow(), images(2, T, 3, 32, 32)
    retrofit(model, num_frames=T, cme='first', tim='first')
    randomize(model)
    clip_model = ClipModel(model, T)
    torch.testing.assert_close(torch.compile(clip_model, fullgraph=True, backend='aot_eager')(x), clip_model(x))
    torch._dynamo.reset()


def test_export_with_a_dynamic_batch():
    model = shallow()
    retrofit(model, num_frames=T)
    clip_model = ClipModel(randomize(model), T)
    shapes = ({0: torch.export.Dim('b', min=1, max=8)},)
    program = torch.export.export(clip_model, (images(3, T, 3, 32, 32),), dynamic_shapes=shapes).module()
    for batch in (1, 2):
        x = images(batch, T, 3, 32, 32)
        torch.testing.assert_close(program(x), clip_model(x))


# Other libraries

@pytest.mark.parametrize('name', TORCHVISION)
def test_every_resnet_of_torchvision(name):
    with torch.device('meta'):
        model = getattr(torchvision.models, name)(weights=None)
    before, keys = anatomy(model), list(model.state_dict())
    report = retrofit(model, num_frames=T)
    kinds = [i.kind for i in report]
    blocks = sum(len(getattr(model, f'layer{i}')) for i in (1, 2, 3, 4))
    assert [kinds.count(kind) for kind in ('CME', 'TIM', 'SME')] == [blocks, blocks, 4]
    assert [i.name for i in report if i.kind == 'SME'] == [f'layer{i}.0.sme' for i in (1, 2, 3, 4)]
    assert all(model.get_submodule(i.name).channels == i.channels for i in report)
    assert model(torch.empty(2 * T, 3, 32, 32, device='meta')).shape == (2 * T, 1000)
    restore(model)
    assert anatomy(model) == before and list(model.state_dict()) == keys


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_torchvision_bit_for_bit(name):
    model, x = randomize(getattr(torchvision.models, name)(weights=None)).eval(), images(T, 3, 32, 32)
    want, state = model(x), values(model)
    retrofit(model, num_frames=T)
    assert torch.equal(model(x), want) and torch.equal(model(x[:1]), restore(copy.deepcopy(model))(x[:1]))
    # torchvision's names are timm's, so its weights fit the family too
    cousin = timm.create_model(f'cmr_{name}', num_frames=T).eval()
    randomize(model)
    cousin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(ClipModel(model, T)(x), cousin(x))
    state = {key: v for key, v in values(model).items() if key in state}
    assert_same(state, restore(model).state_dict())


def hf(kind='basic', cls=transformers.ResNetModel, **kwargs):
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[2, 1, 1, 2], layer_type=kind, num_labels=5, **kwargs)
    return randomize(cls(config)).eval()


def hf_output(model, x):
    out = model(x)
    return out.feature_maps[-1] if 'feature_maps' in out else out[0]


@pytest.mark.parametrize('kind', ['basic', 'bottleneck'])
@pytest.mark.parametrize('cls', [
    transformers.ResNetModel, transformers.ResNetForImageClassification, transformers.ResNetBackbone])
def test_transformers(kind, cls):
    model, x = hf(kind, cls), images()
    before, state, want, still = anatomy(model), values(model), hf_output(model, x), hf_output(model, x[:1])
    report = retrofit(model, num_frames=T)
    prefix = next(n for n, m in model.named_modules() if n.endswith('encoder'))
    stages = [len(stage.layers) for stage in model.get_submodule(prefix).stages]
    assert [(i.kind, i.name) for i in report] == [
        (k, f'{prefix}.stages.{i}.layers.{j}.{k.lower()}') for i, depth in enumerate(stages) for j in range(depth)
        for k in ('CME', 'TIM', 'SME')[:3 if j == 0 else 2]]
    assert torch.equal(hf_output(model, x), want) and torch.equal(hf_output(model, x[:1]), still)
    randomize(model)
    assert not torch.allclose(hf_output(model, x), want)
    model.load_state_dict(state, strict=False)
    temporal = temporal_keys(model)
    assert [key for key in model.state_dict() if key not in temporal] == list(state)
    restore(model)
    assert anatomy(model) == before
    assert_same(state, model.state_dict())
    assert torch.equal(hf_output(model, x), want)


@pytest.mark.parametrize('kind', ['basic', 'bottleneck'])
@pytest.mark.parametrize('stage, index', [(0, 1), (1, 0)])
def test_a_block_of_transformers_is_the_composition_of_its_parts(kind, stage, index):
    model = hf(kind)
    retrofit(model, num_frames=T, sme='all')
    randomize(model)
    block = model.encoder.stages[stage].layers[index]
    x = images(T, block.cme.channels, 6, 6)
    got = block(x)
    cme, tim, sme = block.cme, block.tim, block.sme
    restore(model)
    torch.testing.assert_close(got, sme(block.activation(block.layer(tim(cme(x))) + block.shortcut(x))))


def test_a_network_that_holds_a_resnet():
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    randomize(model.eval())
    x = images(T, 3, 32, 32)
    with torch.no_grad():
        before, want = anatomy(model), model(x)['out']
        report = retrofit(model, num_frames=T)
        assert len(report) == 36 and report.insertions[0].name == 'backbone.layer1.0.cme'
        assert 'backbone.layer1.0.conv1' == report.insertions[0].at
        assert torch.equal(model(x)['out'], want)
        restore(model)
        assert torch.equal(model(x)['out'], want) and anatomy(model) == before


@pytest.mark.parametrize('wrap', [
    lambda net: nn.Sequential(net, nn.Linear(5, 3)), lambda net: ClipModel(net, T),
    lambda net: nn.ModuleDict({'image': net})['image']], ids=['Sequential', 'ClipModel', 'ModuleDict'])
def test_a_resnet_in_a_wrapper(wrap):
    model, x = wrap(image_net()).eval(), images(T, 3, 32, 32)
    want = model(x)
    assert len(retrofit(model, num_frames=T)) == 20
    assert torch.equal(model(x), want)
    assert torch.equal(restore(model)(x), want)


def test_features_only_and_a_pruned_network():
    pruned = image_net()
    pruned.prune_intermediate_layers([1, 2])
    assert [i.name for i in retrofit(pruned, num_frames=T) if i.kind == 'SME'] == ['layer1.0.sme', 'layer2.0.sme']
    assert pruned.forward_intermediates(images(), [1, 2], intermediates_only=True)[1].shape == (2 * T, 16, 4, 4)
    extractor = timm.create_model('resnet18', features_only=True, out_indices=(1, 3), channels=(64, 16, 16, 16)).eval()
    x = images()
    want = extractor(x)
    report = retrofit(extractor, num_frames=T)
    assert [i.name for i in report if i.kind == 'SME'] == ['layer1.0.sme', 'layer2.0.sme', 'layer3.0.sme']
    assert all(torch.equal(a, b) for a, b in zip(extractor(x), want, strict=True))


@pytest.mark.parametrize('kwargs', [
    {'in_chans': 1}, {'output_stride': 8}, {'num_classes': 0}, {'num_classes': 0, 'global_pool': ''},
        {'drop_path_rate': .2},
    {'aa_layer': nn.AvgPool2d}], ids=str)
def test_other_arguments_of_the_network(kwargs):
    model, x = image_net('resnet26', **kwargs), images(2 * T, kwargs.get('in_chans', 3), 32, 32)
    want = model(x)
    retrofit(model, num_frames=T)
    assert torch.equal(model(x), want)


# The report

def test_report():
    model = image_net()
    n = sum(p.numel() for p in model.parameters())
    report = retrofit(model, num_frames=T, reduction=(4, 8), sme='none')
    assert len(report) == len(list(report)) == 16 and report.num_frames == T
    added = sum(p.numel() for p in model.parameters()) - n
    assert sum(i.num_parameters for i in report) == added
    lines = str(report).splitlines()
    assert lines[0].startswith('ResNet (layer1 to layer4): 8 CME, 8 TIM for clips of 4 frames, ')
    assert lines[1] == '  layer1.0.cme    64 channels, before layer1.0.conv1' and len(lines) == 17
    assert {m.reduction for m in model.modules() if isinstance(m, CME)} == {(4, 8)}


# Errors

def test_error_second_retrofit():
    model = image_net()
    retrofit(model)
    before = anatomy(model)
    with pytest.raises(ValueError, match=(
            r'^model \(ResNet\) already has 20 temporal layers \(layer1\.0\.cme, \.\.\.\); wanted a network without\. '
            r'restore\(model\) takes out')):
        retrofit(model)
    assert anatomy(model) == before
    restore(model)
    assert len(retrofit(model)) == 20


def test_error_the_family_has_its_layers_already():
    with pytest.raises(ValueError, match=r'^model \(CMRResNet\) is made of CMR blocks already; choose its layers with'):
        retrofit(timm.create_model('cmr_resnet18', device='meta'))


@pytest.mark.parametrize('make', [
    *(lambda name=name: timm.create_model(name, device='meta') for name in (
        'convnext_atto', 'vit_tiny_patch16_224', 'mobilenetv3_small_050', 'legacy_xception', 'selecsls42b')),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), lambda: nn.Linear(3, 3),
], ids=['ConvNeXt', 'VisionTransformer', 'MobileNetV3', 'Xception', 'SelecSls', 'Sequential', 'Linear'])
def test_error_no_resnet(make):
    model = make()
    before = anatomy(model)
    with pytest.raises(ValueError, match=(
            r'^model \(\w+\) holds no ResNet that is known: no stages \(layer1 to layerN, res2 to res5, stages\.\*\) '
            r'of blocks that begin with conv1, .*\. Name the modules that are stages by stages=, or put the layers at '
            r'any module by insert\(\)$')) as error:
        retrofit(model)
    assert type(model).__name__ in str(error.value) and anatomy(model) == before


def test_error_two_resnets():
    model = nn.ModuleDict({'rgb': image_net(), 'flow': image_net()})
    with pytest.raises(ValueError, match=r'^model \(ModuleDict\) holds several ResNets: rgb, flow; .*Pass one'):
        retrofit(model)
    assert len(retrofit(model['rgb'])) == 20 and not temporal_keys(model['flow'])


def test_error_a_block_that_does_not_hand_its_input_to_conv1():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + self.conv2(self.conv1(x[:, ::2]))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            for i in range(1, 5):
                setattr(self, f'layer{i}', nn.Sequential(Half()))

        def forward(self, x):
            return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))

    model = Net()
    before = anatomy(model)
    with pytest.raises(ValueError, match=(
            r"^model \(Net\) is not supported: block 'layer1\.0' \(Half\) does not hand its input to 'conv1', "
            r'where CME and TIM belong.*stages=')):
        retrofit(model)
    assert anatomy(model) == before


@pytest.mark.parametrize('kwargs, message', [
    ({'num_frames': 0}, 'num_frames must be a positive int, got 0'),
    ({'num_frames': True}, 'num_frames must be a positive int, got True'),
    ({'start': 'papers'}, "start must be one of 'identity', 'shift', 'paper', got 'papers'"),
    *(({layer: 'last'}, f"{layer} must be one of 'all', 'first', 'none', got 'last'") for layer in ('cme', 'tim',
        'sme')),
    ({'reduction': 0}, 'reduction must be a positive int, got 0'),
    ({'cme': 'none', 'tim': 'none', 'sme': 'none'},
     "nothing to insert: cme='none', tim='none' and sme='none'; one must not be 'none'"),
], ids=str)
def test_error_arguments_leave_the_network_alone(kwargs, message):
    model = image_net().train()
    before = anatomy(model)
    with pytest.raises(ValueError, match=f'^{message}$'):
        retrofit(model, **kwargs)
    assert anatomy(model) == before


def test_error_resnet_without_a_conv2d():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)

        def forward(self, x):
            return x + self.conv2(self.conv1(x))

    model = nn.Module()
    for i in range(1, 5):
        setattr(model, f'layer{i}', nn.Sequential(Block()))
    with pytest.raises(ValueError, match=r'^model \(Module\)|the model could not run'):
        retrofit(model)


def test_clip_model_averages_the_logits_of_transformers():
    config = transformers.ResNetConfig(
        layer_type='basic', embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5)
    model = transformers.ResNetForImageClassification(config).eval()
    clip = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        want = model(clip.flatten(0, 1)).logits.unflatten(0, (2, 4)).mean(1)
        retrofit(model, num_frames=4)
        torch.testing.assert_close(ClipModel(model, num_frames=4)(clip), want)


@pytest.mark.parametrize('compile_', [lambda m: m.compile(), lambda m: setattr(m, 'layer1', torch.compile(m.layer1))])
def test_error_parts_are_compiled(compile_):
    model = image_net()
    compile_(model)
    with pytest.raises(TypeError, match=r'^model must be the network itself, got what torch.compile made of it'):
        retrofit(model)


def test_layers_survive_other_hooks_in_a_new_process(tmp_path):
    # a new process counts its hooks from 0 again, and one with the key of ours would replace it
    model, x = image_net(), images()
    retrofit(model, num_frames=T, start='paper')
    torch.save((model, x, model(x)), tmp_path / 'model.pt')
    script = """
import sys, torch
model, x, want = torch.load(sys.argv[1], weights_only=False)
for _ in range(300):
    for m in (model.layer1[0], model.layer1[0].conv1):
        m.register_forward_hook(print).remove()
        m.register_forward_pre_hook(print).remove()
assert torch.equal(model(x), want)
"""
    subprocess.run([sys.executable, '-c', script, str(tmp_path / 'model.pt')], check=True)
