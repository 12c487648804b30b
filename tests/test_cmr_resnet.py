"""The cmr_resnet family: timm's names, keys, weights and interfaces, for clips."""
import copy
import io
import json
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
from helpers import randomize
from timm.models import get_pretrained_cfg, group_parameters, list_pretrained, save_for_hf
from timm.models.resnet import BasicBlock
from timm.optim import param_groups_layer_decay
from torch import nn

from cmr_layers import CME, SME, TIM, CMRBasicBlock, CMRBlock, CMRResNet, set_num_frames, temporal_keys

BLOCKS = {
    'resnet18': 8, 'resnet18d': 8, 'resnet26': 8, 'resnet26d': 8, 'resnet34': 16, 'resnet34d': 16, 'resnet50': 16,
    'resnet50d': 16, 'resnet101': 33, 'resnet101d': 33, 'resnet152': 50, 'resnet152d': 50, 'resnext50_32x4d': 16,
    'resnext50d_32x4d': 16, 'wide_resnet50_2': 16, 'seresnet50': 16,
}
T = 4
# timm's networks with few channels, else with the same keys; the first stage opens as it does at full width
SMALL = {
    'resnet18': {'channels': (64, 16, 16, 16)}, 'resnet34': {'channels': (64, 16, 16, 16)},
    'resnet26': {'channels': (16, 8, 8, 8)}, 'resnet50': {'channels': (16, 8, 8, 8)},
    'resnet50d': {'channels': (16, 8, 8, 8)}, 'seresnet50': {'channels': (16, 8, 8, 8)},
}


def small(arch='resnet18', **kwargs):
    kwargs = {'num_classes': 5, 'num_frames': T, **SMALL[arch], **kwargs}
    return randomize(timm.create_model(f'cmr_{arch}', **kwargs)).eval()


def image_weights(arch='resnet18', **kwargs):
    """Weights of timm's network, as a file from a hub would have them."""
    return randomize(timm.create_model(arch, **{**SMALL[arch], **kwargs})).state_dict()


def from_weights(state_dict, arch='resnet18', **kwargs):
    kwargs = {'num_frames': T, **SMALL[arch], **kwargs}
    return timm.create_model(
        f'cmr_{arch}', pretrained=True, pretrained_cfg_overlay={'state_dict': dict(state_dict)}, **kwargs)


def clips(batch=2, num_frames=T, size=32, **kwargs):
    return torch.randn(batch, num_frames, 3, size, size, **kwargs)


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(0)
    return image_weights()


# The names

def test_all_names_are_registered():
    assert sorted(timm.list_models('cmr_*')) == sorted(f'cmr_{name}' for name in BLOCKS)
    assert timm.list_models(module='cmr_resnet') == timm.list_models('cmr_*')


@pytest.mark.parametrize('name', BLOCKS)
def test_layers_and_keys_of_each_name(name):
    model = timm.create_model(f'cmr_{name}', device='meta')
    assert isinstance(model, CMRResNet)
    found = {kind: [n for n, m in model.named_modules() if type(m) is kind] for kind in (CME, TIM, SME)}
    assert len(found[CME]) == len(found[TIM]) == BLOCKS[name]
    # Figure 4: type B opens each stage, also where the first stage opens without a downsample
    assert found[SME] == [f'layer{stage}.0.sme' for stage in (1, 2, 3, 4)]
    assert all(m.channels == model.get_submodule(n[:-4]).conv1.in_channels
               for n, m in model.named_modules() if isinstance(m, (CME, TIM)))
    # and the rest is timm's network of that depth
    image = timm.create_model(name, device='meta').state_dict()
    ours, temporal = model.state_dict(), temporal_keys(model)
    assert [(k, v.shape) for k, v in ours.items() if k not in temporal] == [(k, v.shape) for k, v in image.items()]
    assert {k.split('.')[2] for k in temporal} == {'cme', 'tim', 'sme'}
    assert all(v.is_meta for v in ours.values())
    # deeper ones only take longer
    if BLOCKS[name] <= 8 or name in ('resnext50_32x4d', 'wide_resnet50_2', 'seresnet50'):
        assert model(torch.empty(2, 8, 3, 32, 32, device='meta')).shape == (2, 1000)


@pytest.mark.parametrize('name', BLOCKS)
def test_pretrained_cfgs_are_timms(name):
    ours = {tagged.split('.', 1)[1] for tagged in list_pretrained(f'cmr_{name}.*')}
    theirs = {tagged.split('.', 1)[1] for tagged in list_pretrained(f'{name}.*')}
    assert ours == theirs
    for suffix in ['', *(f'.{tag}' for tag in theirs)]:
        a, b = get_pretrained_cfg(f'cmr_{name}{suffix}').to_dict(), get_pretrained_cfg(f'{name}{suffix}').to_dict()
        assert a.pop('architecture') == f'cmr_{name}' and b.pop('architecture') == name
        assert a == b


def test_pretrained_cfg_of_the_model():
    model = timm.create_model('cmr_resnet50', device='meta')
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/resnet50.a1_in1k'
    assert model.pretrained_cfg['mean'] == timm.create_model('resnet50', device='meta').pretrained_cfg['mean']
    assert timm.create_model('cmr_resnet50.tv_in1k',
        device='meta').pretrained_cfg['hf_hub_id'] == 'timm/resnet50.tv_in1k'


# Arguments

@pytest.mark.parametrize('where, count', [('all', 8), ('first', 4), ('none', 0)])
@pytest.mark.parametrize('layer', ['cme', 'tim', 'sme'])
@pytest.mark.parametrize('arch', ['resnet18', 'resnet26'])
def test_placements_of_table_5(arch, layer, where, count):
    kwargs = {'cme': 'none', 'tim': 'none', 'sme': 'none', layer: where}
    model = timm.create_model(f'cmr_{arch}', device='meta', **kwargs)
    found = [n for n, m in model.named_modules() if isinstance(m, (CME, TIM, SME))]
    assert len(found) == count and all(n.endswith(f'.{layer}') for n in found)
    if where == 'first':
        assert found == [f'layer{i}.0.{layer}' for i in (1, 2, 3, 4)]


def test_without_layers_it_is_the_mean_of_timms_logits(weights):
    image = timm.create_model('resnet18', **SMALL['resnet18']).eval()
    image.load_state_dict(weights)
    model = timm.create_model(
        'cmr_resnet18', num_frames=T, cme='none', tim='none', sme='none', **SMALL['resnet18']).eval()
    model.load_state_dict(weights, strict=True)
    x = clips()
    assert torch.equal(model(x), image(x.flatten(0, 1)).unflatten(0, (2, T)).mean(1))


def test_reduction_and_num_frames_reach_the_layers():
    model = timm.create_model('cmr_resnet18', num_frames=3, reduction=(4, 16), device='meta')
    assert {m.reduction for m in model.modules() if isinstance(m, CME)} == {(4, 16)}
    assert {m.num_frames for m in model.modules() if hasattr(m, 'num_frames')} == {3} and model.num_frames == 3
    assert model.layer4[1].cme.w2.shape[0] == 32


def test_seresnet_keeps_its_attention_beside_other_block_args():
    model = timm.create_model('cmr_seresnet50', device='meta', block_args={})
    assert all(m.se is not None for n, m in model.named_modules() if re.fullmatch(r'layer\d\.\d+', n))
    other = timm.create_model('cmr_seresnet50', device='meta', block_args={'attn_layer': 'eca'})
    assert type(other.layer1[0].se).__name__ == 'EcaModule'


def test_block_args_leave_timms_table_alone():
    timm.create_model('cmr_seresnet50', device='meta', block_args={'attn_layer': None})
    assert timm.create_model('cmr_seresnet50', device='meta').layer1[0].se is not None


def test_starts_survive_timms_init():
    model = timm.create_model('cmr_resnet18', num_frames=T, **SMALL['resnet18'])
    for m in model.modules():
        if isinstance(m, TIM):
            assert torch.equal(m.weight, TIM(m.channels).weight)
        elif isinstance(m, SME):
            assert not m.bn.weight.any() and not m.bn.bias.any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_dtype(dtype):
    model = timm.create_model('cmr_resnet18', num_frames=T, num_classes=5, dtype=dtype, **SMALL['resnet18']).eval()
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {dtype}
    assert model(clips(dtype=dtype)).dtype == dtype


# Clips

@pytest.mark.parametrize('arch', SMALL)
def test_4d_is_5d(arch):
    model, x = small(arch), clips(3)
    y = model(x)
    assert y.shape == (3, 5) and y.isfinite().all()
    assert torch.equal(model(x.flatten(0, 1)), y)


def test_fewer_frames_than_a_clip_are_stills():
    model, x = small(), torch.randn(3, 3, 32, 32)
    y = model(x)
    assert y.shape == (3, 5)
    torch.testing.assert_close(y, torch.cat([model(frame) for frame in x.split(1)]))
    one = set_num_frames(copy.deepcopy(model), 1)
    torch.testing.assert_close(y, one(x[:, None]))


def test_a_clips_logits_do_not_depend_on_its_neighbours():
    model, x = small(), clips(3)
    y = model(x)
    other = x.clone()
    other[[0, 2]] = torch.randn_like(x[[0, 2]])
    torch.testing.assert_close(model(other)[1], y[1])
    torch.testing.assert_close(model(x[1:2]), y[1:2])
    assert (model(other)[0] - y[0]).abs().max() > 1e-3


def test_the_order_of_the_frames_matters():
    model, x = small(), clips(1)
    assert (model(x) - model(x.flip(1))).abs().max() > 1e-3
    plain = small(cme='none', tim='none', sme='none')
    torch.testing.assert_close(plain(x), plain(x.flip(1)))


def test_empty_batch():
    assert small()(torch.zeros(0, T, 3, 32, 32)).shape == (0, 5)


def test_set_num_frames():
    model, x = small(), clips(1, 8)
    two = model(x.flatten(0, 1))
    assert set_num_frames(model, 8) is model and model.num_frames == 8
    one = model(x)
    assert one.shape == (1, 5) and two.shape == (2, 5)
    assert {m.num_frames for m in model.modules() if hasattr(m, 'num_frames')} == {8}
    other = small(num_frames=8)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), one)


def test_the_method_of_the_model_reaches_its_layers_too():
    model = small()
    model.set_num_frames(2)
    assert model.num_frames == 2
    assert {m.num_frames for m in model.modules() if hasattr(m, 'num_frames')} == {2}


@pytest.mark.parametrize('value', [0, -1, 1.5, None, True], ids=repr)
def test_error_set_num_frames(value):
    model = small()
    with pytest.raises(ValueError, match=f'^num_frames must be a positive int, got {value!r}$'):
        set_num_frames(model, value)
    assert model.num_frames == T and model._model_args['num_frames'] == T


# The head

@pytest.mark.parametrize('consensus', ['logits', 'features'])
def test_consensus_is_the_mean_over_a_clips_frames(consensus):
    model, x = small(consensus=consensus), clips(3)
    maps = model.forward_features(x)
    assert maps.shape[:2] == (3 * T, 16)
    pooled = maps.mean((2, 3))
    by_frame = model.fc(pooled).unflatten(0, (3, T)).mean(1)
    torch.testing.assert_close(model(x), by_frame)
    torch.testing.assert_close(model.forward_head(maps), by_frame)
    pre_logits = model.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(pre_logits, pooled.unflatten(0, (3, T)).mean(1))
    torch.testing.assert_close(model.fc(pre_logits), model(x))
    assert pre_logits.shape == (3, model.head_hidden_size)


def test_drop_rate_is_a_dropout_before_the_classifier():
    logits, features = small(drop_rate=.5), small(drop_rate=.5, consensus='features')
    features.load_state_dict(logits.state_dict())
    maps = torch.rand(4 * T, 16, 2, 2)
    pooled = maps.mean((2, 3))
    torch.testing.assert_close(logits.forward_head(maps), features.forward_head(maps))
    logits.train(), features.train()
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones_like(pooled), .5)
    torch.manual_seed(3)
    want = logits.fc(pooled * mask).unflatten(0, (4, T)).mean(1)    # each frame is dropped from for itself
    torch.testing.assert_close(logits.forward_head(maps), want)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(4, 16), .5)
    torch.manual_seed(3)
    want = features.fc(pooled.unflatten(0, (4, T)).mean(1) * mask)    # or the clip's features once
    torch.testing.assert_close(features.forward_head(maps), want)
    torch.manual_seed(3)
    assert (features.forward_head(maps, pre_logits=True) == 0).any()
    assert small().drop_rate == 0


@pytest.mark.parametrize('consensus', ['logits', 'features'])
def test_without_a_classifier(consensus):
    x = clips()
    pooled = small(num_classes=0, consensus=consensus)
    assert pooled(x).shape == (2, 16) and pooled(x.flatten(0, 1)).shape == (2, 16)
    unpooled = small(num_classes=0, global_pool='', consensus=consensus)
    assert unpooled(x).shape == (2 * T, 16, 1, 1)
    assert torch.equal(unpooled(x), unpooled.forward_features(x))


def test_reset_classifier():
    model, x = small(), clips()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7) and model.get_classifier() is model.fc
    torch.testing.assert_close(model(x), model.fc(features))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(0, '')
    assert model(x).shape == (2 * T, 16, 1, 1)
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3) and model.head_hidden_size == 32


# Features

@pytest.mark.parametrize('ndim', [4, 5])
def test_intermediates(ndim):
    model, x = small(), clips()
    x = x if ndim == 5 else x.flatten(0, 1)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and torch.equal(maps[-1], last)
    assert [tuple(m.shape) for m in maps] == [
        (2 * T, 64, 16, 16), (2 * T, 64, 8, 8), (2 * T, 16, 4, 4), (2 * T, 16, 2, 2), (2 * T, 16, 1, 1)]
    only = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert torch.equal(only[0], maps[1]) and torch.equal(only[1], maps[3]) and len(only) == 2
    assert len(model.forward_intermediates(x, 2, stop_early=True, intermediates_only=True)) == 2


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
@pytest.mark.parametrize('ndim', [4, 5])
def test_features_only(feature_cls, ndim):
    model = small()
    kwargs = {} if feature_cls == 'list' else {'feature_cls': feature_cls}
    extractor = timm.create_model(
        'cmr_resnet18', num_frames=T, features_only=True, **kwargs, **SMALL['resnet18']).eval()
    prefix = {'getter': 'model.', 'hook': 'body.', 'fx': 'graph_module.'}.get(feature_cls, '')
    extractor.load_state_dict(
        {prefix + key: v for key, v in model.state_dict().items() if not key.startswith('fc.')}, strict=True)
    x = clips()
    got = extractor(x if ndim == 5 else x.flatten(0, 1))
    got = list(got.values()) if isinstance(got, dict) else got
    want = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(g.shape) for g in got] == [tuple(w.shape) for w in want]
    assert extractor.feature_info.channels() == [w.shape[1] for w in want]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_features_only_knows_clips_from_half_ones():
    extractor = timm.create_model('cmr_resnet18', num_frames=T, features_only=True, **SMALL['resnet18']).eval()
    with pytest.raises(ValueError, match='holds clips of 3 frames, but num_frames=4 is wanted'):
        extractor(clips(num_frames=3))
    assert set_num_frames(extractor, 3)(clips(num_frames=3))[-1].shape[0] == 6


def test_prune_intermediate_layers():
    model, x = small(), clips()
    want = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    got = model.forward_intermediates(x, [1, 2], intermediates_only=True)
    assert torch.equal(got[0], want[1]) and torch.equal(got[1], want[2]) and not len(model.layer3)


# Training

@pytest.mark.parametrize('arch', ['resnet18', 'resnet26'])
def test_grad_checkpointing_changes_no_output_and_no_gradient(arch):
    model, x = small(arch).double().train(), clips(dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    assert twin.grad_checkpointing
    y, z = model(x), twin(x)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(model.eval().forward_intermediates(x)[0], model.forward_features(x))


def test_grad_checkpointing_does_checkpoint():
    model, counts = small().train(), []
    model.set_grad_checkpointing(True)
    model.layer3[0].cme.register_forward_hook(lambda *args: counts.append(1))
    model(clips()).sum().backward()
    assert len(counts) == 2    # forward, and once more for the backward


@pytest.mark.parametrize('shape', [(2, T, 3, 32, 32), (2, 3, 32, 32)], ids=['clips', 'stills'])
def test_every_parameter_has_a_gradient(shape):
    model = small().train()
    model(torch.randn(shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_three_steps_change_every_parameter_of_a_fresh_model():
    # SME's convolution waits for its batch norm, which starts at zero
    model = timm.create_model('cmr_resnet18', num_classes=5, num_frames=T, **SMALL['resnet18']).double().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), .1)
    x, target = clips(4, size=64, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    same = [key for key, v in model.state_dict().items() if torch.equal(v, before[key])]
    assert not same


def test_temporal_parameters_are_grouped_with_their_block():
    model = timm.create_model('cmr_resnet50', device='meta')
    group = {n: i for i, names in group_parameters(model, model.group_matcher()).items() for n in names}
    temporal = [n for n in group if n in temporal_keys(model)]
    assert temporal and set(group) == {n for n, _ in model.named_parameters()}
    for n in temporal:
        assert group[n] == group['.'.join(n.split('.')[:2]) + '.conv1.weight'], n
    assert len(set(group.values())) == 18    # stem, 16 blocks, head


def test_layer_decay_groups_give_a_block_one_rate():
    model = timm.create_model('cmr_resnet18', device='meta')
    groups = param_groups_layer_decay(model, weight_decay=.1, layer_decay=.5)
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    for n, p in model.named_parameters():
        if n in temporal_keys(model):
            block = model.get_submodule('.'.join(n.split('.')[:2]))
            assert scale[id(p)] == scale[id(block.conv1.weight)], n
    assert len(set(scale.values())) == 10


# Image weights

@pytest.mark.parametrize('source', ['state_dict', 'pth', 'safetensors'])
def test_image_weights_arrive_bit_for_bit(weights, source, tmp_path):
    file = tmp_path / f'model.{source}'
    if source == 'pth':
        torch.save(weights, file)
    elif source == 'safetensors':
        safetensors.torch.save_file(weights, file)
    overlay = {'state_dict': dict(weights)} if source == 'state_dict' else {'file': str(file)}
    kwargs = {'num_frames': T, **SMALL['resnet18']}
    torch.manual_seed(1)
    fresh = timm.create_model('cmr_resnet18', **kwargs).state_dict()
    torch.manual_seed(1)
    model = timm.create_model('cmr_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    state, temporal = model.state_dict(), temporal_keys(model)
    assert set(state) == set(weights) | temporal
    for key, v in state.items():
        assert torch.equal(v, (fresh if key in temporal else weights)[key]), key


@pytest.mark.parametrize('arch', ['resnet50', 'resnet50d', 'seresnet50'])
def test_image_weights_of_other_kinds(arch):
    weights = image_weights(arch)
    model = from_weights(weights, arch)
    assert all(torch.equal(model.state_dict()[key], v) for key, v in weights.items())


def test_image_weights_with_another_number_of_classes(weights):
    model = from_weights(weights, num_classes=174)
    assert model.num_classes == 174 and model.fc.weight.shape == (174, 16)
    assert all(torch.equal(model.state_dict()[key], v) for key, v in weights.items() if not key.startswith('fc.'))
    assert from_weights(weights, num_classes=0)(clips()).shape == (2, 16)


def test_image_weights_with_one_input_channel(weights):
    for kwargs in ({}, {'num_classes': 5}, {'num_classes': 0}):
        model = from_weights(weights, in_chans=1, **kwargs)
        torch.testing.assert_close(model.conv1.weight, weights['conv1.weight'].sum(1, keepdim=True))
        assert torch.equal(model.layer4[1].bn2.bias, weights['layer4.1.bn2.bias'])
        assert model(torch.randn(1, T, 1, 32, 32)).shape[0] == 1


@pytest.mark.parametrize('in_chans', [1, 3])
@pytest.mark.parametrize('feature_cls', ['list', 'getter'])
def test_image_weights_for_features_only(weights, in_chans, feature_cls):
    extractor = from_weights(weights, features_only=True, in_chans=in_chans, feature_cls=feature_cls)
    state = {key.removeprefix('model.'): v for key, v in extractor.state_dict().items()}
    assert {key for key in weights if not key.startswith('fc.')} <= set(state)
    for key, v in weights.items():
        if not key.startswith(('fc.', 'conv1.')):
            assert torch.equal(state[key], v), key
    assert extractor(torch.randn(1, T, in_chans, 32, 32))[-1].shape == (T, 16, 1, 1)


def test_the_callers_state_dict_is_left_alone(weights):
    mine = dict(weights)
    timm.create_model(
        'cmr_resnet18', pretrained=True, num_classes=5, pretrained_cfg_overlay={'state_dict': mine},
            **SMALL['resnet18'])
    assert list(mine) == list(weights)


def test_weights_of_the_family_arrive_whole():
    model = small(num_classes=1000)
    other = from_weights(model.state_dict())
    assert all(torch.equal(v, other.state_dict()[key]) for key, v in model.state_dict().items())


def test_old_checkpoints_without_batch_counters(weights):
    old = {key: v for key, v in weights.items() if not key.endswith('num_batches_tracked')}
    assert len(old) < len(weights)
    for num_classes in (1000, 5):
        model = from_weights(old, num_classes=num_classes)
        assert all(torch.equal(model.state_dict()[key], v) for key, v in old.items() if not key.startswith('fc.'))
    trained = small(num_classes=1000).state_dict()
    old = {key: v for key, v in trained.items() if not key.endswith('num_batches_tracked')}
    model = from_weights(old)
    assert all(torch.equal(model.state_dict()[key], v) for key, v in old.items())


@pytest.mark.parametrize('num_classes', [1000, 5, 0])
@pytest.mark.parametrize('broken, missing, unexpected', [
    (lambda w: {k: v for k, v in w.items() if k != 'layer2.0.conv1.weight'}, ['layer2.0.conv1.weight'], []),
    (lambda w: {**w, 'layer5.weight': torch.zeros(1)}, [], ['layer5.weight']),
    (lambda w: {('backbone.' if k == 'bn1.bias' else '') + k: v for k, v in w.items()}, ['bn1.bias'],
        ['backbone.bn1.bias']),
    (lambda w: {**w, 'layer1.0.tim.weight': torch.zeros(64, 1, 3)}, ['layer1.0.cme.w1', 'layer4.1.tim.weight'],
        []),
], ids=['missing layer', 'unexpected key', 'prefix', 'some of the temporal keys'])
def test_error_weights_that_do_not_fit(weights, num_classes, broken, missing, unexpected):
    # also where timm would load what fits and keep random weights elsewhere
    with pytest.raises(RuntimeError, match='the weights do not fit CMRResNet') as error:
        from_weights(broken(weights), num_classes=num_classes)
    head, tail = str(error.value).split('Unexpected keys: ')
    listed = head.split('Missing keys: ')[1]
    assert all(repr(key) in listed for key in missing)
    assert tail == f'{unexpected}.'
    if not missing:
        assert listed == '[]. '


@pytest.mark.parametrize('num_classes', [1000, 5])
def test_error_weights_of_another_depth(num_classes):
    with pytest.raises(RuntimeError, match=r'Missing keys: \[\]\. Unexpected keys: .*layer1\.2\.conv1\.weight'):
        from_weights(image_weights('resnet34'), num_classes=num_classes)
    with pytest.raises(RuntimeError, match=r'Missing keys: .*layer1\.2\.conv1\.weight.*Unexpected keys: \[\]'):
        from_weights(image_weights('resnet26'), 'resnet50', num_classes=num_classes)
    with pytest.raises(RuntimeError, match='size mismatch for layer4'):
        from_weights(image_weights('resnet18', channels=(64, 16, 16, 8)), num_classes=num_classes)


def test_error_weights_without_their_classifier(weights):
    headless = {key: v for key, v in weights.items() if not key.startswith('fc.')}
    with pytest.raises(RuntimeError, match=r'fc\.weight'):
        from_weights(headless)
    assert from_weights(headless, num_classes=5).num_classes == 5


# Files

@pytest.fixture(scope='module')
def seven(tmp_path_factory):
    """A fine-tuned network of 7 classes, and its file as a training script saves it."""
    torch.manual_seed(0)
    model, file = small(num_classes=7), str(tmp_path_factory.mktemp('seven') / 'best.pth')
    torch.save({'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}}, file)
    return model, file


def from_file(file, **kwargs):
    overlay = {'file': file, **kwargs.pop('overlay', {})}
    return timm.create_model(
        'cmr_resnet18', pretrained=True, pretrained_cfg_overlay=overlay,
        **{'num_frames': T, **SMALL['resnet18'], **kwargs}).eval()


def arrived(model, source):
    theirs = source.state_dict()
    return {key for key, v in model.state_dict().items() if key in theirs and torch.equal(v, theirs[key])}


def test_a_fine_tuned_file_arrives_whole_in_the_documented_ways(seven):
    source, file = seven
    x = clips()
    for model in (
            timm.create_model('cmr_resnet18', num_classes=7, num_frames=T, checkpoint_path=file, **SMALL['resnet18']),
            from_file(file, num_classes=7, overlay={'num_classes': 7}),
            from_file(file, overlay={'num_classes': 7})):
        assert arrived(model, source) == set(source.state_dict())
        assert torch.equal(model.eval()(x), source(x))


@pytest.mark.parametrize('num_classes', [7, 5, 1000, None])
def test_error_a_fine_tuned_files_classes_are_not_said(seven, num_classes):
    message = (
        r'^the classifier in the file has 7 classes, but pretrained_cfg says num_classes=1000, .* a model of '
        rf'num_classes={num_classes or 1000}: add num_classes=7 to pretrained_cfg_overlay')
    for overlay in ({}, {'file': None, 'state_dict': seven[0].state_dict()}):
        with pytest.raises(ValueError, match=message):
            from_file(seven[1], num_classes=num_classes, overlay=overlay)


def test_a_fine_tuned_file_starts_another_task(seven):
    source, file = seven
    head = {'fc.weight', 'fc.bias'}
    assert arrived(from_file(file, num_classes=5, overlay={'num_classes': 7}), source) == set(
        source.state_dict()) - head
    # where no classifier is wanted, nothing has to be said about the file's
    assert arrived(from_file(file, num_classes=0), source) == set(source.state_dict()) - head
    extractor = from_file(file, features_only=True)
    assert torch.equal(extractor.layer4[1].bn2.bias, source.layer4[1].bn2.bias)


def test_a_background_class_is_left_out(weights):
    overlay = {'state_dict': dict(weights), 'num_classes': 999, 'label_offset': 1}
    model = timm.create_model(
        'cmr_resnet18', pretrained=True, num_classes=999, pretrained_cfg_overlay=overlay, **SMALL['resnet18'])
    assert torch.equal(model.fc.weight, weights['fc.weight'][1:])


@pytest.mark.parametrize('extra', ['fc.0.weight', 'fc.parametrizations.weight.original0', 'head.weight'])
def test_error_another_kind_of_classifier(weights, extra):
    other = {key: v for key, v in weights.items() if not key.startswith('fc.')}
    for num_classes in (5, 0, 1000):
        with pytest.raises(RuntimeError, match=f'Unexpected keys: .*{re.escape(extra)}'):
            from_weights({**other, extra: torch.zeros(5)}, num_classes=num_classes)


@pytest.mark.parametrize('in_chans, theirs', [(3, 1), (1, 3), (4, 3), (2, 2)])
def test_a_file_of_other_channels_is_adapted_or_refused(in_chans, theirs, tmp_path):
    source = small(num_classes=7, in_chans=theirs)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    call = {'num_classes': 7, 'in_chans': in_chans, 'overlay': {'num_classes': 7}}
    if (in_chans, theirs) == (3, 1):
        with pytest.raises(RuntimeError, match='conv1'):
            from_file(str(tmp_path / 'a.pth'), **call)
        call['overlay']['input_size'] = (1, 224, 224)
    model = from_file(str(tmp_path / 'a.pth'), **call)
    same = arrived(model, source)
    assert same >= set(source.state_dict()) - {'conv1.weight'}
    assert ('conv1.weight' in same) == (in_chans == theirs)
    if in_chans == 3:  # one channel becomes three that add up to it
        torch.testing.assert_close(model.conv1.weight.sum(1), source.conv1.weight.sum(1))


@pytest.mark.parametrize('change, error', [
    (lambda sd: {k: v for k, v in sd.items() if not k.startswith('fc.')}, 'Missing key'),
    (lambda sd: {k: v for k, v in sd.items() if '.tim.' not in k}, 'Missing key'),
    (lambda sd: {**sd, 'head.weight': torch.zeros(1)}, 'Unexpected key'),
    (lambda sd: {**sd, 'fc.weight': torch.zeros(5, 16), 'fc.bias': torch.zeros(5)}, 'size mismatch for fc.weight'),
    (lambda sd: {**sd, 'conv1.weight': torch.zeros(64, 1, 7, 7)}, 'size mismatch for conv1.weight'),
], ids=['headless', 'without TIM', 'unexpected', 'other classes', 'other channels'])
def test_error_checkpoint_path_does_not_fit(seven, change, error, tmp_path):
    torch.save(change(seven[0].state_dict()), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=error):
        timm.create_model('cmr_resnet18', num_classes=7, num_frames=T, checkpoint_path=str(tmp_path / 'a.pth'),
            **SMALL['resnet18'])


@pytest.mark.parametrize('safe', [True, False])
@pytest.mark.parametrize('changed', [None, 6])
def test_save_for_hf_round_trip(tmp_path, safe, changed):
    model = small(num_frames=3, reduction=4, sme='all', consensus='features')
    num_frames = changed or 3
    if changed:
        set_num_frames(model, changed)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert args['num_frames'] == num_frames
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert other.num_frames == num_frames and other.average_features
    assert {m.num_frames for m in other.modules() if hasattr(m, 'num_frames')} == {num_frames}
    x = clips(num_frames=num_frames)
    assert torch.equal(other(x), model(x))


def test_save_for_hf_of_a_model_that_named_no_num_frames(tmp_path):
    model = randomize(timm.create_model('cmr_resnet18', num_classes=5, **SMALL['resnet18'])).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = clips(1, 8)
    assert other.num_frames == 8 and torch.equal(other(x), model(x))
    fewer = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_frames=T, num_classes=7).eval()
    assert fewer(clips()).shape == (2, 7)


def test_copies_pickles_and_state_dicts():
    model, x = small(), clips()
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.layer1[0].tim.weight.add_(1)
        assert torch.equal(model(x), want) and not torch.equal(twin(x), want)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small()
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), want)


# Compilers and formats

@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shallow():
    """Two stages of a block: deeper networks take a compiler longer, and have nothing else in them."""
    model = CMRResNet(CMRBasicBlock, (1, 1, 1, 1), num_frames=T, num_classes=5, **SMALL['resnet18'])
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    return randomize(model).eval()


def test_compile_is_one_graph(dynamo):
    model, x = shallow(), clips()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))


def test_compile_trains(dynamo):
    model, x = shallow().double().train(), clips(dtype=torch.float64)
    twin = copy.deepcopy(model)
    torch.compile(model, fullgraph=True, backend='aot_eager')(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('grad', [True, False])
def test_export_with_a_dynamic_batch(grad):
    model, batches = shallow(), torch.export.Dim('b', min=1, max=16)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (clips(3),), dynamic_shapes=({0: batches},))
    for batch in (1, 2, 5):
        x = clips(batch)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('arch, consensus', [('resnet18', 'logits'), ('resnet26', 'features')])
def test_torchscript(arch, consensus):
    model, file = small(arch, consensus=consensus, drop_rate=.5, layers=(2, 1, 1, 1)), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted, x = torch.jit.load(file), clips()
    for x in (clips(), clips().flatten(0, 1), torch.randn(3, 3, 32, 32)):
        torch.testing.assert_close(scripted(x), model(x))


def test_channels_last():
    model, x = small(), clips()
    want = model(x)
    model = model.to(memory_format=torch.channels_last)
    folded = x.flatten(0, 1).to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(folded), want, rtol=1e-4, atol=1e-4)
    assert model.forward_features(folded).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast():
    model, x = small(), clips()
    want = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < .1 * want.norm()
    model.train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model(x).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Errors

@pytest.mark.parametrize('call', ['forward', 'forward_features', 'forward_intermediates'])
@pytest.mark.parametrize('shape, message', [
    ((2, 3, 3, 32, 32), r'x of shape \[2, 3, 3, 32, 32\] holds clips of 3 frames, but num_frames=4 is wanted'),
    ((6, 3, 32, 32), 'x holds 6 frames, which is not a whole number of clips: with num_frames=4'),
    ((3, 32, 32), r'x must be clips \(B, 4, C, H, W\) or frames \(B\*4, C, H, W\), got \[3, 32, 32\]'),
], ids=['T', 'N', 'ndim'])
def test_error_input(call, shape, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        getattr(small(), call)(torch.zeros(shape))


@pytest.mark.parametrize('kwargs, message', [
    *(({layer: 'frist'}, f"{layer} must be one of 'all', 'first', 'none', got 'frist'") for layer in ('cme', 'tim',
        'sme')),
    ({'consensus': 'max'}, "consensus must be one of 'logits', 'features', got 'max'"),
    ({'num_frames': 0}, 'num_frames must be a positive int, got 0'),
    ({'num_frames': '8'}, "num_frames must be a positive int, got '8'"),
    ({'num_frames': 0, 'cme': 'none', 'tim': 'none', 'sme': 'none'}, 'num_frames must be a positive int, got 0'),
    ({'reduction': 0}, 'reduction must be a positive int, got 0'),
    ({'reduction': (8,)}, r'reduction must be a positive int or a pair \(r1, r2\) of them, got \(8,\)'),
], ids=str)
def test_error_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        timm.create_model('cmr_resnet18', device='meta', **kwargs)


def test_error_unknown_argument():
    with pytest.raises(TypeError, match='num_segments'):
        timm.create_model('cmr_resnet18', num_segments=8)
    with pytest.raises(TypeError, match='num_segments'):
        timm.create_model('cmr_resnet18', block_args={'num_segments': 8})


def test_the_class_alone():
    model = CMRResNet(CMRBasicBlock, (1, 1, 1, 1), num_frames=T, num_classes=5, **SMALL['resnet18']).eval()
    assert model(clips()).shape == (2, 5)
    assert [n for n, m in model.named_modules() if isinstance(m, SME)] == [f'layer{i}.0.sme' for i in (1, 2, 3, 4)]
    assert set_num_frames(model, 2).num_frames == 2


@pytest.mark.parametrize('taken', [{'num_frames': 4}, {'cme': 'none', 'reduction': 4}])
def test_error_block_args_hold_arguments_of_the_model(taken):
    names = re.escape(str(sorted(taken)))
    with pytest.raises(ValueError, match=rf'^block_args must not hold {names}: these are arguments of the model$'):
        timm.create_model('cmr_resnet18', block_args=taken)


@pytest.mark.parametrize('block', [BasicBlock, 'basic', (CMRBlock,) * 4])
def test_error_block_is_no_cmr_block(block):
    with pytest.raises(TypeError, match=r'^block must be CMRBlock, CMRBasicBlock or made of one of them, got '):
        timm.create_model('cmr_resnet18', block=block)


@pytest.mark.parametrize('call', ['__call__', 'forward_features', 'forward_intermediates'])
def test_error_a_part_of_another_clip_length(call):
    model = small()
    set_num_frames(model.layer1, 2 * T)
    with pytest.raises(ValueError, match=rf'^num_frames={T}, but layer1\.0\.\w+ of the model has num_frames={2 * T}'):
        getattr(model, call)(clips())
