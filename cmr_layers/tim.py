"""Temporal Interaction Module (TIM), the temporal layer that the paper builds on.

Paper: `TEINet: Towards an Efficient Architecture for Video Recognition` (AAAI 2020); its start is the shift of
`TSM: Temporal Shift Module for Efficient Video Understanding` (ICCV 2019).
"""
import math
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from . import ops
from .checks import check_choice, check_positive
from .clip import ClipLayer
from .ops import reference

__all__ = ['TIM']


@register_notrace_module
class TIM(ClipLayer):
    """Depthwise convolution over time: each channel of each pixel mixes a frame with its neighbours.

    Frames beyond the clip count as zero. Each token, prefix tokens included, mixes with itself in the neighbouring
    frames. ``init`` chooses where training starts:

    - ``'tsm'``: TSM's shift. The first 1/shift_div of the channels read the next frame, the second 1/shift_div the
      previous one, the rest stay.
    - ``'tsm_reversed'``: the same with next and previous exchanged.
    - ``'identity'``: every channel stays.
    - ``'random'``: PyTorch's default for a convolution, uniform in +-1/sqrt(kernel_size).

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        kernel_size: Frames that a channel sees, odd.
        init: Start of the taps, see above.
        shift_div: With a TSM start, 1/shift_div of the channels shift each way.
        gain: Factor on the taps' start.

        input_fmt: How the input lies: 'NCHW', 'NHWC' or 'NLC' (tokens), see :class:`ClipLayer`.
        num_prefix_tokens: Tokens before the patches, only with 'NLC'.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W), or what ``input_fmt`` says, to the same. The weight is (C, 1, kernel_size),
        whatever T is.

    Raises:
        ValueError: An argument is out of its range; at call time, another shape (see :class:`ClipLayer`).

    Example:
        >>> x = torch.arange(4.).view(1, 4, 1, 1, 1).expand(1, 4, 8, 1, 1)  # frame t holds t
        >>> TIM(8, num_frames=4)(x)[0, :, :3, 0, 0].int().tolist()  # next, previous, the frame itself
        [[1, 0, 0], [2, 0, 1], [3, 1, 2], [0, 2, 3]]
    """

    def __init__(
            self,
            channels: int,
            num_frames: int = 8,
            kernel_size: int = 3,
            init: str = 'tsm',
            shift_div: int = 8,
            gain: float = 1.0,
            input_fmt: str = 'NCHW',
            num_prefix_tokens: int = 0,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__(channels, num_frames, input_fmt, num_prefix_tokens)
        if check_positive('kernel_size', kernel_size) % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        self.kernel_size = kernel_size
        self.init = check_choice('init', init, ('tsm', 'tsm_reversed', 'identity', 'random'))
        self.shift_div = check_positive('shift_div', shift_div)
        if self.init.startswith('tsm') and (shift_div < 2 or kernel_size < 3):
            raise ValueError(
                f'init={init!r} needs shift_div >= 2 and kernel_size >= 3, got {shift_div} and {kernel_size}'
            )
        if isinstance(gain, bool) or not isinstance(gain, (int, float)):
            raise ValueError(f'gain must be a number, got {gain!r}')
        self.gain = gain
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as ``init`` says."""
        now = self.kernel_size // 2
        if self.init == 'random':
            nn.init.uniform_(self.weight, -1 / math.sqrt(self.kernel_size), 1 / math.sqrt(self.kernel_size))
        else:
            fold = 0 if self.init == 'identity' else self.channels // self.shift_div
            step = -1 if self.init == 'tsm_reversed' else 1
            nn.init.zeros_(self.weight)
            if fold > 0:
                self.weight[:fold, :, now + step] = 1.
                self.weight[fold:2 * fold, :, now - step] = 1.
            self.weight[2 * fold:, :, now] = 1.
        self.weight.mul_(self.gain)

    def forward_clips(self, x: Tensor) -> Tensor:
        return reference.tim(x, self.weight)

    def forward_frames(self, x: Tensor, num_frames: int) -> Tensor:
        return ops.cme_tim(x, num_frames, ops.CMEWeights(), self.weight, owner=self)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, kernel_size={self.kernel_size}, init={self.init!r}'
