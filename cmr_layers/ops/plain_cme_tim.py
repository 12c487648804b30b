"""CME and TIM as PyTorch calls, forward and backward: for CPUs, and where Triton's kernels can't run.

Nothing here is recorded by autograd. Frames x are (N, C, H, W), N = B * T, contiguous or channels_last, and results of
their shape have their strides. ``acc`` stands for x's dtype, at least float32.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import acc_dtype, blocks, outer
from .layout import is_channels_last
from .products import has_onednn, is_exact

__all__ = ['correlate', 'gate_backward', 'gates', 'key_bound', 'mix', 'scales_of', 'taps_backward']

#: Bytes of frames whose gated copy is made as a whole, at most. More of them are gated block by block.
GATED = 2 ** 24
# Pixels up to which a product sums channels_last frames faster than a sum does
_POOLED_BY_PRODUCT = 14 * 14


def gates(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor], taps: Optional[Tensor],
        partial: Optional[Tensor] = None, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Equations (2) to (6).

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        w1, w2, w3, b3: Weights of CME, (C1, C), (C2, C), (C, C1), and (C,) or None.
        taps: Taps of the TIM behind it, (C, 1, K), or None.
        partial: Shares of the pooled vectors, (splits, N, C), if they are known; their sum is taken.
        prefix: Columns at the beginning of W that are not pooled.

    Returns:
        In acc: pooled vectors (N, C), values z (N, C1), clamped keys k (N, C2), gates (N, C), and the scales of
        :func:`scales_of`, or None: this form makes them where they are wanted.
    """
    acc = acc_dtype(x)
    pooled = _pool(x[..., prefix:]) if partial is None else partial.sum(0, dtype=acc)
    z = torch.mm(pooled, w1.to(acc).t())
    k = torch.mm(pooled, w2.to(acc).t())
    bound = key_bound(k.shape[1])
    k.clamp_(-bound, bound)
    values, keys = (v.reshape(-1, num_frames, v.shape[1]) for v in (z, k))
    fused = torch.baddbmm(values, attention(keys), values).flatten(0, 1)
    gate = torch.mm(fused, w3.to(acc).t())
    if b3 is not None:
        gate.add_(b3)
    return pooled, z, k, gate.sigmoid_(), None


def _pool(x: Tensor) -> Tensor:
    """Mean of each frame's channels over the pixels, (N, C) in acc."""
    if (
            x.device.type == 'cpu' and x.dtype == torch.float32 and 0 < x.shape[2] * x.shape[3] <= _POOLED_BY_PRODUCT
            and x.numel() and is_channels_last(x) and is_exact()):
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.bmm(x.new_ones(x.shape[0], 1, pixels.shape[1]), pixels)[:, 0].div_(pixels.shape[1])
    return x.mean((2, 3), dtype=acc_dtype(x))


def scales_of(gate: Optional[Tensor], taps: Optional[Tensor]) -> Tensor:
    """What tap k multiplies frame n by, gates (N, C) times taps (C, 1, K), either of which may be None: (K, N or 1, C).
    """
    if taps is None:
        assert gate is not None
        return gate[None]
    taps = taps.permute(2, 1, 0)
    return taps if gate is None else taps.to(gate.dtype) * gate


def mix(
        x: Tensor, num_frames: int, gate: Optional[Tensor], taps: Optional[Tensor],
        offset: Optional[Tensor] = None, transpose: bool = False, scales: Optional[Tensor] = None,
        prefix: int = 0,
) -> Tensor:
    """TIM of the gated clip, or the transpose of that map.

    A CPU has a fast convolution for the taps of channels_last frames. Otherwise, and where the gated clip would be
    large, the gates are multiplied into the taps, (K, N, C) of them, and one pass over the frames does both.

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        gate: Gates, (N, C) in acc, or None.
        taps: Taps, (C, 1, K), or None.
        offset: What is added, (N, C) in acc.
        transpose: Gate after mixing, and mix with the taps reversed.
        scales: What :func:`scales_of` makes of gates and taps, if somebody has.
        prefix: Columns at the beginning of W that the offset is not added to.

    Returns:
        Frames like x.
    """
    if prefix and offset is not None:
        y = mix(x, num_frames, gate, taps, None, transpose, scales)
        y[..., prefix:].add_(offset[:, :, None, None])
        return y
    if (
            taps is not None and x.device.type == 'cpu' and x.numel() and is_channels_last(x) and has_onednn(x.dtype)
            and (gate is None or transpose or x.nbytes <= GATED)):
        return _convolved(x, num_frames, gate, taps, offset, transpose)
    acc = acc_dtype(x)
    y = torch.empty_like(x)
    scales = (scales_of(gate, taps) if scales is None else scales).to(acc)
    scales = scales.flip(0) if transpose else scales.contiguous()
    frames = x.flatten(2)
    scales = scales.unsqueeze(3).expand(-1, *frames.shape)
    others = [] if offset is None else [offset.unsqueeze(2)]
    for xb, yb, sb, *ob in blocks(frames, num_frames, outer(x), y.flatten(2), scales, *others):
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


def _convolved(
        x: Tensor, num_frames: int, gate: Optional[Tensor], taps: Tensor, offset: Optional[Tensor], transpose: bool,
) -> Tensor:
    """:func:`mix` by a depthwise convolution over the frames and pixels (T, H*W) of a clip."""
    gate, offset = (None if v is None else v.to(x.dtype)[:, :, None, None] for v in (gate, offset))
    u = x if gate is None or transpose else x * gate
    clips = u.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)
    weight = taps.to(x.dtype).unsqueeze(3)
    y = F.conv2d(
        clips, weight.flip(2) if transpose else weight, padding=(taps.shape[2] // 2, 0), groups=taps.shape[0])
    y = y.contiguous(memory_format=torch.channels_last)
    y.as_strided_(x.shape, x.stride())  # in place: an output must be no view
    if gate is not None and transpose:
        y.mul_(gate)
    return y if offset is None else y.add_(offset)


def _spans(num_taps: int, num_frames: int) -> Iterator[Tuple[int, slice, slice]]:
    """For each tap that reaches any frame: its index, the frames it is added to, and those it reads. The middle first.
    """
    middle = num_taps // 2
    for k in sorted(range(num_taps), key=lambda k: abs(k - middle)):
        step = k - middle
        if abs(step) < num_frames:
            yield k, slice(max(0, -step), num_frames - max(0, step)), slice(max(0, step), num_frames + min(0, step))


def correlate(x: Tensor, gy: Tensor, num_frames: int, num_taps: int) -> Tensor:
    """For tap k and frame n, the sum over the pixels of x_n gy_{n-k+K//2}, (K, N, C) in acc."""
    acc, frames = acc_dtype(x), x.flatten(2)
    sums = x.new_zeros(num_taps, *x.shape[:2], 1, dtype=acc)
    for xb, gb, sb in blocks(frames, num_frames, outer(x), gy.flatten(2), sums):
        xb, gb = xb.to(acc), gb.to(acc)
        for k, to, source in _spans(num_taps, num_frames):
            sb[k, :, source, :, 0] += (xb[:, source] * gb[:, to]).sum(3)
    return sums.squeeze(3)


def key_bound(width: int) -> float:
    """Bound on keys of a width that keeps the dot products of equation (4) below the largest float32."""
    return float((3e38 / width) ** 0.5)


def attention(k: Tensor) -> Tensor:
    """Weights of equation (5), (B, T, T), of clamped keys (B, T, C2)."""
    return torch.matmul(k, k.transpose(1, 2)).neg_().softmax(2)


def gate_backward(
        g: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor],
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of equations (2) to (6).

    Args:
        g: Gradient of the gates, (N, C).
        num_frames: Frames T of a clip.
        w1, w2, w3, b3: Weights, (C1, C), (C2, C), (C, C1), and (C,) or None.
        pooled: What the forward pass left: pooled vectors (N, C),
        z: values (N, C1),
        k: clamped keys (N, C2),
        gate: gates (N, C).

    Returns:
        Gradients of the pooled vectors, w1, w2, w3 and b3 (empty if None), the weights' in the weights' dtypes.
    """
    g = torch.ops.aten.sigmoid_backward(g, gate)
    values, keys = (v.reshape(-1, num_frames, v.shape[1]) for v in (z, k))
    d = attention(keys)
    fused = torch.baddbmm(values, d, values).flatten(0, 1)
    g_fused = torch.mm(g, w3.to(g.dtype))
    g_values = g_fused.view_as(values)
    g_d = torch.ops.aten._softmax_backward_data(torch.bmm(g_values, values.transpose(1, 2)), d, 2, d.dtype)
    g_z = torch.baddbmm(g_values, d.transpose(1, 2), g_values).flatten(0, 1)
    g_k = torch.bmm(g_d + g_d.transpose(1, 2), keys).neg_().flatten(0, 1)
    g_k.masked_fill_(k.abs() >= key_bound(k.shape[1]), 0)  # clamped
    g_pooled = torch.mm(g_z, w1.to(g.dtype)).addmm_(g_k, w2.to(g.dtype))
    g_b3 = g.new_empty(0) if b3 is None else g.sum(0).to(b3.dtype)
    return (
        g_pooled, torch.mm(g_z.t(), pooled).to(w1.dtype), torch.mm(g_k.t(), pooled).to(w2.dtype),
        torch.mm(g.t(), fused).to(w3.dtype), g_b3)


def taps_backward(sums: Tensor, gate: Optional[Tensor], taps: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Gradients of gates and taps.

    Args:
        sums: For tap k and frame n, the sum over the pixels of x_n g_{n-k+K//2}, (K, N, C); (1, N, C) without taps.
        gate: Gates, (N, C), or None if there is no CME.
        taps: Taps, (C, 1, K), or None if there is no TIM.

    Returns:
        Gradients of the gates, (N, C), and of the taps, (C, 1, K) in their dtype. One that is None has an empty one.
    """
    g_gate, g_taps = sums.new_empty(0), sums.new_empty(0)
    if gate is not None:
        weights = sums.new_ones(1) if taps is None else taps.to(sums.dtype).permute(2, 1, 0)
        g_gate = (sums * weights).sum(0)
    if taps is not None:
        g_taps = (sums if gate is None else sums * gate).sum(1).t().contiguous().unsqueeze(1).to(taps.dtype)
    return g_gate, g_taps
