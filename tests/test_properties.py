"""What has to hold for any clip: properties of the layers, checked on many small ones."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_layers import TIM
from cmr_layers.clip import Consensus, Fold, clip_shape
from cmr_layers.ops import reference as law

examples = settings(deadline=None, max_examples=25, derandomize=True)
CLOSE = {'rtol': 1e-10, 'atol': 1e-10}
small = st.integers(1, 4)
kinds = st.sampled_from(['CME', 'SME', 'TIM'])


@st.composite
def clips(draw, min_clips=1, min_frames=1):
    """A float64 clip batch (B, T, C, H, W), some of its pixels zero, in one of three memory layouts."""
    shape = (draw(st.integers(min_clips, 4)), draw(st.integers(min_frames, 6)), draw(small), draw(small), draw(small))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10. ** draw(st.integers(-3, 3))
    if draw(st.booleans()):
        x = x * (torch.rand(*shape[:2], 1, *shape[3:], generator=generator) < .7)
    order = draw(st.sampled_from([(0, 1, 2, 3, 4), (0, 1, 3, 4, 2), (1, 0, 2, 3, 4)]))
    return x.permute(order).contiguous().permute([order.index(i) for i in range(5)])


@st.composite
def orders(draw, n):
    return torch.tensor(draw(st.permutations(range(n))))


def layer_for(build, kind, x):
    return build(kind, x.shape[2], x.shape[1], dtype=torch.float64)


@examples
@given(kind=kinds, x=clips(min_clips=2))
def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch(build, kind, x):
    layer = layer_for(build, kind, x)
    y = layer(x)
    for b in range(len(x)):
        torch.testing.assert_close(layer(x[b:b + 1]), y[b:b + 1], **CLOSE)


@examples
@given(kind=kinds, data=st.data(), x=clips(min_clips=2))
def test_permuting_clips_permutes_results(build, kind, data, x):
    layer, order = layer_for(build, kind, x), data.draw(orders(len(x)))
    torch.testing.assert_close(layer(x[order]), layer(x)[order], **CLOSE)


@examples
@given(kind=kinds, x=clips())
def test_folded_and_unfolded_clips_give_the_same(build, kind, x):
    layer = layer_for(build, kind, x)
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1), **CLOSE)
    torch.testing.assert_close(Fold(x.shape[1])(x), x.flatten(0, 1), rtol=0, atol=0)


@examples
@given(data=st.data(), x=clips(min_frames=2))
def test_permuting_frames_permutes_what_cme_returns(build, data, x):
    layer, order = layer_for(build, 'CME', x), data.draw(orders(x.shape[1]))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], **CLOSE)


@examples
@given(data=st.data(), kind=kinds, x=clips())
def test_permuting_pixels_permutes_results(build, data, kind, x):
    # none of the three looks at where a pixel is
    layer, order, (h, w) = layer_for(build, kind, x), data.draw(orders(x.shape[3] * x.shape[4])), x.shape[3:]
    moved = x.flatten(3)[..., order].unflatten(3, (h, w))
    torch.testing.assert_close(layer(moved), layer(x).flatten(3)[..., order].unflatten(3, (h, w)), **CLOSE)


@examples
@given(x=clips())
def test_cme_never_enlarges_and_never_changes_a_sign(build, x):
    y, gate = (layer := layer_for(build, 'CME', x))(x), layer.gate(x)
    assert gate.shape == x.shape[:3] and (gate >= 0).all() and (gate <= 1).all()
    assert (y.abs() <= x.abs()).all() and (y * x >= 0).all()


@examples
@given(x=clips(), num_frames=st.integers(1, 6))
def test_cme_of_a_static_clip_is_cme_of_a_still(build, x, num_frames):
    # whatever the weights of (5), they sum to 1 over j, and every z_j is the same
    layer = layer_for(build, 'CME', x)
    still = x[:, :1]
    layer.set_num_frames(1)
    want = layer(still)
    layer.set_num_frames(num_frames)
    repeats = (1, num_frames, 1, 1, 1)
    torch.testing.assert_close(layer(still.repeat(repeats)), want.repeat(repeats), **CLOSE)


@examples
@given(x=clips(), num_frames=st.integers(2, 6))
def test_a_static_clip_leaves_the_motion_term_at_bn_of_conv_of_zero(build, x, num_frames):
    # all but the zero pixels, whose similarity is 0; their x * (1 - s) is zero all the same
    layer = layer_for(build, 'SME', x)
    layer.set_num_frames(num_frames)
    x = x[:, :1].repeat(1, num_frames, 1, 1, 1)
    nothing = layer.bn(layer.conv(torch.zeros_like(x[0, 0])[None]))
    scale = x.abs().max().item()
    torch.testing.assert_close(layer(x) - x, nothing.expand_as(x), rtol=1e-10, atol=1e-12 * (1 + scale))
    assert law.motion(x).abs().max() <= 1e-14 * (1 + scale)


@examples
@given(x=clips(min_frames=2))
def test_similarity_is_a_cosine(x):
    s = law.similarity(x)
    assert (s.abs() <= 1 + 1e-12).all()
    zero = (x == 0).all(2)
    pair = zero[:, :-1] | zero[:, 1:]
    assert (s[:, :-1][pair] == 0).all()
    want = torch.nn.functional.cosine_similarity(x[:, :-1], x[:, 1:], dim=2, eps=1e-30)
    torch.testing.assert_close(s[:, :-1], want, **CLOSE)
    torch.testing.assert_close(law.similarity(x.flip(1))[:, :-1], s[:, :-1].flip(1), **CLOSE)


@examples
@given(data=st.data(), x=clips(min_frames=2))
def test_similarity_ignores_the_length_of_the_vectors(data, x):
    scales = torch.tensor([data.draw(st.floats(1e-3, 1e3)) for _ in range(x.shape[1])], dtype=torch.float64)
    torch.testing.assert_close(law.similarity(x * scales.view(-1, 1, 1, 1)), law.similarity(x), **CLOSE)


@examples
@given(x=clips())
def test_rectified_features_keep_the_similarity_between_0_and_1(x):
    # what a ResNet's blocks hand to SME: x * (1 - s) then never exceeds x
    x = x.relu()
    s = law.similarity(x)
    assert (s >= 0).all() and (s <= 1 + 1e-12).all()
    assert (law.motion(x) <= x * (1 + 1e-12)).all()


@examples
@given(x=clips(), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_tim_is_linear(build, x, a, b):
    layer, y = layer_for(build, 'TIM', x), x.roll(1, 0).flip(3)
    torch.testing.assert_close(layer(a * x + b * y), a * layer(x) + b * layer(y), rtol=1e-10, atol=1e-8)


@examples
@given(x=clips(), kernel_size=st.sampled_from([1, 3, 5, 7]))
def test_tim_backwards_in_time_is_tim_with_its_taps_reversed(build, x, kernel_size):
    layer = build('TIM', x.shape[2], x.shape[1], torch.float64, kernel_size=kernel_size, init='random')
    want = layer(x).flip(1)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(2))
    torch.testing.assert_close(layer(x.flip(1)), want, **CLOSE)


@examples
@given(channels=st.integers(1, 40), shift_div=st.integers(2, 40), init=st.sampled_from(['tsm', 'tsm_reversed']))
def test_a_shift_moves_a_fraction_of_the_channels_each_way(channels, shift_div, init):
    taps, fold = TIM(channels, init=init, shift_div=shift_div).weight[:, 0], channels // shift_div
    assert (taps.sum(1) == 1).all() and ((taps == 0) | (taps == 1)).all()
    assert taps.sum(0).tolist() == [fold, channels - 2 * fold, fold]
    reads_next = taps[:, 2 if init == 'tsm' else 0]
    assert (reads_next[:fold] == 1).all()


@examples
@given(images=st.integers(0, 40), frames=st.integers(1, 10))
def test_clip_shape_loses_no_image(images, frames):
    if images > frames and images % frames:
        with pytest.raises(ValueError, match=f'num_frames={frames}'):
            clip_shape(images, frames)
    else:
        batch, length = clip_shape(images, frames)
        assert batch * length == images and length == (frames if images >= frames else 1)


@examples
@given(data=st.data(), batch=small, frames=st.integers(1, 6))
def test_consensus_does_not_care_for_the_order_of_frames(data, batch, frames):
    x, order = torch.randn(batch, frames, 3, dtype=torch.float64), data.draw(orders(frames))
    y = Consensus(frames)(x.flatten(0, 1))
    assert y.shape == (batch, 3)
    torch.testing.assert_close(Consensus(frames)(x[:, order].flatten(0, 1)), y)
