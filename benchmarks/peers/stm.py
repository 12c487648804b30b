"""STM: between conv1 and conv3, a convolution over time before conv2 (CSTM), and motion of the next frame added (CMM).

Source: `STM: SpatioTemporal and Motion Encoding for Action Recognition` (ICCV 2019), after its author's code: CMM is
added behind conv2's batch norm and ReLU, and where the block halves the resolution CMM's output is max-pooled, of
which the paper says nothing.
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from cmr_layers import TIM
from cmr_layers.clip import ClipLayer

from .resnet import check_options, tsn_resnet50

__all__ = ['CMM', 'FeatureDifference', 'STMBlock', 'cstm', 'stm_resnet50']


class FeatureDifference(nn.Module):
    """m_t = dw3x3(q_{t+1}) - q_t of q = BN(conv1x1(h)); m_T = 0.

    Shapes:
        Clips (B, T, C, H, W) to (B, T, C / reduction, H, W).
    """

    def __init__(self, channels: int, reduction: int, **dd: Any) -> None:
        super().__init__()
        reduced = max(1, channels // reduction)  # thin networks have fewer channels than that
        self.squeeze = nn.Conv2d(channels, reduced, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(reduced, **dd)
        self.transform = nn.Conv2d(reduced, reduced, 3, padding=1, groups=reduced, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.squeeze(x.flatten(0, 1)))
        q, later = q.unflatten(0, x.shape[:2]), self.transform(q).unflatten(0, x.shape[:2])
        m = later[:, 1:] - q[:, :-1]
        return torch.cat([m, torch.zeros_like(q[:, :1])], 1)


class CMM(ClipLayer):
    """Channel-wise motion module: W m_t, with m of :class:`FeatureDifference`.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        reduction: C over the channels of m.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.
    """

    def __init__(
            self, channels: int, num_frames: int = 8, reduction: int = 16, device: Any = None, dtype: Any = None,
    ) -> None:
        super().__init__(channels, num_frames)
        dd = {'device': device, 'dtype': dtype}
        self.difference = FeatureDifference(channels, reduction, **dd)
        self.expand = nn.Conv2d(self.difference.transform.out_channels, channels, 1, bias=False, **dd)

    def forward_clips(self, x: Tensor) -> Tensor:
        m = self.difference(x)
        y: Tensor = self.expand(m.flatten(0, 1)).unflatten(0, m.shape[:2])
        return y


def cstm(channels: int, num_frames: int, **dd: Any) -> TIM:
    """CSTM's convolution over time: it starts with C/4 channels of frame t-1, C/2 of frame t, C/4 of frame t+1."""
    conv = TIM(channels, num_frames, init='identity', **dd)
    with torch.no_grad():
        for part, tap in ((slice(channels // 4), 0), (slice(channels - channels // 4, None), 2)):
            conv.weight[part] = 0
            conv.weight[part, :, tap] = 1
    return conv


class STMBlock(Bottleneck):
    """timm's Bottleneck, its 3x3 convolution replaced by the sum of CSTM and CMM."""

    def __init__(self, *args: Any, num_frames: int = 8, **kwargs: Any) -> None:
        check_options(kwargs)
        super().__init__(*args, **kwargs)
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ('device', 'dtype')}
        self.time = cstm(self.conv2.in_channels, num_frames, **dd)
        self.cmm = CMM(self.conv2.in_channels, num_frames, **dd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        motion = self.cmm(h)
        if self.conv2.stride[0] > 1:
            motion = F.max_pool2d(motion, 2, ceil_mode=True)  # as many rows as conv2 leaves of an odd number
        y = self.act2(self.bn2(self.conv2(self.time(h)))) + motion
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act3(y)
        return out


def stm_resnet50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """ResNet-50 of 16 STM blocks."""
    return tsn_resnet50(num_frames, num_classes, block=STMBlock, block_args=dict(num_frames=num_frames), **kwargs)
