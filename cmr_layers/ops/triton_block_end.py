"""The end of a residual block as Triton kernels: both branches are read once, their rectified sum is written once.

One kernel sums what it writes over the pixels. The other compares it with the frame before, which it still holds.

Frames are folded, row n = b * T + t, and lie in memory as (N, C, P) or (N, P, C), P = H * W. All sums are float32, of
values as they are stored.
"""
from typing import Any, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_end import splits
from .layout import is_channels_last
from .triton_cme_tim import Launches, launch, strides
from .triton_sme import similarity

# Launch configurations, for contiguous and for channels_last frames; see triton_cme_tim.py.
_LAUNCH: Launches = {
    'mean': (dict(BLOCK_P=256, BLOCK_C=8, num_warps=4), dict(BLOCK_P=64, BLOCK_C=64, num_warps=4)),
    'similarity': (dict(FRAMES=8, TILE=4096, num_warps=4),) * 2,
}
# Programs that fill a card: one for each multiprocessor of an H100.
_PROGRAMS = 132

__all__ = ['with_mean', 'with_similarity']


@triton.jit
def _rectified(u, v, y):
    """relu(u + v), rounded as y stores it. A NaN stays one."""
    total = u.to(tl.float32) + v.to(tl.float32)
    return tl.maximum(total, 0., propagate_nan=tl.PropagateNan.ALL).to(y.dtype.element_ty)


@triton.jit
def _end_mean_kernel(
        x, shortcut, y, partial,    # 3 x (N, C, P) in any order, all alike, (splits, N, C)
        N, C, P,
        stride_n, stride_c, stride_p,
        STEPS,                      # blocks of pixels of a program
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """y = relu(x + shortcut), and the shares of its mean over the pixels."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    n = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)  # summed once, at the end: a sum in the loop would wait for all
    for step in range(STEPS):
        p = (split * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        at = n * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
        mask = (p < P)[:, None] & (c < C)[None, :]
        v = _rectified(tl.load(x + at, mask=mask, other=0.), tl.load(shortcut + at, mask=mask, other=0.), y)
        tl.store(y + at, v, mask=mask)
        total += v.to(tl.float32)
    tl.store(partial + (split * N + n) * C + c, tl.sum(total, 0) / P, mask=c < C)


@triton.jit
def _end_similarity_kernel(
        x, shortcut, y, s,      # 3 x (N, P, C), (N, P)
        T, C, P,
        FRAMES: tl.constexpr,   # of a program
        AFTER: tl.constexpr,    # 1 if a program compares its last frame with one of another program, else 0
        PIXELS: tl.constexpr,
        BLOCK_C: tl.constexpr,  # all channels
):
    """y = relu(x + shortcut), and equation (7): a program walks over the frames and holds all channels of two of them.

    The pair of the last two frames writes the similarity of both, s_T = s_{T-1}.
    """
    blocks, chunks = tl.cdiv(P, PIXELS), tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    p = (pid % blocks) * PIXELS + tl.arange(0, PIXELS)
    pid = pid // blocks
    start = (pid % chunks) * FRAMES
    first = (pid // chunks).to(tl.int64) * T
    c = tl.arange(0, BLOCK_C)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = ((first + start) * P + p)[:, None] * C + c[None, :]
    u = tl.load(x + at, mask=inside, other=0.)
    v = tl.load(shortcut + at, mask=inside, other=0.)
    here = tl.zeros([PIXELS, BLOCK_C], tl.float32)
    inverse_norm_here = tl.zeros([PIXELS], tl.float32)
    for f in tl.static_range(FRAMES + AFTER):
        t = start + f
        rectified = _rectified(u, v, y)
        if f + 1 < FRAMES + AFTER:  # before the store, which loads may not overtake
            u = tl.load(x + at + P * C, mask=inside & (t + 1 < T), other=0.)
            v = tl.load(shortcut + at + P * C, mask=inside & (t + 1 < T), other=0.)
        if f < FRAMES:
            tl.store(y + at, rectified, mask=inside & (t < T))
        there = rectified.to(tl.float32)
        energy = tl.sum(there * there, 1)
        if y.dtype.element_ty != tl.float16:
            if tl.max(energy, 0) > 1e37:
                # Squares that overflow, or are about to: once more, with those pixels scaled. A cosine does not mind.
                there *= tl.where(energy > 1e37, 2.**-75, 1.)[:, None]
                energy = tl.sum(there * there, 1)
        inverse_norm = tl.where(energy > 1e-24, tl.rsqrt(energy), 1.)  # a norm below 1e-12 counts as zero
        if f > 0:
            cosine = tl.sum(here * there, 1) * inverse_norm_here * inverse_norm
            row = s + (first + t - 1) * P + p
            tl.store(row, cosine, mask=(p < P) & (t < T))
            tl.store(row + P, cosine, mask=(p < P) & (t == T - 1))
        here, inverse_norm_here = there, inverse_norm
        at += P * C


def with_mean(x: Tensor, shortcut: Tensor) -> Tuple[Tensor, Tensor]:
    """relu(x + shortcut), and shares of its mean over the pixels, (splits, N, C)."""
    n, channels, height, width = x.shape
    pixels, y = height * width, torch.empty_like(x)
    meta = launch(_LAUNCH, 'mean', x)
    parts = splits(pixels)
    partial = x.new_empty(parts, n, channels, dtype=torch.float32)
    grid: Any = (n * triton.cdiv(channels, meta['BLOCK_C']), parts)
    steps = triton.cdiv(triton.cdiv(pixels, meta['BLOCK_P']), parts)
    _end_mean_kernel[grid](x, shortcut, y, partial, n, channels, pixels, *strides(x), steps, **meta)
    return y, partial


def with_similarity(x: Tensor, shortcut: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
    """relu(x + shortcut), and its similarities, (N, H, W), of clips of two frames or more."""
    n, channels, height, width = x.shape
    pixels = height * width
    meta = launch(_LAUNCH, 'similarity', x)
    tile, frames = meta.pop('TILE'), min(meta.pop('FRAMES'), triton.next_power_of_2(num_frames))
    block_c = triton.next_power_of_2(channels)
    if not is_channels_last(x) or block_c > tile:  # no program can hold all channels of some pixels, side by side
        y, _ = with_mean(x, shortcut)
        return y, similarity(y, num_frames)[0]
    y, s = torch.empty_like(x), x.new_empty(n, height, width, dtype=torch.float32)
    block_p = min(64, tile // block_c)
    columns = n // num_frames * triton.cdiv(pixels, block_p)
    while frames > 1 and columns * triton.cdiv(num_frames, frames) < _PROGRAMS:
        frames //= 2
    chunks = triton.cdiv(num_frames, frames)
    _end_similarity_kernel[(columns * chunks,)](
        x, shortcut, y, s, num_frames, channels, pixels, FRAMES=frames, AFTER=int(chunks > 1), PIXELS=block_p,
        BLOCK_C=block_c, **meta)
    return y, s
