"""What the tests of the layers share."""
import pytest
import torch
from helpers import randomize

from cmr_layers import CME, SME, TIM

# the tensors are tiny: more threads only cost time
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def build():
    """A layer as after training: no parameter and no statistic is at a value that would hide a wrong term."""

    def make(kind, channels=8, num_frames=4, dtype=None, **kwargs):
        layer = {'CME': CME, 'SME': SME, 'TIM': TIM}[kind](channels, num_frames=num_frames, dtype=dtype, **kwargs)
        return randomize(layer, everything=True).eval()

    return make


@pytest.fixture(params=['CME', 'SME', 'TIM'])
def kind(request):
    return request.param
