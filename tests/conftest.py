"""What the tests of the layers share."""
import gc
import itertools

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test that is marked ``pairwise``, only as many combinations run as show each pair of its arguments once.

    A fault mostly needs one value, or two that meet: this finds it. The other combinations are ``slow``.
    """
    tests = {}
    for item in items:
        marked = hasattr(item, 'callspec') and item.get_closest_marker('pairwise')
        if marked and not item.get_closest_marker('slow'):
            tests.setdefault(item.nodeid.partition('[')[0], []).append(item)
    for combinations in tests.values():
        pairs = {
            item: set(itertools.combinations([(name, str(value)) for name, value in item.callspec.params.items()], 2))
            for item in combinations}
        wanted = set().union(*pairs.values())
        while wanted:
            best = max(pairs, key=lambda item: len(pairs[item] & wanted))
            wanted -= pairs.pop(best)
        for item in pairs:
            item.add_marker('slow')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='session')
def _frozen():
    """What times code unfreezes what it froze, and all that the tests have loaded with it: here it does not."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gc, 'unfreeze', lambda: None)
        yield


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
