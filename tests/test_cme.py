"""CME alone: the module against the loops, its gates, its start and its errors."""

import loops
import pytest
import torch

from cmr_layers import CME

F64 = {'dtype': torch.float64}


@pytest.mark.parametrize('num_frames', [1, 2, 3, 8])
@pytest.mark.parametrize('channels, kwargs', [
    (8, {}), (6, {'reduction': 4}), (8, {'reduction': (2, 4)}), (6, {'reduction': (4, 1), 'gate_init': .7}),
    (3, {'reduction': 1}),
], ids=str)
def test_the_module_follows_the_paper(build, channels, num_frames, kwargs):
    layer, x = build('CME', channels, num_frames, **F64, **kwargs), torch.randn(2, num_frames, channels, 3, 2, **F64)
    weights = [layer.w1, layer.w2, layer.w3, layer.b3]
    torch.testing.assert_close(layer(x), loops.cme(x, *weights), rtol=1e-12, atol=1e-12)
    gate = loops.cme_gate(x, *weights)
    torch.testing.assert_close(layer.gate(x), gate, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.gate(x.flatten(0, 1)), gate, rtol=1e-12, atol=1e-12)


def test_a_still_fuses_twice_its_own_value(build):
    # its only neighbour is itself: z_hat = z + z
    layer, x = build('CME', num_frames=1, **F64), torch.randn(3, 8, 4, 5, **F64)
    z = x.mean((2, 3)) @ layer.w1.T
    torch.testing.assert_close(layer(x), x * (2 * z @ layer.w3.T).sigmoid()[:, :, None, None])


def test_every_frame_of_the_clip_reaches_every_gate(build):
    layer, x = build('CME', num_frames=5, **F64), torch.randn(1, 5, 8, 2, 2, **F64)
    for t in range(5):
        y = x.clone()
        y[:, t] += 1
        changed = (layer.gate(y) - layer.gate(x)).abs().amax(2)[0]
        assert (changed > 0).all(), t


@pytest.mark.parametrize('channels, reduction, values, keys', [
    (64, 8, 8, 8), (12, 8, 2, 2), (5, 8, 1, 1), (16, (2, 4), 8, 4), (10, (3, 4), 4, 3), (7, [1, 7], 7, 1),
])
def test_widths_are_rounded_up(channels, reduction, values, keys):
    layer = CME(channels, reduction=reduction)
    assert layer.w1.shape == (values, channels)
    assert layer.w2.shape == (keys, channels)
    assert layer.w3.shape == (channels, values)
    assert layer(torch.randn(8, channels, 2, 2)).shape == (8, channels, 2, 2)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('half_input', [False, True])
def test_under_autocast_the_gates_are_those_of_float32(build, dtype, half_input):
    layer, x = build('CME', 16), torch.randn(2, 4, 16, 3, 3)
    x = x.to(dtype) if half_input else x
    with torch.autocast('cpu', dtype=dtype):
        gate = layer.gate(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, layer.gate(x.float()), rtol=1e-6, atol=1e-6)
    # the test can tell: the same gates in half precision are a thousand times further away
    assert (layer.to(dtype).gate(x) - gate).abs().max() > 2e-5


def test_half_precision_clips_with_large_keys_keep_a_sharp_softmax(build):
    # the dot products are in the thousands, where bfloat16 steps are larger than 8
    layer = build('CME', 32, reduction=1)
    x = (torch.rand(1, 4, 32, 3, 3) * 8).to(torch.bfloat16)
    weights = [layer.w1, layer.w2, layer.w3]
    torch.testing.assert_close(layer.gate(x).double(), loops.cme_gate(x, *weights), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('num_frames', [1, 4])
def test_gates_that_start_at_a_half_halve_the_clip_bit_for_bit(num_frames):
    layer, x = CME(12, num_frames=num_frames, gate_init=.5), torch.randn(2, num_frames, 12, 3, 3)
    assert torch.equal(layer.gate(x), torch.full((2, num_frames, 12), .5))
    assert torch.equal(layer(x), x / 2)


@pytest.mark.parametrize('gate_init', [.98, .1, .5])
def test_gate_init_starts_every_gate_there(gate_init):
    layer = CME(12, num_frames=4, gate_init=gate_init)
    gate = layer.gate(torch.randn(2, 4, 12, 3, 3))
    torch.testing.assert_close(gate, torch.full_like(gate, gate_init))
    assert (layer.b3 is None) == (gate_init == .5)


@pytest.mark.parametrize('gate_init', [0, 1, 1.5, -2., float('nan')])
def test_error_gate_init_lies_between_0_and_1(gate_init):
    with pytest.raises(ValueError, match=f'^gate_init must lie between 0 and 1, or be None, got {gate_init}$'):
        CME(8, gate_init=gate_init)


def test_a_gate_can_learn_from_its_start():
    # W3 starts at zero, so W1 and W2 wait for it; W3 and the bias must not
    layer = CME(8, num_frames=4, gate_init=.98)
    layer(torch.randn(1, 4, 8, 2, 2)).square().sum().backward()
    assert (layer.w3.grad != 0).all() and (layer.b3.grad != 0).all()
    assert (layer.w1.grad == 0).all() and (layer.w2.grad == 0).all()


def test_without_gate_init_it_starts_with_torchs_default_and_gates_near_a_half():
    layer = CME(64, num_frames=4)
    assert layer.b3 is None
    for w in (layer.w1, layer.w2, layer.w3):
        bound = w.shape[1] ** -.5
        assert .9 * bound < w.abs().max() <= bound
    gate = layer.gate(torch.randn(2, 4, 64, 8, 8))
    assert (gate - .5).abs().max() < .1 and gate.std() > 0


def test_the_mean_is_taken_over_all_of_the_frame(build):
    layer, x = build('CME', **F64), torch.randn(1, 4, 8, 7, 5, **F64)
    pooled = x.mean((3, 4), keepdim=True)
    torch.testing.assert_close(layer.gate(pooled), layer.gate(x))
    shuffled = x.flatten(3)[..., torch.randperm(35)].unflatten(3, (7, 5))
    torch.testing.assert_close(layer.gate(shuffled), layer.gate(x))


def test_repr_shows_what_was_asked_for():
    assert repr(CME(8, 4)) == 'CME(8, num_frames=4, reduction=8)'
    assert '8, num_frames=4, reduction=(2, 4), gate_init=0.9' in repr(CME(8, 4, (2, 4), .9))


@pytest.mark.parametrize('reduction, got', [
    (0, '0'), (-8, '-8'), (2.5, '2.5'), ('8', "'8'"), (None, 'None'), (True, 'True'), ((8, 0), '0'),
    ((None, 8), 'None')])
def test_error_reduction_is_positive(reduction, got):
    with pytest.raises(ValueError, match=f'^reduction must be a positive int, got {got}$'):
        CME(8, reduction=reduction)


@pytest.mark.parametrize('reduction, got', [((), r'\(\)'), ((8,), r'\(8,\)'), ((8, 8, 8), r'\(8, 8, 8\)')])
def test_error_reduction_is_one_or_two(reduction, got):
    message = rf'^reduction must be a positive int or a pair \(r1, r2\) of them, got {got}$'
    with pytest.raises(ValueError, match=message):
        CME(8, reduction=reduction)


def test_gate_checks_its_input_as_the_layer_does(build):
    with pytest.raises(ValueError, match=r'^x must have shape \(B\*T, 8, H, W\)'):
        build('CME').gate(torch.zeros(4, 7, 2, 2))
