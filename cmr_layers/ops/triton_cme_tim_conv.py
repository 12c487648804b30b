"""CME's gate, TIM and the 1x1 convolution behind them as one Triton kernel: the mixed frames never reach memory.

A tile of the matrix product's left side is all T frames of some pixels, gated and mixed on the way in. Each frame is
read three times, from the second-level cache: the copies into shared memory go past the first. Wide convolutions would
mix once for every block of output channels, so this is for one block (:mod:`.cme_tim` says where), in channels_last.
"""
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['gated_conv']


@triton.jit
def _gated_conv_kernel(
        x, scales, weight, bias, y,         # (N, P, C), (TAPS, N, C), (OUT, C), (OUT,), (N, P, OUT)
        N, T, P, C, OUT,
        TAPS: tl.constexpr,                 # 1 or 3
        HAS_BIAS: tl.constexpr,
        DOT: tl.constexpr,                  # what the matrix unit multiplies
        BLOCK_T: tl.constexpr,              # all frames of a clip
        BLOCK_P: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_O: tl.constexpr,
):
    """y_t = W (sum_k scale_{k,t+k-1} x_{t+k-1}) + b for some pixels of all frames of a clip."""
    blocks_o, blocks_p = tl.cdiv(OUT, BLOCK_O), tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    o = (pid % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // blocks_o
    start_p = (pid % blocks_p) * BLOCK_P
    first = (pid // blocks_p).to(tl.int64) * T
    t = tl.arange(0, BLOCK_T)[:, None, None]
    p = (start_p + tl.arange(0, BLOCK_P))[None, :, None]
    acc = tl.zeros([BLOCK_T * BLOCK_P, BLOCK_O], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        channel = c[None, None, :]
        u = tl.zeros([BLOCK_T, BLOCK_P, BLOCK_K], tl.float32)
        for tap in tl.static_range(TAPS):
            s = t + tap - TAPS // 2
            frame = (s >= 0) & (s < T) & (t < T)
            v = tl.load(
                x + ((first + s) * P + p) * C + channel, mask=frame & (p < P) & (channel < C), other=0.).to(tl.float32)
            u += v * tl.load(scales + (tap * N + first + s) * C + channel, mask=frame & (channel < C), other=0.)
        rows = tl.reshape(u, [BLOCK_T * BLOCK_P, BLOCK_K]).to(DOT)
        cols = tl.load(weight + o[None, :] * C + c[:, None], mask=(o < OUT)[None, :] & (c < C)[:, None], other=0.)
        acc += tl.dot(rows, cols.to(DOT), input_precision='ieee')
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < OUT, other=0.).to(tl.float32)[None, :]
    row = tl.arange(0, BLOCK_T * BLOCK_P)
    t_row = row // BLOCK_P
    p_row = start_p + row % BLOCK_P
    at = ((first + t_row) * P + p_row)[:, None] * OUT + o[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=((t_row < T) & (p_row < P))[:, None] & (o < OUT)[None, :])


def gated_conv(
        x: Tensor, num_frames: int, scales: Tensor, weight: Tensor, bias: Optional[Tensor], dot: Any = None,
) -> Tensor:
    """conv1x1(mix(x, scales)) of channels_last frames (N, C, H, W), to channels_last (N, OUT, H, W).

    ``dot`` is the dtype that the matrix unit multiplies, x's own by default.
    """
    n, channels, height, width = x.shape
    out_channels, pixels = weight.shape[0], height * width
    y = torch.empty(
        n, out_channels, height, width, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    block_t = triton.next_power_of_2(num_frames)
    block_o = min(64, max(16, triton.next_power_of_2(out_channels)))
    block_p = max(1, 128 // block_t)  # as much as the registers hold
    grid = (n // num_frames * triton.cdiv(pixels, block_p) * triton.cdiv(out_channels, block_o),)
    _gated_conv_kernel[grid](
        x, scales.contiguous(), weight.flatten(1).contiguous(), None if bias is None else bias.contiguous(), y,
        n, num_frames, pixels, channels, out_channels, TAPS=scales.shape[0], HAS_BIAS=bias is not None,
        DOT=dot or getattr(tl, str(x.dtype).removeprefix('torch.')), BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_K=32,
        BLOCK_O=block_o, num_warps=8, num_stages=3, enable_fp_fusion=True)
    return y
