"""The operators as PyTorch calls, forward and backward: what runs on CPUs, and where Triton's kernels can't.

Each pass over the frames is cut into blocks that stay in the cache from one call to the next, so a frame is read from
memory about as often as its layer needs and nothing of a clip's size is written but results. Nothing here is recorded
by autograd. Frames x are (N, C, H, W), N = B * T, contiguous or channels_last, and results of their shape have their
strides; ``acc`` stands for x's dtype, at least float32, in which everything but matrix products is computed.
"""
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .layout import is_channels_last
from .vectors import attention, gate_backward, key_bound, taps_backward

__all__ = [
    'front', 'front_backward', 'gates', 'like', 'mix', 'motion_conv', 'motion_conv_backward', 'normed_product',
    'product', 'similarity', 'sme',
]

# Elements of a block. Smaller ones would fit in the L2 cache, but then the calls cost more than the memory.
_BLOCK = 2 ** 19
# Pixels that one matrix product takes: enough to hide that the weight is packed anew each time.
_ROWS = 1536
# The energy of features that are not huge, see similarity().
_FINITE = 1e38


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x: Tensor, num_frames: int, dim: int, *others: Tensor) -> Iterator[List[Tensor]]:
    """Blocks (..., clips, T, C, H*W) of x and others, which are (..., N, C, H*W) or expand to it.

    A block is a few small clips, or a large one cut along dimension ``dim``; where there is no cache to fit, it is all.
    """
    size, clips = x.shape[dim], x.shape[0] // num_frames
    clip = max(1, num_frames * x.shape[1] * x.shape[2])
    step, group = max(1, _BLOCK * size // clip), max(1, _BLOCK // clip)
    if x.device.type != 'cpu':
        step, group = size, clips
    tensors = [v.expand(*v.shape[:-3], *x.shape).unflatten(-3, (clips, num_frames)) for v in (x, *others)]
    for n in range(0, clips, max(1, group)):
        for start in range(0, size, step):
            yield [
                v.narrow(-4, n, min(group, clips - n)).narrow(dim - 3, start, min(step, size - start)) for v in tensors]


def _outer(x: Tensor) -> int:
    """The outer one of the dimensions C and H*W of frames, along which blocks are long runs of memory."""
    return 2 if is_channels_last(x) else 1


def like(g: Tensor, x: Tensor) -> Tensor:
    """A gradient with the strides and the dtype of the frames."""
    return g.to(x.dtype) if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def _spans(num_taps: int, num_frames: int) -> Iterator[Tuple[int, slice, slice]]:
    """For each tap that reaches any frame: its index, the frames it is added to, and those it reads. The middle first.
    """
    middle = num_taps // 2
    for k in sorted(range(num_taps), key=lambda k: abs(k - middle)):
        step = k - middle
        if abs(step) < num_frames:
            yield k, slice(max(0, -step), num_frames - max(0, step)), slice(max(0, step), num_frames + min(0, step))


def mix(
        x: Tensor, num_frames: int, gate: Optional[Tensor], taps: Optional[Tensor],
        offset: Optional[Tensor] = None, transpose: bool = False,
) -> Tensor:
    """TIM of the gated clip, in one pass over the frames, or the transpose of that map.

    The gates are multiplied into the taps, (K, N, C) of them, so that the gated clip is never written.

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        gate: Gates, (N, C) in acc, or None.
        taps: Taps, (C, 1, K), or None.
        offset: What is added, (N, C) in acc.
        transpose: Gate after mixing, and mix with the taps reversed.

    Returns:
        Frames like x.
    """
    acc = _acc(x)
    y = torch.empty_like(x)
    scales = x.new_ones(1, 1, 1, dtype=acc) if taps is None else taps.to(acc).permute(2, 1, 0).contiguous()
    if transpose:
        scales = scales.flip(0)
    if gate is not None:
        scales = scales * gate
    frames = x.flatten(2)
    scales = scales.unsqueeze(3).expand(-1, *frames.shape)
    others = [] if offset is None else [offset.unsqueeze(2)]
    for xb, yb, sb, *ob in _blocks(frames, num_frames, _outer(x), y.flatten(2), scales, *others):
        xb = xb.to(acc)
        total = yb if yb.dtype == acc else torch.empty_like(xb)
        middle, *rest = _spans(scales.shape[0], num_frames)
        torch.mul(xb, sb[middle[0]], out=total)
        for k, to, source in rest:
            total[:, to].addcmul_(xb[:, source], sb[k, :, to if transpose else source])
        for v in ob:
            total.add_(v)
        if total is not yb:
            yb.copy_(total)
    return y


def front(
        x: Tensor, num_frames: int, w1: Optional[Tensor], w2: Optional[Tensor], w3: Optional[Tensor],
        b3: Optional[Tensor], taps: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CME, then TIM.

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        w1, w2, w3, b3: Weights of CME, (C1, C), (C2, C), (C, C1), and (C,) or None; all None if there is no CME.
        taps: Taps of TIM, (C, 1, K), or None if there is no TIM.

    Returns:
        Frames y like x, and in acc, empty if there is no CME: pooled vectors (N, C), values z (N, C1), clamped keys
        k (N, C2), gates (N, C).
    """
    if w1 is None or w2 is None or w3 is None:
        pooled, z, k, gate = (x.new_empty(0, dtype=_acc(x)) for _ in range(4))
        return mix(x, num_frames, None, taps), pooled, z, k, gate
    pooled, z, k, gate = gates(x, num_frames, w1, w2, w3, b3)
    return mix(x, num_frames, gate, taps), pooled, z, k, gate


def gates(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations (2) to (6): what :func:`front` returns besides y."""
    acc = _acc(x)
    pooled = x.mean((2, 3), dtype=acc)
    z = torch.mm(pooled, w1.to(acc).t())
    k = torch.mm(pooled, w2.to(acc).t())
    bound = key_bound(k.shape[1])
    k.clamp_(-bound, bound)
    values, keys = (v.view(v.shape[0] // num_frames, num_frames, v.shape[1]) for v in (z, k))
    fused = torch.baddbmm(values, attention(keys), values).flatten(0, 1)
    gate = torch.mm(fused, w3.to(acc).t())
    if b3 is not None:
        gate.add_(b3)
    return pooled, z, k, gate.sigmoid_()


def front_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Optional[Tensor], w2: Optional[Tensor], w3: Optional[Tensor],
        b3: Optional[Tensor], taps: Optional[Tensor], pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivative of :func:`front`.

    Args:
        gy: Gradient of y, in any layout; the other arguments are those of :func:`front` and what it returned.

    Returns:
        Gradients of x, like x, and of w1, w2, w3, b3 and taps in their dtypes, empty where there is none.
    """
    gy = like(gy, x)
    g_gate, g_taps = taps_backward(
        _correlate(x, gy, num_frames, 1 if taps is None else taps.shape[2]), None if w3 is None else gate, taps)
    if w1 is None or w2 is None or w3 is None:
        g1, g2, g3, g_b3 = (x.new_empty(0) for _ in range(4))
        return mix(gy, num_frames, None, taps, transpose=True), g1, g2, g3, g_b3, g_taps
    g_pooled, g1, g2, g3, g_b3 = gate_backward(g_gate, num_frames, w1, w2, w3, b3, pooled, z, k, gate)
    gx = mix(gy, num_frames, gate, taps, offset=g_pooled.div_(x.shape[2] * x.shape[3]), transpose=True)
    return gx, g1, g2, g3, g_b3, g_taps


def _correlate(x: Tensor, gy: Tensor, num_frames: int, num_taps: int) -> Tensor:
    """For tap k and frame n, the sum over the pixels of x_n gy_{n-k+K//2}, (K, N, C) in acc."""
    acc, frames = _acc(x), x.flatten(2)
    sums = x.new_zeros(num_taps, *x.shape[:2], 1, dtype=acc)
    for xb, gb, sb in _blocks(frames, num_frames, _outer(x), gy.flatten(2), sums):
        xb, gb = xb.to(acc), gb.to(acc)
        for k, to, source in _spans(num_taps, num_frames):
            sb[k, :, source, :, 0] += (xb[:, source] * gb[:, to]).sum(3)
    return sums.squeeze(3)


def similarity(x: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
    """Similarities of equation (7) and inverse norms, both (N, H, W) in acc.

    As :func:`.reference.similarity`: the features of a zero pixel have inverse norm 1.
    """
    acc, (n, _, height, width) = _acc(x), x.shape
    s, inverse_norm = (x.new_ones(n, 1, height * width, dtype=acc) for _ in range(2))
    if num_frames > 1:
        for xb, sb, ib in _blocks(x.flatten(2), num_frames, 2, s, inverse_norm):
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
    """Frames as matrices (C, pixels) that share x's memory: some thousand pixels of many frames, or those of each."""
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


def product(x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool) -> Tensor:
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


def motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor]:
    """The 1x1 convolution of x (1 - s) in equation (8).

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        weight: Weight, (C, C, 1, 1).
        bias: Bias, (C,), or None.

    Returns:
        Convolved frames like x, and what :func:`similarity` returns.
    """
    s, inverse_norm = similarity(x, num_frames)
    return product(x, s, weight.flatten(1), bias, residual=False), s, inverse_norm


def motion_conv_backward(
        gh: Tensor, x: Tensor, num_frames: int, weight: Tensor, s: Tensor, inverse_norm: Tensor, learns: bool = True,
) -> Tuple[Tensor, Tensor]:
    """Derivative of :func:`motion_conv`; that of the bias, the sum of gh, is not among it.

    Args:
        gh: Gradient of the convolved frames, in any layout; the other arguments are those of :func:`motion_conv` and
            what it returned.
        learns: Whether the gradient of the weight is wanted.

    Returns:
        Gradients of x, like x, and of the weight, in its dtype, or empty.
    """
    acc, dtype, channels_last, (n, channels, height, width) = _acc(x), _product_dtype(x), is_channels_last(x), x.shape
    gx, g_weight = torch.empty_like(x), x.new_zeros(channels, channels, dtype=acc)
    matrix = weight.flatten(1).t().to(dtype)
    views = (_matrices(v, channels_last) for v in (x, like(gh, x), gx, (1 - s).to(dtype).unsqueeze(1)))
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
    maps = (v.view(n, 1, height * width) for v in (s, inverse_norm))
    for xb, qb, sb, ib in _blocks(x.flatten(2), num_frames, 2, gx.flatten(2), *maps):
        xb, sb, ib, total = xb.to(acc), sb[:, :, :1], ib[:, :, :1], qb.to(acc)
        gs = (total * xb).sum(2, keepdim=True).neg_()
        pairs = gs[:, :-1]
        pairs[:, -1:] += gs[:, -1:]  # the last frame's similarity is that of the one before
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


def sme(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor], mean: Optional[Tensor],
        var: Optional[Tensor], gamma: Optional[Tensor], beta: Optional[Tensor], eps: float,
) -> Tensor:
    """Equation (8) with the running statistics, which are folded into the weight: inference.

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        weight: Weight of the convolution, (C, C, 1, 1).
        bias: Its bias, (C,), or None.
        mean, var: Statistics, (C,), both None if there is no normalisation.
        gamma, beta: Weight and bias of the normalisation, (C,), or None.
        eps: What it adds to the variance.

    Returns:
        Frames like x.
    """
    return normed_product(x, similarity(x, num_frames)[0], weight, bias, mean, var, gamma, beta, eps)


def normed_product(
        x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], mean: Optional[Tensor], var: Optional[Tensor],
        gamma: Optional[Tensor], beta: Optional[Tensor], eps: float,
) -> Tensor:
    """:func:`sme` of known similarities s, (N, H, W)."""
    acc, matrix = _acc(x), weight.flatten(1)
    if mean is not None and var is not None:
        scale = (var.to(acc) + eps).rsqrt_()
        if gamma is not None:
            scale.mul_(gamma)
        shift = -mean.to(acc) if bias is None else bias.to(acc) - mean
        bias = shift.mul_(scale) if beta is None else shift.mul_(scale).add_(beta)
        matrix = matrix.to(acc) * scale.unsqueeze(1)
    return product(x, s, matrix, bias, residual=True)
