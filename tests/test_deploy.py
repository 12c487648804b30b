"""``fold`` takes the batch norms out of our networks, and what they compute stays; ``graphed`` replays a network.

The networks of others are in ``test_fold_networks.py``; what is folded and what is left alone, and why, in
``test_watch.py``; what ``fold`` keeps and its errors in ``test_fold.py``; timm's own call in ``test_fuse.py``.
"""
import copy
import pickle

import pytest
import timm
import torch
from fake_cuda import fake_cuda
from folding import EVERY, KINDS, T, assert_folds, assert_near, clips, norms, resaved, small
from helpers import anatomy, assert_same, randomize, values
from timm.models import create_feature_extractor
from timm.utils import freeze, reparameterize_model
from torch import nn

from cmr_layers import TIM, insert, save_model, set_num_frames
from cmr_layers.deploy import _check_like, fold, graphed
from cmr_layers.ops import use_path


def folded(model, x):
    """A folded copy; the network has to survive that."""
    model = copy.deepcopy(model)
    fold(model, x)
    return model


# The family

@pytest.mark.parametrize('name', EVERY)
def test_every_network_computes_what_it_did(name):
    model, x = small(name), clips()
    assert norms(model)
    if '152' not in name:    # to save time
        single, half = (1e-3, .4) if '101' in name else (1e-5, .05)
        assert_folds(copy.deepcopy(model), x, single)
        assert_folds(copy.deepcopy(model).bfloat16(), x.bfloat16(), half)
    assert_folds(model.double(), x.double(), 1e-11)


@pytest.mark.parametrize('name', [
    'cmr_resnet18', 'cmr_resnet26', pytest.param('cmr_resnet50', marks=pytest.mark.slow)])
def test_at_full_width(name):
    model, x = randomize(timm.create_model(name, num_classes=5, num_frames=2)).eval(), clips(1, 2)
    half = copy.deepcopy(model).bfloat16()
    assert_folds(half, x.bfloat16(), .05)
    assert_folds(model, x)
    with torch.no_grad():
        assert_near(model.bfloat16()(x.bfloat16()), half(x.bfloat16()), .05)


@pytest.mark.parametrize('name', EVERY)
def test_no_batch_norm_is_left_at_full_width(name):
    model = timm.create_model(name, device='meta', num_frames=2).eval()
    keys, gone = set(model.state_dict()), set(norms(model))
    fold(model, torch.empty(2, 3, 64, 64, device='meta'))
    assert not norms(model) and gone
    # what is gone are the batch norms, what is new are the biases of their convolutions
    assert keys - set(model.state_dict()) == {key for key in keys if key.rsplit('.', 1)[0] in gone}
    assert {key.rsplit('.', 1)[1] for key in set(model.state_dict()) - keys} == {'bias'}
    assert not any(m.training for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('example', ['clips', 'frames', 'stills'])
def test_other_clips_and_stills(name, example):
    model = small(name).double()
    stills = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x = clips(dtype=torch.float64)
    twin = folded(model, {'clips': x, 'frames': x.flatten(0, 1), 'stills': stills}[example])
    assert not norms(twin)
    assert_near(twin(stills), model(stills), 1e-11)
    for num_frames in (2, 4):
        set_num_frames(model, num_frames), set_num_frames(twin, num_frames)
        x = clips(num_frames=num_frames, dtype=torch.float64)
        assert_near(twin(x), model(x), 1e-11)
        assert_near(twin(x.flatten(0, 1)), model(x), 1e-11)


@torch.no_grad()
@pytest.mark.parametrize('path', ['auto', 'plain', 'reference'])
def test_on_each_path(path):
    model, x = small(sme='all'), clips()
    with use_path(path):    # the run that fold watches is on a path of its own
        twin = folded(model, x)
        assert not norms(twin)
        assert_near(twin(x), model(x), 1e-5)


def test_with_gradients_on_and_in_inference_mode():
    model, x = small(), clips()
    want = model(x)
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        fold(twin, clips())
    assert not norms(twin)
    assert_near(twin(x), want, 1e-5)
    twin(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in twin.parameters())


@pytest.mark.parametrize('kwargs', [
    {'sme': 'all', 'cme': 'none'}, {'output_stride': 8}, {'stem_type': 'deep_tiered', 'stem_width': 16},
    {'norm_layer': lambda *args, **kwargs: nn.BatchNorm2d(*args, eps=.1, affine=False, **kwargs)},
    {'drop_path_rate': .1, 'drop_block_rate': .1, 'drop_rate': .5}, {'down_kernel_size': 3},
    {'norm_layer': timm.layers.BatchNormAct2d}, {'aa_layer': timm.layers.BlurPool2d},
], ids=lambda kwargs: ' '.join(map(str, kwargs)))
def test_other_arguments(kwargs):
    if 'norm_layer' in kwargs:
        model = timm.create_model('cmr_resnet18', num_classes=5, num_frames=T, zero_init_last=False, **kwargs).eval()
    else:
        model = small(**kwargs)
    assert_folds(model, clips())


def test_gradients_flow_through_a_folded_network():
    model, x = small().double(), clips(dtype=torch.float64)
    twin = folded(model, x)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    torch.testing.assert_close(twin.layer2[0].tim.weight.grad, model.layer2[0].tim.weight.grad)


def test_image_weights_fold_too():
    weights = randomize(timm.create_model('resnet18')).state_dict()
    model = timm.create_model(
        'cmr_resnet18', pretrained=True, pretrained_cfg_overlay={'state_dict': weights}, num_frames=T, cme='none',
        tim='none', sme='none').eval()
    image, x = timm.create_model('resnet18').eval(), clips()
    image.load_state_dict(weights)
    assert_folds(model, x)
    assert_near(model(x), image(x.flatten(0, 1)).unflatten(0, (2, T)).mean(1), 1e-5)


# The stem's batch norm, which timm's call leaves

@pytest.mark.parametrize('name', KINDS)
def test_timms_call_leaves_the_stems_norm_and_fold_folds_it(name):
    model, x = small(name), clips()
    want = model(x)
    model = reparameterize_model(model)
    left = norms(model)
    assert 'bn1' in left and all(at.startswith(('bn1', 'conv1.')) for at in left)
    assert [norm for _, norm in assert_folds(model, x).pairs] == left
    assert_near(model(x), want, 1e-5)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), resaved],
    ids=['deepcopy', 'pickle', 'torch.save'])
def test_copies_have_their_own_stem(name, clone):
    model, x = small(name), clips()
    twin = clone(model)
    assert type(model.bn1) is type(twin.bn1) is nn.BatchNorm2d
    before = values(model)
    fold(twin, x)
    assert_same(before, model.state_dict())
    assert not norms(twin)
    assert_near(twin(x), model(x), 1e-5)
    assert torch.equal(clone(twin)(x), twin(x))


@pytest.mark.parametrize('name', ['cmr_resnet18', 'cmr_resnet18d'])
def test_another_stem_is_the_one_that_folds(name):
    model = small(name)
    if name.endswith('d'):
        model.conv1[0] = nn.Conv2d(5, 32, 3, stride=2, padding=1, bias=False)
        model.conv1[6] = nn.Conv2d(32, 64, 5, padding=2)
    else:
        model.conv1 = nn.Conv2d(5, 64, 7, stride=2, padding=3, bias=False)
    x = torch.randn(2, T, 5, 32, 32)
    assert_folds(copy.deepcopy(model.eval()), x)
    model.conv1 = nn.Sequential(nn.Conv2d(5, 64, 7, stride=2, padding=3), nn.ReLU()).eval()    # ends with no conv
    want = model(x)
    assert fold(model, x).left == {'bn1': 'is not behind a convolution'} and norms(model) == ['bn1']
    assert_near(model(x), want, 1e-5)


# What stays

@pytest.mark.parametrize('name', KINDS)
def test_a_second_time_changes_nothing(name):
    model, x = small(name), clips()
    fold(model, x)
    before, tree = values(model), anatomy(model)
    report = fold(model, x)
    assert str(report) == f'{type(model).__name__}: 0 batch norms folded, 0 left alone'
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


@pytest.mark.parametrize('name', KINDS)
def test_folded_weights_load_into_a_folded_network(name):
    x = clips()
    one, other = folded(small(name), x), folded(small(name), x)
    assert not torch.equal(other(x), one(x))
    other.load_state_dict(resaved(one.state_dict()), strict=True)
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize('convert, kind', [
    (nn.SyncBatchNorm.convert_sync_batchnorm, 'SyncBatchNorm'), (lambda m: freeze(m) or m, 'FrozenBatchNorm2d')])
def test_converted_norms_stay_and_their_weights_fold_in_a_fresh_network(convert, kind):
    model, fresh, x = small(), small(), clips()
    want = model(x)
    model = convert(model).eval()
    report = fold(model, x)
    assert not report.pairs and len(report.left) == 24
    assert report.left['bn1'] == f'is a {kind}, which has a forward of its own'
    assert_near(model(x), want, 1e-6)
    assert fresh.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []
    assert_folds(fresh, x)
    assert_near(fresh(x), want, 1e-5)


def test_error_a_folded_network_is_not_saved(tmp_path):
    mobilenet = timm.create_model('mobilenetv3_small_050', num_classes=5).eval()
    insert(mobilenet, TIM, at='blocks.*.0', num_frames=T)
    for model in (small(), mobilenet):
        fold(model, clips().flatten(0, 1))
        with pytest.raises(ValueError, match='folded'):
            save_model(model, tmp_path)


# Compilers and formats

@pytest.mark.parametrize('name', KINDS)
def test_torchscript_before_and_after(name):
    # deeper ones only take longer; what was released has one depth a name
    model, x = small(name, **({} if name.startswith('released') else {'layers': (2, 1, 1, 1)})), clips()
    for network in (model, folded(model, x)):
        torch.testing.assert_close(torch.jit.script(network)(x), network(x))


@pytest.mark.parametrize('name', KINDS)
def test_fx_before_and_after(name):
    model, x = small(name), clips()
    want = model.forward_intermediates(x, intermediates_only=True)[1:]
    nodes = ['layer1', 'layer2', 'layer3', 'layer4']
    extractor = create_feature_extractor(copy.deepcopy(model), nodes)
    twin = copy.deepcopy(extractor).eval()    # copies of these are in training mode
    assert len(fold(twin, x))
    for network in (extractor.eval(), create_feature_extractor(folded(model, x), nodes), twin):
        for got, y in zip(network(x).values(), want, strict=True):
            assert_near(got, y, 1e-5)
    assert not norms(network)


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
@pytest.mark.parametrize('name', KINDS)
def test_features_only(name, feature_cls):
    kwargs = {} if feature_cls == 'list' else {'feature_cls': feature_cls}
    model, x = small(name, features_only=True, **kwargs), clips()
    twin = folded(model, x)
    assert norms(model) and not norms(twin)
    for got, want in zip(twin(x), model(x), strict=True):
        if isinstance(got, str):    # a dict's keys
            got, want = twin(x)[got], model(x)[want]
        assert_near(got, want, 1e-5)


def test_compile_and_export():
    torch._dynamo.reset()
    model, x = small(layers=(1, 1, 1, 1)), clips()
    fold(model, x)
    want = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), want)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)
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


@torch.no_grad()
def test_graphed_without_a_gpu():
    # the graph is recorded and run again, operation by operation
    model = small()
    fold(model, clips())
    inputs = [clips() for _ in range(3)]
    with fake_cuda():
        run = graphed(model, inputs[0])
        got = [run(x) for x in inputs]
        for y, x in zip(got, inputs, strict=True):
            assert_near(y, model(x), 1e-5)
            assert not y.is_inference()
        with pytest.raises(ValueError, match=r'^x must be a tensor of .* as the graph was captured with, got '):
            run(inputs[0][:1])
        for part in (model, model.layer1, model.layer4[0].tim):  # every module is looked at, at every replay
            part.training = True
            with pytest.raises(ValueError, match=r'^model must be in eval mode, got one in training mode'):
                run(inputs[0])
            part.training = False
        assert torch.equal(run(inputs[1]), got[1])
    assert not torch.equal(got[0], got[1])


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a GPU')


@cuda
@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_graphed_replays_the_forward_pass(name, dtype):
    model = small(name)
    fold(model, clips())
    model.to('cuda', dtype)
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
