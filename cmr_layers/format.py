"""The formats in which networks hand on their features, and how a layer sees each of them as maps (N, C, H, W).

No equation asks where in an image a place is: CME averages over the places, TIM and SME take each by itself. So tokens
(N, L, C) are maps (N, C, 1, L), whether or not they lie in a grid. All of this is views, nothing is copied.

Prefix tokens, a class token or registers, come before the patches and have no place in the image. They stay in the
maps, as the first columns, and each layer says what it does with them.
"""
from typing import Tuple

from torch import Tensor

from .checks import check_choice

__all__ = ['FORMATS', 'as_maps', 'check_format', 'from_maps', 'shapes']

#: The names are timm's (``timm.layers.Format``).
FORMATS = ('NCHW', 'NHWC', 'NLC')


def check_format(input_fmt: str, num_prefix_tokens: int) -> Tuple[str, int]:
    """Return both arguments of a layer, or raise a ValueError that names the wrong one."""
    input_fmt = check_choice('input_fmt', input_fmt, FORMATS)
    if isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int) or num_prefix_tokens < 0:
        raise ValueError(f'num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}')
    if num_prefix_tokens and input_fmt != 'NLC':
        raise ValueError(
            f"num_prefix_tokens must be 0 unless input_fmt='NLC', as maps have no such tokens; got {num_prefix_tokens} "
            f'with input_fmt={input_fmt!r}')
    return input_fmt, num_prefix_tokens


def shapes(input_fmt: str, channels: int, num_frames: int) -> str:
    """The two shapes that a layer takes, for messages."""
    frame = {
        'NCHW': f'{channels}, H, W', 'NHWC': f'H, W, {channels}', 'NLC': f'L, {channels}'}[input_fmt]
    return f'(B*T, {frame}) or (B, {num_frames}, {frame})'


def as_maps(x: Tensor, input_fmt: str) -> Tensor:
    """Frames, or clips, that are not NCHW as (..., C, H, W)."""
    if input_fmt == 'NLC':
        x = x.unsqueeze(-3)  # at this place the new axis gets the stride that channels_last maps have there
    return x.movedim(-1, -3)


def from_maps(y: Tensor) -> Tensor:
    """Undo :func:`as_maps`, but for the shape of tokens: (..., 1, L, C)."""
    return y.movedim(-3, -1)
