"""CMRBlock and CMRBasicBlock: timm's blocks in every argument, the paper's order of layers, and the placements."""
import copy
import inspect
import itertools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import randomize
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from cmr_layers import CME, SME, TIM, CMRBasicBlock, CMRBlock
from cmr_layers.block import PLACEMENTS, is_placed

BLOCKS = {'bottleneck': (CMRBlock, Bottleneck), 'basic': (CMRBasicBlock, BasicBlock)}
NONE = {'cme': 'none', 'tim': 'none', 'sme': 'none'}
ALL = {'cme': 'all', 'tim': 'all', 'sme': 'all'}
LAYERS = {'cme': CME, 'tim': TIM, 'sme': SME}


def downsample(inplanes, outplanes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def make(name, opens=True, stride=2, **kwargs):
    block, _ = BLOCKS[name]
    planes, out = 8, 8 * block.expansion
    if opens:
        made = block(16, planes, stride, downsample(16, out, stride), num_frames=4, **kwargs)
    else:
        made = block(out, planes, num_frames=4, **kwargs)
    return randomize(made).eval()


def frames(block, n=8, size=6):
    return torch.randn(n, block.conv1.in_channels, size, size)


@pytest.fixture(params=list(BLOCKS))
def name(request):
    return request.param


# A drop-in for timm's block

VARIANTS = {
    'plain': {},
    'drop_path': {'drop_path': DropPath(.5)},
    'se': {'attn_layer': 'se'},
    'eca': {'attn_layer': 'eca'},
    'reduce_first': {'reduce_first': 2},
    'dilation': {'dilation': 2, 'first_dilation': 1},
    'aa': {'aa_layer': nn.AvgPool2d},
    'silu': {'act_layer': nn.SiLU},
    'drop_block': {'drop_block': nn.Identity},
    'groups': {'cardinality': 4, 'base_width': 32},
    'wide': {'base_width': 128},
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('stride', [1, 2])
def test_without_layers_it_is_timms_block_bit_for_bit(name, variant, stride):
    ours, timms = BLOCKS[name]
    kwargs = VARIANTS[variant]
    if name == 'basic' and variant in ('groups', 'wide'):
        with pytest.raises(AssertionError, match='BasicBlock'):
            ours(16, 8, **kwargs)
        return
    out = 8 * timms.expansion
    a = timms(16, 8, stride, downsample(16, out, stride), **kwargs)
    b = ours(16, 8, stride, downsample(16, out, stride), **NONE, **kwargs)
    b.load_state_dict(randomize(a).state_dict(), strict=True)
    x = torch.randn(5, 16, 6, 6)    # no multiple of num_frames: without layers that is no concern
    for mode in (True, False):
        torch.manual_seed(1)    # drop_path draws
        want = a.train(mode)(x.clone())
        torch.manual_seed(1)
        assert torch.equal(b.train(mode)(x.clone()), want)
    assert list(a.state_dict()) == list(b.state_dict())
    for (key, v), w in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(v, w), key


def test_every_argument_of_timms_block_can_be_given_by_position(name):
    ours, timms = BLOCKS[name]
    parameters = list(inspect.signature(timms.__init__).parameters.values())[1:]
    assert [p.name for p in parameters[:4]] == ['inplanes', 'planes', 'stride', 'downsample']
    values = [32, 8, 1, None] + [p.default for p in parameters[4:-2]]    # all but device and dtype
    assert [(k, v.shape) for k, v in ours(*values, **NONE).state_dict().items()] == \
        [(k, v.shape) for k, v in timms(*values).state_dict().items()]


def test_it_is_a_subclass_with_timms_expansion_and_zero_init(name):
    ours, timms = BLOCKS[name]
    assert issubclass(ours, timms) and ours.expansion == timms.expansion
    block = make(name)
    block.zero_init_last()
    assert not (block.bn3 if name == 'bottleneck' else block.bn2).weight.any()


def test_error_unknown_argument(name):
    with pytest.raises(TypeError, match='num_segments'):
        BLOCKS[name][0](16, 8, num_segments=8)


# What it computes

def compose(block, x, name, se=None):
    """The block from its parts, in the order of Figure 4."""
    def bn(m, y):
        return F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)

    shortcut = x if block.downsample is None else bn(block.downsample[1], block.downsample[0](x))
    y = block.tim(block.cme(x))
    if name == 'bottleneck':
        y = F.relu(bn(block.bn1, F.conv2d(y, block.conv1.weight)))
        y = F.relu(bn(block.bn2, F.conv2d(y, block.conv2.weight, stride=block.stride, padding=1)))
        y = bn(block.bn3, F.conv2d(y, block.conv3.weight))
    else:
        y = F.relu(bn(block.bn1, F.conv2d(y, block.conv1.weight, stride=block.stride, padding=1)))
        y = bn(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
    y = y if block.se is None else block.se(y)
    return block.sme(F.relu(y + shortcut))


@pytest.mark.parametrize('placed', list(itertools.product(['all', 'none'], repeat=3)), ids='-'.join)
@pytest.mark.parametrize('opens', [True, False], ids=['opens', 'follows'])
@pytest.mark.parametrize('attn', [None, 'se'])
def test_forward_is_the_composition_of_its_parts(name, opens, placed, attn):
    block = make(name, opens, attn_layer=attn, **dict(zip(LAYERS, placed, strict=True)))
    x = frames(block)
    before = x.clone()
    torch.testing.assert_close(block(x), compose(block, x, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize('opens', [True, False], ids=['opens', 'follows'])
def test_the_shortcut_takes_the_raw_input(name, opens):
    block = make(name, opens, stride=1, sme='none')
    last = block.bn3 if name == 'bottleneck' else block.bn2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)    # the residual branch is silent
    x = frames(block)
    want = x if block.downsample is None else block.downsample(x)
    assert torch.equal(block(x), want.relu())


def test_cme_comes_before_tim_and_both_before_conv1(name):
    seen, block = [], make(name)
    for child, module in block.named_children():
        module.register_forward_hook(lambda m, args, out, child=child: seen.append((child, args[0].shape[1])))
    block(frames(block))
    assert seen[:3] == [('cme', 16), ('tim', 16), ('conv1', 16)]
    assert seen[-1] == ('sme', 8 * block.expansion)


def test_what_sme_returns_is_not_rectified_again(name):
    block = make(name, sme='all')
    y = block(frames(block))
    assert (y < 0).any()
    block.sme = nn.Identity()
    assert (block(frames(block)) >= 0).all()


def test_sme_sees_the_output_after_the_relu(name):
    block, seen = make(name, sme='all'), []
    block.sme.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    block(frames(block))
    assert (seen[0] >= 0).all() and (seen[0] == 0).any()


@pytest.mark.parametrize('layer', LAYERS)
def test_each_layer_alone_mixes_the_frames_of_a_clip_only(name, layer):
    block = make(name, opens=False, **{**NONE, layer: 'all'})
    x = frames(block, 8)
    changed = x.clone()
    changed[2] += torch.randn_like(x[2])
    difference = (block(changed) - block(x)).abs().amax((1, 2, 3))
    assert difference[1] > 1e-5                    # frame 1 of the same clip sees frame 2
    assert not difference[4:].any()                # the other clip doesn't


def test_one_step_gives_every_parameter_a_gradient(name):
    block = make(name, **ALL).train()
    block(frames(block)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert all(p.grad.any() for n, p in block.named_parameters())


def test_stills_pass(name):
    block = make(name, **ALL)
    x = frames(block, 3)
    torch.testing.assert_close(block(x), torch.cat([block(frame) for frame in x.split(1)]), rtol=1e-5, atol=1e-5)


# Where the layers are

@pytest.mark.parametrize('where', PLACEMENTS)
@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('opens', [True, False], ids=['opens', 'follows'])
def test_placements(name, layer, where, opens):
    block = make(name, opens, **{**NONE, layer: where})
    expected = where == 'all' or (where == 'first' and opens)
    assert isinstance(getattr(block, layer), LAYERS[layer] if expected else nn.Identity)
    assert all(isinstance(getattr(block, other), nn.Identity) for other in LAYERS if other != layer)
    assert is_placed(layer, where, opens) == expected


@pytest.mark.parametrize('opens, kinds', [(True, [CME, TIM, SME]), (False, [CME, TIM, nn.Identity])],
                         ids=['type B', 'type A'])
def test_a_block_that_opens_a_stage_is_type_b_and_others_type_a(name, opens, kinds):
    block = make(name, opens)
    assert [type(m) for m in (block.cme, block.tim, block.sme)] == kinds
    assert block.cme.channels == block.tim.channels == block.conv1.in_channels
    if opens:
        assert block.sme.channels == 8 * block.expansion


@pytest.mark.parametrize('reduction, r1, r2', [(8, 8, 8), (4, 4, 4), ((2, 16), 2, 16)])
def test_reduction_and_num_frames_reach_the_layers(name, reduction, r1, r2):
    block = BLOCKS[name][0](32, 8, num_frames=5, reduction=reduction, **ALL)
    assert block.cme.reduction == (r1, r2)
    assert block.cme.w1.shape[0] == 32 // r1 and block.cme.w2.shape[0] == 32 // r2
    assert {block.cme.num_frames, block.tim.num_frames, block.sme.num_frames} == {5}


def test_the_starts_are_those_of_the_layers_alone(name):
    block, _ = BLOCKS[name]
    block = block(32, 8, **ALL)
    assert torch.equal(block.tim.weight, TIM(32).weight)
    assert not block.sme.bn.weight.any() and not block.sme.bn.bias.any()
    assert block.cme.gate_init is None and block.cme.b3 is None and block.cme.w3.any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_dtype(name, dtype):
    block = BLOCKS[name][0](8 * BLOCKS[name][0].expansion, 8, num_frames=4, dtype=dtype, attn_layer='se', **ALL).eval()
    assert {v.dtype for v in block.state_dict().values() if v.is_floating_point()} == {dtype}
    assert block(torch.randn(4, block.conv1.in_channels, 4, 4, dtype=dtype)).dtype == dtype


def test_device(name):
    block = BLOCKS[name][0](8 * BLOCKS[name][0].expansion, 8, num_frames=4, device='meta', attn_layer='se', **ALL)
    assert all(v.is_meta for v in block.state_dict().values())
    assert block(torch.empty(4, block.conv1.in_channels, 4, 4, device='meta')).shape == (4, 8 * block.expansion, 4, 4)


def test_copies_and_pickles(name):
    block = make(name, **ALL)
    x = frames(block)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))


# In timm's networks

def test_timms_resnet50_takes_the_block():
    model = timm.create_model('resnet50', block=CMRBlock, block_args={'num_frames': 4}, device='meta')
    found = {kind: [n for n, m in model.named_modules() if isinstance(m, cls)] for kind, cls in LAYERS.items()}
    assert len(found['cme']) == len(found['tim']) == 16
    assert found['sme'] == [f'layer{i}.0.sme' for i in (1, 2, 3, 4)]
    assert {m.num_frames for m in model.modules() if hasattr(m, 'num_frames')} == {4}
    assert model(torch.empty(8, 3, 64, 64, device='meta')).shape == (8, 1000)    # one row per frame


def test_in_timms_resnet18_the_first_stage_does_not_know_its_first_block():
    model = timm.create_model('resnet18', block=CMRBasicBlock, device='meta')
    assert [n for n, m in model.named_modules() if isinstance(m, SME)] == [f'layer{i}.0.sme' for i in (2, 3, 4)]


def test_seresnext_and_arguments_of_the_network_reach_the_block():
    model = timm.create_model(
        'seresnext50_32x4d', block=CMRBlock, block_args={'attn_layer': 'se', 'tim': 'none', 'cme': 'first'},
        device='meta')
    assert model.layer1[0].conv2.groups == 32 and model.layer1[0].se is not None
    assert sum(isinstance(m, CME) for m in model.modules()) == 4 and not any(isinstance(m,
        TIM) for m in model.modules())


@pytest.mark.parametrize('arch, block', [('resnet18', CMRBasicBlock), ('resnet26', CMRBlock)])
def test_a_network_of_blocks_without_layers_is_timms_bit_for_bit(arch, block):
    channels = (64, 16, 16, 16)
    a = randomize(timm.create_model(arch, channels=channels, num_classes=5, zero_init_last=False)).eval()
    b = timm.create_model(arch, channels=channels, num_classes=5, block=block, block_args=NONE).eval()
    b.load_state_dict(a.state_dict(), strict=True)
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(a(x), b(x))


# Errors

@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('value', ['frist', None, True, 'ALL'], ids=repr)
def test_error_placement_names_argument_choices_and_value(name, layer, value):
    with pytest.raises(ValueError, match=f"^{layer} must be one of 'all', 'first', 'none', got {value!r}$"):
        BLOCKS[name][0](16, 8, **{layer: value})


def test_error_placement_through_timm():
    with pytest.raises(ValueError, match=r"^sme must be one of 'all', 'first', 'none', got 'last'$"):
        timm.create_model('resnet18', block=CMRBasicBlock, block_args={'sme': 'last'}, device='meta')


@pytest.mark.parametrize('kwargs, message', [
    ({'num_frames': 0}, 'num_frames must be a positive int, got 0'),
    ({'reduction': 0}, 'reduction must be a positive int, got 0'),
    ({'reduction': (8, 8, 8)}, r'reduction must be a positive int or a pair \(r1, r2\) of them, got \(8, 8, 8\)')])
def test_error_arguments_of_the_layers(name, kwargs, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        BLOCKS[name][0](16, 8, **kwargs)


def test_error_no_whole_number_of_clips(name):
    block = make(name)
    with pytest.raises(ValueError, match=r'^x holds 6 frames, which is not a whole number of clips: with num_frames=4'):
        block(frames(block, 6))
