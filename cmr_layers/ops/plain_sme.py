"""SME as PyTorch calls, forward and backward: for CPUs, and where Triton's kernels can't run.

Nothing here is recorded by autograd. Frames x are (N, C, H, W), N = B * T, contiguous or channels_last, and results of
their shape have their strides. ``acc`` stands for x's dtype, at least float32.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .blocks import acc_dtype, block_length, blocks
from .layout import is_channels_last
from .products import affine, is_exact, matrices, product_dtype

__all__ = ['motion_conv_backward', 'product', 'similarity']

# The energy of features that are not huge, see similarity().
_FINITE = 1e38
# Frames whose pixels one batched product compares with each other. It needs only neighbours, and all pairs of so few
# cost less than another pass over the frames.
_WINDOW = 9


def similarity(x: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
    """Similarities of equation (7) and inverse norms, both (N, H, W) in acc.

    As :func:`.reference.similarity`: the features of a zero pixel have inverse norm 1.
    """
    if num_frames > 1 and x.numel() and x.device.type == 'cpu' and is_channels_last(x) and is_exact():
        maps = _similarity_by_products(x, num_frames)
        if maps is not None:
            return maps
    return _similarity_by_blocks(x, num_frames)


def _similarity_by_products(x: Tensor, num_frames: int) -> Optional[Tuple[Tensor, Tensor]]:
    """One matrix product for each pixel of a clip reads the frames once. None if features are huge, or not finite.

    Its matrices are (T, C), and views of channels_last frames.
    """
    acc, (n, channels, height, width) = acc_dtype(x), x.shape
    size, clips = height * width, n // num_frames
    pixels = x.permute(0, 2, 3, 1).view(clips, num_frames, size, channels)
    energy = x.new_empty(clips, num_frames, size, dtype=acc)
    s = torch.empty_like(energy)
    for start in range(0, num_frames - 1, _WINDOW - 1):
        window = slice(start, start + _WINDOW)
        xs = pixels[:, window].transpose(1, 2)
        products = x.new_empty(clips, size, xs.shape[2], xs.shape[2], dtype=acc)
        step = size if x.dtype == acc else block_length(xs.shape[2] * channels)  # what is converted at once
        for xc, pc in zip(xs, products):
            for xb, pb in zip(xc.split(step), pc.split(step)):
                xb = xb.to(acc)
                torch.bmm(xb, xb.transpose(1, 2), out=pb)
        energy[:, window] = products.diagonal(0, 2, 3).transpose(1, 2)
        s[:, window][:, :-1] = products.diagonal(1, 2, 3).transpose(1, 2)
    if not energy.amax() < _FINITE:
        return None
    inverse_norm = torch.where(energy > 1e-24, energy, 1.).rsqrt_()
    s[:, :-1].mul_(inverse_norm[:, :-1]).mul_(inverse_norm[:, 1:])
    s[:, -1] = s[:, -2]
    return s.view(n, height, width), inverse_norm.view(n, height, width)


def _similarity_by_blocks(x: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
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


def product(x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool = False) -> Tensor:
    """The convolution of equation (8), weight (C, C), plus bias, plus x if it is the ``residual``; like x.

    x (1 - s) and the sum that the product is added to are only ever made for the pixels of one matrix product.
    """
    dtype, y = product_dtype(x), torch.empty_like(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    for xb, yb, scale in matrices(x, y, (1 - s).to(dtype).unsqueeze(1)):
        out = yb if yb.dtype == dtype else torch.empty_like(yb, dtype=dtype)
        affine(out, weight, (xb * scale).to(dtype), bias, xb if residual else None)
        if out is not yb:
            yb.copy_(out)
    return y


def motion_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, weight: Tensor, s: Tensor, inverse_norm: Tensor, learns: bool = True,
) -> Tuple[Tensor, Tensor]:
    """Derivative of the convolution of x (1 - s). The gradient of the bias is the sum of gy, and not here.

    Args:
        gy: Gradient of the convolved frames, with x's dtype and strides.
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        weight: Weight, (C, C, 1, 1).
        s, inverse_norm: What :func:`similarity` returned for x.
        learns: Whether the gradient of the weight is wanted.

    Returns:
        Gradients of x, like x, and of the weight, in its dtype, or empty.
    """
    acc, dtype = acc_dtype(x), product_dtype(x)
    n, channels, height, width = x.shape
    gx, g_weight = torch.empty_like(x), x.new_zeros(channels, channels, dtype=acc)
    matrix = weight.flatten(1).t().to(dtype)
    for xb, gb, qb, scale in matrices(x, gy, gx, (1 - s).to(dtype).unsqueeze(1)):
        gb = gb.to(dtype)
        if learns and dtype == acc:
            g_weight.addmm_(gb, (xb * scale).t())
        elif learns:
            g_weight.add_(torch.mm(gb, (xb * scale).t().to(dtype)))
        if dtype == x.dtype:
            affine(qb, matrix, gb, None, None)
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
