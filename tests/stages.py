"""What the tests of fused stages share: a small network, on which path it runs, and which operators it calls."""
import contextlib
import copy

import pytest
import torch
from folding import T
from helpers import randomize
from interpreter import DEVICE, interpreted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmr_layers import CMRBasicBlock, CMRBlock
from cmr_layers.deploy import fold, fuse_stages
from cmr_layers.ops import use_path

PATHS = ['auto', 'reference', 'plain', 'triton']


class Net(nn.Module):
    """Two stages: a block with an SME, two without, and one with; then a single block."""

    def __init__(self, kind=CMRBlock, **kwargs):
        super().__init__()
        width = 16 if kind is CMRBasicBlock else 4

        def block(channels, sme, down=None):
            return kind(channels, width, downsample=down, num_frames=T, sme=sme, reduction=2, **kwargs)

        self.first = nn.Sequential(
            block(8, 'all', nn.Sequential(nn.Conv2d(8, 16, 1, **kwargs), nn.BatchNorm2d(16))), block(16, 'none'),
            block(16, 'none'), block(16, 'all'))
        self.second = nn.Sequential(block(16, 'none'))

    def forward(self, x):
        return self.second(self.first(x))


def frames(batch=2, size=3, **kwargs):
    return torch.randn(batch * T, 8, size, size, **kwargs).to(DEVICE, memory_format=torch.channels_last)


def network(kind=CMRBlock, folded=True, **kwargs):
    model = randomize(Net(kind, **kwargs), everything=True).to(DEVICE, memory_format=torch.channels_last).eval()
    if folded:
        fold(model, frames())
    return model


def fused(model, x):
    """A fused copy."""
    model = copy.deepcopy(model)
    assert len(fuse_stages(model, x))
    return model


@contextlib.contextmanager
def on(path):
    """Without gradients, on a path."""
    if path == 'triton':
        pytest.importorskip('triton')
    with interpreted() if path == 'triton' else contextlib.nullcontext(), use_path(path), torch.no_grad():
        yield


class Calls(TorchDispatchMode):
    """Which operators of ours run, and which of them get something from the end of a block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'cmr_layers':
            name = func._opname
            if name == 'block_end':
                name += ', motion' if args[3] else ', mean'
            elif name == 'cme_tim' and len(args) > 13 and args[13] is not None:
                name += ', pooled'
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class OwnBlock(CMRBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def another_class(module):
    module.__class__ = OwnBlock
