"""What the tests of the operations share: the forms that compute them."""
import contextlib

import pytest
import torch
from helpers import LAYOUTS
from interpreter import DEVICE, interpreted

from cmr_layers.ops import blocks, products, use_path

FORMS = ('reference', 'plain', 'triton')


@pytest.fixture(params=['plain', 'triton'])
def form(request):
    """The path that is forced: both forms of the operators, or what a test is parametrized with.

    Triton's runs in its interpreter where there is no GPU. The reference can be had by name: it is what the others are
    compared with.
    """
    assert request.param in FORMS
    if request.param == 'triton':
        pytest.importorskip('triton')
    with interpreted() if request.param == 'triton' else contextlib.nullcontext(), use_path(request.param):
        yield request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture
def small_blocks(monkeypatch):
    """The plain form cuts even tiny clips into several blocks and products, the last ones ragged."""
    monkeypatch.setattr(blocks, '_SIZE', 64)
    monkeypatch.setattr(products, '_SIZE', 64)


@pytest.fixture
def unwritten_shows():
    """Fresh tensors hold NaN, so that what a form leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """A GPU multiplies no float32 as tf32. (The interpreter knows no tf32, and runs the kernels that would use it.)"""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, DEVICE == 'cpu'
    yield
    torch.backends.cudnn.allow_tf32 = before
