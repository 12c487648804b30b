"""timm's protocol: ``reparameterize_model`` folds the batch norms of blocks and layers, and leaves the stem's."""
import copy

import pytest
import timm
import torch
import torchvision
from folding import KINDS, T, assert_near, clips, norms, resaved, retrofitted, small
from helpers import anatomy, assert_same, randomize, values
from timm.models import create_feature_extractor
from timm.utils import freeze, reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from cmr_layers import SME, CMRBasicBlock
from cmr_layers.fuse import fold_norms, fold_pair
from cmr_layers.released import CME as ReleasedCME

# what timm does not ask for: the network's own, and those of a stem of several convolutions
STEM = {'cmr_resnet18': ['bn1'], 'cmr_resnet26d': ['conv1.1', 'conv1.4', 'bn1'], 'released_cmr_resnet50': ['bn1']}


@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
def test_networks_compute_what_they_did_with_the_stems_norm_alone(name):
    model, x = small(name), clips()
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, .05)):
        network = copy.deepcopy(model).to(dtype)
        folded = reparameterize_model(network)
        assert norms(folded) == STEM[name]
        assert_near(folded(x.to(dtype)), network(x.to(dtype)), tolerance)


# The arithmetic

def test_half_precision_is_rounded_once_and_double_stays_double():
    conv, norm = nn.Conv2d(4, 8, 3, padding=1), randomize(nn.BatchNorm2d(8))
    exact = nn.Sequential(conv, norm).eval().bfloat16()
    wide, double = copy.deepcopy(exact).float(), copy.deepcopy(exact).double()
    for pair in (exact, wide, double):
        fold_norms(pair)
    for name in ('weight', 'bias'):
        assert torch.equal(getattr(exact[0], name), getattr(wide[0], name).bfloat16())
        assert getattr(double[0], name).dtype == torch.float64
        torch.testing.assert_close(getattr(double[0], name).float(), getattr(wide[0], name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('kwargs', [
    {'groups': 2, 'bias': False}, {'padding_mode': 'zeros', 'padding': 1, 'stride': 2}, {'dilation': 2}], ids=str)
@pytest.mark.parametrize('affine', [True, False])
def test_pairs(kwargs, affine):
    norm = nn.BatchNorm2d(8, eps=.1, affine=affine)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(.5, 2)
    pair, x = nn.Sequential(nn.Conv2d(4, 8, 3, **kwargs), norm).double().eval(), torch.randn(2, 4, 9, 9).double()
    want = pair(x)
    assert fold_norms(pair) is pair and isinstance(pair[1], nn.Identity)
    torch.testing.assert_close(pair(x), want, rtol=1e-12, atol=1e-12)


def test_frozen_convolutions_stay_frozen():
    model = small()
    model.layer1[0].conv1.weight.requires_grad_(False)
    folded = reparameterize_model(model)
    assert {n for n, p in folded.named_parameters() if not p.requires_grad} == {
        'layer1.0.conv1.weight', 'layer1.0.conv1.bias'}


def test_each_parameter_of_a_convolution_learns_or_not_as_it_did():
    conv, norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8).eval()
    conv.weight.requires_grad_(False)
    fold_pair(conv, norm)
    assert not conv.weight.requires_grad and conv.bias.requires_grad


def test_memory_format_stays():
    model = small().to(memory_format=torch.channels_last)
    folded, x = reparameterize_model(model), clips()
    assert folded.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(folded(x), model(x), 1e-5)


@pytest.mark.parametrize('layer', [SME, ReleasedCME])
def test_layers_fold_alone(layer):
    model, x = nn.Sequential(layer(8, num_frames=4)).double().eval(), torch.randn(8, 8, 5, 5, dtype=torch.float64)
    folded = reparameterize_model(randomize(model))
    assert not norms(folded) and type(folded[0]) is layer
    assert_near(folded(x), model(x), 1e-12)


@pytest.mark.parametrize('name', KINDS)
def test_the_original_is_left_alone(name):
    model, x = small(name), clips()
    before, tree, want = values(model), anatomy(model), model(x)
    folded = reparameterize_model(model)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree and torch.equal(model(x), want)
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize('name', KINDS)
def test_in_place(name):
    model, x = small(name), clips()
    want = reparameterize_model(model)
    assert reparameterize_model(model, inplace=True) is model and norms(model) == STEM[name]
    assert_same(want.state_dict(), model.state_dict())
    assert torch.equal(model(x), want(x))


@pytest.mark.parametrize('name', KINDS)
def test_a_second_time_changes_nothing(name):
    folded = reparameterize_model(small(name))
    again = reparameterize_model(folded)
    assert_same(folded.state_dict(), again.state_dict())
    assert anatomy(folded) == anatomy(again)


@pytest.mark.parametrize('name', KINDS)
def test_folded_weights_load_into_a_folded_network(name):
    folded, x = reparameterize_model(small(name)), clips()
    other = reparameterize_model(small(name))
    assert not torch.equal(other(x), folded(x))
    other.load_state_dict(resaved(folded.state_dict()), strict=True)
    assert torch.equal(other(x), folded(x))


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('inplace', [True, False])
def test_error_training_mode(name, inplace):
    model = small(name).train()
    before, tree = values(model), anatomy(model)
    message = r'^model must be in eval mode to fold its batch norms, got BatchNorm2d\(.*\) in training mode'
    with pytest.raises(ValueError, match=message):
        reparameterize_model(model, inplace=inplace)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


@pytest.mark.parametrize('at', ['layer2.0', 'layer3.0.downsample', 'layer1.0.sme'])
def test_error_a_part_in_training_mode(at):
    model = small()
    model.get_submodule(at).train()
    with pytest.raises(ValueError, match=r'still change; call model\.eval'):
        reparameterize_model(model)


@pytest.mark.parametrize('norm_layer', [
    lambda channels, **dd: nn.GroupNorm(4, channels, **dd),
    lambda channels, **dd: nn.BatchNorm2d(channels, track_running_stats=False, **dd),
    lambda channels, **dd: timm.layers.BatchNormAct2d(channels, **dd),
], ids=['GroupNorm', 'no statistics', 'BatchNormAct2d'])
def test_other_norms_stay(norm_layer):
    model = timm.create_model(
        'cmr_resnet18', num_classes=5, num_frames=T, norm_layer=norm_layer, zero_init_last=False).eval()
    folded, x = reparameterize_model(model), clips()
    assert norms(folded) == [name for name in norms(model) if not name.endswith('.sme.bn')]
    assert_near(folded(x), model(x), 1e-5)


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, lambda m: freeze(m) or m],
    ids=['SyncBatchNorm', 'freeze'])
def test_converted_norms_stay_and_their_weights_fold_in_a_fresh_network(convert):
    model, fresh, x = small(), small(), clips()
    want = model(x)
    model = convert(model)
    assert_near(model(x), want, 1e-6)
    assert_near(reparameterize_model(model)(x), want, 1e-6)
    assert fresh.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []
    folded = reparameterize_model(fresh)
    assert norms(folded) == ['bn1']
    assert_near(folded(x), want, 1e-5)


@pytest.mark.parametrize('at', ['layer1.0.conv1', 'layer1.0.bn1', 'layer4.1.bn2'])
def test_a_pair_with_a_hook_stays(at):
    model, x, seen = small(), clips(), []
    module = model.get_submodule(at)
    module.register_forward_hook(lambda m, args, y: seen.append(1) or y + 1)
    want = model(x)
    reparameterize_model(model, inplace=True)
    assert norms(model) == ['bn1', at.replace('conv', 'bn')]
    assert_near(model(x), want, 1e-5)
    assert len(seen) == 2


def test_reparametrized_and_pruned_convolutions_stay():
    model, x = small(), clips()
    parametrizations.weight_norm(model.layer1[0].conv1)
    prune.l1_unstructured(model.layer1[0].conv2, 'weight', .5)
    want = model(x)
    reparameterize_model(model, inplace=True)
    assert norms(model) == ['bn1', 'layer1.0.bn1', 'layer1.0.bn2']
    assert_near(model(x), want, 1e-5)


def test_only_what_follows_a_convolution_folds():
    act = nn.ReLU()
    module = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    before = anatomy(module)
    assert anatomy(fold_norms(module)) == before


@pytest.mark.parametrize('wrap', [False, True])
@pytest.mark.parametrize('make', [timm.create_model, torchvision.models.get_model])
def test_of_a_retrofitted_network_all_norms_but_the_stems_fold(make, wrap):
    model, x = retrofitted(make, wrap)
    folded = reparameterize_model(model)
    assert norms(folded) == ['model.bn1' if wrap else 'bn1'] and len(norms(model)) == 24
    assert_near(folded(x), model(x), 1e-5)


def test_timms_network_of_cmr_blocks_keeps_the_stems_norm():
    model = timm.models.ResNet(CMRBasicBlock, (1, 1, 1, 1), num_classes=5, block_args={'num_frames': T})
    folded, x = reparameterize_model(randomize(model).eval()), clips().flatten(0, 1)
    assert norms(folded) == ['bn1']
    assert_near(folded(x), model(x), 1e-5)


@pytest.mark.parametrize('name', KINDS)
def test_torchscript_before_and_after(name):
    model, x = small(name), clips()
    folded = reparameterize_model(model)
    for network in (model, folded):
        torch.testing.assert_close(torch.jit.script(network)(x), network(x))


@pytest.mark.parametrize('name', KINDS)
def test_fx_before_and_after(name):
    model, x = small(name), clips()
    want = model.forward_intermediates(x, intermediates_only=True)[1:]
    nodes = ['layer1', 'layer2', 'layer3', 'layer4']
    extractor = create_feature_extractor(copy.deepcopy(model), nodes)
    for network in (
            extractor, create_feature_extractor(reparameterize_model(model), nodes),
            reparameterize_model(extractor.eval(), inplace=True)):    # a copy would be in training mode
        for got, y in zip(network(x).values(), want, strict=True):
            assert_near(got, y, 1e-5)


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
@pytest.mark.parametrize('name', KINDS)
def test_features_only(name, feature_cls):
    kwargs = {} if feature_cls == 'list' else {'feature_cls': feature_cls}
    model, x = small(name, features_only=True, **kwargs), clips()
    folded = reparameterize_model(model)
    found = {at.removeprefix('model.').removeprefix('body.').replace('_', '.') for at in norms(folded)}
    assert found == set(STEM[name])
    for got, want in zip(folded(x), model(x), strict=True):
        if isinstance(got, str):    # a dict's keys
            got, want = folded(x)[got], model(x)[want]
        assert_near(got, want, 1e-5)


def test_compile_and_export():
    torch._dynamo.reset()
    folded, x = reparameterize_model(small()), clips()
    want = folded(x)
    torch.testing.assert_close(torch.compile(folded, fullgraph=True, backend='aot_eager')(x), want)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), want)
    torch._dynamo.reset()
