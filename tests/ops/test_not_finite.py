"""NaN, infinity and huge values go through every form as through the law, forward and backward: what diverged shows."""
import pytest
import torch
import torch.nn.functional as F
from helpers import F32, cme_tim_weights, frames
from interpreter import DEVICE

from cmr_layers import ops
from cmr_layers.ops import reference as law

pytestmark = [
    pytest.mark.pairwise,
    pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning'),
    pytest.mark.usefixtures('small_blocks')]

NAN, INF = float('nan'), float('inf')
HUGE = {F32: 1e30, torch.float16: 6e4, torch.bfloat16: 1e30}
# Half precision takes the same ways, as the end of a clip shows. The interpreter is slow, and shows each value and each
# place once. The reference rounds on its way: no huge value there.
INTERPRETED = [
    (F32, NAN, 'end'), (F32, -INF, 'pixel'), (F32, HUGE[F32], 'channel'), (torch.bfloat16, NAN, 'end'),
    (torch.float16, HUGE[torch.float16], 'end')]


def usual(form, dtype, value, where):
    if form == 'triton':
        return (dtype, value, where) in INTERPRETED
    return dtype is F32 or (where == 'end' and value != -INF)


CASES = [
    pytest.param(form, dtype, value, where, marks=() if usual(form, dtype, value, where) else pytest.mark.slow)
    for form in ('reference', 'plain', 'triton') for dtype, huge in HUGE.items() for value in (NAN, -INF, huge)
    for where in ('pixel', 'channel', 'end') if value != huge or form != 'reference']
T, C = 4, 6


def spoilt(value, where, dtype, layout):
    """Frames of two clips, the value in one pixel of a frame, in a channel of a clip, or in its last frame."""
    x = frames(2 * T, C, 3, 2, dtype=dtype, layout=layout, device=DEVICE)
    x[{'pixel': (1, 2, 1, 1), 'channel': (slice(T), 2), 'end': (T - 1, 0, 2, 1)}[where]] = value
    return x.requires_grad_()


def sure(y):
    """Whether the rows of a result are finite, frame by frame: which element of a frame it is depends on the order."""
    return y.detach().flatten(1).isfinite().all(1).cpu()


def same(got, want):
    """The frames that are not finite are the law's, in float64. Near a dtype's largest number rounding decides."""
    largest = want.detach().abs().flatten(1).amax(1).cpu()
    near = largest.isfinite() & (largest > torch.finfo(got.dtype).max / 8)
    assert torch.equal(sure(got) | near, sure(want) | near)
    return sure(got)


def check(compute, exactly, x):
    """Values and gradients; which frames are finite."""
    wide = x.detach().double().requires_grad_()
    y, want = compute(x), exactly(wide)
    assert y.dtype == x.dtype
    finite, g = same(y, want), torch.randn_like(want)
    same(*(torch.autograd.grad(v, w, g.to(v.dtype))[0] for v, w in ((y, x), (want, wide))))
    return finite


@pytest.mark.parametrize('form, dtype, value, where', CASES, indirect=['form'], ids=str)
@pytest.mark.parametrize('parts', ['CME', 'TIM', 'CME + TIM + conv'])
def test_cme_and_tim(form, dtype, value, where, parts, layout):
    weights, taps = cme_tim_weights(
        C, None if parts == 'TIM' else 3, kernel_size=None if parts == 'CME' else 3, dtype=dtype, device=DEVICE)
    conv = ops.Convolution(frames(8, C, 1, 1, dtype=dtype, device=DEVICE)) if 'conv' in parts else ops.Convolution()
    x = spoilt(value, where, dtype, layout)

    def exactly(x):
        clips = law.clips(x, T)
        if weights.w1 is not None:
            clips = law.cme(clips, *(None if w is None else w.double() for w in weights))
        if taps is not None:
            clips = law.tim(clips, taps.double())
        y = clips.reshape(x.shape)
        return F.conv2d(y, conv.weight.double()) if conv.weight is not None else y

    def compute(x):
        return ops.cme_tim(x, T, weights, taps, conv)

    with torch.no_grad():
        same(compute(x), exactly(x.double()))
    finite = check(compute, exactly, x)
    if not abs(value) < INF:
        assert not finite[:T].all() and finite[T:].all()    # it shows, and the other clip has nothing of it


@pytest.mark.parametrize('form, dtype, value, where', CASES, indirect=['form'], ids=str)
def test_sme(form, dtype, value, where, layout):
    x, weight = spoilt(value, where, dtype, layout), frames(C, C, 1, 1, dtype=dtype, device=DEVICE, scale=.1)

    def exactly(x):
        return F.conv2d(law.motion(law.clips(x, T)).flatten(0, 1), weight.double())

    with torch.no_grad():
        same(ops.sme(x, T, weight, None, None), x + exactly(x.double()))
    finite = check(lambda x: ops.motion_conv(x, T, weight, None), exactly, x)
    if not abs(value) < INF:
        assert not finite[:T].all() and finite[T:].all()


@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize('which', ['w1', 'w2', 'w3', 'taps', 'sme'])
def test_weights_that_diverged(form, value, which, layout):
    weights, taps = cme_tim_weights(C, device=DEVICE)
    weight, x = frames(C, C, 1, 1, device=DEVICE), frames(2 * T, C, 3, 2, layout=layout, device=DEVICE)
    {**weights._asdict(), 'taps': taps, 'sme': weight}[which].view(-1)[1] = value
    y = ops.sme(x, T, weight, None, None) if which == 'sme' else ops.cme_tim(x, T, weights, taps)
    clips = law.clips(x, T)
    want = F.conv2d(law.motion(clips).flatten(0, 1), weight) if which == 'sme' else law.tim(
        law.cme(clips, *weights), taps).flatten(0, 1)
    if (which, value) != ('w3', INF):   # infinite sums cancel, or not, by their order
        assert torch.equal(y.isnan(), want.isnan())
    assert not y.isfinite().all() or (which in ('w2', 'w3') and value == INF)  # keys are clamped, gates are at most 1


@pytest.mark.parametrize('form', ['plain', 'triton'], indirect=True)
def test_a_nan_among_the_keys_stays_one(form):
    weights, taps = cme_tim_weights(C, device=DEVICE)
    x = frames(T, C, 3, 2, device=DEVICE)
    x[1, 0, 0, 0] = NAN
    *_, z, k, gate = torch.ops.cmr_layers.cme_tim(
        x, T, *weights, taps, *ops.Convolution(), triton=form == 'triton')
    assert z[1].isnan().all() and k[1].isnan().all() and gate.isnan().all()
    assert z[[0, 2, 3]].isfinite().all() and k[[0, 2, 3]].isfinite().all()
