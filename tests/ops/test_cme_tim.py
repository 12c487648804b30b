"""CME, TIM and the convolution behind them, in every form: values, gradients, layouts and edges are the law's."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL,
    F32,
    F64,
    HALF,
    LAYOUTS,
    PRECISE,
    TOLERANCE,
    assert_like,
    assert_near,
    cme_tim_weights,
    contiguous,
    frames,
)
from interpreter import DEVICE

from cmr_layers import ops
from cmr_layers.ops import blocks, plain_cme_tim
from cmr_layers.ops import reference as law

pytestmark = [
    pytest.mark.pairwise,
    # numpy, under the interpreter, warns of what these tests provoke
    pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning'),
    pytest.mark.usefixtures('small_blocks', 'unwritten_shows')]

# clips, T, C, H, W: one frame; odd sizes; one pixel; one channel; more frames than a program of Triton's walks over;
# channels and pixels beyond a block of its
SHAPES = [
    (1, 1, 6, 5, 3), (2, 1, 16, 3, 5), (2, 2, 6, 1, 5), (1, 3, 5, 3, 7), (2, 5, 1, 3, 3), (1, 3, 5, 1, 1),
    (2, 9, 11, 1, 2), (1, 2, 136, 5, 3), (3, 8, 8, 7, 7), (1, 5, 40, 7, 5)]
PARTS = {
    'CME + TIM': {}, 'CME + TIM, b3': {'b3': True}, 'CME': {'kernel_size': None},
    'CME, b3': {'kernel_size': None, 'b3': True, 'c2': 4}, 'TIM': {'c1': None},
    'CME + TIM of 1 tap': {'kernel_size': 1}, 'TIM of 1 tap': {'c1': None, 'kernel_size': 1},
    'CME + TIM of 5 taps': {'kernel_size': 5, 'c1': 1}, 'TIM of 5 taps': {'c1': None, 'kernel_size': 5}}
CONVOLUTIONS = {    # weight, then bias, stride, padding, dilation and groups, of 6 channels
    '1x1': ((4, 6, 1, 1), True, [1, 1], [0, 0], [1, 1], 1),
    '1x1, no bias': ((20, 6, 1, 1), False, [1, 1], [0, 0], [1, 1], 1),
    '3x3': ((4, 3, 3, 3), False, [2, 2], [1, 1], [1, 1], 2),
    '3x3, dilated': ((4, 6, 3, 3), True, [1, 1], [2, 2], [2, 2], 1)}


def convolution(kind, dtype=F32):
    shape, bias, *rest = CONVOLUTIONS[kind]
    kw = {'dtype': dtype, 'device': DEVICE}
    return ops.Convolution(frames(*shape, scale=.5, **kw), frames(shape[0], **kw) if bias else None, *rest)


def given(shape, dtype, layout=contiguous, conv=None, weight_dtype=None, scale=1., **kwargs):
    """Frames of a shape with the clips apart, frames of a clip, weights of CME, taps, and a convolution."""
    n, t, *size = shape
    x = frames(n * t, *size, dtype=dtype, layout=layout, device=DEVICE, scale=scale)
    cme, taps = cme_tim_weights(size[0], dtype=weight_dtype or dtype, device=DEVICE, **kwargs)
    return x, t, cme, taps, ops.Convolution() if conv is None else convolution(conv, weight_dtype or dtype)


def exactly(x, num_frames, cme, taps, conv):
    """The law, in the dtype of what it is given."""
    clips = law.clips(x, num_frames)
    if cme.w1 is not None:
        clips = law.cme(clips, *cme)
    if taps is not None:
        clips = law.tim(clips, taps)
    x = clips.reshape(x.shape)
    return x if conv.weight is None else F.conv2d(x, *conv)


def compute(form, x, num_frames, cme, taps, conv):
    """Frames, and what the operator leaves for its backward pass."""
    if form == 'reference':
        return (ops.cme_tim(x, num_frames, cme, taps, conv),)
    return torch.ops.cmr_layers.cme_tim(x, num_frames, *cme, taps, *conv, triton=form == 'triton')


def tensors(x, num_frames, cme, taps, conv):
    return [x, *cme, taps, conv.weight, conv.bias]


def replaced(args, function):
    """The arguments with a function of each tensor in its place."""
    _, t, _, _, conv = args
    x, w1, w2, w3, b3, taps, weight, bias = (None if v is None else function(v) for v in tensors(*args))
    return x, t, ops.CMEWeights(w1, w2, w3, b3), taps, conv._replace(weight=weight, bias=bias)


def check(form, args, g=None, times=1.):
    """Values and gradients are those of the law in float64, nothing that is given is written to, and nothing shared."""
    args = replaced(args, lambda v: v.detach().requires_grad_())
    exact = replaced(args, lambda v: v.detach().double().requires_grad_())
    x, t, cme, _, conv = args
    before = [v.detach().clone() for v in tensors(*args) if v is not None]
    y, *vectors = compute(form, *args)
    want = exactly(*exact)
    assert_near(y, want, times=times)
    if conv.weight is None and form != 'reference':
        assert_like(y, x)
    g = torch.randn_like(y) if g is None else g
    gradients = torch.autograd.grad(y, [v for v in tensors(*args) if v is not None], g)
    wanted = torch.autograd.grad(want, [v for v in tensors(*exact) if v is not None], g.double())
    if form != 'reference':
        assert_like(gradients[0], x)
    for v, got, grad in zip([v for v in tensors(*args) if v is not None], gradients, wanted, strict=True):
        assert got.dtype == v.dtype
        if v is cme.w2 and t == 1:      # a still attends to itself, whatever its key is
            assert_near(got, torch.zeros_like(got))
        else:
            # the gradient of a bias is summed in float32
            summed = F32 if v is conv.bias and v.dtype == F64 else v.dtype
            # the keys' gradient is what is left of terms as large as the values', and those were rounded
            unit = max(g.abs().max().item() for g in wanted[1:3]) or None if v is cme.w2 else None
            assert_near(got, grad, dtype=max(x.dtype, summed, key=TOLERANCE.get), times=times, unit=unit)
    inputs = [v for v in tensors(*args) if v is not None]
    assert all(torch.equal(v, w) for v, w in zip(inputs, before, strict=True))
    if form != 'reference':
        check_vectors(vectors, exact)
        memory = [v.untyped_storage().data_ptr() for v in (y, *vectors, *gradients) if v.numel()]
        assert len({*memory}) == len(memory) and not {*memory} & {v.untyped_storage().data_ptr() for v in inputs}


def check_vectors(vectors, exact):
    """Pooled vectors, z, k and gates, whose precision is float32 at least."""
    x, t, (w1, w2, w3, b3), *_ = replaced(exact, torch.Tensor.detach)
    if w1 is None:
        assert all(v.shape == (0,) for v in vectors)
        return
    pooled = x.mean((2, 3))
    gate = law.cme_gate(law.clips(x, t), w1, w2, w3, b3).flatten(0, 1)
    for got, want in zip(vectors, (pooled, pooled @ w1.t(), pooled @ w2.t(), gate), strict=True):
        assert_near(got, want)


@pytest.mark.parametrize('form, dtype, shape', [
    pytest.param(form, dtype, shape, marks=pytest.mark.slow if form == 'triton' and shape == (3, 8, 8, 7, 7) else ())
    for form, dtype in PRECISE for shape in SHAPES], indirect=['form'], ids=str)
def test_values_and_gradients_are_the_laws(form, dtype, shape, layout):
    check(form, given(shape, dtype, layout, b3=True))


@pytest.mark.parametrize('parts', PARTS)
@pytest.mark.parametrize('form, dtype', PRECISE, indirect=['form'], ids=str)
def test_either_may_be_missing(form, dtype, parts, layout):
    if form == 'triton' and 'of 5 taps' in parts:
        pytest.skip('the kernels know 1 and 3')
    for shape in SHAPES if form == 'plain' else [(2, 3, 10, 3, 2)]:
        check(form, given(shape, dtype, layout, **PARTS[parts]))


@pytest.mark.parametrize('conv', CONVOLUTIONS)
@pytest.mark.parametrize('form, dtype', PRECISE, indirect=['form'], ids=str)
def test_a_convolution_behind(form, dtype, conv, layout):
    check(form, given((2, 3, 6, 5, 4), dtype, layout, conv))
    check(form, given((2, 3, 6, 5, 4), dtype, layout, conv, c1=None))


@pytest.mark.parametrize('form, dtype', ALL, indirect=['form'], ids=str)
@pytest.mark.parametrize('t', [1, 2, 8])
def test_every_precision_is_within_rounding_of_float64(form, dtype, t, layout):
    check(form, given((1 if form == 'triton' else 2, t, 12, 5, 3), dtype, layout, b3=True))


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('shape', [(2, 4, 6, 3, 3), (1, 8, 6, 3, 7), (1, 2, 6, 9, 1), (1, 16, 6, 1, 1)], ids=str)
def test_a_convolution_behind_in_half_precision(form, dtype, shape, layout):
    # in Triton, channels_last: the one kernel that takes in the convolution, too. Mixed frames and result are rounded.
    check(form, given(shape, dtype, layout, '1x1', b3=True), times=2)


@pytest.mark.parametrize(
    'dtype, weight_dtype', [(torch.float16, F32), (torch.bfloat16, F32), (F32, torch.float16)], ids=str)
def test_weights_of_another_precision(form, dtype, weight_dtype, layout):
    # as under autocast
    for t in (1, 4):
        check(form, given((2, t, 12, 5, 3), dtype, layout, b3=True, weight_dtype=weight_dtype))


def test_gradients_come_in_any_layout(form, layout):
    dtype = F64 if form == 'plain' else F32
    for conv in ('1x1',) if form == 'triton' else (None, '1x1'):
        args = given((2, 3, 6, 3, 4), dtype, layout, conv)
        shape = compute(form, *args)[0].shape
        g, wide = torch.randn(shape, dtype=dtype, device=DEVICE), torch.randn(
            *shape[:2], shape[3], shape[2], dtype=dtype, device=DEVICE)
        others = (g.contiguous(memory_format=other) for other in LAYOUTS.values())
        for gradient in (*others, g[:, :1].expand_as(g), wide.transpose(2, 3)):
            check(form, args, gradient)


@pytest.mark.parametrize('dtype', [F64, F32, torch.bfloat16], ids=str)
def test_blocks_of_the_size_that_is_used(dtype, layout, monkeypatch):
    monkeypatch.undo()
    args = given((2, 8, 40, 40, 44), dtype, layout)
    assert args[0].numel() > 2 * blocks._SIZE
    check('plain', args)


@pytest.mark.parametrize('num_frames', [17, 32, 33])
def test_gates_of_many_frames_and_of_reductions_that_differ(form, num_frames):
    args = given((2, num_frames, 40, 2, 2), F32, torch.channels_last, c1=40, c2=33, b3=True, kernel_size=None)
    _, *vectors = compute(form, *args)
    check_vectors(vectors, replaced(args, torch.Tensor.double))


def test_a_frame_that_one_program_can_not_pool(form, layout):
    args = given((1, 2, 3, 27, 23), F32, layout, kernel_size=None)
    _, *vectors = compute(form, *args)
    check_vectors(vectors, replaced(args, torch.Tensor.double))


@pytest.mark.parametrize('value', [1e15, 1e30])
def test_keys_are_clamped_before_their_products_overflow(form, value, layout):
    args = given((1, 4, 32, 2, 2), F32, layout, c1=4, c2=4, kernel_size=None, scale=value)
    x, t, cme, *_ = args = replaced(args, torch.Tensor.requires_grad_)
    y, _, _, k, gate = compute(form, *args)
    bound = plain_cme_tim.key_bound(4)
    assert k.abs().max() <= bound and y.isfinite().all()
    assert_near(gate, law.cme_gate(law.clips(x, t), *cme).flatten(0, 1))
    g, g_key = torch.autograd.grad(y, [x, cme.w2], torch.randn_like(y))
    assert g.isfinite().all()
    if value == 1e30:
        assert not g_key.any()      # clamped keys have no gradient


def test_an_empty_batch_gives_empty_frames_and_zero_gradients(layout):
    # through the operator: the layers leave an empty batch to the reference
    for conv in (None, '1x1'):
        args = replaced(given((0, 4, 6, 3, 2), F64, layout, conv, b3=True), torch.Tensor.requires_grad_)
        y, *vectors = compute('plain', *args)
        assert y.shape == (0, 6 if conv is None else 4, 3, 2)
        assert [v.shape for v in vectors] == [(0, 6), (0, 3), (0, 2), (0, 6)]
        inputs = [v for v in tensors(*args) if v is not None]
        for v, g in zip(inputs, torch.autograd.grad(y, inputs, torch.zeros_like(y)), strict=True):
            assert torch.equal(g, torch.zeros_like(v))


@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
@pytest.mark.parametrize('with_conv', [False, True])
def test_the_function_that_layers_call_is_the_law(form, with_conv, layout):
    for parts, grad in itertools.product(('CME + TIM, b3', 'CME', 'TIM'), (False, True)):
        args = given((2, 3, 6, 3, 2), F32, layout, '3x3' if with_conv else None, **PARTS[parts])
        with torch.set_grad_enabled(grad):
            y = ops.cme_tim(*args)
        assert_near(y, exactly(*replaced(args, torch.Tensor.double)))


@pytest.mark.parametrize('gated', [0, 1 << 22], ids=['by blocks', 'as a whole'])
@pytest.mark.parametrize('form, dtype', [case for case in ALL if case[0] == 'plain'], indirect=['form'], ids=str)
def test_gated_clips_are_made_by_blocks_or_as_a_whole(form, dtype, gated, layout, monkeypatch):
    monkeypatch.setattr(plain_cme_tim, 'GATED', gated)
    for parts in ('CME + TIM, b3', 'TIM', 'CME + TIM of 5 taps'):
        check(form, given((2, 4, 12, 5, 3), dtype, layout, **PARTS[parts]))


@pytest.mark.parametrize('form, dtype', [case for case in ALL if case[0] == 'plain'], indirect=['form'], ids=str)
@pytest.mark.parametrize('parts', ['CME + TIM, b3', 'TIM'])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_what_is_not_finite_is_so_where_it_is_in_the_law(form, dtype, value, parts, layout):
    x, t, cme, taps, conv = given((2, 4, 6, 3, 3), dtype, layout, **PARTS[parts])
    x[1, 2, 0, 1] = value
    with torch.no_grad():
        y = compute(form, x, t, cme, taps, conv)[0]
        want = exactly(*replaced((x, t, cme, taps, conv), torch.Tensor.double))
    assert torch.equal(y.isfinite(), want.isfinite()) and not y.isfinite().all()
