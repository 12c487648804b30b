"""Passes over frames in blocks that stay in a CPU's cache from one call to the next.

So a frame is read from memory about as often as its layer needs, and nothing of a clip's size is written but results.
"""
from typing import Iterator, List

import torch
from torch import Tensor

from .layout import is_channels_last

__all__ = ['acc_dtype', 'block_length', 'blocks', 'outer']

# Elements of a block. Smaller ones would fit in the L2 cache, but then the calls cost more than the memory.
_SIZE = 2 ** 19


def acc_dtype(x: Tensor) -> torch.dtype:
    """What everything but matrix products is computed in: x's dtype, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def block_length(elements: int) -> int:
    """How many slices of so many elements make a block; at least one."""
    return max(1, _SIZE // elements)


def blocks(x: Tensor, num_frames: int, dim: int, *others: Tensor) -> Iterator[List[Tensor]]:
    """Blocks (..., clips, T, C, H*W) of x and others, which are (..., N, C, H*W) or expand to it.

    A block holds a few small clips, or a slice of one large clip along ``dim``. On other devices than CPUs a single
    block holds everything.
    """
    size, clips = x.shape[dim], x.shape[0] // num_frames
    clip = max(1, num_frames * x.shape[1] * x.shape[2])
    step, group = max(1, _SIZE * size // clip), max(1, _SIZE // clip)
    if x.device.type != 'cpu':
        step, group = size, clips
    tensors = [v.expand(*v.shape[:-3], *x.shape).unflatten(-3, (clips, num_frames)) for v in (x, *others)]
    for n in range(0, clips, max(1, group)):
        for start in range(0, size, step):
            yield [
                v.narrow(-4, n, min(group, clips - n)).narrow(dim - 3, start, min(step, size - start)) for v in tensors]


def outer(x: Tensor) -> int:
    """The outer one of the dimensions C and H*W of frames, along which blocks are long runs of memory."""
    return 2 if is_channels_last(x) else 1
