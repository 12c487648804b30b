"""Where training starts: each parameter and buffer of each network, however it is built, as the docstrings say.

The expectations are written out here and share nothing with the package. Statistics have tolerances of six standard
errors or 3 %, so a factor of 1.1 is caught in all but the smallest tensors, and one of 1.3 in those, too.
"""
import copy
import math

import pytest
import timm
import torch
from torch import nn

from cmr_layers import CME, SME, TIM, CMRBasicBlock, CMRBlock, adapt, insert, released, retrofit
from cmr_layers.starts import start_of

FAMILY = [
    'resnet18', 'resnet18d', 'resnet26', 'resnet26d', 'resnet34', 'resnet34d', 'resnet50', 'resnet50d', 'resnet101',
    'resnet101d', 'resnet152', 'resnet152d', 'resnext50_32x4d', 'resnext50d_32x4d', 'wide_resnet50_2', 'seresnet50']
NAMES = [f'cmr_{name}' for name in FAMILY] + [f'released_cmr_resnet{depth}' for depth in (50, 101, 152)]


def is_normal(w, std):
    """Whether w looks as if drawn from N(0, std^2): its width, its mean, and its tails, which a uniform start lacks."""
    w, n = w.detach().double().flatten(), w.numel()
    tails = (w.abs() > 2 * std).double().mean().item()
    return (
        abs(w.std() / std - 1) < max(.03, 6 / math.sqrt(2 * n)) and abs(w.mean()) < 6 * std / math.sqrt(n)
        and abs(tails - .0455) < max(.005, 6 * math.sqrt(.0434 / n)))


def is_uniform(w, bound):
    """Whether w looks as if drawn from U(-bound, bound): nothing beyond, and the interval filled."""
    w, n = w.detach().double().flatten(), w.numel()
    return (
        w.abs().max() <= bound * (1 + 1e-6) and w.abs().max() > bound * (1 - 12 / n)
        and abs(w.std() / bound * math.sqrt(3) - 1) < max(.03, 6 / math.sqrt(2 * n))
        and abs(w.mean()) < 6 * bound / math.sqrt(3 * n))


def is_tsm(w):
    """Whether taps are TSM's shift: an eighth of the channels from the next frame, an eighth from the previous one."""
    eighth = len(w) // 8
    rows = [[0, 0, 1]] * eighth + [[1, 0, 0]] * eighth + [[0, 1, 0]] * (len(w) - 2 * eighth)
    return w[:, 0].tolist() == rows


def wrong_starts(model, zeroed=True, fresh_norms=True):
    """Names of the tensors that don't start as they should, and of those of which nothing is known.

    Args:
        model: A network of the family, released, or timm's with blocks of either.
        zeroed: The last batch norm of each residual branch starts at zero.
        fresh_norms: The batch norms of the image network are new.
    """
    right = {}
    for name, m in model.named_modules():
        if isinstance(m, CME):
            c1, c = m.w1.shape
            right[f'{name}.w1'] = right[f'{name}.w2'] = lambda w, c=c: is_uniform(w, c ** -.5)
            right[f'{name}.w3'] = lambda w, c1=c1: is_uniform(w, c1 ** -.5)
        elif isinstance(m, released.CME):
            for w in ('w1', 'w2', 'w3'):
                fan_in = getattr(m, w)[0].weight.shape[1]
                right[f'{name}.{w}.0.weight'] = lambda w, fan_in=fan_in: is_uniform(w, fan_in ** -.5)
        elif isinstance(m, TIM):
            right[f'{name}.weight'] = is_tsm
        elif isinstance(m, nn.Conv2d):
            fan_in, fan_out = (m.weight.shape[i] * m.weight[0, 0].numel() for i in (1, 0))
            right[f'{name}.weight'] = lambda w, fan_out=fan_out: is_normal(w, (2 / fan_out) ** .5)
            right[f'{name}.bias'] = lambda w, fan_in=fan_in: is_uniform(w, fan_in ** -.5)
        elif isinstance(m, nn.BatchNorm2d):
            block = model.get_submodule(name.rpartition('.')[0])
            sme, temporal = isinstance(block, SME), '.cme.' in name or '.sme.' in name
            last = isinstance(block, (CMRBasicBlock, CMRBlock)) and name[-3:] == ('bn3' if hasattr(
                block, 'bn3') else 'bn2')
            zero = sme or (last and zeroed)
            if temporal or fresh_norms or zero:
                right[f'{name}.weight'] = lambda w, zero=zero: bool((w == (0 if zero else 1)).all())
            if temporal or fresh_norms:
                right[f'{name}.bias'] = lambda w: not w.any()
                right[f'{name}.running_mean'] = lambda w: not w.any()
                right[f'{name}.running_var'] = lambda w: bool((w == 1).all())
                right[f'{name}.num_batches_tracked'] = lambda w: w == 0
        elif isinstance(m, nn.Linear):
            theirs, bound = isinstance(model, released.ReleasedCMRResNet), m.in_features ** -.5
            right[f'{name}.weight'] = lambda w, theirs=theirs, bound=bound: (
                is_normal(w, .001) if theirs else is_uniform(w, bound))
            right[f'{name}.bias'] = lambda w, theirs=theirs, bound=bound: (
                not w.any() if theirs else is_uniform(w, bound))
    state = model.state_dict()
    if not fresh_norms:
        state = {key: value for key, value in state.items() if key in right}
    return sorted(key for key, value in state.items() if key not in right or not right[key](value))


# One name of each kind of block and stem; the others are deeper networks of the same blocks.
KINDS = [
    'cmr_resnet18', 'cmr_resnet18d', 'cmr_resnet26d', 'cmr_resnet50', 'cmr_resnext50_32x4d',
    'cmr_resnext50d_32x4d', 'cmr_wide_resnet50_2', 'cmr_seresnet50', 'released_cmr_resnet50']


def test_the_names_are_of_these_kinds():
    blocks = {}
    for name in NAMES:
        model = timm.create_model(name, device='meta')
        block = repr(model.layer1[0]), type(model.conv1), type(model.layer2[0].downsample[0])
        blocks.setdefault(block, []).append(name)
    assert all(set(names) & set(KINDS) for names in blocks.values()), blocks.values()


@pytest.mark.parametrize('name', KINDS)
def test_every_parameter_of_every_kind(name):
    model = timm.create_model(name)
    assert wrong_starts(model) == []
    biased = [m.conv.bias is not None for m in model.modules() if isinstance(m, SME)]
    assert biased == [name.startswith('released')] * 4


def test_all_names_are_here():
    assert sorted(NAMES) == sorted(timm.list_models('cmr_*') + timm.list_models('released_cmr_*'))


WAYS = ['cmr_resnet18', 'cmr_resnet26d', 'released_cmr_resnet50']
NARROW = {'channels': (64, 64, 64, 64)}     # the same, and faster


@pytest.mark.parametrize('name', WAYS)
def test_without_the_zeros_of_the_image_network(name):
    model = timm.create_model(name, zero_init_last=False, **NARROW)
    assert wrong_starts(model, zeroed=False) == []


def trained(model):
    """Every parameter and buffer at a value that is none of the starts'."""
    with torch.no_grad():
        for w in model.state_dict().values():
            w.fill_(7)
    return model


@pytest.mark.parametrize('zeroed', [True, False])
@pytest.mark.parametrize('name', WAYS)
def test_init_weights_once_more(name, zeroed):
    model = timm.create_model(name, **NARROW)
    model.init_weights(zeroed)
    assert wrong_starts(model) == []
    # timm leaves other batch norms and the classifier as they are; what is ours starts anew
    trained(model).init_weights(zeroed)
    wrong = wrong_starts(model, zeroed=zeroed, fresh_norms=False)
    assert wrong == (['fc.bias', 'fc.weight'] if name.startswith('cmr_') else [])


@pytest.mark.parametrize('name', WAYS)
def test_from_the_meta_device(name):
    model = timm.create_model(name, device='meta', **NARROW).to_empty(device='cpu')
    trained(model)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
    model.init_weights()
    assert wrong_starts(model) == []


@pytest.mark.parametrize('name', WAYS)
def test_another_classifier(name):
    model = trained(timm.create_model(name, **NARROW))
    model.reset_classifier(300)
    assert model.fc.weight.shape[0] == 300
    assert not {'fc.weight', 'fc.bias'} & set(wrong_starts(model))
    model.reset_classifier(0)
    assert isinstance(model.fc, nn.Identity)


@pytest.mark.parametrize('zeroed', [True, False])
@pytest.mark.parametrize('block', [CMRBlock, released.CMRBlock])
def test_the_block_in_timms_resnet(block, zeroed):
    model = timm.create_model('resnet26', block=block, zero_init_last=zeroed)
    assert wrong_starts(model, zeroed=zeroed) == []


def test_block_args_and_placements():
    model = timm.create_model('cmr_resnet26', sme='all', cme='first', reduction=(4, 16))
    assert sum(isinstance(m, SME) for m in model.modules()) == 8
    assert wrong_starts(model) == []
    model = timm.create_model('released_cmr_resnet50', sme='all', reduction=16, block_args={'attn_layer': 'se'})
    assert wrong_starts(model) == []


@pytest.mark.parametrize('name', WAYS)
def test_double_precision(name):
    model = timm.create_model(name, dtype=torch.float64, **NARROW)
    assert {w.dtype for w in model.parameters()} == {torch.float64}
    assert wrong_starts(model) == []


def put(model, how):
    if how == 'retrofit':
        retrofit(model, num_frames=4, start='paper')
    else:
        insert(model, CME, at='layer1.*', num_frames=4)
        insert(model, TIM, at='layer2.*', num_frames=4)
        insert(model, SME, at='layer3.*', num_frames=4)
        insert(model, released.CME, at='layer4.*', num_frames=4)


@pytest.mark.parametrize('how', ['retrofit', 'insert'])
def test_layers_put_into_a_network(how):
    model = timm.create_model('resnet18')
    put(model, how)
    layers = [m for m in model.modules() if isinstance(m, (CME, TIM, SME, released.CME))]
    assert len(layers) == (8 + 8 + 4 if how == 'retrofit' else 8)
    assert [wrong_starts(nn.Sequential(m)) for m in layers] == [[]] * len(layers)
    model.init_weights(False)
    assert [wrong_starts(nn.Sequential(m)) for m in layers] == [[]] * len(layers)


def shifted(x, num_frames):
    """TSM's shift of (N, C, H, W): an eighth of the channels from the next frame, an eighth from the one before."""
    clips, eighth = x.unflatten(0, (-1, num_frames)), x.shape[1] // 8
    y = clips.clone()
    y[:, :-1, :eighth], y[:, -1, :eighth] = clips[:, 1:, :eighth], 0
    y[:, 1:, eighth:2 * eighth], y[:, 0, eighth:2 * eighth] = clips[:, :-1, eighth:2 * eighth], 0
    return y.flatten(0, 1)


@pytest.mark.parametrize('kinds', [(CME, TIM), (TIM,)])
@pytest.mark.parametrize('how', ['retrofit', 'adapt', 'insert'])
def test_the_start_as_a_shift_is_tsm_and_nothing_else(how, kinds):
    """Gates of exactly 1/2 and taps of 2 cancel, so the rest of the features is what the image network expects."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=5, zero_init_last=False).eval()
    plain, want = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in want.named_modules():
        if name.startswith('layer') and name.endswith('conv1'):
            module.register_forward_pre_hook(lambda _, args: shifted(args[0], 4))
    if how == 'insert':
        insert(model, list(kinds), at='layer*.*.conv1', where='before', num_frames=4, start='shift')
    else:
        call = retrofit if how == 'retrofit' else adapt
        call(model, num_frames=4, cme='all' if CME in kinds else 'none', sme='all', start='shift')
    assert sum(isinstance(m, TIM) for m in model.modules()) == 8
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(plain(x), want(x))
        assert torch.equal(model(x), want(x))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'mobilenetv3_small_050', 'swin_s3_tiny_224'])
def test_adapt_starts_other_backbones_as_a_shift(name):
    model = timm.create_model(name)
    adapt(model, num_frames=4, start='shift')
    tims, cmes = ([m for m in model.modules() if isinstance(m, kind)] for kind in (TIM, CME))
    assert tims and len(cmes) == len(tims)
    assert all(is_tsm(m.weight / 2) for m in tims)
    for m in cmes:
        x = torch.randn(4, 7, 7, m.channels) if m.input_fmt == 'NHWC' else torch.randn(
            4, 50, m.channels) if m.input_fmt == 'NLC' else torch.randn(4, m.channels, 7, 7)
        assert (m.gate(x) == .5).all()


def test_a_cme_without_a_tim_starts_open():
    model = timm.create_model('resnet18')
    retrofit(model, num_frames=4, tim='none', start='shift')
    cme = model.layer1[0].cme
    torch.testing.assert_close(cme.gate(torch.randn(1, 4, 64, 7, 7)), torch.full((1, 4, 64), .98))


@pytest.mark.parametrize('start', ['identity', 'shift'])
def test_what_a_start_sets_is_not_set_twice(start):
    with pytest.raises(ValueError, match=rf"^gain is set by start='{start}', got 1.0 besides$"):
        insert(timm.create_model('resnet18'), [CME, TIM], at='layer1.0', num_frames=4, start=start, gain=1.)


def test_a_start_is_known_for_the_packages_layers_only():
    with pytest.raises(ValueError, match=r"^start='shift' is for CME, SME and TIM, got 'Conv2d'$"):
        start_of('shift', [nn.Conv2d])
