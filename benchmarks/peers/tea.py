"""TEA: Res2Net's splits mixed over time one after the other (MTA), behind a gate from the next frame's features (ME).

Source: `TEA: Temporal Excitation and Aggregation for Action Recognition` (CVPR 2020), as released
(Phoenix1327/tea-action-recognition), which differs from the paper: the gate is sigmoid - 0.5, the paper's is
2 sigmoid - 1, and the split without a spatial convolution is the last and is shifted over time.
"""
from typing import Any

import torch
from timm.models.res2net import Bottle2neck
from torch import Tensor, nn

from cmr_layers import TIM
from cmr_layers.clip import ClipLayer

from .resnet import check_options, tsn_resnet50
from .stm import FeatureDifference

__all__ = ['ME', 'TEABlock', 'tea_res2net50']


class ME(ClipLayer):
    """Motion excitation: h + h * a with a = sigmoid(BN(W GAP(m))) - 0.5, in (-0.5, 0.5), and m as STM has it.

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
        self.expand = nn.Sequential(
            nn.Conv2d(self.difference.transform.out_channels, channels, 1, bias=False, **dd),
            nn.BatchNorm2d(channels, **dd))

    def forward_clips(self, x: Tensor) -> Tensor:
        m = self.difference(x).mean((3, 4), keepdim=True)
        a = self.expand(m.flatten(0, 1)).unflatten(0, m.shape[:2]).sigmoid() - .5
        y: Tensor = x + x * a
        return y


class TEABlock(Bottle2neck):
    """timm's Bottle2neck with ME behind conv1 and a convolution over time before each split's 3x3 (MTA).

    The last split has that convolution only; it starts as a shift of all channels, the first half of them from frame
    t+1, the second from frame t-1. The other splits start as they are.
    """

    def __init__(self, *args: Any, num_frames: int = 8, **kwargs: Any) -> None:
        check_options(kwargs)
        super().__init__(*args, **kwargs)
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ('device', 'dtype')}
        self.me = ME(self.conv1.out_channels, num_frames, **dd)
        self.shifts = nn.ModuleList([
            *(TIM(self.width, num_frames, init='identity', **dd) for _ in self.convs),
            TIM(self.width, num_frames, init='tsm', shift_div=2, **dd)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.me(self.relu(self.bn1(self.conv1(x))))
        splits = h.split(self.width, 1)
        outputs: list[Tensor] = []
        for i, (shift, conv, bn) in enumerate(zip(self.shifts, self.convs, self.bns)):
            y = splits[i] if i == 0 or self.is_first else outputs[-1] + splits[i]
            outputs.append(self.relu(bn(conv(shift(y)))))
        last = self.shifts[-1](splits[-1])
        outputs.append(last if self.pool is None else self.pool(last))
        y = self.bn3(self.conv3(torch.cat(outputs, 1)))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y)
        return out


def tea_res2net50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """Res2Net-50 26w 4s of 16 TEA blocks."""
    return tsn_resnet50(
        num_frames, num_classes, name='res2net50_26w_4s', block=TEABlock,
        block_args=dict(scale=4, num_frames=num_frames), **kwargs)
