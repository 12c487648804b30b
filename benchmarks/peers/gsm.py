"""GSM: a gate on every place decides how much of a channel is shifted over time.

Source: `Gate-Shift Networks for Video Action Recognition` (CVPR 2020), as released (swathikirans/GSM). That code has
no ResNet-50. The placement here is that of the authors' later code (swathikirans/GSF): behind conv3 and before its
batch norm, in every block, on the first quarter of the channels. CMR's Table 1 has GSM in InceptionV3.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_layers.clip import ClipLayer

from .resnet import bottlenecks, tsn_resnet50

__all__ = ['GSM', 'gsm_resnet50']


class GSM(ClipLayer):
    """Gate and shift the first ``gated_channels``; the rest stays.

    Of each half of them, g = tanh(Conv3d(ReLU(BN x))), one plane a frame, chooses g * x, which is shifted (the first
    half reads frame t+1, the second t-1, zeros beyond the clip) and added to what was not chosen. Then the channels of
    each half are interleaved. The gate starts at zero, where that permutation is all that happens.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        gated_channels: How many of them take part, a multiple of 4; by default, all.

    Raises:
        ValueError: gated_channels is no multiple of 4.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.
    """

    def __init__(
            self, channels: int, num_frames: int = 8, gated_channels: int | None = None, device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(channels, num_frames)
        self.gated_channels = channels if gated_channels is None else gated_channels
        if self.gated_channels % 4:
            raise ValueError(f'gated_channels must be a multiple of 4, got {self.gated_channels}')
        dd = {'device': device, 'dtype': dtype}
        self.norm = nn.BatchNorm3d(self.gated_channels, **dd)
        self.gate = nn.Conv3d(self.gated_channels, 2, 3, padding=1, groups=2, **dd)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]

    def forward_clips(self, x: Tensor) -> Tensor:
        x, rest = x[:, :, :self.gated_channels], x[:, :, self.gated_channels:]
        gates = self.gate(F.relu(self.norm(x.transpose(1, 2)))).tanh().transpose(1, 2)
        halves = []
        for half, gate, step in zip(x.chunk(2, 2), gates.chunk(2, 2), (1, -1)):
            moving = gate * half
            still = half - moving
            # T is third from the last but one: (left, right) pads of W, H, C, T
            if step > 0:
                moving = F.pad(moving[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
            else:
                moving = F.pad(moving[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            y = moving + still
            halves.append(y.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3))
        return torch.cat([*halves, rest], 2)


def gsm_resnet50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """ResNet-50 with GSM behind conv3 of all 16 blocks, on a quarter of its channels."""
    model = tsn_resnet50(num_frames, num_classes, **kwargs)
    for block in bottlenecks(model):
        conv = block.conv3
        C, dd = conv.out_channels, {'device': conv.weight.device, 'dtype': conv.weight.dtype}
        block.conv3 = nn.Sequential(conv, GSM(C, num_frames, C // 4, **dd))  # type: ignore[assignment]
    return model
