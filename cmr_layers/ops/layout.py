"""The two layouts that frames have in the operators, and the one way to write the strides of each.

An axis of size 1 may have any stride: PyTorch calls (N, C, L, 1) contiguous, or channels_last, whatever the last
stride is. Some of its kernels take such a stride at its word all the same. The backward pass of its batch norm is one,
and then reads a gradient in the wrong order. So nothing here hands on the strides that it was given.
"""
from typing import List, Optional

import torch
from torch import Tensor

from .path import is_exporting

__all__ = ['dense', 'is_channels_last', 'is_recorded', 'like', 'rectify_gradient', 'strides']


def is_channels_last(x: Tensor) -> bool:
    """Which of the two layouts frames are in. Frames in both, such as maps of one pixel, count as contiguous."""
    return not x.is_contiguous()


def strides(x: Tensor, channels_last: bool) -> List[int]:
    """The strides of a tensor of x's shape; channels_last is for frames (N, C, H, W) only."""
    order = [1, 3, 2, 0] if channels_last else list(range(x.ndim - 1, -1, -1))
    result = [1] * x.ndim
    step = 1
    for axis in order:
        result[axis] = step
        step = step * x.shape[axis]
    return result


def dense(x: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """x in the layout of another tensor, or in its own, with the strides of that layout, copied only where it must be.

    Args:
        x: Frames, (N, C, H, W), or a contiguous tensor of any shape.
        like: Another tensor. One in neither layout counts as contiguous.
    """
    y = x if like is None else like
    last = y.ndim == 4 and not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last) if last else x.contiguous()
    if is_recorded() or list(x.stride()) == strides(x, last):
        return x
    if last:
        n, c, h, w = x.shape
        return x.permute(0, 2, 3, 1).flatten().view(n, h, w, c).permute(0, 3, 1, 2)
    return x.flatten().view(x.shape)


def like(g: Tensor, x: Tensor) -> Tensor:
    """A gradient with the strides and the dtype of frames."""
    return g.to(x.dtype) if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def rectify_gradient(x: Tensor) -> Tensor:
    """x itself, and in the backward pass a gradient with the strides of x's layout, whatever strides it comes with."""
    if x.requires_grad and not is_recorded() and 1 in x.shape and x.is_contiguous():
        return x.flatten().view(x.shape)
    return x


def is_recorded() -> bool:
    """Whether a graph is made that leaves PyTorch: strides mean nothing in it, and sizes are not known."""
    if torch.jit.is_scripting():
        return False
    return bool(torch.jit.is_tracing() or is_exporting())
