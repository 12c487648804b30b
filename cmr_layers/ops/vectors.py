"""The backward of CME's vector path and of the taps, shared by the plain and the Triton form.

These are matrices of one row per frame, a thousandth of a clip: a library's matrix products do them well.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['attention', 'gate_backward', 'key_bound', 'taps_backward']


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
    values, keys = (v.view(v.shape[0] // num_frames, num_frames, v.shape[1]) for v in (z, k))
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
        Gradients of the gates, (N, C), and the taps, (C, 1, K) in their dtype; empty for what is None.
    """
    g_gate, g_taps = sums.new_empty(0), sums.new_empty(0)
    if gate is not None:
        weights = sums.new_ones(1) if taps is None else taps.to(sums.dtype).permute(2, 1, 0)
        g_gate = (sums * weights).sum(0)
    if taps is not None:
        g_taps = (sums if gate is None else sums * gate).sum(1).t().contiguous().unsqueeze(1).to(taps.dtype)
    return g_gate, g_taps
