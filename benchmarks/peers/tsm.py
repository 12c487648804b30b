"""TSM: an eighth of the channels comes from the next frame, an eighth from the previous one.

Source: `TSM: Temporal Shift Module for Efficient Video Understanding` (ICCV 2019), as released
(mit-han-lab/temporal-shift-module): ``blockres``, the shift before conv1 of every block, the shortcut unshifted.
The paper's figure draws the other direction.
"""
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cmr_layers.clip import ClipLayer

from .resnet import before_conv1, tsn_resnet50

__all__ = ['TemporalShift', 'tsm_resnet50']


class TemporalShift(ClipLayer):
    """Channels [0, C/8) read frame t+1, [C/8, C/4) read frame t-1, the rest stays; zeros beyond the clip.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        shift_div: C over the channels that are shifted one way.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.
    """

    def __init__(
            self, channels: int, num_frames: int = 8, shift_div: int = 8, device: Any = None, dtype: Any = None,
    ) -> None:
        super().__init__(channels, num_frames)
        self.fold = channels // shift_div

    def forward_clips(self, x: Tensor) -> Tensor:
        one, two = self.fold, 2 * self.fold
        y = torch.empty_like(x)
        y[:, :-1, :one] = x[:, 1:, :one]
        y[:, -1, :one] = 0
        y[:, 1:, one:two] = x[:, :-1, one:two]
        y[:, 0, one:two] = 0
        y[:, :, two:] = x[:, :, two:]
        return y


def tsm_resnet50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """ResNet-50 with the shift before conv1 of all 16 blocks."""
    model = tsn_resnet50(num_frames, num_classes, **kwargs)
    before_conv1(model, partial(TemporalShift, num_frames=num_frames))
    return model
