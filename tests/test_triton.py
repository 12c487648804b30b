"""The Triton kernels against the equations in float64: on a GPU if there is one, in Triton's interpreter otherwise."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, interpreted

from cmr_layers.ops import reference
from cmr_layers.ops.vectors import key_bound

pytest.importorskip('triton')
# numpy, under the interpreter, warns of what these tests provoke
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')

# The interpreter cuts a bfloat16 where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3 if DEVICE == 'cpu' else 2.5e-3}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
# of matrix products: on a GPU they take float32 apart into tf32, as PyTorch's convolutions do
PRODUCT = {**TOLERANCE, torch.float32: 1e-6 if DEVICE == 'cpu' else 2e-3}
# B, T, C, H, W: one frame, odd sizes, more frames than a program walks over, channels and pixels beyond a block
SHAPES = [(2, 4, 24, 3, 3), (1, 1, 16, 3, 5), (1, 5, 40, 7, 5), (2, 9, 6, 1, 2), (1, 2, 136, 5, 3), (3, 8, 8, 7, 7),
          (1, 3, 5, 1, 1)]


@pytest.fixture(autouse=True)
def _kernels():
    # what a kernel leaves unwritten shows: fresh tensors hold NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with interpreted():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def new(*shape, dtype=torch.float32, scale=1.):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def frames(shape, dtype, layout, scale=1.):
    clips, num_frames, *rest = shape
    return new(clips * num_frames, *rest, dtype=dtype, scale=scale).contiguous(memory_format=layout)


def weights(channels, c1=3, c2=5, dtype=torch.float32):
    scale = channels ** -.5
    return [new(c1, channels, dtype=dtype, scale=scale), new(c2, channels, dtype=dtype, scale=scale),
            new(channels, c1, dtype=dtype), new(channels, dtype=dtype)]


def double(*tensors):
    return [v if v is None else v.detach().double().requires_grad_() for v in tensors]


def assert_close(got, want, tolerance):
    """Relative error in the norm, and nothing far off at a single place."""
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= tolerance, f'relative error {error:.1e}'
    assert (got.double() - want).abs().max() <= 40 * tolerance * (1e-30 + want.abs().max())


def want_front(x, num_frames, cme, taps):
    clips = reference.clips(x, num_frames)
    if cme[0] is not None:
        clips = reference.cme(clips, *cme)
    return (clips if taps is None else reference.tim(clips, taps)).reshape(x.shape)


KINDS = {'CME, TIM': (True, True, 3), 'CME with bias, TIM': (True, False, 3), 'CME': (True, True, None),
         'TIM': (False, True, 3), 'CME, TIM of one tap': (True, True, 1), 'TIM of one tap': (False, True, 1)}


def front_arguments(shape, dtype, layout, kind):
    has_cme, no_bias, num_taps = KINDS[kind]
    x, cme = frames(shape, dtype, layout), weights(shape[2]) if has_cme else [None] * 4
    if no_bias:
        cme[3] = None
    return x, cme, None if num_taps is None else new(shape[2], 1, num_taps)


def check_front(shape, dtype, layout, kind):
    from cmr_layers.ops import triton_front
    x, cme, taps = front_arguments(shape, dtype, layout, kind)
    inputs = double(x, *cme, taps)
    want = want_front(inputs[0], shape[1], inputs[1:5], inputs[5])
    y, *saved = triton_front.front(x, shape[1], *cme, taps)
    assert y.stride() == x.stride() and y.dtype == dtype
    assert_close(y, want, TOLERANCE[dtype])
    gy = torch.randn_like(x)
    got = triton_front.front_backward(gy, x, shape[1], *cme, taps, *saved)
    assert got[0].stride() == x.stride() and got[0].dtype == dtype
    known = [v for v in inputs if v is not None]
    for g, g_want in zip(
            [g for g, v in zip(got, inputs, strict=True) if v is not None],
            torch.autograd.grad(want, known, gy.double()), strict=True):
        assert_close(g, g_want, TOLERANCE[dtype])
    assert all(g.numel() == 0 for g, v in zip(got, inputs, strict=True) if v is None)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_front_and_its_derivatives(shape, layout):
    check_front(shape, torch.float32, layout, 'CME with bias, TIM')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_front_in_half_precision(dtype, layout):
    check_front((2, 4, 24, 5, 3), dtype, layout, 'CME, TIM')


@pytest.mark.parametrize('kind', KINDS)
def test_front_with_a_part_missing(kind, layout):
    check_front((2, 3, 10, 3, 2), torch.float32, layout, kind)


def test_front_with_half_precision_weights_and_wide_frames():
    from cmr_layers.ops import triton_front
    x, cme, taps = frames((1, 4, 16, 3, 3), torch.float32, torch.contiguous_format), weights(16), new(16, 1, 3)
    cme, taps = [w.half() for w in cme], taps.half()
    inputs = double(x, *cme, taps)
    y, *saved = triton_front.front(x, 4, *cme, taps)
    assert_close(y, want_front(inputs[0], 4, inputs[1:5], inputs[5]), 1e-6)
    gradients = triton_front.front_backward(torch.randn_like(x), x, 4, *cme, taps, *saved)
    assert [g.dtype for g in gradients] == [torch.float32] + [torch.float16] * 5


@pytest.mark.parametrize('num_frames', [17, 32, 33])
def test_gates_of_many_frames_and_of_reductions_that_differ(num_frames):
    from cmr_layers.ops import triton_front
    x, cme = frames((2, num_frames, 40, 2, 2), torch.float32, torch.channels_last), weights(40, c1=40, c2=33)
    want = reference.cme_gate(reference.clips(x.double(), num_frames), *double(*cme)).flatten(0, 1)
    pooled, _, _, gate = triton_front.gates(x, num_frames, *cme)
    assert_close(gate, want, 1e-6)
    assert_close(pooled, x.double().mean((2, 3)), 1e-6)


def test_gates_of_a_frame_that_one_program_can_not_pool():
    from cmr_layers.ops import triton_front
    for layout in LAYOUTS.values():
        x = frames((1, 2, 3, 27, 23), torch.float32, layout)
        assert_close(triton_front.gates(x, 2, *weights(3))[0], x.double().mean((2, 3)), 1e-6)


@pytest.mark.parametrize('value', [1e15, 1e30])
def test_keys_are_clamped_before_their_products_overflow(value):
    from cmr_layers.ops import triton_front
    x = frames((1, 4, 16, 2, 2), torch.float32, torch.contiguous_format, scale=value)
    cme = weights(16)
    _, _, k, gate = triton_front.gates(x, 4, *cme)
    assert k.abs().max() <= key_bound(5)
    torch.testing.assert_close(gate, reference.cme_gate(reference.clips(x, 4), *cme).flatten(0, 1))


CONVOLUTIONS = [((2, 4, 24, 3, 3), 10), ((1, 8, 40, 3, 7), 136), ((1, 2, 5, 9, 1), 3), ((1, 16, 33, 1, 1), 16)]


@pytest.mark.parametrize('shape, out_channels', CONVOLUTIONS, ids=str)
@pytest.mark.parametrize('bias, dtype', [
    (False, torch.float32), (True, torch.float32), (True, torch.float16), (True, torch.bfloat16)], ids=str)
def test_convolution_behind_gate_and_tim(shape, out_channels, bias, dtype):
    import triton.language as tl

    from cmr_layers.ops import triton_conv
    x, taps, gate = frames(shape, dtype, torch.channels_last), new(shape[2], 1, 3), new(shape[0] * shape[1], shape[2])
    weight, b = new(out_channels, shape[2], 1, 1, dtype=dtype), new(out_channels) if bias else None
    # the interpreter multiplies the bits of bfloat16s, not the numbers
    dot = tl.float32 if dtype is torch.bfloat16 and DEVICE == 'cpu' else None
    y = triton_conv.gated_conv(x, shape[1], gate, taps, weight, b, dot=dot)
    clips = reference.clips(x.double() * gate.double()[:, :, None, None], shape[1])
    want = F.conv2d(reference.tim(clips, taps.double()).flatten(0, 1), *double(weight, b))
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert_close(y, want, 2 * TOLERANCE[dtype])  # mixed frames and result are rounded


MOVING = [shape for shape in SHAPES if shape[1] > 1]


def motion_arguments(shape, dtype, layout):
    x = frames(shape, dtype, layout)
    with torch.no_grad():
        if x.shape[2] * x.shape[3] > 1:
            x[:, :, 0, 0] = 0                       # a pixel that is zero in all frames
            x[1, :, -1, -1] = x[0, :, -1, -1] * 2   # and one that only grows
    return x, new(shape[2], shape[2], 1, 1, dtype=dtype, scale=shape[2] ** -.5), new(shape[2], dtype=dtype)


@pytest.mark.parametrize('shape', MOVING, ids=str)
def test_similarity(shape, layout):
    from cmr_layers.ops import triton_sme
    x, *_ = motion_arguments(shape, torch.float32, layout)
    s, inverse_norm = triton_sme.similarity(x, shape[1])
    want = reference.similarity(reference.clips(x.double(), shape[1])).flatten(0, 1)
    torch.testing.assert_close(s.double(), want, rtol=0, atol=2e-6)
    norm = x.double().norm(dim=1)
    torch.testing.assert_close(
        inverse_norm.double(), torch.where(norm > 1e-12, 1 / norm, torch.ones_like(norm)), rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [(2, 4, 24, 3, 3), (2, 9, 6, 1, 2), (1, 2, 136, 5, 3)], ids=str)
def test_the_end_of_a_block_and_the_similarities_of_what_it_writes(shape, dtype, layout):
    from cmr_layers.ops import triton_sme
    x, shortcut = frames(shape, dtype, layout), frames(shape, dtype, layout)
    y, s, inverse_norm = triton_sme.rectified_sum(x, shortcut, shape[1])
    assert torch.equal(y, (x + shortcut).relu()) and y.stride() == x.stride()
    for got, want in zip((s, inverse_norm), triton_sme.similarity(y, shape[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_huge_sums_are_stored_as_they_are():
    from cmr_layers.ops import triton_sme
    x = frames((1, 3, 16, 2, 2), torch.float32, torch.channels_last, scale=1e30)
    y, s, _ = triton_sme.rectified_sum(x, x, 3)
    assert torch.equal(y, (x + x).relu())
    want = reference.similarity(reference.clips(y.double(), 3)).flatten(0, 1)
    torch.testing.assert_close(s.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('value', [1e-10, 1e15, 1e19, 1e30, 3e38])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_similarity_of_features_whose_squares_leave_float32(value, dtype):
    from cmr_layers.ops import triton_sme
    x = ((torch.rand(3, 64, 2, 2) * 2 - 1) * value).to(DEVICE, dtype)
    x[0, :, 0, 0] /= value  # huge beside ordinary
    s, inverse_norm = triton_sme.similarity(x, 3)
    want = reference.similarity(reference.clips(x.double(), 3)).flatten(0, 1)
    torch.testing.assert_close(s.double(), want, rtol=0, atol=1e-5)
    assert inverse_norm.isfinite().all()


def check_motion(shape, dtype, layout):
    from cmr_layers.ops import triton_sme
    x, weight, bias = motion_arguments(shape, dtype, layout)
    inputs = double(x, weight, bias)
    weighted = reference.motion(reference.clips(inputs[0], shape[1])).flatten(0, 1)
    want = F.conv2d(weighted, *inputs[1:])
    h, s, inverse_norm = triton_sme.motion_conv(x, shape[1], weight, bias)
    assert h.stride() == x.stride() and h.dtype == dtype
    assert_close(h, want, PRODUCT[dtype])

    mean, var, gamma, beta = (torch.rand(4, shape[2]) + .5).to(DEVICE)
    norms = (mean, var, gamma, beta), (mean, var, None, None), (mean, var, gamma, None), (mean, var, None, beta)
    for norm in (*norms, (None,) * 4):
        v = triton_sme.sme(x, shape[1], weight, bias, *norm, 1e-5)
        scaled = want if norm[0] is None else F.batch_norm(want, *(n if n is None else n.double() for n in norm))
        assert v.stride() == x.stride() and v.dtype == dtype
        assert_close(v, scaled + inputs[0], PRODUCT[dtype])

    gh = torch.randn_like(h)
    q = F.conv2d(gh.double(), weight.double().transpose(0, 1)).to(dtype).contiguous(memory_format=layout)
    gx, m = triton_sme.motion_gradient(q, x, shape[1], s, inverse_norm)
    assert gx.stride() == m.stride() == x.stride() and gx.dtype == m.dtype == dtype
    assert_close(m, weighted, TOLERANCE[dtype])
    # the zero pixel's derivative is the reference's choice; the kernel's is finite and has the same first term
    g_want, = torch.autograd.grad(weighted, inputs[0], q.double())
    assert_close(gx, g_want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize('shape', MOVING, ids=str)
def test_sme_and_its_derivatives(shape, layout):
    check_motion(shape, torch.float32, layout)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_sme_in_half_precision(dtype, layout, monkeypatch):
    if dtype is torch.bfloat16 and DEVICE == 'cpu':
        import triton.language as tl

        from cmr_layers.ops import triton_sme
        # the interpreter multiplies the bits of bfloat16s, not the numbers
        monkeypatch.setattr(triton_sme, '_product', partial(triton_sme._product, dot=tl.float32))
    check_motion((2, 4, 24, 3, 3), dtype, layout)


def test_sme_where_float32_must_not_become_tf32(monkeypatch):
    from cmr_layers.ops import triton_sme
    monkeypatch.setattr(triton_sme, '_product', None)  # a library multiplies
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        check_motion((2, 4, 24, 3, 3), torch.float32, torch.channels_last)
    finally:
        torch.backends.cudnn.allow_tf32 = before
