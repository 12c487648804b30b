"""Modules that a fused operator may stand in for, and all those that run themselves."""
import pytest
import timm
import torch
from helpers import small_block as block
from torch import nn

from cmr_layers import CME, SME, TIM, released
from cmr_layers.bypass import is_bare, is_own, is_pytorch_conv, is_pytorch_norm
from cmr_layers.cme_tim import cme_tim_conv
from cmr_layers.ops import explain, use_path


def test_a_module_is_bare_until_somebody_hooks_or_patches_it():
    touch = [
        lambda m: m.register_forward_hook(print), lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print), lambda m: m.register_full_backward_pre_hook(print),
        lambda m: setattr(m, 'forward', m.forward)]
    for change in touch:
        module = nn.Conv2d(4, 4, 1)
        assert is_bare(module) and is_pytorch_conv(module)
        handle = change(module)
        assert not is_bare(module) and not is_pytorch_conv(module)
        if handle is not None:
            handle.remove()
            assert is_bare(module)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)    # on all modules
    try:
        assert not is_bare(nn.Identity())
    finally:
        handle.remove()
    assert is_bare(nn.Identity())


def test_a_subclass_is_no_pytorch_module_unless_it_computes_what_its_base_does():
    class Conv(nn.Conv2d):
        pass

    class Norm(nn.BatchNorm2d):
        pass

    assert not is_pytorch_conv(Conv(4, 4, 1)) and is_pytorch_norm(Norm(4))
    assert not is_pytorch_conv(nn.Conv2d(4, 4, 3, padding='same'))
    assert not is_pytorch_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'))
    assert not is_pytorch_norm(Tripled(4)) and not is_pytorch_norm(nn.GroupNorm(2, 4))
    assert not is_pytorch_norm(nn.BatchNorm2d(4, track_running_stats=False))


def test_a_layer_is_our_own_if_it_computes_what_its_kind_does():
    class Named(TIM):
        pass

    assert is_own(TIM(4), TIM) and is_own(Named(4), TIM)
    assert not any(is_own(layer, kind) for layer, kind in (
        (CME(4), TIM), (TwiceFrames(4), TIM), (Twice(4), TIM), (released.CME(8), CME), (nn.Identity(), TIM)))


@pytest.mark.parametrize('which', ['cme', 'tim', 'conv1', 'sme.conv', 'sme.bn'])
@pytest.mark.parametrize('grad', [False, True])
def test_forwards_patched_on_an_instance_are_called(which, grad):
    # as Accelerate's hooks and many profilers do
    made, x, seen = block(), torch.randn(4, 8, 3, 2), []
    with torch.set_grad_enabled(grad):
        want = made(x)
        part = made.get_submodule(which)
        forward = part.forward
        part.forward = lambda v: seen.append(which) or forward(v)
        torch.testing.assert_close(made(x), want)
    assert seen == [which]


@pytest.mark.parametrize('which', ['cme', 'tim', 'conv1'])
def test_hooks_on_the_parts_are_called(which):
    made, x, seen = block(), torch.randn(4, 8, 3, 2), []
    want = made(x)
    handle = getattr(made, which).register_forward_hook(lambda m, args, y: seen.append(y.shape))
    torch.testing.assert_close(made(x), want)
    assert len(seen) == 1
    handle.remove()
    made(x)
    assert len(seen) == 1
    getattr(made, which).register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    made(x)
    assert len(seen) == 2


class Tripled(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize('norm_layer', [
    timm.layers.BatchNormAct2d, Tripled, lambda n, **kw: nn.BatchNorm2d(n, affine=False),
    lambda n, **kw: nn.GroupNorm(2, n),
    nn.Identity,
], ids=['BatchNormAct2d', 'subclass', 'not affine', 'GroupNorm', 'Identity'])
def test_sme_in_inference_is_what_it_is_with_gradients(norm_layer):
    layer, x = SME(8, num_frames=4, norm_layer=norm_layer).eval(), torch.randn(4, 8, 3, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(.5, 1)
    want = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    with use_path('reference'):
        torch.testing.assert_close(layer(x), want)


def test_explain_tells_of_a_convolution_of_smes_that_runs_itself():
    layer = SME(8, num_frames=4).eval()
    nn.utils.parametrizations.weight_norm(layer.conv)
    assert explain(layer, torch.randn(4, 8, 3, 2)) == [
        ('SME', 'SME', 'reference', 'its convolution is hooked, patched or not a 1x1 nn.Conv2d')]


def test_hooks_on_the_parts_of_sme_are_called():
    layer, x, seen = SME(8, num_frames=4).eval(), torch.randn(4, 8, 3, 2), []
    layer.conv.register_forward_hook(lambda *args: seen.append('conv'))
    layer.bn.register_forward_hook(lambda *args: seen.append('bn'))
    with torch.no_grad():
        layer(x)
    assert seen == ['conv', 'bn']


class TwiceClips(TIM):
    def forward_clips(self, x):
        return 2 * super().forward_clips(x)


class TwiceFrames(TIM):
    def forward_frames(self, x, num_frames):
        return 2 * super().forward_frames(x, num_frames)


class Twice(TIM):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('Twice', [TwiceClips, TwiceFrames, Twice])
def test_layers_of_another_arithmetic_are_called_as_they_are(Twice):
    x = torch.randn(4, 8, 3, 2)
    torch.testing.assert_close(Twice(8, num_frames=4)(x), 2 * TIM(8, num_frames=4)(x))
    made, x = block(), torch.randn(4, 8, 3, 2)
    twice = Twice(8, num_frames=4)
    twice.load_state_dict(made.tim.state_dict())
    with torch.no_grad():
        want = made.cme(x)
        made.tim = twice
        seen = []
        made.conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        made(x)
    torch.testing.assert_close(seen[0], 2 * TIM.forward_frames(twice, want, 4))
    released_block = released.CMRBlock(8, 4, downsample=nn.Conv2d(8, 16, 1), num_frames=4, reduction=2).eval()
    assert [row[1] for row in explain(released_block, x)] == ['TIM', 'SME']


def test_a_layer_with_forward_clips_only_is_used():
    class Rolled(SME):
        def forward_clips(self, x):
            return x.roll(1, 1)

    x = torch.randn(4, 8, 3, 2)
    assert torch.equal(Rolled(8, num_frames=4)(x), x.roll(1, 0))


def test_convolutions_that_are_not_pytorchs_own_run_themselves():
    class Louder(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    made, x = block(), torch.randn(4, 8, 3, 2)
    conv = Louder(8, 4, 1, bias=False)
    conv.load_state_dict(made.conv1.state_dict())
    seen = []
    with torch.no_grad():
        made.bn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        made(x)
        made.conv1 = conv
        made(x)
    torch.testing.assert_close(seen[1], 2 * seen[0])


class Zero:
    def forward_clips(self, x):
        return x * 0


@pytest.mark.parametrize('base', [CME, SME, TIM])
def test_a_mixins_arithmetic_is_used(base):
    mixed = type('Mixed', (Zero, base), {})
    assert not mixed(8, 4)(torch.randn(4, 8, 3, 3)).any()


@pytest.mark.parametrize('conv', [
    nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2)], ids=['3x3', 'groups'])
def test_a_convolution_of_another_kind_in_sme_is_called(conv):
    layer, x = SME(8, 4).eval(), torch.randn(4, 8, 5, 5)
    layer.conv = conv
    layer.bn.weight.data.fill_(1.)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.forward_clips(x[None])[0])


@pytest.mark.parametrize('where', ['cme', 'tim', 'conv', 'cme class', 'conv class'])
def test_patches_of_inner_methods_are_used(where, monkeypatch):
    cme, tim, conv, x = CME(8, 4), TIM(8, 4), nn.Conv2d(8, 4, 1), torch.randn(4, 8, 3, 3)
    if where == 'conv':
        conv._conv_forward = lambda x, weight, bias: 2 * torch.nn.functional.conv2d(x, weight, bias)
    elif where == 'conv class':
        forward = nn.Conv2d.forward
        monkeypatch.setattr(nn.Conv2d, 'forward', lambda self, x: 2 * forward(self, x))
    elif where == 'cme class':
        frames = CME.forward_frames
        monkeypatch.setattr(CME, 'forward_frames', lambda self, x, num_frames: 2 * frames(self, x, num_frames))
    else:
        layer = cme if where == 'cme' else tim
        forward_frames = layer.forward_frames
        layer.forward_frames = lambda x, num_frames: 2 * forward_frames(x, num_frames)
    torch.testing.assert_close(cme_tim_conv(cme, tim, conv, x), conv(tim(cme(x))))
