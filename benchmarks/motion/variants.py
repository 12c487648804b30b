"""Layers with one thing of the paper's exchanged: what its text leaves open, what it claims to matter, and faults.

Each computes the plain form of the equations, see ``cmr_layers/ops/reference.py``.
"""
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_layers import CME, SME, CMRBlock
from cmr_layers.released import CME as ReleasedCME

__all__ = [
    'AloneCME', 'BrokenCME', 'BrokenSME', 'DepthwiseSME', 'EarlyBlock', 'MaplessSME', 'PoolFirstCME', 'ShuffledCME',
    'ShuffledSME', 'SimilarCME', 'SoftmaxOverT']


class _CME(CME):
    """Equations (1) to (6), with gaps to fill."""
    sign: ClassVar[int] = -1  # of (4): the frames that differ count most
    softmax_dim: ClassVar[int] = 2  # of (5): over j

    def fusion(self, z: Tensor, k: Tensor) -> Tensor:
        d = self.sign * k @ k.transpose(1, 2)
        return z + d.softmax(self.softmax_dim) @ z

    def gate(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # at least in float32, as the paper's CME here
            x = self._clips(x).mean((3, 4), dtype=torch.promote_types(x.dtype, torch.float32))
            z = self.fusion(F.linear(x, self.w1), F.linear(x, self.w2))
            return F.linear(z, self.w3, self.b3).sigmoid()

    def forward_clips(self, x: Tensor) -> Tensor:
        return x * self.gate(x).to(x.dtype)[..., None, None]


class SoftmaxOverT(_CME):
    """The softmax of (5) over t, as in the released code."""
    softmax_dim = 1


class SimilarCME(_CME):
    """Without the minus of (4): the frames that are alike count most."""
    sign = 1


class AloneCME(_CME):
    """Without (3) to (5): each frame gates itself, as a squeeze-and-excitation layer without its ReLU."""

    def fusion(self, z: Tensor, k: Tensor) -> Tensor:
        return z


class PoolFirstCME(ReleasedCME):
    """The released CME, pooled before its projections, batch norms and ReLUs, where the paper pools.

    The paper's own projections are linear: there, first or last is the same.
    """

    def _gate(self, x: Tensor) -> Tensor:
        return super()._gate(x.mean((3, 4), keepdim=True))


class DepthwiseSME(SME):
    """A convolution in (8) that scales each channel by itself."""

    def __init__(self, channels: int, num_frames: int = 8, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, num_frames, device=device, dtype=dtype)
        self.conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device=device, dtype=dtype)
        self.reset_parameters()


class MaplessSME(SME):
    """Without (7): the convolution sees all places alike, and no other frame."""

    def forward_clips(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x.flatten(0, 1))).view_as(x) + x
        return y


class EarlyBlock(CMRBlock):
    """A block whose SME sees the sum before the ReLU, which follows it."""

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self._branches(self._begin(x), x)
        y: Tensor = self.act3(self.sme(x + shortcut))
        return y


class BrokenCME(CME):
    """Hands on what it gets."""

    def forward_clips(self, x: Tensor) -> Tensor:
        return x


class BrokenSME(SME):
    """Hands on what it gets."""

    def forward_clips(self, x: Tensor) -> Tensor:
        return x


class ShuffledCME(CME):
    """Opens each frame with the gates of a frame of its clip that is drawn anew in each call."""

    def forward_clips(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        return x * gates[:, torch.randperm(x.shape[1])].to(x.dtype)[..., None, None]


class ShuffledSME(SME):
    """Takes any frame for the next one, drawn anew in each call."""

    def forward_clips(self, x: Tensor) -> Tensor:
        order = torch.randperm(x.shape[1])
        y: Tensor = super().forward_clips(x[:, order])
        return y[:, order.argsort()]
