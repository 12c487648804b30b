"""What the tests of the layers share."""
import gc

import pytest
import torch
from helpers import randomize

from cmr_layers import CME, SME, TIM

# the tensors are tiny: more threads only cost time
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """A million objects, none of them garbage: no collection of garbage looks through them, now or in a test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _frozen():
    """What a test has unfrozen is frozen again."""
    if not gc.get_freeze_count():
        gc.freeze()


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
