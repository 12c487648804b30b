"""ClipDrop: stochastic depth and DropBlock are drawn once a clip, wherever they are, and change in nothing else."""
import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
import transformers
from helpers import anatomy, assert_same, randomize, values
from timm.layers import DropBlock2d, DropPath
from torch import nn
from torchvision.ops import StochasticDepth
from transformers.models.convnext.modeling_convnext import ConvNextDropPath

from cmr_layers import SME, TIM, CMRBasicBlock, insert, restore, retrofit, set_num_frames
from cmr_layers.drop import ClipDrop, share_drops

T = 4
DROPS = {
    'timm DropPath': lambda: DropPath(.5),
    'unscaled': lambda: DropPath(.5, scale_by_keep=False),
    'torchvision row': lambda: StochasticDepth(.5, 'row'),
    'torchvision batch': lambda: StochasticDepth(.5, 'batch'),
    'transformers': lambda: ConvNextDropPath(.5),
    'timm DropBlock': lambda: DropBlock2d(.3, block_size=3),
    'even block': lambda: DropBlock2d(.3, block_size=4),
    'own mask per channel': lambda: DropBlock2d(.3, block_size=3, couple_channels=False),
    'unscaled block': lambda: DropBlock2d(.3, block_size=3, scale_by_keep=False),
    'gamma': lambda: DropBlock2d(.3, block_size=3, gamma_scale=.5),
    'inplace': lambda: DropBlock2d(.3, block_size=3, inplace=True),
    'torchvision DropBlock': lambda: torchvision.ops.DropBlock2d(.3, block_size=3),
    'torchvision inplace': lambda: torchvision.ops.DropBlock2d(.3, block_size=3, inplace=True),
}
drops = pytest.mark.parametrize('make', DROPS.values(), ids=DROPS)


def frames(clips=6, *shape):
    return torch.randn(clips * T, *(shape or (3, 8, 8)))


def drawn_per_clip(mask):
    """Whether a mask (B*T, ...) is the same in all frames of each clip, and not the same in all clips."""
    clips = mask.unflatten(0, (-1, T))
    return bool((clips == clips[:, :1]).all()), len(clips.flatten(1).unique(dim=0)) > 1


@drops
def test_the_mask_of_a_clip_is_what_the_module_draws_for_one_sample(make):
    x, drop = frames(), make()
    torch.manual_seed(5)
    mask = make()(torch.ones(6, 3, 8, 8))  # one sample per clip
    torch.manual_seed(5)
    y = ClipDrop(drop, T)(x)
    assert torch.equal(y, x * mask.repeat_interleave(T, 0))
    assert 0 < (mask == 0).sum() < mask.numel() or 'batch' in str(drop)


@drops
def test_eval_mode_changes_no_bit_and_draws_nothing(make):
    x, drop = frames(), ClipDrop(make(), T).eval()
    before = torch.get_rng_state()
    assert drop(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mode_is_that_of_the_module():
    assert ClipDrop(DropPath(.5), T).training and not ClipDrop(DropPath(.5).eval(), T).training


@drops
def test_x_stays_as_it_is_in_training(make):
    x = frames()
    before = x.clone()
    ClipDrop(make(), T)(x)
    assert torch.equal(x, before)


@drops
def test_stills_are_dropped_one_by_one_as_before(make):
    x = torch.randn(T - 1, 3, 8, 8)
    torch.manual_seed(5)
    want = make()(x.clone())
    torch.manual_seed(5)
    assert torch.equal(ClipDrop(make(), T)(x.clone()), want)


@pytest.mark.parametrize('shape', [(3,), (5, 3), (3, 8, 8), (8, 8, 3)], ids=str)
def test_vectors_tokens_and_maps_in_any_layout(shape):
    y = ClipDrop(DropPath(.5), T)(torch.ones(16 * T, *shape))
    assert y.shape == (16 * T, *shape)
    assert drawn_per_clip(y) == (True, True) and set(y.unique().tolist()) == {0., 2.}


def test_the_expectation_is_the_input_and_a_clip_is_lost_as_often_as_the_rate_says():
    y = ClipDrop(DropPath(.25), T)(torch.ones(4000 * T, 1, 1, 1)).view(4000, T)
    assert abs(float(y.mean()) - 1) < .03
    assert abs(float((y[:, 0] == 0).float().mean()) - .25) < .03


@drops
def test_the_gradient_is_the_mask(make):
    x = frames().requires_grad_()
    torch.manual_seed(5)
    mask = make()(torch.ones(6, 3, 8, 8)).repeat_interleave(T, 0)
    torch.manual_seed(5)
    ClipDrop(make(), T)(x).sum().backward()
    assert torch.equal(x.grad, mask)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_stays(dtype):
    assert ClipDrop(DropPath(.5), T)(frames().to(dtype)).dtype == dtype


def test_another_clip_length():
    drop = set_num_frames(ClipDrop(DropPath(.5), T), 2)
    y = drop(torch.ones(200, 1)).view(100, 2)
    assert torch.equal(y[:, 0], y[:, 1]) and len(y.view(50, 4).unique(dim=0)) > 2
    assert repr(drop).startswith('ClipDrop(\n  num_frames=2')


def test_error_half_a_clip():
    with pytest.raises(ValueError, match=r'^x holds 6 frames, which is not a whole number of clips'):
        ClipDrop(DropPath(.5), T)(torch.ones(6, 1))


def test_error_noise_is_no_mask():
    with pytest.raises(ValueError, match=r'^drop must have with_noise=False to be drawn once a clip, got with_noise='):
        ClipDrop(DropBlock2d(.3, with_noise=True), T)


def test_error_noise_leaves_a_network_as_it_was():
    model = timm.create_model('resnet18', channels=(64, 8, 8, 8), drop_block_rate=.1)
    for module in model.modules():
        if isinstance(module, DropBlock2d):
            module.with_noise = True
    before = anatomy(model)
    with pytest.raises(ValueError, match=r'with_noise=False'):
        retrofit(model, num_frames=T)
    assert anatomy(model) == before


# In networks

def resnet(**kwargs):
    kwargs = {'num_classes': 5, 'zero_init_last': False, 'channels': (64, 8, 8, 8), **kwargs}
    return randomize(timm.create_model('resnet18', **kwargs))


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 2], drop_path_rate=.5)
    return transformers.ConvNextModel(config)


def watched(model, x):
    """What each drop of a network makes of ones, in a forward pass in training mode."""
    masks = []
    drops = [m for m in model.modules() if isinstance(m, ClipDrop)]

    def look(m, args, y):
        masks.append((y / args[0]).nan_to_num(0))

    handles = [drop.register_forward_hook(look) for drop in drops]
    model.train()(x)
    for handle in handles:
        handle.remove()
    return masks


NETWORKS = {
    'retrofit': lambda: (resnet(drop_path_rate=.9, drop_block_rate=.5), lambda m: retrofit(m, T), 7 + 4),
    'torchvision': lambda: (
        torchvision.models.convnext_tiny(stochastic_depth_prob=.9), lambda m: insert(
            m, SME, at='features.1', num_frames=T), 18),
    'timm convnext': lambda: (
        timm.create_model('convnext_atto', drop_path_rate=.9), lambda m: insert(
            m, SME, at='stages.*', num_frames=T), 11),
    'timm efficientnet': lambda: (
        timm.create_model('efficientnet_b0', drop_path_rate=.9), lambda m: insert(
            m, TIM, at='blocks.*.0', where='before', num_frames=T), 15),
    'transformers': lambda: (
        convnext(), lambda m: insert(m, SME, at='encoder.stages.0', num_frames=T), 4),
    'family': lambda: (timm.create_model(
        'cmr_resnet18', num_frames=T, channels=(64, 8, 8, 8), drop_path_rate=.9, drop_block_rate=.5), lambda m: None,
        7 + 4),
}


@pytest.mark.parametrize('make', NETWORKS.values(), ids=NETWORKS)
def test_all_frames_of_a_clip_keep_or_lose_a_branch_together(make):
    model, change, count = make()
    change(model)
    held = [m for m in model.modules() if type(m).__name__.endswith(('DropPath', 'DropBlock2d', 'StochasticDepth'))]
    made = [m for m in model.modules() if isinstance(m, ClipDrop)]
    assert {id(m) for m in held} == {id(m.drop) for m in made} and len(made) == count
    masks = watched(model, torch.randn(6 * T, 3, 64, 64))
    seen = [drawn_per_clip((mask != 0).float()) for mask in masks]
    assert all(together for together, _ in seen) and sum(alone for _, alone in seen) >= 2


def test_frames_alike_stay_alike_so_sme_sees_no_motion():
    model = resnet(drop_path_rate=.9, drop_block_rate=.5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    x = torch.randn(3, 1, 3, 64, 64).expand(3, T, 3, 64, 64).flatten(0, 1)

    def spread(y):
        y = y.detach().unflatten(0, (3, T))
        return float((y - y[:, :1]).abs().max())

    assert spread(model(x)) > .1  # what a network without the layers does
    retrofit(model, num_frames=T)
    assert spread(model(x)) == 0


def test_the_layers_of_the_family_are_the_image_networks_but_for_the_draw():
    model = timm.create_model('cmr_resnet18', num_frames=T, drop_path_rate=.5, drop_block_rate=.3)
    image = timm.create_model('resnet18', drop_path_rate=.5, drop_block_rate=.3)
    rates = [[(type(m).__name__, m.drop_prob) for m in net.modules() if isinstance(m, (DropPath, DropBlock2d))]
             for net in (model, image)]
    assert rates[0] == rates[1] and len(rates[0]) == 7 + 4  # the rate of the first block is 0
    assert isinstance(CMRBasicBlock(8, 8, num_frames=T, drop_path=DropPath(.5)).drop_path, ClipDrop)


def test_no_key_changes_and_restore_puts_the_modules_back():
    model = resnet(drop_path_rate=.5, drop_block_rate=.3).eval()
    before, held, state = anatomy(model), list(model.modules()), values(model)
    retrofit(model, num_frames=T, cme='none', sme='none')
    assert [key for key in model.state_dict() if not key.endswith('.tim.weight')] == list(state)
    restore(model)
    assert anatomy(model) == before and all(a is b for a, b in zip(model.modules(), held, strict=True))
    assert_same(state, values(model))


def test_restore_leaves_the_drops_of_the_family_alone():
    model = timm.create_model('cmr_resnet18', num_frames=T, channels=(64, 8, 8, 8), drop_path_rate=.5)
    before = anatomy(model)
    insert(model, SME, at='layer1.0', num_frames=T)
    restore(model)
    assert anatomy(model) == before and any(isinstance(m, ClipDrop) for m in model.modules())


def test_a_second_insert_wraps_nothing_twice():
    model = resnet(drop_path_rate=.5)
    for _ in range(2):
        insert(model, SME, at='layer1.0', num_frames=T)
    assert not any(isinstance(m.drop, ClipDrop) for m in model.modules() if isinstance(m, ClipDrop))


def test_a_module_that_only_has_such_a_name_stays():
    class ConvDropPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    class DropPathSchedule(nn.Module):
        def forward(self, x):
            return x + 1

    model = nn.Sequential(ConvDropPath(), DropPathSchedule(), nn.Dropout(.5), DropPath(.5))
    made = share_drops(model, T)
    assert [type(m).__name__ for m in model] == ['ConvDropPath', 'DropPathSchedule', 'Dropout', 'ClipDrop']
    assert made == [model[3]]


def test_the_clip_length_of_a_network_reaches_its_drops():
    model = resnet(drop_path_rate=.5)
    retrofit(model, num_frames=T)
    set_num_frames(model, 2)
    assert {m.num_frames for m in model.modules() if isinstance(m, ClipDrop)} == {2}


def test_eval_mode_of_a_network_with_drops_is_that_without():
    model, twin, x = resnet(drop_path_rate=.5, drop_block_rate=.3).eval(), resnet().eval(), frames(2, 3, 32, 32)
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        torch.manual_seed(3)
        retrofit(m, num_frames=T, start='paper')
    assert torch.equal(model(x), twin(x))


def test_copies_and_pickles_draw_the_same():
    model, x = resnet(drop_path_rate=.9), frames(2, 3, 32, 32)
    retrofit(model, num_frames=T)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(model.state_dict())
        outputs = []
        for m in (copy.deepcopy(model), other):
            torch.manual_seed(5)
            outputs.append(m.train()(x))
        assert torch.equal(*outputs)


def test_torchscript_draws_once_a_clip():
    for make in (lambda: DropPath(.5), lambda: DropBlock2d(.3, block_size=3), lambda: StochasticDepth(.5, 'row')):
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(ClipDrop(make(), T)), file)
        file.seek(0)
        assert drawn_per_clip(torch.jit.load(file)(torch.ones(16 * T, 3, 8, 8))) == (True, True)
    model, x = resnet(drop_path_rate=.5, drop_block_rate=.3).eval(), frames(2, 3, 32, 32)
    retrofit(model, num_frames=T)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_compiled_graph_draws_once_a_clip():
    torch._dynamo.reset()
    compiled = torch.compile(ClipDrop(DropPath(.5), T), fullgraph=True, backend='aot_eager')
    for clips in (16, 24):
        assert drawn_per_clip(compiled(torch.ones(clips * T, 3, 2, 2))) == (True, True)
    model, x = resnet(drop_path_rate=.5).eval(), frames(2, 3, 32, 32)
    retrofit(model, num_frames=T)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x))


@pytest.mark.parametrize('drop, rate', [(DropPath(.1), 'drop_prob'), (StochasticDepth(.1, 'row'), 'p')])
def test_a_schedule_reaches_the_rate(drop, rate):
    shared = ClipDrop(drop, 4)
    setattr(shared, rate, .5)
    assert getattr(shared, rate) == getattr(drop, rate) == .5
    assert not hasattr(shared, 'p' if rate == 'drop_prob' else 'drop_prob')
