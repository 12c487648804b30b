"""TIM alone: the module against the loops, each start and its direction, and its errors."""
import loops
import pytest
import torch

from cmr_layers import TIM

F64 = {'dtype': torch.float64}
NEXT, STAY, PREVIOUS = [0., 0., 1.], [0., 1., 0.], [1., 0., 0.]


@pytest.mark.parametrize('num_frames', [1, 2, 3, 8])
@pytest.mark.parametrize('channels, size, kernel_size', [
    (4, (3, 2), 3), (3, (1, 1), 5), (2, (7, 5), 3), (4, (2, 2), 1), (2, (1, 2), 9)], ids=str)
def test_the_module_is_the_depthwise_convolution(build, num_frames, channels, size, kernel_size):
    kwargs = {'kernel_size': kernel_size, 'init': 'random', **F64}
    layer, x = build('TIM', channels, num_frames, **kwargs), torch.randn(2, num_frames, channels, *size, **F64)
    torch.testing.assert_close(layer(x), loops.tim(x, layer.weight), rtol=1e-12, atol=1e-12)


def test_a_still_is_scaled_by_its_centre_taps(build):
    layer, x = build('TIM', num_frames=1, **F64), torch.randn(3, 8, 4, 5, **F64)
    torch.testing.assert_close(layer(x), x * layer.weight[:, 0, 1].view(8, 1, 1))


def test_a_frame_sees_its_neighbours_only(build):
    layer, x = build('TIM', num_frames=5), torch.randn(1, 5, 8, 2, 2)
    for t in range(5):
        y = x.clone()
        y[:, t] += 1
        changed = (layer(y) != layer(x)).flatten(2).any(2)[0]
        assert set(changed.nonzero().flatten().tolist()) == {t - 1, t, t + 1} & set(range(5))


def test_each_channel_and_pixel_is_for_itself(build):
    layer, x = build('TIM'), torch.randn(1, 4, 8, 3, 3)
    y = x.clone()
    y[:, :, 5, 1, 2] += 1
    changed = (layer(y) != layer(x)).flatten(0, 1).any(0)
    assert changed.nonzero().tolist() == [[5, 1, 2]]


def test_tsm_starts_as_the_shift():
    # TSM: out[:, :, :fold] = x[t + 1], out[:, :, fold:2 * fold] = x[t - 1], the rest is copied
    x = torch.randn(2, 5, 16, 3, 2)
    want = torch.zeros_like(x)
    want[:, :-1, :2] = x[:, 1:, :2]
    want[:, 1:, 2:4] = x[:, :-1, 2:4]
    want[:, :, 4:] = x[:, :, 4:]
    assert torch.equal(TIM(16, num_frames=5)(x), want)
    assert torch.equal(TIM(16, num_frames=5, init='tsm_reversed')(x.flip(1)), want.flip(1))


@pytest.mark.parametrize('init, shift_div, taps', [
    ('tsm', 8, [NEXT] + [PREVIOUS] + [STAY] * 6),
    ('tsm', 4, [NEXT] * 2 + [PREVIOUS] * 2 + [STAY] * 4),
    ('tsm', 2, [NEXT] * 4 + [PREVIOUS] * 4),
    ('tsm', 16, [STAY] * 8),                                  # fewer channels than shift_div: none shifts
    ('tsm', 3, [NEXT] * 2 + [PREVIOUS] * 2 + [STAY] * 4),     # rounded down
    ('tsm_reversed', 8, [PREVIOUS] + [NEXT] + [STAY] * 6),
    ('identity', 8, [STAY] * 8),
    ('identity', 1, [STAY] * 8),
])
def test_taps_at_the_start(init, shift_div, taps):
    assert torch.equal(TIM(8, init=init, shift_div=shift_div).weight[:, 0], torch.tensor(taps))


def test_the_shift_reaches_one_frame_whatever_the_kernel_size():
    x = torch.randn(1, 6, 8, 2, 2)
    assert torch.equal(TIM(8, num_frames=6, kernel_size=7)(x), TIM(8, num_frames=6)(x))


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_identity_is_the_identity_bit_for_bit(kernel_size):
    x = torch.randn(2, 4, 8, 3, 2)
    assert torch.equal(TIM(8, num_frames=4, init='identity', kernel_size=kernel_size)(x), x)


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_random_starts_like_a_convolution(kernel_size):
    weight, bound = TIM(512, init='random', kernel_size=kernel_size).weight, kernel_size ** -.5
    assert weight.abs().max() <= bound and weight.max() > .95 * bound and weight.min() < -.95 * bound
    assert weight.mean().abs() < .1 * bound


@pytest.mark.parametrize('init', ['tsm', 'tsm_reversed', 'identity', 'random'])
def test_gain_scales_the_start(init):
    weights = []
    for gain in (1., 2.):
        torch.manual_seed(1)
        weights.append(TIM(16, init=init, gain=gain).weight)
    assert torch.equal(weights[1], weights[0] * 2) and (weights[0] != 0).any()


def test_taps_train_after_any_start():
    layer = TIM(8, num_frames=4)
    layer(torch.randn(1, 4, 8, 2, 2)).square().sum().backward()
    assert layer.weight.requires_grad and (layer.weight.grad != 0).all()


def test_a_start_is_the_same_on_a_half_precision_layer():
    assert torch.equal(TIM(8, dtype=torch.bfloat16).weight.float(), TIM(8).weight)


def test_repr_shows_what_was_asked_for():
    assert repr(TIM(8, 4, 5, 'identity')) == "TIM(8, num_frames=4, kernel_size=5, init='identity')"


@pytest.mark.parametrize('value', [0, -3, 2.5, '3', None, True], ids=repr)
@pytest.mark.parametrize('name', ['kernel_size', 'shift_div'])
def test_error_positive_ints(name, value):
    with pytest.raises(ValueError, match=f'^{name} must be a positive int, got {value!r}$'):
        TIM(8, **{name: value})


@pytest.mark.parametrize('kernel_size', [2, 4])
def test_error_kernel_size_is_odd(kernel_size):
    with pytest.raises(ValueError, match=f'^kernel_size must be odd, got {kernel_size}$'):
        TIM(8, kernel_size=kernel_size)


@pytest.mark.parametrize('init', ['TSM', '', None, 3], ids=repr)
def test_error_init_is_one_of_four(init):
    message = f"^init must be one of 'tsm', 'tsm_reversed', 'identity', 'random', got {init!r}$"
    with pytest.raises(ValueError, match=message):
        TIM(8, init=init)


@pytest.mark.parametrize('init', ['tsm', 'tsm_reversed'])
@pytest.mark.parametrize('shift_div, kernel_size', [(1, 3), (8, 1)])
def test_error_a_shift_needs_room(init, shift_div, kernel_size):
    message = f"^init='{init}' needs shift_div >= 2 and kernel_size >= 3, got {shift_div} and {kernel_size}$"
    with pytest.raises(ValueError, match=message):
        TIM(8, init=init, shift_div=shift_div, kernel_size=kernel_size)


@pytest.mark.parametrize('init', ['identity', 'random'])
def test_other_starts_need_no_room(init):
    assert TIM(8, init=init, shift_div=1, kernel_size=1).weight.shape == (8, 1, 1)
