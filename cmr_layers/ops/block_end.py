"""The end of a residual block, y = relu(x + shortcut), and what the layers behind it would read y once more for.

The CME of the next block wants the mean over y's pixels, the SME of this block wants y's similarities. The kernels of
this operator compute them from what they write, in one pass over both branches. As PyTorch calls it would save nothing:
a CPU adds and rectifies in place, and pools what is in its cache. So it has no other form than Triton's, and where no
kernel runs the layers see to themselves. It is for inference and has no derivative.
"""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .layout import dense
from .operator import LIBRARY, no_derivative, operator
from .path import choose, undisturbed

__all__ = ['block_end']


def block_end(
        x: Tensor, shortcut: Tensor, num_frames: int, motion: bool, owner: Any = None,
) -> Tuple[Tensor, Optional[Tensor]]:
    """relu(x + shortcut), without gradients, and what is known of it then.

    Args:
        x: What the residual branch returned, (N, C, H, W), N = B * T, the frames of a clip next to each other. It may
            be overwritten.
        shortcut: Likewise of the shortcut.
        num_frames: Frames T of a clip.
        motion: An SME comes next.
        owner: The block that calls, for :func:`.path.explain`.

    Returns:
        Frames like x. With ``motion`` their similarities of equation (7), (N, H, W) in float32, for :func:`.sme.sme`,
        else shares of their mean over the pixels, (splits, N, C) in float32, whose sum over the splits is the mean,
        for :func:`.cme_tim.cme_tim`. None if no kernel computed them.
    """
    obstacle = ''
    if x.shape != shortcut.shape or x.dtype != shortcut.dtype:
        obstacle = f'x is {x.dtype} of {list(x.shape)} and the shortcut {shortcut.dtype} of {list(shortcut.shape)}'
    elif motion and num_frames == 1:
        obstacle = 'a still has no motion'
    if choose(owner, 'block end', x, num_frames, obstacle=obstacle) != 'triton':
        return x.add_(shortcut).relu_(), None
    y, known = torch.ops.cmr_layers.block_end(x, shortcut, num_frames, motion)
    return y, known


@operator
def _block_end(x: Tensor, shortcut: Tensor, num_frames: int, motion: bool) -> Tuple[Tensor, Tensor]:
    from . import triton_block_end
    with undisturbed(x):
        x = dense(x)
        shortcut = dense(shortcut, x)
        if motion:
            return triton_block_end.with_similarity(x, shortcut, num_frames)
        return triton_block_end.with_mean(x, shortcut)


@torch.library.register_fake('cmr_layers::block_end', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, shortcut: Tensor, num_frames: int, motion: bool) -> Tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    size = (n, height, width) if motion else (splits(height * width), n, channels)
    return torch.empty_like(dense(x)), x.new_empty(size, dtype=torch.float32)


def splits(pixels: int) -> int:
    """Into how many shares of about 256 pixels or more the mean over so many is cut.

    CME's kernels take 8 shares at most, and each of their programs reads all of them.
    """
    blocks = -(-pixels // 64)
    most = min(8, max(1, blocks // 4))
    return -(-blocks // -(-blocks // most))


no_derivative('block_end')
