"""SME in every form: values, gradients, layouts and edges are the law's."""
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
    contiguous,
    frames,
)
from interpreter import DEVICE

from cmr_layers import ops
from cmr_layers.ops import blocks, plain_sme, products
from cmr_layers.ops import reference as law

pytestmark = [
    pytest.mark.pairwise,
    # numpy, under the interpreter, warns of what these tests provoke
    pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning'),
    pytest.mark.usefixtures('small_blocks', 'unwritten_shows')]

# clips, T, C, H, W: odd sizes; one pixel; one channel; more frames than a program of Triton's walks over; channels and
# pixels beyond a block of its
SHAPES = [
    (2, 2, 6, 1, 5), (1, 3, 5, 3, 7), (2, 5, 1, 3, 3), (1, 3, 5, 1, 1), (2, 9, 11, 1, 2), (1, 2, 136, 5, 3),
    (3, 8, 8, 7, 7), (1, 5, 40, 7, 5)]
NORMS = {'folded': 0, 'no affine': 2, 'affine': 4}


def given(shape, dtype, layout=contiguous, bias=True, weight_dtype=None, scale=1.):
    """Frames of a shape with the clips apart, frames of a clip, weight and bias."""
    n, t, c, *size = shape
    x = frames(n * t, c, *size, dtype=dtype, layout=layout, device=DEVICE, scale=scale)
    kw = {'dtype': weight_dtype or dtype, 'device': DEVICE}
    return x, t, frames(c, c, 1, 1, scale=c ** -.5, **kw), frames(c, **kw) if bias else None


def norm(channels, dtype=F32, given=4):
    values = torch.randn(channels), torch.rand(channels) + .5, *torch.randn(2, channels)
    values = [v.to(DEVICE, dtype) for v in values]
    return ops.Norm(*values[:given], *[None] * (4 - given), 1e-3)


def exactly(x, num_frames, weight, bias, residual=False, norm=None):
    """The law, in the dtype of what it is given."""
    h = F.conv2d(law.motion(law.clips(x, num_frames)).flatten(0, 1), weight, bias)
    if norm is not None:
        h = F.batch_norm(h, *norm[:4], eps=norm.eps)
    return x + h if residual else h


def compute(form, x, num_frames, weight, bias, residual=False):
    """Frames, and what the operator leaves for its backward pass."""
    if form == 'reference':
        if residual:
            return (ops.sme(x, num_frames, weight, bias, None),)
        return (ops.motion_conv(x, num_frames, weight, bias),)
    return torch.ops.cmr_layers.motion_conv(x, num_frames, weight, bias, residual, triton=form == 'triton')


def double(args):
    return [v.detach().double().requires_grad_() if isinstance(v, torch.Tensor) else v for v in args]


def check(form, args, residual=False, g=None, times=1.):
    """Values and gradients are those of the law in float64, nothing that is given is written to, and nothing shared."""
    args = [v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for v in args]
    exact = double(args)
    x, t, *_ = args
    inputs = [v for v in args if isinstance(v, torch.Tensor)]
    before = [v.detach().clone() for v in inputs]
    y, *maps = compute(form, *args, residual)
    want = exactly(*exact, residual)
    if form != 'reference':     # which promises values
        assert_like(y, x)
    assert_near(y, want, times=times)
    gradients = torch.autograd.grad(y, inputs, g := torch.randn_like(y) if g is None else g)
    wanted = torch.autograd.grad(want, [v for v in exact if isinstance(v, torch.Tensor)], g.double())
    if form != 'reference':
        assert_like(gradients[0], x)
    for v, got, grad in zip(inputs, gradients, wanted, strict=True):
        assert got.dtype == v.dtype
        # the gradient of the bias is summed in float32
        summed = F32 if v is args[3] and v.dtype == F64 else v.dtype
        assert_near(got, grad, dtype=max(x.dtype, summed, key=TOLERANCE.get), times=times)
    assert all(torch.equal(v, w) for v, w in zip(inputs, before, strict=True))
    if form != 'reference':
        check_maps(maps, x, t)
        memory = [v.untyped_storage().data_ptr() for v in (y, *maps, *gradients) if v.numel()]
        assert len({*memory}) == len(memory) and not {*memory} & {v.untyped_storage().data_ptr() for v in inputs}


def check_maps(maps, x, num_frames):
    """Similarities and inverse norms, whose precision is float32 at least; the inverse norm of a zero pixel is 1."""
    x = x.detach().double()
    s, inverse_norm = maps
    assert s.dtype == inverse_norm.dtype and s.dtype in (F64, F32)
    assert_near(s, law.similarity(law.clips(x, num_frames)).flatten(0, 1), unit=1.)
    if num_frames > 1:
        size = x.norm(dim=1)
        assert_near(inverse_norm, torch.where(size > 1e-12, 1 / size, torch.ones_like(size)))


@pytest.mark.parametrize('form, dtype, shape', [
    pytest.param(form, dtype, shape, marks=pytest.mark.slow if form == 'triton' and shape == (3, 8, 8, 7, 7) else ())
    for form, dtype in PRECISE for shape in SHAPES], indirect=['form'], ids=str)
def test_values_and_gradients_are_the_laws(form, dtype, shape, layout):
    check(form, given(shape, dtype, layout))
    if form == 'plain':
        check(form, given(shape, dtype, layout, bias=False))


@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
@pytest.mark.parametrize('bias', [False, True])
def test_the_residual_has_its_gradient(form, bias, layout):
    # what ops.sme computes where the norm is folded
    for shape in [(2, 3, 6, 3, 2), (1, 9, 5, 1, 2)]:
        args = [
            v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in given(shape, F32, layout, bias)]
        exact = double(args)
        inputs, wanted = ([v for v in values if isinstance(v, torch.Tensor)] for values in (args, exact))
        y, want = ops.sme(*args, None), exactly(*exact, residual=True)
        assert_like(y, args[0])
        assert_near(y, want)
        g = torch.randn_like(y)
        for got, grad in zip(
                torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, wanted, g.double()), strict=True):
            assert_near(got, grad)
    if form == 'plain':
        check(form, given((2, 3, 6, 3, 2), F64, layout, bias), residual=True)


@pytest.mark.parametrize('form, dtype', ALL, indirect=['form'], ids=str)
@pytest.mark.parametrize('t', [2, 8])
def test_every_precision_is_within_rounding_of_float64(form, dtype, t, layout):
    for residual in (True,) if form == 'triton' else (False, True):
        check(form, given((1 if form == 'triton' else 2, t, 12, 5, 3), dtype, layout), residual)


@pytest.mark.parametrize('dtype', [F32, *HALF], ids=str)
@pytest.mark.parametrize('native', [False, True])
def test_a_cpu_multiplies_in_what_it_has_instructions_for(dtype, native, layout, monkeypatch):
    monkeypatch.setattr(plain_sme, 'product_dtype', lambda x: dtype if native else F32)
    for weight_dtype in (dtype, F32):
        check('plain', given((2, 4, 12, 5, 3), dtype, layout, weight_dtype=weight_dtype))


@pytest.mark.parametrize('dtype, weight_dtype', [(torch.float16, F32), (torch.bfloat16, F32)], ids=str)
def test_weights_of_another_precision(form, dtype, weight_dtype, layout):
    # as under autocast
    check(form, given((2, 4, 12, 5, 3), dtype, layout, weight_dtype=weight_dtype))


@pytest.mark.parametrize('form, dtype', ALL, indirect=['form'], ids=str)
@pytest.mark.parametrize('number', NORMS.values(), ids=NORMS)
def test_a_norm_with_its_statistics(form, dtype, number, layout):
    for shape in SHAPES if form == 'plain' else SHAPES[:1]:
        x, t, weight, bias = given(shape, dtype, layout)
        for b in (bias, None):
            given_norm = norm(shape[2], dtype, number) if number else None
            with torch.no_grad():
                y = ops.sme(x, t, weight, b, given_norm)
            exact = None if given_norm is None else ops.Norm(*(
                v.double() if isinstance(v, torch.Tensor) else v for v in given_norm))
            assert_like(y, x)
            # the reference rounds what it normalises; the operators fold the norm in float32
            assert_near(y, exactly(*double((x, t, weight, b)), residual=True, norm=exact), times=3)


def test_a_norm_in_float32_with_half_precision_frames(form, layout):
    # as under autocast
    x, t, weight, bias = given((2, 3, 8, 3, 3), torch.bfloat16, layout, weight_dtype=F32)
    given_norm = norm(8)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = ops.sme(x, t, weight, bias, given_norm)
    assert_like(y, x)
    exact = ops.Norm(*(v.double() if isinstance(v, torch.Tensor) else v for v in given_norm))
    assert_near(y, exactly(*double((x, t, weight, bias)), residual=True, norm=exact))


def test_gradients_come_in_any_layout(form, layout):
    args = given((2, 3, 5, 3, 4), F64 if form == 'plain' else F32, layout)
    g, wide = torch.randn_like(args[0]), args[0].new_empty(6, 5, 4, 3).normal_()
    others = (g.contiguous(memory_format=other) for other in LAYOUTS.values())
    for gradient in (*others, g[:, :1].expand_as(g), wide.transpose(2, 3)):
        check(form, args, g=gradient)
        if form == 'plain':
            check(form, args, True, g=gradient)


@pytest.mark.parametrize('dtype', [pytest.param(F64, marks=pytest.mark.slow), F32, torch.bfloat16], ids=str)
def test_blocks_of_the_size_that_is_used(dtype, layout, monkeypatch):
    monkeypatch.undo()
    args = given((2, 8, 84, 40, 44), dtype, layout, bias=False)
    assert args[0].numel() > 2 * blocks._SIZE and args[0].numel() > products._SIZE
    check('plain', args)


def test_an_empty_batch_gives_empty_frames_and_zero_gradients(layout):
    # through the operator: the layers leave an empty batch to the reference
    x, t, weight, _ = given((0, 4, 6, 3, 2), F64, layout)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for residual in (False, True):
        y, *maps = compute('plain', x, t, weight, None, residual)
        assert y.shape == x.shape and all(v.shape == (0, 3, 2) for v in maps)
        for v, g in zip((x, weight), torch.autograd.grad(y, (x, weight), torch.zeros_like(y)), strict=True):
            assert torch.equal(g, torch.zeros_like(v))


@pytest.mark.parametrize('form, dtype', [*PRECISE, *ALL], indirect=['form'], ids=str)
def test_zero_pixels_have_similarity_zero_and_the_laws_gradients(form, dtype, layout):
    x, t, weight, _ = given((2, 4, 5, 2, 2), dtype, layout, bias=False)
    x[:, :, 0, 0] = 0                       # in every frame
    x[1, :, 0, 1] = 0                       # in one
    x[1, :, 1, 1] = x[0, :, 1, 1] * 2       # and one that only grows
    check(form, (x, t, weight, None))
    if form != 'reference':
        s = compute(form, x, t, weight, None)[1]
        assert not s[:, 0, 0].any() and not s[:2, 0, 1].any() and s[2:, 0, 1].all() and s[:, 1].all()
    # what the neighbour's similarity says
    x = x.detach().double().requires_grad_()
    gx, = torch.autograd.grad(exactly(x, t, weight.double(), None).sum(), x)
    assert gx[1, :, 0, 1].abs().min() > 0


@pytest.mark.parametrize('form', ['plain', 'triton'], indirect=True)
@pytest.mark.parametrize('scale', [1e-9, 1e-13, 1e-18, 1e-38])
def test_tiny_features_have_the_laws_gradients(form, scale, layout):
    x, t, weight, _ = given((1, 3, 4, 2, 2), F32, layout, bias=False, scale=scale)
    check(form, (x, t, weight, None))


HUGE = [
    (torch.float16, 3e4), (torch.bfloat16, 1e15), (torch.bfloat16, 1e30), (F32, 1e15), (F32, 1e19), (F32, 1e30),
    (F32, 3e38)]


@pytest.mark.parametrize('form, dtype, value', [
    *(('plain', F64, value) for value in (1e30, 1e200)),
    *(('plain', *case) for case in HUGE if case[1] < 1e38),
    *(pytest.param('triton', *case, marks=pytest.mark.slow if case[1] == 1e19 else ())
      for case in HUGE if case[1] != 1e15)],
    indirect=['form'], ids=str)
def test_huge_features_are_exact(form, dtype, value, layout):
    # in one pixel of one frame, all of a pixel, and everywhere
    some = torch.rand(6, 6, 2, 3, dtype=F64) * 2 - 1
    pixel, always = (1, slice(None), 0, 1), (slice(None), slice(None), 1, 2)
    for where in (pixel, ...) if form == 'triton' else (pixel, always, ...):
        x = some.clone()
        x[where] *= value
        x = x.to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
        weight = frames(6, 6, 1, 1, dtype=dtype, device=DEVICE, scale=1 / 16)
        g = torch.randn_like(x) / 16
        # a cosine does not depend on the scale
        small = x.detach().double() / x.detach().double().abs().amax(1, keepdim=True)
        h, s, inverse_norm = compute(form, x, 3, weight, None)
        assert inverse_norm.isfinite().all()
        assert_near(s, law.similarity(law.clips(small, 3)).flatten(0, 1), unit=1.)
        if value > 1e38:    # its products overflow in float32
            continue
        gx, = torch.autograd.grad(h, x, g)
        x = x.detach().double().requires_grad_()
        want = exactly(x, 3, weight.double(), None)
        g_want, = torch.autograd.grad(want, x, g.double())
        assert g_want.isfinite().all()
        for got, expected in ((h, want), (gx, g_want)):
            assert got.isfinite().all()
            # pixel by pixel: beside one of 1e30 all others would be near anything
            size = expected.detach().abs().amax(1, keepdim=True)
            assert_near(got.double() / size, expected / size, dtype, times=8)


@pytest.mark.parametrize('form, dtype', [*PRECISE, *ALL], indirect=['form'], ids=str)
def test_static_clips_hardly_move(form, dtype, layout):
    x, t, weight, bias = given((1, 4, 6, 3, 2), dtype, layout)
    x = x[:1].repeat(4, 1, 1, 1).contiguous(memory_format=layout)
    x, weight, bias = (v.requires_grad_() for v in (x, weight, bias))
    h, *maps = compute(form, x, t, weight, bias)
    eps = torch.finfo(torch.promote_types(dtype, F32)).eps
    if maps:
        torch.testing.assert_close(maps[0], torch.ones_like(maps[0]), rtol=0, atol=8 * eps)
    assert_near(h, bias[:, None, None].expand_as(h))
    # between equal frames the cosine is at its maximum, so nothing is left of its gradient either
    for g in torch.autograd.grad(h, (x, weight), torch.randn_like(h)):
        assert_near(g, torch.zeros_like(g), times=20)


def test_a_still_is_its_bias_and_has_no_gradient(layout):
    # through the operator: the layers leave a still to the reference
    x, t, weight, bias = given((3, 1, 5, 2, 2), F64, layout)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    h, s, _ = compute('plain', x, t, weight, bias)
    assert torch.equal(s, torch.ones_like(s))
    assert torch.equal(h, bias[:, None, None].expand_as(h))
    assert not any(g.any() for g in torch.autograd.grad(h, (x, weight), torch.randn_like(h)))


@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
def test_the_function_that_layers_call_is_the_law(form, layout):
    for bias, grad in itertools.product((False, True), repeat=2):
        args = given((2, 3, 6, 3, 2), F32, layout, bias)
        with torch.set_grad_enabled(grad):
            assert_near(ops.motion_conv(*args), exactly(*double(args)))


@pytest.mark.parametrize('bias, residual', [
    (True, False), (False, True), *(pytest.param(same, same, marks=pytest.mark.slow) for same in (False, True))])
def test_other_processors_than_intels_multiply_by_convolutions(bias, residual, layout, monkeypatch):
    monkeypatch.setattr(products, '_is_intel', lambda: False)
    threads, calls = torch.get_num_threads(), []
    monkeypatch.setattr(F, 'conv2d', lambda *args, f=F.conv2d: calls.append(args) or f(*args))
    torch.set_num_threads(2)
    try:
        compute('plain', *given(SHAPES[0], F32, layout, bias), residual)
        assert bool(calls) == (layout == torch.channels_last)
        for shape in SHAPES:
            check('plain', given(shape, F32, layout, bias), residual, times=2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('frames_of_a_clip', [2, 9, 10, 20])
def test_similarities_stay_in_float32_where_matrix_products_do_not(frames_of_a_clip, layout):
    x, t, *_ = given((2, frames_of_a_clip, 24, 5, 3), F32, layout)
    want = law.similarity(law.clips(x.double(), t)).flatten(0, 1)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        for precision in ('ieee', 'bf16'):
            matmul.fp32_precision = precision
            assert products.is_exact() == (precision == 'ieee')
            assert_near(plain_sme.similarity(x, t)[0], want, unit=1.)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize('form, dtype', [case for case in ALL if case[0] == 'plain'], indirect=['form'], ids=str)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_what_is_not_finite_is_so_where_it_is_in_the_law(form, dtype, value, layout):
    x, t, weight, bias = given((2, 4, 6, 3, 3), dtype, layout)
    x[1, 2, 0, 1] = value
    with torch.no_grad():
        y = compute(form, x, t, weight, bias, True)[0]
        want = exactly(x.double(), t, weight.double(), bias.double(), True)
    assert torch.equal(y.isfinite(), want.isfinite()) and not y.isfinite().all()
