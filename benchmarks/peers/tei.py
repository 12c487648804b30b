"""TEINet: a gate on the channels from the difference to the next frame (MEM), then a convolution over time (TIM).

Source: `TEINet: Towards an Efficient Architecture for Video Recognition` (AAAI 2020). No code of it was released. MEM
is here as a class of the same shape in code of the same laboratory has it, with batch norm and ReLU behind each of
its convolutions, so that its gate lies in [0.5, 1); that code leaves the convolutions' bias open, here they have none.
"""
from typing import Any

import torch
from torch import Tensor, nn

from cmr_layers import TIM
from cmr_layers.clip import ClipLayer

from .resnet import before_conv1, tsn_resnet50

__all__ = ['MEM', 'FrameDifference', 'tei_resnet50']


def conv_norm_relu(in_channels: int, out_channels: int, **dd: Any) -> nn.Sequential:
    """A 1x1 convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False, **dd), nn.BatchNorm2d(out_channels, **dd),
        nn.ReLU(inplace=True))


def restart(module: nn.Module) -> None:
    """Start convolutions and norms within a module as PyTorch does."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)):
            part.reset_parameters()


class FrameDifference(nn.Module):
    """d_t = ReLU(BN(W1 p_t)) - ReLU(BN(W2 p_{t+1})) of the frames' pooled channels p, for all frames but the last.

    Shapes:
        Clips (B, T, C, H, W) to (B, T - 1, C / reduction, 1, 1).
    """

    def __init__(self, channels: int, reduction: int, **dd: Any) -> None:
        super().__init__()
        self.now = conv_norm_relu(channels, channels // reduction, **dd)
        self.later = conv_norm_relu(channels, channels // reduction, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, T = x.shape[:2]
        p = x.mean((3, 4), keepdim=True).flatten(0, 1)
        now, later = (w(p).unflatten(0, (B, T)) for w in (self.now, self.later))
        return now[:, :-1] - later[:, 1:]  # type: ignore[no-any-return]


class MEM(ClipLayer):
    """Motion enhanced module: u_t = sigmoid(ReLU(BN(W3 d_t))) * x_t; the last frame stays as it is.

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
        self.expand = conv_norm_relu(channels // reduction, channels, **dd)

    def reset_parameters(self) -> None:
        """Start as PyTorch does, also in a network that has another start for its convolutions."""
        restart(self)

    def forward_clips(self, x: Tensor) -> Tensor:
        d = self.difference(x)
        gate = self.expand(d.flatten(0, 1)).sigmoid().view(*d.shape[:2], self.channels, 1, 1)
        return x * torch.cat([gate, gate.new_ones(x.shape[0], 1, self.channels, 1, 1)], 1)


def tei_resnet50(num_frames: int = 8, num_classes: int = 174, **kwargs: Any) -> nn.Module:
    """ResNet-50 with MEM and TIM before conv1 of all 16 blocks."""
    def make(channels: int, **dd: Any) -> nn.Module:
        return nn.Sequential(MEM(channels, num_frames, **dd), TIM(channels, num_frames, **dd))

    model = tsn_resnet50(num_frames, num_classes, **kwargs)
    before_conv1(model, make)
    return model
