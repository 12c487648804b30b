"""Spatial-wise Motion Enhancement (SME), equations (7)-(8) of the paper.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
import math
from typing import Any, Type

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from . import ops
from .bypass import is_bare, is_pointwise_conv, is_pytorch_norm
from .clip import ClipLayer
from .fuse import fold_norms
from .ops import reference
from .ops.layout import rectify_gradient
from .ops.path import choose

__all__ = ['SME']


@register_notrace_module
class SME(ClipLayer):
    """Adds to each frame a convolution of the places that change towards the next frame.

    The similarity s is low where a pixel's features point elsewhere in the next frame, so x * (1 - s) keeps the moving
    places only. A dense 1x1 convolution and a batch norm scale that term, and the frame itself is added.

    Of tokens, patch is compared with patch. Prefix tokens have no place that could move: they pass as they are, and the
    batch norm's statistics leave them out.

    The batch norm starts with weight and bias zero, as in the authors' code, so the layer starts as the identity.
    The convolution starts as there: normal with variance 2 / C (Kaiming, fan-out), a bias with PyTorch's default,
    uniform in +-1/sqrt(C).

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        bias: Give the convolution a bias. The batch norm makes it redundant; the authors' checkpoints have one.
        norm_layer: Normalisation after the convolution.

        input_fmt: How the input lies: 'NCHW', 'NHWC' or 'NLC' (tokens), see :class:`ClipLayer`.
        num_prefix_tokens: Tokens before the patches, only with 'NLC'.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W), or what ``input_fmt`` says, to the same.

    Raises:
        ValueError: channels or num_frames is no positive int; at call time, another shape (see :class:`ClipLayer`).

    Example:
        >>> import torch
        >>> layer, x = SME(64, num_frames=8), torch.randn(16, 64, 14, 14)
        >>> bool((layer(x) == x).all())  # the identity, before training
        True
        >>> layer.similarity(x).shape
        torch.Size([2, 8, 14, 14])
    """

    def __init__(
            self,
            channels: int,
            num_frames: int = 8,
            bias: bool = False,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            input_fmt: str = 'NCHW',
            num_prefix_tokens: int = 0,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, num_frames, input_fmt, num_prefix_tokens)
        self.conv = nn.Conv2d(channels, channels, 1, bias=bias, **dd)
        self.bn = norm_layer(channels, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as described in the class docstring."""
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
        if self.conv.bias is not None:
            bound = 1 / math.sqrt(self.channels)
            nn.init.uniform_(self.conv.bias, -bound, bound)
        if hasattr(self.bn, 'reset_parameters'):
            self.bn.reset_parameters()  # type: ignore[operator]
        self.zero_init_last()

    def zero_init_last(self) -> None:
        """Make the layer the identity. timm calls this when it (re-)initialises a network."""
        for p in self.bn.parameters(recurse=False):
            nn.init.zeros_(p)

    def similarity(self, x: Tensor) -> Tensor:
        """Similarity s of equation (7): what the layer takes to (B, T, H, W), of tokens (B, T, L), at least float32."""
        s = reference.similarity(self._clips(x)[..., self.num_prefix_tokens:])
        return s.squeeze(2) if self.input_fmt == 'NLC' else s

    def forward_clips(self, x: Tensor) -> Tensor:
        prefix, x = x[..., :self.num_prefix_tokens], x[..., self.num_prefix_tokens:]
        frames = reference.motion(x).flatten(0, 1)
        h = rectify_gradient(self.bn(self.conv(frames)))
        v: Tensor = h.view_as(x) + x                                        # (8)
        if self.num_prefix_tokens > 0:
            v = torch.cat([prefix, v], dim=4)
        return v

    def forward_frames(self, x: Tensor, num_frames: int) -> Tensor:
        conv, bn = self.conv, self.bn
        if not is_pointwise_conv(conv):
            choose(self, 'SME', x, num_frames, obstacle='its convolution is hooked, patched or not a 1x1 nn.Conv2d')
            return super().forward_frames(x, num_frames)
        prefix = self.num_prefix_tokens
        if type(bn) is nn.Identity and is_bare(bn):  # folded
            return ops.sme(x, num_frames, conv.weight, conv.bias, None, owner=self, prefix=prefix)
        if is_pytorch_norm(bn) and not bn.training and not torch.is_grad_enabled() and not torch.jit.is_tracing():
            norm = ops.Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
            return ops.sme(x, num_frames, conv.weight, conv.bias, norm, owner=self, prefix=prefix)
        h = ops.motion_conv(x, num_frames, conv.weight, conv.bias, owner=self, prefix=prefix)
        if prefix == 0:
            v: Tensor = rectify_gradient(bn(h)) + x
            return v
        return torch.cat([x[..., :prefix], bn(h[..., prefix:]) + x[..., prefix:]], dim=3)

    fuse = fold_norms  # for timm's reparameterize_model
