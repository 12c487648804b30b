"""The end of a block: the sum is that of the plain modules, and what is known of it is what the law computes of it."""
import pytest
import torch
from helpers import F32, HALF, LAYOUTS, assert_like, assert_near, cme_tim_weights, frames
from interpreter import DEVICE, interpreted
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cmr_layers import ops
from cmr_layers.ops import reference as law
from cmr_layers.ops import use_path
from cmr_layers.ops.block_end import splits

pytest.importorskip('triton')
pytestmark = [
    pytest.mark.pairwise,
    # numpy, under the interpreter, warns of what these tests provoke
    pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning'),
    pytest.mark.usefixtures('unwritten_shows')]

# clips, T, C, H, W: stills; odd sizes; one pixel; one channel; more frames than a program walks over; several shares of
# the mean; channels and pixels beyond a block of the kernels'; frames cut among programs, with a rest; many channels
SHAPES = [
    (2, 1, 6, 5, 3), (2, 2, 6, 1, 5), (1, 3, 5, 3, 7), (2, 5, 1, 3, 3), (1, 3, 5, 1, 1), (2, 9, 11, 1, 2),
    (1, 2, 136, 5, 3), (3, 8, 8, 7, 7), (1, 2, 3, 27, 23), (1, 17, 8, 2, 2), (1, 2, 4100, 2, 1)]
NAMES = torch.ops.cmr_layers


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted():
        yield


def given(shape, dtype=F32, layout=torch.contiguous_format, scale=1.):
    n, t, *size = shape
    kw = {'dtype': dtype, 'layout': layout, 'device': DEVICE, 'scale': scale}
    return frames(n * t, *size, **kw), frames(n * t, *size, **kw), t


def modules(x, shortcut):
    """What the modules compute: the sum is rounded, then rectified."""
    return torch.relu(x + shortcut)


def check(x, shortcut, num_frames, motion):
    before = x.clone(), shortcut.clone()
    y, known = NAMES.block_end(x, shortcut, num_frames, motion)
    # the interpreter cuts bfloat16 off, where a GPU and PyTorch round
    if DEVICE == 'cpu' and x.dtype == torch.bfloat16:
        assert_near(y, torch.relu(x.double() + shortcut.double()))
    else:
        torch.testing.assert_close(y, modules(x, shortcut), rtol=0, atol=0, equal_nan=True)
    assert_like(y, x)
    assert torch.equal(before[0], x) and torch.equal(before[1], shortcut)
    assert known.dtype == F32 and known.is_contiguous()
    if motion:
        assert_near(known, law.similarity(law.clips(y.double(), num_frames)).flatten(0, 1), unit=1.)
    else:
        assert known.shape == (splits(x[0, 0].numel()), *x.shape[:2])
        assert_near(known.double().sum(0), y.double().mean((2, 3)), dtype=F32)


@pytest.mark.parametrize('motion', [False, True])
@pytest.mark.parametrize('shape, dtype', [
    *((shape, F32) for shape in SHAPES), *((shape, dtype) for shape in SHAPES[2:9:3] for dtype in HALF)], ids=str)
def test_both_kernels_are_the_law(shape, dtype, motion, layout):
    if motion and shape[1] == 1:
        pytest.skip('a still has no motion')
    check(*given(shape, dtype, layout), motion)


def test_shares_of_the_mean():
    # 8 at most, none of them empty, for the pixels of a ResNet and those of a shape above
    assert [splits(size ** 2) for size in (1, 7, 8, 14, 28, 56, 400)] == [1, 1, 1, 1, 3, 7, 8] and splits(27 * 23) == 2


@pytest.mark.parametrize('motion', [False, True])
@pytest.mark.parametrize('programs', [1, 4, 10**6])
def test_a_clip_cut_among_programs(programs, motion, monkeypatch):
    from cmr_layers.ops import triton_block_end
    monkeypatch.setattr(triton_block_end, '_PROGRAMS', programs)
    for t in (2, 3, 5, 8, 9):
        check(*given((2, t, 12, 3, 1), F32, torch.channels_last), motion)


@pytest.mark.parametrize('motion', [False, True])
@pytest.mark.parametrize('dtype', [F32, *HALF], ids=str)
def test_nan_stays_nan_and_infinity_infinite(dtype, motion, layout):
    inf, nan, most = float('inf'), float('nan'), torch.finfo(dtype).max
    # u + v: NaN from either side, from both infinities, and beyond the largest number
    pairs = [(nan, 1.), (1., nan), (inf, -inf), (inf, 1.), (-inf, 1.), (most, most), (-most, -most), (nan, -inf)]
    x, shortcut, t = given((2, 2, 6, 3, 3), dtype, layout)
    for i, (u, v) in enumerate(pairs):
        x[0, i % 6, i // 3, i % 3], shortcut[0, i % 6, i // 3, i % 3] = u, v
    y, known = NAMES.block_end(x, shortcut, t, motion)
    want = modules(x, shortcut)
    assert want.isnan().any() and want.isinf().any()
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        assert torch.equal(y.isnan(), want.isnan())
    else:
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    if motion:
        exact = law.similarity(law.clips(y, t)).flatten(0, 1)
        assert exact[:2].isnan().any() and not exact[2:].isnan().any()
        assert torch.equal(known.isnan(), exact.isnan())
    else:
        means, exact = known.sum(0), y.mean((2, 3), dtype=F32)
        assert torch.equal(means.isnan(), exact.isnan()) and torch.equal(means.isinf(), exact.isinf())
    assert not known[..., 2:, :, :].isnan().any() if motion else not known[:, 2:].isnan().any()


@pytest.mark.parametrize('dtype, value', [
    (torch.float16, 2e4), (torch.bfloat16, 1e15), (torch.bfloat16, 1e30), (F32, 1e15), (F32, 1e30), (F32, 1e38)],
    ids=str)
def test_huge_features_have_the_laws_similarity(dtype, value, layout):
    for where in ((1, slice(None), 0, 1), ...):
        x, shortcut, t = given((1, 3, 6, 2, 3), layout=layout)
        for branch in (x, shortcut):
            branch.clamp_(-1, 1)[where] *= value
        check(x.to(dtype), shortcut.to(dtype), t, True)


@pytest.mark.parametrize('scale', [1e-9, 1e-13, 1e-18, 1e-38])
def test_tiny_features_have_the_laws_similarity(scale, layout):
    x, shortcut, t = given((1, 3, 4, 2, 2), F32, layout, scale=scale)
    check(x, shortcut, t, True)
    check(-x.abs(), -shortcut.abs(), t, True)   # all zero


@pytest.mark.parametrize('motion', [False, True])
def test_branches_in_other_layouts(motion, layout):
    for other in LAYOUTS.values():
        x, shortcut, t = given((1, 3, 6, 2, 3), layout=layout)
        check(x, shortcut.contiguous(memory_format=other), t, motion)
        check(x, shortcut.transpose(2, 3).contiguous().transpose(2, 3), t, motion)
        check(x, shortcut[:, :1].expand_as(x), t, motion)


# The operator

@pytest.mark.parametrize('motion', [False, True])
def test_opcheck_and_the_fake(motion, layout):
    args = (*given((2, 3, 6, 16, 9), layout=layout), motion)
    opcheck(NAMES.block_end.default, args)
    real = NAMES.block_end(*args)
    with FakeTensorMode() as mode:
        fake = NAMES.block_end(*map(mode.from_tensor, args[:2]), *args[2:])
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


def test_error_it_has_no_derivative():
    x, shortcut, t = given((2, 3, 6, 2, 2))
    y, _ = NAMES.block_end(x.requires_grad_(), shortcut, t, False)
    with pytest.raises(RuntimeError, match=r'^cmr_layers::block_end is for inference and has no derivative: run the'):
        y.sum().backward()


# What the layers call

@torch.no_grad()
@pytest.mark.parametrize('path', ['reference', 'plain', 'triton'])
def test_only_a_kernel_knows_more_than_the_sum(path, layout):
    for motion in (False, True):
        x, shortcut, t = given((2, 3, 6, 3, 2), layout=layout)
        want = modules(x, shortcut)
        with use_path(path):
            y, known = ops.block_end(x, shortcut, t, motion)
        assert torch.equal(y, want) and (known is not None) == (path == 'triton')
        assert_like(y, shortcut)


@torch.no_grad()
def test_what_no_kernel_takes_is_the_sum():
    x, shortcut, t = given((2, 3, 6, 3, 2), torch.float16)
    for u, v, frames_of_a_clip, motion in (
            (x.double(), shortcut.double(), t, False), (x, shortcut.float(), t, False), (x, shortcut[:, :1], t, False),
            (x, shortcut, 1, True)):
        want = modules(u.clone(), v).to(u.dtype)
        y, known = ops.block_end(u.clone(), v, frames_of_a_clip, motion)
        assert known is None and y.dtype == u.dtype
        assert_near(y, want)
    with use_path('triton'), pytest.raises(
            RuntimeError, match=r"^the path 'triton' is forced, but block end can't take it: x is torch\.float16 of "
                                r'\[6, 6, 3, 2\] and the shortcut torch\.float32'):
        ops.block_end(x, shortcut.float(), t, False)


@torch.no_grad()
@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
@pytest.mark.parametrize('dtype', [F32, *HALF], ids=str)
def test_the_layers_take_what_is_known(form, dtype, layout):
    x, shortcut, t = given((2, 3, 6, 32, 18), dtype, layout)
    cme, taps = cme_tim_weights(6, b3=True, dtype=dtype, device=DEVICE)
    weight, bias = frames(6, 6, 1, 1, dtype=dtype, device=DEVICE, scale=.3), frames(6, dtype=dtype, device=DEVICE)
    y, pooled = NAMES.block_end(x, shortcut, t, False)
    assert pooled.shape[0] == 2
    # as the layers compute it alone, up to rounding
    assert_near(ops.cme_tim(y, t, cme, taps, pooled=pooled), ops.cme_tim(y, t, cme, taps).double())
    y, s = NAMES.block_end(x, shortcut, t, True)
    assert_near(ops.sme(y, t, weight, bias, None, similarity=s), ops.sme(y, t, weight, bias, None).double())
    if form != 'reference':     # they do take it
        none = torch.zeros_like(pooled)
        assert not torch.equal(ops.cme_tim(y, t, cme, taps, pooled=none), ops.cme_tim(y, t, cme, taps, pooled=pooled))
        moves = ops.sme(y, t, weight, bias, None, similarity=torch.ones_like(s))     # nothing does
        assert_near(moves, (y.double() + bias.double()[:, None, None]))


def test_clips_too_long_for_the_kernels_of_the_gates(form):
    x, shortcut, t = given((1, 33, 4, 3, 2), F32)
    cme, taps = cme_tim_weights(4, device=DEVICE)
    y, pooled = NAMES.block_end(x, shortcut, t, False)
    assert_near(ops.cme_tim(y, t, cme, taps, pooled=pooled), ops.cme_tim(y, t, cme, taps).double())


def test_error_a_product_of_known_similarities_has_no_derivative(form):
    x, *_ = given((2, 3, 6, 2, 2))
    weight, s = frames(6, 6, 1, 1, device=DEVICE).requires_grad_(), frames(6, 2, 2, device=DEVICE)
    args = x, weight, None, s
    with pytest.raises(RuntimeError, match=r'^cmr_layers::motion_product is for inference and has no derivative'):
        NAMES.motion_product(*args, triton=form == 'triton').sum().backward()
    opcheck(NAMES.motion_product.default, (x, weight.detach(), None, s), {'triton': form == 'triton'})
    for memory_format in LAYOUTS.values():
        x = x.contiguous(memory_format=memory_format)
        assert_like(NAMES.motion_product(x, *args[1:], triton=form == 'triton'), x)


def test_pooled_frames_have_the_same_gradients(form):
    x, _, t = given((2, 3, 12, 3, 2))
    cme, taps = cme_tim_weights(12, device=DEVICE)
    inputs = [x.requires_grad_(), *(w.requires_grad_() for w in (*cme[:3], taps))]
    pooled = x.detach().mean((2, 3))[None]
    g = torch.randn_like(x)
    got, want = (
        torch.autograd.grad(ops.cme_tim(x, t, cme, taps, pooled=partial), inputs, g) for partial in (pooled, None))
    for one, other in zip(got, want, strict=True):
        assert_near(one, other.double())
    opcheck(NAMES.cme_tim.default, (x, t, *cme, taps, None, None, [1, 1], [0, 0], [1, 1], 1, pooled),
            {'triton': form == 'triton'})
