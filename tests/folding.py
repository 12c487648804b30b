"""What the tests of folded networks share: small networks with values as after training, and how near is near.

Tolerances are of the folded network's logits against those of the whole one, relative to their size: 1e-11 in float64
(measured: 1e-13), 1e-5 in float32 (2e-6) and 0.05 in bfloat16 (0.03). Randomized networks of 101 layers and more
amplify any rounding, as much without folding: 1e-3 in float32 (8e-5) and 0.4 in bfloat16 (0.13).
"""
import io
import re

import pytest
import timm
import torch
from helpers import anatomy, assert_same, randomize, values
from torch import nn

import cmr_layers.released  # noqa: F401  # registers its networks with timm
from cmr_layers import ClipModel, retrofit
from cmr_layers.deploy import fold

T = 3
FAMILY = [
    'cmr_resnet18', 'cmr_resnet18d', 'cmr_resnet26', 'cmr_resnet26d', 'cmr_resnet34', 'cmr_resnet34d', 'cmr_resnet50',
    'cmr_resnet50d', 'cmr_resnet101', 'cmr_resnet101d', 'cmr_resnet152', 'cmr_resnet152d', 'cmr_resnext50_32x4d',
    'cmr_resnext50d_32x4d', 'cmr_wide_resnet50_2', 'cmr_seresnet50',
]
RELEASED = [f'released_cmr_resnet{depth}' for depth in (50, 101, 152)]
# these repeat the stems and blocks of the others
REPEATED = r'101|152|resnet34|cmr_resnet50|resnext50d'
EVERY = [pytest.param(name, marks=pytest.mark.slow if re.search(REPEATED, name) else ())
         for name in FAMILY + RELEASED]
# one of each kind of stem, block and shortcut, and of each CME
KINDS = ['cmr_resnet18', 'cmr_resnet26d', 'released_cmr_resnet50']
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def small(name='cmr_resnet18', **kwargs):
    """A network with few channels, else as the name says."""
    first = 64 if name.removesuffix('d').endswith(('18', '34')) else 16
    kwargs = {'num_classes': 5, 'num_frames': T, 'channels': (first, 16, 16, 16), **kwargs}
    return randomize(timm.create_model(name, **kwargs)).eval()


def retrofitted(make, wrap):
    """A ResNet-18 with layers, alone or in a ClipModel, and its input."""
    model = make('resnet18', num_classes=5)
    retrofit(model, num_frames=T)
    randomize(model).eval()
    return (ClipModel(model, num_frames=T), clips()) if wrap else (model, clips().flatten(0, 1))


def clips(batch=2, num_frames=T, size=32, **kwargs):
    return torch.randn(batch, num_frames, 3, size, size, **kwargs)


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def assert_near(got, want, tolerance):
    assert got.dtype == want.dtype and got.shape == want.shape
    distance = (got.double() - want.double()).norm() / want.double().norm()
    assert distance <= tolerance, f'{distance:.1e} > {tolerance:.1e}'


def batch_norms(model):
    return {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def assert_folds(model, x, tolerance=1e-5):
    """All batch norms, and to what the network computed."""
    with torch.no_grad():
        want = model(x)
        report = fold(model, x)
        assert not norms(model) and not report.left and len(report)
        assert_near(model(x), want, tolerance)
    return report


def resaved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# One convolution and one batch norm

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Net(nn.Module):
    """A convolution, a batch norm, and how they are run."""

    def __init__(self, run=lambda net, x: net.norm(net.conv(x)), dims=2, conv=None, norm=None, **parts):
        super().__init__()
        self.conv = conv if conv is not None else CONVS[dims](4, 4, 3, padding=1)
        self.norm = norm if norm is not None else BATCH_NORMS[dims](4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = [run]    # a list is no attribute that a module of PyTorch's would look at

    def forward(self, x):
        return self.run[0](self, x)


def net(*args, **kwargs):
    model = Net(*args, **kwargs).eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.uniform_(-.5, .5), m.running_var.uniform_(.5, 2)
            if m.affine:
                m.weight.data.uniform_(.5, 1.5), m.bias.data.uniform_(-.5, .5)
    return model.double()


def example(dims=2, channels=4):
    return torch.randn(2, channels, *[7, 6, 5][:dims], dtype=torch.float64)


def tensors(y):
    return y if isinstance(y, (tuple, list)) else list(y.values()) if isinstance(y, dict) else [y]


@torch.no_grad()
def check(model, folded, left, x=None):
    """That these are folded, that those are left for these reasons, and that nothing changes what is computed."""
    x = example() if x is None else x
    before, tree = values(model), anatomy(model)
    want, other = model(x), model(-x)
    report = fold(model, x)
    assert [norm for _, norm in report.pairs] == folded
    assert report.left == left
    for y, wanted in ((model(x), want), (model(-x), other)):
        for got, one in zip(tensors(y), tensors(wanted), strict=True):
            torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-10)
    if not folded:
        assert_same(before, model.state_dict())
        assert anatomy(model) == tree
    for name in folded:
        assert not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    return report
