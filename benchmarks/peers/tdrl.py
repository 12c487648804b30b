"""TDRL: channels gated by differences that are accumulated frame by frame (PEM), then TSM's shift as a convolution.

Source: `Temporal Distinct Representation Learning for Action Recognition` (ECCV 2020), after its released code. Its
recurrence is kept: T small steps, one after the other. That code also registers parameters that it never uses
(0.50 M in ResNet-50) and, in training, computes a loss on the similarity of frames; neither is here. The convolution
over time is TSM's shift and frozen, as in that code.
"""
from typing import Any

import torch
from torch import Tensor, nn

from cmr_layers import TIM
from cmr_layers.clip import ClipLayer

from .resnet import before_conv1, tsn_resnet50
from .tei import FrameDifference, restart

__all__ = ['PEM', 'tdrl_resnet50']


class PEM(ClipLayer):
    """Progressive enhancement module, with d_t of :class:`~benchmarks.peers.tei.FrameDifference` and d_T = g_0 = 1.

    For t = 1 to T: gamma_t = sigmoid(w [d_t; g_{t-1}] + b), one number, and g_t = gamma_t d_t + (1 - gamma_t) g_{t-1}.
    Then u_t = sigmoid(Wa g_t + ba) * x_t, for all frames at once.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        reduction: C over the channels of d.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.
    """

    def __init__(
            self, channels: int, num_frames: int = 8, reduction: int = 8, device: Any = None, dtype: Any = None,
    ) -> None:
        super().__init__(channels, num_frames)
        dd = {'device': device, 'dtype': dtype}
        self.difference = FrameDifference(channels, reduction, **dd)
        self.gamma = nn.Conv2d(2 * (channels // reduction), 1, 1, **dd)
        self.expand = nn.Conv2d(channels // reduction, channels, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the released code does, also in a network that has another start for its convolutions."""
        restart(self)
        for conv in (self.gamma, self.expand):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward_clips(self, x: Tensor) -> Tensor:
        d = self.difference(x)
        last = d.new_ones(x.shape[0], *d.shape[2:])
        g, steps = last, []
        for d_t in (*d.unbind(1), last):
            gamma = self.gamma(torch.cat([d_t, g], 1)).sigmoid()
            g = gamma * d_t + (1 - gamma) * g
            steps.append(g)
        a = self.expand(torch.cat(steps)).sigmoid()  # frame by frame, the clips of each
        y: Tensor = x * a.unflatten(0, (len(steps), -1)).transpose(0, 1)
        return y


def tdrl_resnet50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """ResNet-50 with PEM and the frozen convolution over time before conv1 of all 16 blocks."""
    def make(channels: int, **dd: Any) -> nn.Module:
        return nn.Sequential(
            PEM(channels, num_frames, **dd), TIM(channels, num_frames, init='tsm', **dd).requires_grad_(False))

    model = tsn_resnet50(num_frames, num_classes, **kwargs)
    before_conv1(model, make)
    return model
