"""The operators' CPU form against autograd of the reference in float64: values, gradients, layouts, edges."""
import pytest
import torch
import torch.nn.functional as F

from cmr_layers.ops import plain
from cmr_layers.ops import reference as law

cl, contiguous = torch.channels_last, torch.contiguous_format
LAYOUTS = {'contiguous': contiguous, 'channels_last': cl}
# What a result may be off by, in units of its largest value: a few roundings of its dtype, or of what it sums.
TOLERANCE = {
    dtype: roundings * torch.finfo(dtype).eps
    for dtype, roundings in ((torch.float64, 500), (torch.float32, 20), (torch.float16, 3), (torch.bfloat16, 3))}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Cut even tiny clips into several blocks and products, the last ones ragged."""
    monkeypatch.setattr(plain, '_BLOCK', 64)
    monkeypatch.setattr(plain, '_ROWS', 7)


def frames(*shape, dtype=torch.float64, layout=contiguous):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)


def front_weights(channels, c1=3, c2=2, b3=False, kernel_size=3, dtype=torch.float64):
    """w1, w2, w3, b3 and taps; c1 or kernel_size None: without them. Small enough that no softmax saturates."""
    weights = [None] * 5
    if c1 is not None:
        weights[:3] = [torch.randn(shape) / 2 for shape in ((c1, channels), (c2, channels), (channels, c1))]
        weights[3] = torch.randn(channels) if b3 else None
    if kernel_size is not None:
        weights[4] = torch.randn(channels, 1, kernel_size)
    return [None if w is None else w.to(dtype) for w in weights]


def law_front(x, num_frames, w1, w2, w3, b3, taps):
    x = law.clips(x, num_frames)
    if w1 is not None:
        x = law.cme(x, w1, w2, w3, b3)
    if taps is not None:
        x = law.tim(x, taps)
    return x.flatten(0, 1)


def law_motion_conv(x, num_frames, weight, bias):
    return F.conv2d(law.motion(law.clips(x, num_frames)).flatten(0, 1), weight, bias)


def exact(function, g, x, num_frames, *weights):
    """The law's output and the gradients of x and the weights, in float64; None for what is None."""
    inputs = [None if v is None else v.detach().double().requires_grad_() for v in (x, *weights)]
    y = function(inputs[0], num_frames, *inputs[1:])
    given = [v for v in inputs if v is not None]
    gradients = iter(torch.autograd.grad(y, given, g.double()))
    return y.detach(), [None if v is None else next(gradients) for v in inputs]


def assert_near(got, want, tolerance):
    want = want.double()
    scale = want.abs().max().item() if want.numel() else 1.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(scale, 1e-300))


def assert_like(got, x):
    assert (got.shape, got.dtype, got.stride()) == (x.shape, x.dtype, x.stride())


def unchanged(function, *args):
    """The results, once it is sure that no argument was written to and no result shares memory with one."""
    tensors = [v for v in args if isinstance(v, torch.Tensor)]
    before = [v.clone() for v in tensors]
    results = function(*args)
    results = results if isinstance(results, tuple) else (results,)
    assert all(torch.equal(v, w) for v, w in zip(tensors, before))
    memory = [v.untyped_storage().data_ptr() for v in results if v.numel()]
    assert not {*memory} & {v.untyped_storage().data_ptr() for v in tensors if v.numel()}
    assert len({*memory}) == len(memory)
    return results


def check_front(x, num_frames, weights, tolerance, g=None):
    g = torch.randn_like(x) if g is None else g
    want, gradients = exact(law_front, g, x, num_frames, *weights)
    y, *vectors = unchanged(plain.front, x, num_frames, *weights)
    assert_like(y, x)
    assert_near(y, want, tolerance)
    acc = torch.promote_types(x.dtype, torch.float32)
    assert all(v.dtype == acc for v in vectors)
    if weights[0] is None:
        assert all(v.shape == (0,) for v in vectors)
    else:
        w1, w2, w3, b3, _ = [None if w is None else w.double() for w in weights]
        pooled, z, k, gate = vectors
        fine = 1e-12 if acc == torch.float64 else 1e-5
        assert_near(pooled, x.double().mean((2, 3)), fine)
        assert_near(z, pooled.double() @ w1.t(), fine)
        assert_near(k, pooled.double() @ w2.t(), fine)
        assert_near(gate, law.cme_gate(law.clips(x.double(), num_frames), w1, w2, w3, b3).flatten(0, 1), fine)
    gx, *g_weights = unchanged(plain.front_backward, g, x, num_frames, *weights, *vectors)
    assert_like(gx, x)
    assert_near(gx, gradients[0], tolerance)
    for got, w, grad in zip(g_weights, weights, gradients[1:]):
        if w is None:
            assert got.shape == (0,)
        else:
            assert (got.shape, got.dtype) == (w.shape, w.dtype)
            assert_near(got, grad, tolerance)


def check_motion_conv(x, num_frames, weight, bias, tolerance, g=None):
    g = torch.randn_like(x) if g is None else g
    want, gradients = exact(law_motion_conv, g, x, num_frames, weight, bias)
    h, s, inverse_norm = unchanged(plain.motion_conv, x, num_frames, weight, bias)
    assert_like(h, x)
    assert_near(h, want, tolerance)
    acc = torch.promote_types(x.dtype, torch.float32)
    fine = 1e-12 if acc == torch.float64 else 1e-5
    n, _, height, width = x.shape
    assert s.shape == inverse_norm.shape == (n, height, width)
    assert s.dtype == inverse_norm.dtype == acc
    assert_near(s, law.similarity(law.clips(x.double(), num_frames)).flatten(0, 1), fine)
    if num_frames > 1:
        assert_near(inverse_norm, 1 / x.double().norm(dim=1), fine)
    gx, g_weight = unchanged(plain.motion_conv_backward, g, x, num_frames, weight, s, inverse_norm)
    assert_like(gx, x)
    assert_near(gx, gradients[0], tolerance)
    assert (g_weight.shape, g_weight.dtype) == (weight.shape, weight.dtype)
    assert_near(g_weight, gradients[1], tolerance)


SHAPES = [(1, 6, 5, 3), (2, 6, 1, 5), (3, 5, 3, 7), (5, 1, 3, 3), (8, 11, 1, 1), (8, 6, 4, 2)]
FRONTS = {
    'CME alone': {'kernel_size': None}, 'TIM alone': {'c1': None}, 'both': {}, 'both, b3': {'b3': True},
    'CME alone, b3': {'kernel_size': None, 'b3': True, 'c2': 4}, 'K=1': {'c1': None, 'kernel_size': 1},
    'both, K=1': {'kernel_size': 1}, 'K=5': {'c1': None, 'kernel_size': 5}, 'both, K=5': {'kernel_size': 5, 'c1': 1},
}


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('front', FRONTS)
@pytest.mark.parametrize('clips', [1, 2])
def test_front_is_the_law_in_float64(shape, front, clips, layout):
    t, *size = shape
    check_front(frames(clips * t, *size, layout=layout), t, front_weights(size[0], **FRONTS[front]), 1e-12)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('clips', [1, 2])
def test_motion_conv_is_the_law_in_float64(shape, bias, clips, layout):
    t, channels, *size = shape
    weight, bias = frames(channels, channels, 1, 1), torch.randn(channels, dtype=torch.float64) if bias else None
    check_motion_conv(frames(clips * t, channels, *size, layout=layout), t, weight, bias, 1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('weight_dtype', [None, torch.float32], ids=str)
@pytest.mark.parametrize('t', [1, 2, 8])
def test_front_in_lower_precision(dtype, weight_dtype, t, layout):
    x = frames(2 * t, 12, 5, 3, dtype=dtype, layout=layout)
    check_front(x, t, front_weights(12, b3=True, dtype=weight_dtype or dtype), TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('weight_dtype', [None, torch.float32], ids=str)
@pytest.mark.parametrize('native', [False, True])
@pytest.mark.parametrize('t', [1, 2, 8])
def test_motion_conv_in_lower_precision(dtype, weight_dtype, native, t, layout, monkeypatch):
    # products in x's dtype, as on CPUs that have instructions for it, and in float32
    monkeypatch.setattr(plain, '_product_dtype', lambda x: dtype if native else torch.float32)
    x = frames(2 * t, 12, 5, 3, dtype=dtype, layout=layout)
    weight, bias = (frames(*size, dtype=weight_dtype or dtype) for size in ((12, 12, 1, 1), (12,)))
    check_motion_conv(x, t, weight, bias, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_the_size_that_is_used(dtype, layout, monkeypatch):
    monkeypatch.undo()
    x = frames(16, 40, 40, 44, dtype=dtype, layout=layout)
    assert x.numel() > 2 * plain._BLOCK and 16 * 40 * 44 > plain._ROWS
    weights, weight = front_weights(40, dtype=dtype), frames(40, 40, 1, 1, dtype=dtype)
    check_front(x, 8, weights, TOLERANCE[dtype])
    check_motion_conv(x, 8, weight, None, TOLERANCE[dtype])


@pytest.mark.parametrize('layout_of_g', LAYOUTS)
def test_gradients_come_in_any_layout(layout_of_g, layout):
    x = frames(6, 5, 3, 4, layout=layout)
    g = frames(6, 5, 3, 4, layout=LAYOUTS[layout_of_g])
    weight = frames(5, 5, 1, 1)
    for gradient in (g, g[:, :1].expand_as(g), frames(6, 5, 4, 3).transpose(2, 3)):
        check_front(x, 3, front_weights(5), 1e-12, gradient)
        check_motion_conv(x, 3, weight, None, 1e-12, gradient)


def law_sme(x, num_frames, weight, bias, mean, var, gamma, beta, eps):
    h = law_motion_conv(x, num_frames, weight, bias)
    return x + (h if mean is None else F.batch_norm(h, mean, var, gamma, beta, eps=eps))


NORMS = {'folded': 0, 'no affine': 2, 'affine': 4}


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_sme_is_the_law(shape, bias, norm, dtype, layout):
    t, channels, *size = shape
    x = frames(2 * t, channels, *size, dtype=dtype, layout=layout)
    weight, bias = frames(channels, channels, 1, 1, dtype=dtype), frames(channels, dtype=dtype) if bias else None
    given = [v.to(dtype) for v in (torch.randn(channels), torch.rand(channels) + .5, *torch.randn(2, channels))]
    given = given[:NORMS[norm]] + [None] * (4 - NORMS[norm])
    (v,) = unchanged(plain.sme, x, t, weight, bias, *given, 1e-3)
    assert_like(v, x)
    want = law_sme(*(v.double() if isinstance(v, torch.Tensor) else v for v in (x, t, weight, bias, *given, 1e-3)))
    assert_near(v, want, TOLERANCE[dtype])


def test_sme_takes_float32_weights_and_statistics_with_half_precision_frames(layout):
    x = frames(6, 8, 3, 3, dtype=torch.bfloat16, layout=layout)
    weight, bias, mean, gamma, beta = (torch.randn(size) for size in ((8, 8, 1, 1), 8, 8, 8, 8))
    norm = bias, mean, torch.rand(8) + .5, gamma, beta
    v = plain.sme(x, 3, weight, *norm, 1e-5)
    assert_like(v, x)
    assert_near(v, law_sme(x.double(), 3, weight.double(), *(w.double() for w in norm), 1e-5), 3e-2)


def test_an_empty_batch_gives_empty_frames_and_zero_weight_gradients(layout):
    x = frames(0, 6, 3, 2, layout=layout)
    weights, weight = front_weights(6, b3=True), frames(6, 6, 1, 1)
    y, *vectors = plain.front(x, 4, *weights)
    assert [v.shape for v in vectors] == [(0, 6), (0, 3), (0, 2), (0, 6)]
    gx, *gradients = plain.front_backward(x, x, 4, *weights, *vectors)
    h, s, inverse_norm = plain.motion_conv(x, 4, weight, None)
    assert s.shape == inverse_norm.shape == (0, 3, 2)
    gh, g_weight = plain.motion_conv_backward(x, x, 4, weight, s, inverse_norm)
    v = plain.sme(x, 4, weight, None, None, None, None, None, 0.)
    assert y.shape == gx.shape == h.shape == gh.shape == v.shape == x.shape
    for g, w in zip([*gradients, g_weight], [*weights, weight]):
        assert torch.equal(g, torch.zeros_like(w))


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_zero_pixels_have_similarity_zero_and_the_laws_gradients(dtype, layout):
    x = frames(8, 5, 2, 2, dtype=dtype, layout=layout)
    x[:, :, 0, 0] = 0      # in every frame
    x[1, :, 0, 1] = 0      # in one
    weight = frames(5, 5, 1, 1, dtype=dtype)
    g = torch.randn_like(x)
    want, (gx, g_weight) = exact(lambda *args: law_motion_conv(*args, None), g, x, 4, weight)
    h, s, inverse_norm = plain.motion_conv(x, 4, weight, None)
    assert not s[:, 0, 0].any() and not s[:2, 0, 1].any() and s[2:, 0, 1].all() and s[:, 1].all()
    assert_near(h, want, TOLERANCE[dtype])
    got, got_weight = plain.motion_conv_backward(g, x, 4, weight, s, inverse_norm)
    assert gx[1, :, 0, 1].abs().min() > 0      # what the neighbour's similarity says
    assert_near(got, gx, TOLERANCE[dtype])
    assert_near(got_weight, g_weight, TOLERANCE[dtype])


@pytest.mark.parametrize('scale', [1e-9, 1e-13, 1e-18, 1e-38])
def test_tiny_features_have_the_laws_gradients(scale, layout):
    x = (frames(3, 4, 2, 2, dtype=torch.float32) * scale).contiguous(memory_format=layout)
    weight, g = torch.randn(4, 4, 1, 1), torch.randn(3, 4, 2, 2)
    _, s, inverse_norm = plain.motion_conv(x, 3, weight, None)
    torch.testing.assert_close(s.double(), law.similarity(x.double().unsqueeze(0))[0], rtol=0, atol=1e-5)
    gx, _ = plain.motion_conv_backward(g, x, 3, weight, s, inverse_norm)
    assert_near(gx, exact(law_motion_conv, g, x, 3, weight, None)[1][0], 1e-5)


@pytest.mark.parametrize('dtype, value', [
    (torch.float16, 3e4), (torch.bfloat16, 1e15), (torch.float32, 1e15), (torch.float32, 1e19), (torch.float32, 1e30),
    (torch.bfloat16, 1e30), (torch.float64, 1e30), (torch.float64, 1e200)], ids=str)
def test_huge_features_are_exact(dtype, value, layout):
    # in one pixel of one frame, all of a pixel, and everywhere
    some = torch.rand(6, 6, 2, 3, dtype=torch.float64) * 2 - 1
    for where in ((1, slice(None), 0, 1), (slice(None), slice(None), 1, 2), ...):
        x = some.clone()
        x[where] *= value
        x = x.to(dtype).contiguous(memory_format=layout)
        weight, g = frames(6, 6, 1, 1, dtype=dtype) / 16, torch.randn_like(x) / 16
        # a cosine does not depend on the scale
        largest = x.double().abs().amax(1, keepdim=True)
        small = x.double() / largest
        h, s, inverse_norm = plain.motion_conv(x, 3, weight, None)
        assert_near(s, law.similarity(law.clips(small, 3)).flatten(0, 1), 1e-12 if dtype == torch.float64 else 1e-5)
        gx, _ = plain.motion_conv_backward(g, x, 3, weight, s, inverse_norm)
        want, (g_want, _) = exact(lambda *args: law_motion_conv(*args, None), g, x, 3, weight)
        assert g_want.isfinite().all()
        for got, expected in ((h, want), (gx, g_want)):
            assert got.isfinite().all()
            # pixel by pixel: beside one of 1e30 all others would be near anything
            size = expected.abs().amax(1, keepdim=True)
            assert_near(got.double() / size, expected / size, 8 * TOLERANCE[dtype])


def test_huge_features_leave_gates_finite(layout):
    x = (torch.rand(4, 32, 2, 2) * 2 - 1).mul(1e30).contiguous(memory_format=layout)
    weights = front_weights(32, 4, 4, kernel_size=None, dtype=torch.float32)
    y, pooled, z, k, gate = plain.front(x, 4, *weights)
    torch.testing.assert_close(gate, law.cme_gate(law.clips(x, 4), *weights[:4])[0])
    assert y.isfinite().all() and (k.abs() < 1e30 * pooled.abs().max()).all()
    gx, _, g_key, *_ = plain.front_backward(torch.randn_like(x), x, 4, *weights, pooled, z, k, gate)
    assert gx.isfinite().all()
    assert not g_key.any()      # clamped keys have no gradient


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_static_clips_hardly_move(dtype, layout):
    x = frames(1, 6, 3, 2, dtype=dtype).repeat(4, 1, 1, 1).contiguous(memory_format=layout)
    weight, bias, g = (frames(*size, dtype=dtype) for size in ((6, 6, 1, 1), (6,), (4, 6, 3, 2)))
    h, s, inverse_norm = plain.motion_conv(x, 4, weight, bias)
    eps = torch.finfo(s.dtype).eps
    torch.testing.assert_close(s, torch.ones_like(s), rtol=0, atol=8 * eps)
    torch.testing.assert_close(h, bias[:, None, None].expand_as(h), rtol=0, atol=256 * eps)
    gx, g_weight = plain.motion_conv_backward(g, x, 4, weight, s, inverse_norm)
    # between equal frames the cosine is at its maximum, so nothing is left of its gradient either
    tolerance = max(256 * eps, TOLERANCE[dtype])
    torch.testing.assert_close(gx, torch.zeros_like(gx), rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(g_weight, torch.zeros_like(g_weight), rtol=0, atol=4 * tolerance)


def test_a_still_is_its_bias_and_has_no_gradient(layout):
    x = frames(3, 5, 2, 2, layout=layout)
    weight, bias = frames(5, 5, 1, 1), frames(5)
    h, s, inverse_norm = plain.motion_conv(x, 1, weight, bias)
    assert torch.equal(s, torch.ones_like(s))
    assert torch.equal(h, bias[:, None, None].expand_as(h))
    gx, g_weight = plain.motion_conv_backward(frames(3, 5, 2, 2), x, 1, weight, s, inverse_norm)
    assert not gx.any() and not g_weight.any()
