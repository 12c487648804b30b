"""CME and TIM as PyTorch calls, forward and backward: for CPUs, and where Triton's kernels can't run.

Nothing here is recorded by autograd. Frames x are (N, C, H, W), N = B * T, contiguous or channels_last, and results of
their shape have their strides. ``acc`` stands for x's dtype, at least float32.
"""
from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from .blocks import acc_dtype, blocks, outer

__all__ = ['correlate', 'gate_backward', 'gates', 'key_bound', 'mix', 'taps_backward']


def gates(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations (2) to (6).

    Args:
        x: Frames, (N, C, H, W).
        num_frames: Frames T of a clip.
        w1, w2, w3, b3: Weights of CME, (C1, C), (C2, C), (C, C1), and (C,) or None.

    Returns:
        In acc: pooled vectors (N, C), values z (N, C1), clamped keys k (N, C2), gates (N, C).
    """
    acc = acc_dtype(x)
    pooled = x.mean((2, 3), dtype=acc)
    z = torch.mm(pooled, w1.to(acc).t())
    k = torch.mm(pooled, w2.to(acc).t())
    bound = key_bound(k.shape[1])
    k.clamp_(-bound, bound)
    values, keys = (v.reshape(-1, num_frames, v.shape[1]) for v in (z, k))
    fused = torch.baddbmm(values, attention(keys), values).flatten(0, 1)
    gate = torch.mm(fused, w3.to(acc).t())
    if b3 is not None:
        gate.add_(b3)
    return pooled, z, k, gate.sigmoid_()


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
    acc = acc_dtype(x)
    y = torch.empty_like(x)
    scales = x.new_ones(1, 1, 1, dtype=acc) if taps is None else taps.to(acc).permute(2, 1, 0).contiguous()
    if transpose:
        scales = scales.flip(0)
    if gate is not None:
        scales = scales * gate
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
