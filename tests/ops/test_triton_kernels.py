"""Triton kernels one by one, where the claim is the kernel's own: on a GPU if there is one, or in Triton's interpreter.

What they share with the plain form is in test_cme_tim.py and test_sme.py.
"""
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, frames
from interpreter import DEVICE, interpreted

from cmr_layers.ops import plain_cme_tim, plain_sme
from cmr_layers.ops import reference as law

pytest.importorskip('triton')
pytestmark = [
    # numpy, under the interpreter, warns of what these tests provoke
    pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning'),
    pytest.mark.usefixtures('unwritten_shows')]
F32 = torch.float32


@pytest.fixture(autouse=True)
def _kernels():
    with interpreted():
        yield


CONVOLUTIONS = [((2, 4, 24, 3, 3), 10), ((1, 8, 40, 3, 7), 136), ((1, 2, 5, 9, 1), 3), ((1, 16, 33, 1, 1), 16)]


@pytest.mark.parametrize('shape, out_channels', CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    'bias, dtype', [(False, F32), (True, F32), (True, torch.float16), (True, torch.bfloat16)], ids=str)
def test_one_kernel_gates_mixes_and_convolves(shape, out_channels, bias, dtype):
    from cmr_layers.ops.triton_cme_tim_conv import gated_conv
    n, t, channels, *size = shape
    x = frames(n * t, channels, *size, dtype=dtype, layout=torch.channels_last, device=DEVICE)
    taps, gate = frames(channels, 1, 3, device=DEVICE), frames(n * t, channels, device=DEVICE)
    weight = frames(out_channels, channels, 1, 1, dtype=dtype, device=DEVICE)
    b = frames(out_channels, device=DEVICE) if bias else None
    y = gated_conv(x, t, plain_cme_tim.scales_of(gate, taps), weight, b)
    clips = law.clips(x.double() * gate.double()[:, :, None, None], t)
    want = F.conv2d(law.tim(clips, taps.double()).flatten(0, 1), weight.double(), None if b is None else b.double())
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert_near(y, want, times=2)  # mixed frames and result are rounded


def test_float32_that_must_not_become_tf32_is_a_librarys(monkeypatch):
    from cmr_layers.ops import triton_sme
    called = []
    monkeypatch.setattr(
        triton_sme.plain, 'product', lambda *args, product=plain_sme.product: called.append(1) or product(*args))
    x, weight = frames(8, 24, 3, 3, device=DEVICE), frames(24, 24, 1, 1, device=DEVICE)
    want = F.conv2d(law.motion(law.clips(x.double(), 4)).flatten(0, 1), weight.double())
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            # tf32 keeps 10 bits, as float16 does; the interpreter knows no tf32
            tolerance = torch.float16 if allowed and DEVICE == 'cuda' else F32
            assert_near(
                triton_sme.product(x, triton_sme.similarity(x, 4)[0], weight.flatten(1), None), want, tolerance)
            assert len(called) == 1
    finally:
        torch.backends.cudnn.allow_tf32 = before
