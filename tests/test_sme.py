"""SME alone: the module against the loops, its similarity, its start and its edges."""
from functools import partial

import loops
import pytest
import torch
from torch import nn

from cmr_layers import SME

F64 = {'dtype': torch.float64}


def follow(layer, x):
    bn = layer.bn
    return loops.sme(
        x, layer.conv.weight, layer.conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


@pytest.mark.parametrize('num_frames', [1, 2, 3, 8])
@pytest.mark.parametrize('channels, size, bias', [(4, (3, 2), False), (3, (1, 1), True), (2, (7, 5), False)], ids=str)
def test_the_module_follows_equation_8(build, num_frames, channels, size, bias):
    layer, x = build('SME', channels, num_frames, **F64, bias=bias), torch.randn(2, num_frames, channels, *size, **F64)
    torch.testing.assert_close(layer(x), follow(layer, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.similarity(x.flatten(0, 1)), loops.similarity(x), rtol=1e-12, atol=1e-12)


def test_in_training_the_batch_norm_sees_all_frames_of_the_batch(build):
    layer, x = build('SME', 3, 4, **F64).train(), torch.randn(2, 4, 3, 3, 2, **F64)
    term = nn.functional.conv2d(loops.motion(x).flatten(0, 1), layer.conv.weight)
    mean, var = term.mean((0, 2, 3), keepdim=True), term.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (p.view(1, -1, 1, 1) for p in (layer.bn.weight, layer.bn.bias))
    want = (term - mean) / (var + layer.bn.eps).sqrt() * weight + bias + x.flatten(0, 1)
    torch.testing.assert_close(layer(x).flatten(0, 1), want)


def test_a_frame_sees_the_next_one_only(build):
    layer, x = build('SME', num_frames=5, **F64), torch.randn(1, 5, 8, 2, 2, **F64)
    for t, seen_by in enumerate([{0}, {0, 1}, {1, 2}, {2, 3, 4}, {3, 4}]):    # the last copies s from the one before
        y = x.clone()
        y[:, t] += 1
        changed = (layer(y) - layer(x)).abs().amax((2, 3, 4))[0] > 1e-9
        assert set(changed.nonzero().flatten().tolist()) == seen_by, t


def test_each_pixel_is_for_itself(build):
    layer, x = build('SME', **F64), torch.randn(1, 4, 8, 3, 3, **F64)
    y = x.clone()
    y[..., 1, 2] += 1
    changed = (layer(y) != layer(x)).flatten(0, 2).any(0)
    assert changed.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('static', [False, True], ids=['still', 'static clip'])
def test_without_motion_it_adds_bn_of_conv_of_zero(build, bias, static):
    layer = build('SME', num_frames=4 if static else 1, bias=bias, **F64)
    x = torch.randn(1, 1, 8, 3, 2, **F64).expand(1, 4 if static else 1, -1, -1, -1)
    nothing = layer.bn(layer.conv(torch.zeros(1, 8, 3, 2, **F64)))
    torch.testing.assert_close(layer(x) - x, nothing.expand_as(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_it_starts_as_the_identity_bit_for_bit(dtype, train):
    layer, x = SME(8, num_frames=4, dtype=dtype).train(train), torch.randn(2, 4, 8, 3, 2).to(dtype)
    x[0, 1] = 0
    assert torch.equal(layer(x), x)
    assert (layer.bn.weight == 0).all() and (layer.bn.bias == 0).all()


def test_it_can_learn_from_the_identity():
    layer = SME(8, num_frames=4)
    layer(torch.randn(1, 4, 8, 2, 2)).square().sum().backward()
    assert (layer.bn.weight.grad != 0).all() and (layer.bn.bias.grad != 0).all()
    assert (layer.conv.weight.grad == 0).all()    # waits for the batch norm's weight


def test_the_convolution_starts_with_variance_2_over_c():
    layer = SME(96, bias=True)
    assert abs(layer.conv.weight.std().item() * (96 / 2) ** .5 - 1) < .05
    assert abs(layer.conv.weight.mean().item()) < .01
    assert .9 / 96 ** .5 < layer.conv.bias.abs().max() <= 1 / 96 ** .5  # PyTorch's default, as in the authors' code


def test_the_convolution_has_no_bias_unless_asked():
    assert SME(8).conv.bias is None and SME(8, bias=True).conv.bias.shape == (8,)


def test_zero_init_last_makes_a_trained_layer_the_identity(build):
    layer, x = build('SME'), torch.randn(8, 8, 3, 2)
    assert not torch.equal(layer(x), x)
    layer.zero_init_last()
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize('norm_layer', [partial(nn.GroupNorm, 2), nn.Identity], ids=['group', 'none'])
def test_another_norm_layer(norm_layer):
    class Norm(nn.Module):
        def __init__(self, channels, device=None, dtype=None):
            super().__init__()
            self.norm = norm_layer(channels, device=device, dtype=dtype)

        def forward(self, x):
            return self.norm(x)

    layer, x = SME(8, num_frames=4, norm_layer=Norm), torch.randn(2, 4, 8, 3, 2)
    torch.testing.assert_close(
        layer(x), layer.bn(layer.conv(loops.motion(x).float().flatten(0, 1))).view_as(x) + x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_similarity_is_accumulated_in_float32(build, dtype, autocast):
    layer, x = build('SME', 64), (torch.randn(1, 4, 64, 3, 3) * 100).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        s = layer.similarity(x)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), loops.similarity(x), rtol=1e-5, atol=1e-6)


def test_similarity_of_float64_is_float64(build):
    assert build('SME').similarity(torch.randn(1, 4, 8, 2, 2, **F64)).dtype == torch.float64


def test_zero_pixels_leave_finite_gradients_everywhere(build):
    layer, x = build('SME').train(), torch.randn(2, 4, 8, 3, 2).relu()
    x[0, :, :, 0] = 0
    x[1, 2] = 0
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_similarity_checks_its_input_as_the_layer_does(build):
    with pytest.raises(ValueError, match='num_frames=4'):
        build('SME').similarity(torch.zeros(1, 3, 8, 2, 2))


def test_repr_shows_what_was_asked_for():
    assert repr(SME(8, 4)).startswith('SME(\n  8, num_frames=4\n')
