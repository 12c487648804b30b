"""What the tests of folded networks share: small networks with values as after training, and how near is near.

Tolerances are of the folded network's logits against those of the whole one, relative to their size: 1e-11 in float64
(measured: 1e-13), 1e-5 in float32 (2e-6) and 0.05 in bfloat16 (0.03). Randomized networks of 101 layers and more
amplify any rounding, as much without folding: 1e-3 in float32 (8e-5) and 0.4 in bfloat16 (0.13).
"""
import io

import timm
import torch
from helpers import randomize
from torch import nn

import cmr_layers.released  # noqa: F401  # registers its networks with timm

T = 3
FAMILY = [
    'cmr_resnet18', 'cmr_resnet18d', 'cmr_resnet26', 'cmr_resnet26d', 'cmr_resnet34', 'cmr_resnet34d', 'cmr_resnet50',
    'cmr_resnet50d', 'cmr_resnet101', 'cmr_resnet101d', 'cmr_resnet152', 'cmr_resnet152d', 'cmr_resnext50_32x4d',
    'cmr_resnext50d_32x4d', 'cmr_wide_resnet50_2', 'cmr_seresnet50',
]
RELEASED = [f'released_cmr_resnet{depth}' for depth in (50, 101, 152)]
# one of each kind of stem, block and shortcut, and of each CME
KINDS = ['cmr_resnet18', 'cmr_resnet26d', 'released_cmr_resnet50']
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def small(name='cmr_resnet18', **kwargs):
    """A network with few channels, else as the name says."""
    first = 64 if name.removesuffix('d').endswith(('18', '34')) else 16
    kwargs = {'num_classes': 5, 'num_frames': T, 'channels': (first, 16, 16, 16), **kwargs}
    return randomize(timm.create_model(name, **kwargs)).eval()


def clips(batch=2, num_frames=T, size=32, **kwargs):
    return torch.randn(batch, num_frames, 3, size, size, **kwargs)


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def assert_near(got, want, tolerance):
    assert got.dtype == want.dtype and got.shape == want.shape
    distance = (got.double() - want.double()).norm() / want.double().norm()
    assert distance <= tolerance, f'{distance:.1e} > {tolerance:.1e}'


def resaved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
