"""Folded networks compute what they did, without batch norms; the CUDA graph replays the forward pass.

Tolerances are of the folded network's logits against those of the whole one, relative to their size: 1e-11 in float64
(measured: 1e-13), 1e-5 in float32 (2e-6) and 0.05 in bfloat16 (0.03). Randomized networks of 101 layers and more
amplify any rounding, as much without folding: 1e-3 in float32 (8e-5) and 0.4 in bfloat16 (0.13).
"""
import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from helpers import anatomy, assert_same, randomize, values
from timm.models import create_feature_extractor
from timm.utils import freeze, reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from cmr_layers import SME, ClipModel, CMRBasicBlock, retrofit, set_num_frames
from cmr_layers.deploy import StemNorm, _check_like, fold_norms, graphed
from cmr_layers.released import CME as ReleasedCME

T = 3
FAMILY = [
    'cmr_resnet18', 'cmr_resnet18d', 'cmr_resnet26', 'cmr_resnet26d', 'cmr_resnet34', 'cmr_resnet34d', 'cmr_resnet50',
    'cmr_resnet50d', 'cmr_resnet101', 'cmr_resnet101d', 'cmr_resnet152', 'cmr_resnet152d', 'cmr_resnext50_32x4d',
    'cmr_resnext50d_32x4d', 'cmr_wide_resnet50_2', 'cmr_seresnet50',
]
RELEASED = [f'released_cmr_resnet{depth}' for depth in (50, 101, 152)]
# one of each kind of stem, block and shortcut, and of each CME
KINDS = ['cmr_resnet18', 'cmr_resnet26d', 'released_cmr_resnet50']
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def small(name='cmr_resnet18', **kwargs):
    """A network with few channels, else as the name says."""
    first = 64 if name.removesuffix('d').endswith(('18', '34')) else 16
    kwargs = {'num_classes': 5, 'num_frames': T, 'channels': (first, 16, 16, 16), **kwargs}
    return randomize(timm.create_model(name, **kwargs)).eval()


def clips(batch=2, num_frames=T, size=32, **kwargs):
    return torch.randn(batch, num_frames, 3, size, size, **kwargs)


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def assert_near(got, want, tolerance):
    assert got.dtype == want.dtype and got.shape == want.shape
    distance = (got.double() - want.double()).norm() / want.double().norm()
    assert distance <= tolerance, f'{distance:.1e} > {tolerance:.1e}'


def resaved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Outputs

@torch.no_grad()
@pytest.mark.parametrize('name', FAMILY + RELEASED)
def test_every_network_computes_what_it_did(name):
    model, x = small(name), clips()
    assert norms(model)
    single, half = (1e-3, .4) if '101' in name or '152' in name else (1e-5, .05)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, single), (torch.bfloat16, half)):
        network = copy.deepcopy(model).to(dtype)
        folded = reparameterize_model(network)
        assert not norms(folded)
        assert_near(folded(x.to(dtype)), network(x.to(dtype)), tolerance)


@torch.no_grad()
@pytest.mark.parametrize('name', ['cmr_resnet18', 'cmr_resnet50'])
def test_at_full_width(name):
    model, x = randomize(timm.create_model(name, num_classes=5, num_frames=2)).eval(), clips(1, 2, size=64)
    folded = reparameterize_model(model)
    assert_near(folded(x), model(x), 1e-5)
    assert_near(folded.bfloat16()(x.bfloat16()), reparameterize_model(model.bfloat16())(x.bfloat16()), .05)


@pytest.mark.parametrize('name', FAMILY + RELEASED)
def test_no_batch_norm_is_left_at_full_width(name):
    model = timm.create_model(name, device='meta').eval()
    folded = reparameterize_model(model)
    assert norms(model) and not norms(folded)
    # what is gone are the batch norms, what is new are the biases of their convolutions
    gone = {key for key in model.state_dict() if key.rsplit('.', 1)[0] in norms(model)}
    convs = {name for name, m in folded.named_modules() if isinstance(m, nn.Conv2d)} - {
        name for name, m in model.named_modules() if getattr(m, 'bias', None) is not None}
    assert set(folded.state_dict()) == {*model.state_dict()} - gone | {f'{name}.bias' for name in convs}
    assert not any(m.training for m in folded.modules())


@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
def test_other_clips_and_stills(name):
    model = small(name).double()
    folded = reparameterize_model(model)
    stills = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_near(folded(stills), model(stills), 1e-11)
    for num_frames in (2, 4):
        set_num_frames(model, num_frames), set_num_frames(folded, num_frames)
        x = clips(num_frames=num_frames, dtype=torch.float64)
        assert_near(folded(x), model(x), 1e-11)
        assert_near(folded(x.flatten(0, 1)), model(x), 1e-11)


@torch.no_grad()
@pytest.mark.parametrize('kwargs', [
    {'sme': 'all', 'cme': 'none'}, {'output_stride': 8}, {'stem_type': 'deep_tiered', 'stem_width': 16},
    {'norm_layer': lambda *args, **kwargs: nn.BatchNorm2d(*args, eps=.1, affine=False, **kwargs)},
    {'drop_path_rate': .1, 'drop_block_rate': .1, 'drop_rate': .5}, {'down_kernel_size': 3},
], ids=lambda kwargs: ' '.join(kwargs))
def test_other_arguments(kwargs):
    if 'norm_layer' in kwargs:
        model = timm.create_model('cmr_resnet18', num_classes=5, num_frames=T, zero_init_last=False, **kwargs).eval()
    else:
        model = small(**kwargs)
    folded, x = reparameterize_model(model), clips()
    assert not norms(folded)
    assert_near(folded(x), model(x), 1e-5)


def test_gradients_flow_through_a_folded_network():
    model, x = small().double(), clips(dtype=torch.float64)
    folded = reparameterize_model(model)
    model(x).square().sum().backward()
    folded(x).square().sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    torch.testing.assert_close(folded.layer2[0].tim.weight.grad, model.layer2[0].tim.weight.grad)


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


# What stays

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
    assert reparameterize_model(model, inplace=True) is model and not norms(model)
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


def test_image_weights_fold_too():
    weights = randomize(timm.create_model('resnet18')).state_dict()
    model = timm.create_model(
        'cmr_resnet18', pretrained=True, pretrained_cfg_overlay={'state_dict': weights}, num_frames=T, cme='none',
        tim='none', sme='none').eval()
    image, x = timm.create_model('resnet18').eval(), clips()
    image.load_state_dict(weights)
    assert_near(reparameterize_model(model)(x), image(x.flatten(0, 1)).unflatten(0, (2, T)).mean(1), 1e-5)


# The stem's batch norm

@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), resaved],
    ids=['deepcopy', 'pickle', 'torch.save'])
def test_copies_know_their_own_stem(name, clone):
    model, x = small(name), clips()
    twin = clone(model)
    assert type(model.bn1) is type(twin.bn1) is StemNorm and twin.bn1.stem[0] is twin.conv1
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [(n, type(m)) for n, m in twin.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    before = values(model)
    folded = reparameterize_model(twin, inplace=True)
    assert_same(before, model.state_dict())
    assert_near(folded(x), model(x), 1e-5)
    assert torch.equal(clone(folded)(x), folded(x))


def test_it_is_the_batch_norm_it_replaced():
    conv, norm = nn.Conv2d(3, 8, 1), randomize(nn.BatchNorm2d(8, eps=.1, momentum=None)).eval()
    stem_norm, x = StemNorm(norm, conv), torch.randn(2, 8, 4, 4)
    assert isinstance(stem_norm, nn.BatchNorm2d) and torch.equal(stem_norm(x), norm(x))
    assert_same(norm.state_dict(), stem_norm.state_dict())
    assert stem_norm.extra_repr() == norm.extra_repr() and not stem_norm.training
    assert [m for m in stem_norm.modules()] == [stem_norm]


@pytest.mark.parametrize('name', ['cmr_resnet18', 'cmr_resnet18d'])
def test_another_stem_is_the_one_that_folds(name):
    model = small(name)
    if name.endswith('d'):
        model.conv1[0] = nn.Conv2d(5, 32, 3, stride=2, padding=1, bias=False)
        model.conv1[6] = nn.Conv2d(32, 64, 5, padding=2)
    else:
        model.conv1 = nn.Conv2d(5, 64, 7, stride=2, padding=3, bias=False)
    x = torch.randn(2, T, 5, 32, 32)
    folded = reparameterize_model(model)
    assert not norms(folded)
    assert_near(folded(x), model(x), 1e-5)
    model.conv1 = nn.Sequential(nn.Conv2d(5, 64, 7, stride=2, padding=3), nn.ReLU())    # no convolution before bn1
    folded = reparameterize_model(model)
    assert norms(folded) == ['bn1']
    assert_near(folded(x), model(x), 1e-5)


# What does not fold

@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('inplace', [True, False])
def test_error_training_mode(name, inplace):
    model = small(name).train()
    before, tree = values(model), anatomy(model)
    message = r'^model must be in eval mode to fold its batch norms, got (BatchNorm2d|StemNorm)\(.*\) in training mode'
    with pytest.raises(ValueError, match=message):
        reparameterize_model(model, inplace=inplace)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


@pytest.mark.parametrize('at', ['layer2.0', 'layer3.0.downsample', 'layer1.0.sme', 'bn1'])
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
    assert not norms(folded)
    assert_near(folded(x), want, 1e-5)


@pytest.mark.parametrize('at', ['layer1.0.conv1', 'layer1.0.bn1', 'layer4.1.bn2', 'conv1', 'bn1'])
def test_a_pair_with_a_hook_stays(at):
    model, x, seen = small(), clips(), []
    module = model.get_submodule(at)
    module.register_forward_hook(lambda m, args, y: seen.append(1) or y + 1)
    want = model(x)
    reparameterize_model(model, inplace=True)
    assert norms(model) == [at.replace('conv', 'bn')]
    assert_near(model(x), want, 1e-5)
    assert len(seen) == 2


def test_reparametrized_and_pruned_convolutions_stay():
    model, x = small(), clips()
    parametrizations.weight_norm(model.layer1[0].conv1)
    prune.l1_unstructured(model.layer1[0].conv2, 'weight', .5)
    want = model(x)
    reparameterize_model(model, inplace=True)
    assert norms(model) == ['layer1.0.bn1', 'layer1.0.bn2']
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
    model = make('resnet18', num_classes=5)
    retrofit(model, num_frames=T)
    randomize(model).eval()
    x = clips() if wrap else clips().flatten(0, 1)
    model = ClipModel(model, num_frames=T) if wrap else model
    folded = reparameterize_model(model)
    assert norms(folded) == ['model.bn1' if wrap else 'bn1'] and len(norms(model)) == 24
    assert_near(folded(x), model(x), 1e-5)


def test_timms_network_of_cmr_blocks_keeps_the_stems_norm():
    model = timm.models.ResNet(CMRBasicBlock, (1, 1, 1, 1), num_classes=5, block_args={'num_frames': T})
    folded, x = reparameterize_model(randomize(model).eval()), clips().flatten(0, 1)
    assert norms(folded) == ['bn1']
    assert_near(folded(x), model(x), 1e-5)


# Compilers and formats

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
    assert norms(model) and not norms(folded)
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


# The CUDA graph

def test_error_graphed():
    model, x = small(), clips()
    with pytest.raises(ValueError, match=r'^example_input must be on a CUDA device, got a tensor on cpu$'):
        graphed(model, x)
    with pytest.raises(ValueError, match=r'^model must be in eval mode, got one in training mode; call model\.eval'):
        graphed(model.train(), x)
    model.eval().layer1.train()
    with pytest.raises(ValueError, match=r'^model must be in eval mode'):
        graphed(model, x)
    with pytest.raises(TypeError, match=r'^example_input must be a tensor, got list$'):
        graphed(model.eval(), [x])
    with pytest.raises(TypeError, match=r'^model must be an nn\.Module, got'):
        graphed(torch.relu, x)


@pytest.mark.parametrize('x, got', [
    (torch.zeros(1, 3), r'\[1, 3\], torch\.float32 on cpu'), (torch.zeros(2, 3).half(), r'\[2, 3\], torch\.float16 on'),
    (torch.zeros(2, 3, device='meta'), r'\[2, 3\], torch\.float32 on meta')], ids=['shape', 'dtype', 'device'])
def test_error_other_input_than_captured(x, got):
    static = torch.zeros(2, 3)
    wanted = r'\[2, 3\], torch\.float32 on cpu, as the graph was captured with'
    with pytest.raises(ValueError, match=f'^x must be a tensor of {wanted}, got {got}'):
        _check_like(x, static)
    with pytest.raises(TypeError, match=f'^x must be a tensor of {wanted}, got list$'):
        _check_like([x], static)
    _check_like(torch.ones(2, 3), static)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a GPU')


@cuda
@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_graphed_replays_the_forward_pass(name, dtype):
    model = reparameterize_model(small(name)).to('cuda', dtype)
    inputs = [clips(device='cuda', dtype=dtype) for _ in range(3)]
    run = graphed(model, inputs[0])
    got = [run(x) for x in inputs]    # copies: a later call leaves an earlier result alone
    for y, x in zip(got, inputs, strict=True):
        assert_near(y, model(x), 1e-5 if dtype == torch.float32 else .02)
        assert not y.is_inference()


@cuda
@torch.no_grad()
def test_graphed_sees_weights_that_change_in_place():
    model, x = small().cuda(), clips(device='cuda')
    run = graphed(model, x)
    before = run(x)
    model.load_state_dict(small().state_dict())
    assert_near(run(x), model(x), 1e-5)
    assert not torch.equal(run(x), before)


@cuda
def test_graphed_of_several_outputs():
    model, x = small(features_only=True).cuda(), clips(device='cuda')
    run = graphed(model, torch.randn_like(x))
    for got, want in zip(run(x), model(x), strict=True):
        assert_near(got, want, 1e-5)


@cuda
def test_error_graphed_at_call_time():
    model, x = small().cuda(), clips(device='cuda')
    run = graphed(model, x)
    for other in (x[:1], x.half(), x.cpu()):
        with pytest.raises(ValueError, match=r'^x must be a tensor of .* as the graph was captured with, got '):
            run(other)
    model.train()
    with pytest.raises(ValueError, match=r'^model must be in eval mode'):
        run(x)
    with torch.autocast('cuda'), pytest.raises(RuntimeError, match=r'^autocast must be without a cache here'):
        graphed(model.eval(), x)
    with torch.autocast('cuda', dtype=torch.bfloat16, cache_enabled=False):
        assert_near(graphed(model, x)(x), model(x), .02)
