"""SME as PyTorch calls, forward and backward: for CPUs, and where Triton's kernels can't run.

Nothing here is recorded by autograd. Frames x are (N, C, H, W), N = B * T, contiguous or channels_last, and results of
their shape have their strides. ``acc`` stands for x's dtype, at least float32.
"""
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from .blocks import acc_dtype, blocks
from .layout import dense, is_channels_last

__all__ = ['motion_conv', 'motion_conv_backward', 'product', 'similarity']

# Pixels that one matrix product takes: enough to hide that the weight is packed anew each time.
_ROWS = 1536
# The energy of features that are not huge, see similarity().
_FINITE = 1e38


def motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor], residual: bool = False,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The 1x1 convolution of x (1 - s) in equation (8).

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        weight: Weight, (C, C, 1, 1).
        bias: Bias, (C,), or None.
        residual: Add x.

    Returns:
        Convolved frames like x, and similarities and inverse norms, see :func:`similarity`.
    """
    x = dense(x)
    s, inverse_norm = similarity(x, num_frames)
    return product(x, s, weight.flatten(1), bias, residual), s, inverse_norm


def similarity(x: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
    """Similarities of equation (7) and inverse norms, both (N, H, W) in acc.

    As :func:`.reference.similarity`: the features of a zero pixel have inverse norm 1.
    """
    acc, (n, _, height, width) = acc_dtype(x), x.shape
    s, inverse_norm = (x.new_ones(n, 1, height * width, dtype=acc) for _ in range(2))
    if num_frames > 1:
        for xb, sb, ib in blocks(x.flatten(2), num_frames, 2, s, inverse_norm):
            xb, sb, ib = xb.to(acc), sb[:, :, 0], ib[:, :, 0]
            energy = (xb * xb).sum(2)
            if x.device.type != 'cpu' or not energy.amax() < _FINITE:  # elsewhere to ask costs more than to do it
                largest = xb.abs().amax(2)
                scale = torch.where(largest > 1e15, largest, 1.)
                xb = xb / scale.unsqueeze(2)
                energy = (xb * xb).sum(2)
            else:
                scale = energy.new_ones(())
            root = torch.where(energy > 1e-24, energy, 1.).rsqrt_()
            torch.div(root, scale, out=ib)
            torch.sum(xb[:, :-1] * xb[:, 1:], 2, out=sb[:, :-1]).mul_(root[:, :-1]).mul_(root[:, 1:])
            sb[:, -1] = sb[:, -2]
    return s.view(n, height, width), inverse_norm.view(n, height, width)


def _matrices(x: Tensor, channels_last: bool) -> Sequence[Tensor]:
    """Frames as matrices (C, pixels) that share x's memory: one per frame, or one per thousand and a half pixels."""
    if channels_last:
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2).t()
        return pixels.split(_ROWS, 1) if x.device.type == 'cpu' else [pixels]
    return x.flatten(2).unbind(0)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrices are multiplied in.

    Where the CPU has no instructions for a half precision, PyTorch's own products take ten times as long in it as
    those in float32.
    """
    if x.device.type == 'cpu' and x.dtype in (torch.bfloat16, torch.float16):
        onednn = torch.ops.mkldnn
        if not torch.backends.mkldnn.is_available() or not (
                onednn._is_mkldnn_bf16_supported() if x.dtype == torch.bfloat16 else
                onednn._is_mkldnn_fp16_supported()):
            return torch.float32
    return x.dtype


def product(x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool = False) -> Tensor:
    """The convolution of equation (8), weight (C, C), plus bias, plus x if it is the ``residual``.

    x (1 - s) and the sum that the product is added to are only ever made for the pixels of one matrix product.
    """
    dtype, channels_last, y = _product_dtype(x), is_channels_last(x), torch.empty_like(x)
    weight = weight.to(dtype)
    start = x.new_zeros(1, 1) if bias is None else bias.unsqueeze(1)
    views = (_matrices(v, channels_last) for v in (x, y, (1 - s).to(dtype).unsqueeze(1)))
    for xb, yb, scale in zip(*views):
        total = yb if yb.dtype == dtype else torch.empty_like(yb, dtype=dtype)
        if residual:
            torch.add(xb, start, out=total)
        else:
            total.copy_(start)
        total.addmm_(weight, (xb * scale).to(dtype))
        if total is not yb:
            yb.copy_(total)
    return y


def motion_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, weight: Tensor, s: Tensor, inverse_norm: Tensor, learns: bool = True,
) -> Tuple[Tensor, Tensor]:
    """Derivative of :func:`motion_conv` without its residual. The gradient of the bias is the sum of gy, and not here.

    Args:
        gy: Gradient of the convolved frames, with x's dtype and strides. The other arguments are those that
            :func:`motion_conv` took and what it returned.
        learns: Whether the gradient of the weight is wanted.

    Returns:
        Gradients of x, like x, and of the weight, in its dtype, or empty.
    """
    acc, dtype, channels_last = acc_dtype(x), _product_dtype(x), is_channels_last(x)
    n, channels, height, width = x.shape
    gx, g_weight = torch.empty_like(x), x.new_zeros(channels, channels, dtype=acc)
    matrix = weight.flatten(1).t().to(dtype)
    views = (_matrices(v, channels_last) for v in (x, gy, gx, (1 - s).to(dtype).unsqueeze(1)))
    for xb, gb, qb, scale in zip(*views):
        gb = gb.to(dtype)
        if learns and dtype == acc:
            g_weight.addmm_(gb, (xb * scale).t())
        elif learns:
            g_weight.add_(torch.mm(gb, (xb * scale).t().to(dtype)))
        if dtype == x.dtype:
            torch.mm(matrix, gb, out=qb)
        else:
            qb.copy_(torch.mm(matrix, gb))

    # gx holds q, the gradient of x (1 - s)
    maps = (v.reshape(n, 1, height * width) for v in (s, inverse_norm))
    for xb, qb, sb, ib in blocks(x.flatten(2), num_frames, 2, gx.flatten(2), *maps):
        xb, sb, ib, total = xb.to(acc), sb[:, :, :1], ib[:, :, :1], qb.to(acc)
        gs = (total * xb).sum(2, keepdim=True).neg_()
        pairs = gs[:, :-1]
        pairs[:, -1:] += gs[:, -1:]  # the last frame takes the similarity of the one before
        total.mul_(1 - sb)
        cross = pairs * ib[:, :-1] * ib[:, 1:]  # in this order, or huge features would underflow
        total[:, :-1].addcmul_(xb[:, 1:], cross)
        total[:, 1:].addcmul_(xb[:, :-1], cross)
        pairs = pairs * sb[:, :-1]
        own = torch.zeros_like(gs)
        own[:, :-1] += pairs
        own[:, 1:] += pairs
        total.addcmul_(xb, own.mul_(ib).mul_(ib), value=-1)
        if total is not qb:
            qb.copy_(total)
    return gx, g_weight.to(weight.dtype).view(weight.shape) if learns else x.new_empty(0)
