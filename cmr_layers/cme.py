"""Channel-wise Motion Enhancement (CME), equations (1)-(6) of the paper.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
import math
from typing import Any, Optional, Tuple, Union

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from . import ops
from .checks import check_positive
from .clip import ClipLayer
from .ops import reference

__all__ = ['CME']


@register_notrace_module
class CME(ClipLayer):
    """Gates each frame's channels by their difference from the clip's other frames.

    Every frame is pooled to a vector and reduced to a value z and a key k. It takes in the values of the other frames
    with weights softmax_j(-k_t k_j), so the frames that differ most count most. A sigmoid turns the fused vector into
    one gate in (0, 1) per channel and frame. The frame is multiplied by its gates.

    Of tokens, only the patches are pooled: prefix tokens have no place in the image, and a class token is no average of
    it. All tokens are gated: a gate belongs to a channel of a frame, and attention will compare every token with every
    other in the same channels.

    The paper does not say whether the projections have a bias, nor how they start. As in the authors' code they have no
    bias here and start with PyTorch's default, so the gates start near 1/2, not near 1. ``gate_init`` chooses another
    start for all gates: W3 starts at zero, and any value but 1/2 adds a bias.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        reduction: The paper's r1 = r2, or the pair (r1, r2): values have C/r1 channels, keys C/r2. Where r does not
            divide C, which the paper asks for, the width is rounded up.
        gate_init: Value in (0, 1) that all gates start at; other than 0.5 it gives W3 a bias. None: PyTorch's
            default start of equation (6) as it stands.

        input_fmt: How the input lies: 'NCHW', 'NHWC' or 'NLC' (tokens), see :class:`ClipLayer`.
        num_prefix_tokens: Tokens before the patches, only with 'NLC'.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W), or what ``input_fmt`` says, to the same.

    Raises:
        ValueError: An argument is no positive int, or gate_init is not in (0, 1); at call time, another shape (see
            :class:`ClipLayer`).

    Example:
        >>> import torch
        >>> layer = CME(64, num_frames=8)
        >>> layer(torch.randn(16, 64, 14, 14)).shape
        torch.Size([16, 64, 14, 14])
        >>> layer.gate(torch.randn(2, 8, 64, 14, 14)).shape
        torch.Size([2, 8, 64])
    """

    def __init__(
            self,
            channels: int,
            num_frames: int = 8,
            reduction: Union[int, Tuple[int, int]] = 8,
            gate_init: Optional[float] = None,
            input_fmt: str = 'NCHW',
            num_prefix_tokens: int = 0,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, num_frames, input_fmt, num_prefix_tokens)
        r1, r2 = _pair(reduction)
        self.reduction = (r1, r2)
        if gate_init is not None and not (hasattr(gate_init, '__float__') and 0 < gate_init < 1):
            raise ValueError(f'gate_init must lie between 0 and 1, or be None, got {gate_init!r}')
        self.gate_init = gate_init
        c1, c2 = -(-channels // r1), -(-channels // r2)
        self.w1 = nn.Parameter(torch.empty(c1, channels, **dd))
        self.w2 = nn.Parameter(torch.empty(c2, channels, **dd))
        self.w3 = nn.Parameter(torch.empty(channels, c1, **dd))
        self.b3 = nn.Parameter(torch.empty(channels, **dd)) if gate_init not in (None, 0.5) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as described in the class docstring."""
        for w in (self.w1, self.w2, self.w3):
            nn.init.kaiming_uniform_(w, a=math.sqrt(5))  # PyTorch's default: uniform in +-1/sqrt(fan_in)
        if self.gate_init is not None:
            nn.init.zeros_(self.w3)
            if self.b3 is not None:
                nn.init.constant_(self.b3, math.log(self.gate_init / (1 - self.gate_init)))

    def gate(self, x: Tensor) -> Tensor:
        """Gates a of equation (6): what the layer takes to (B, T, C), in (0, 1), at least float32."""
        return reference.cme_gate(self._clips(x), self.w1, self.w2, self.w3, self.b3, self.num_prefix_tokens)

    def forward_clips(self, x: Tensor) -> Tensor:
        return reference.cme(x, self.w1, self.w2, self.w3, self.b3, self.num_prefix_tokens)

    def forward_frames(self, x: Tensor, num_frames: int) -> Tensor:
        return ops.cme_tim(x, num_frames, self.weights(), None, owner=self, prefix=self.num_prefix_tokens)

    def weights(self) -> ops.CMEWeights:
        return ops.CMEWeights(self.w1, self.w2, self.w3, self.b3)

    def extra_repr(self) -> str:
        r1, r2 = self.reduction
        gate_init = '' if self.gate_init is None else f', gate_init={self.gate_init}'
        return f'{super().extra_repr()}, reduction={r1 if r1 == r2 else (r1, r2)}{gate_init}'


def _pair(reduction: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
    """One knob, or r1 and r2 set apart."""
    pair = tuple(reduction) if isinstance(reduction, (tuple, list)) else (reduction, reduction)
    if len(pair) != 2:
        raise ValueError(f'reduction must be a positive int or a pair (r1, r2) of them, got {reduction!r}')
    return check_positive('reduction', pair[0]), check_positive('reduction', pair[1])
