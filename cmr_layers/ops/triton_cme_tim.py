"""CME and TIM as Triton kernels: pool, project, gate, and one pass over the frames that gates and mixes them.

A clip is read twice and written once. Two launches on vectors stand between the two reads. A single kernel for both
would stream the weights of a wide block through one multiprocessor.

Frames are folded, row n = b * T + t, and lie in memory as (N, C, P) or (N, P, C), P = H * W. All sums are float32.
"""
from typing import Any, Dict, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain_cme_tim as plain
from .layout import is_channels_last

# Launch configurations, for contiguous and for channels_last frames. They come from the compiler's resource report
# (python -m benchmarks.kernels), and none has been timed yet. Nothing is tuned at run time: that would measure again in
# every process, and break the first CUDA graph. Contraction of products and sums is pinned, since its default differs
# between versions of Triton and results would move with it.
Launches = Dict[str, Tuple[Dict[str, Any], ...]]
_LAUNCH: Launches = {
    'pool': (dict(BLOCK_P=256, BLOCK_C=8, num_warps=4), dict(BLOCK_P=64, BLOCK_C=64, num_warps=4)),
    'mix': (
        dict(FRAMES=8, PIXELS=256, BLOCK_P=64, BLOCK_C=4, num_warps=4),
        dict(FRAMES=8, PIXELS=16, BLOCK_P=4, BLOCK_C=64, num_warps=8)),
    'correlate': (
        dict(FRAMES=8, PIXELS=512, BLOCK_P=64, BLOCK_C=4, num_warps=8),
        dict(FRAMES=8, PIXELS=64, BLOCK_P=4, BLOCK_C=64, num_warps=8)),
    'project': (dict(BLOCK_N=8, BLOCK_O=4, BLOCK_K=256, num_warps=4),) * 2,
    'project, wide': (dict(BLOCK_N=8, BLOCK_O=4, BLOCK_K=512, num_warps=8),) * 2,
    'gate': (dict(BLOCK_K=32, num_warps=4),) * 2,
}
# The projections hold a tile of each split at once.
MAX_SPLITS = 8
# The kernel of equations (4) to (6) holds a matrix of all frames by all frames, which spills beyond this.
MAX_FRAMES = 32

__all__ = ['correlate', 'gates', 'launch', 'mix', 'strides']


@triton.jit
def _pool_kernel(
        x, partial,             # (N, C, P) in any order, (splits, N, C)
        N, C, P,
        stride_n, stride_c, stride_p,
        split_size,             # pixels of a program
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Sums over the pixels, in splits: one program per frame would leave most of the card idle at batch 1."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    n = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    end = tl.minimum(P, (split + 1) * split_size)
    for start in tl.range(split * split_size, end, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)
        at = n * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
        total += tl.load(x + at, mask=(p < end)[:, None] & (c < C)[None, :], other=0.).to(tl.float32)
    tl.store(partial + (split * N + n) * C + c, tl.sum(total, 0) / P, mask=c < C)


@triton.jit
def _project_kernel(
        partial, w1, w2,        # (SPLITS, N, C), (C1, C), (C2, C)
        pooled, z, k,           # (N, C), (N, C1), (N, C2)
        N, C, C1, C2,
        bound,                  # on |k|, so that equation (4) does not overflow
        SPLITS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_O: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """Equations (2) and (3) in one launch: the first programs take rows of W1, the others of W2.

    Products are added up in registers. What tl.dot makes of float32 reads its operands from shared memory again and
    again, and there are too few of them to fill a tensor core.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block, values = tl.program_id(1), tl.cdiv(C1, BLOCK_O)
    if block < values:
        w, out, width, limit, o = w1, z, C1, float('inf'), block * BLOCK_O
    else:
        w, out, width, limit, o = w2, k, C2, bound, (block - values) * BLOCK_O
    o += tl.arange(0, BLOCK_O)
    products = tl.zeros([BLOCK_N, BLOCK_O, BLOCK_K], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        rows = tl.load(w + o[:, None] * C + c[None, :], mask=(o < width)[:, None] & (c < C)[None, :], other=0.)
        inside = (n < N)[:, None] & (c < C)[None, :]
        m = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for split in tl.static_range(SPLITS):
            m += tl.load(partial + (split * N + n)[:, None] * C + c[None, :], mask=inside, other=0.)
        tl.store(pooled + n[:, None] * C + c[None, :], m, mask=inside & (block == 0))
        products += m[:, None, :] * rows.to(tl.float32)[None, :, :]
    # A NaN stays one: a network that diverged must show it.
    v = tl.maximum(tl.sum(products, 2), -limit, propagate_nan=tl.PropagateNan.ALL)
    v = tl.minimum(v, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + n[:, None] * width + o[None, :], v, mask=(n < N)[:, None] & (o < width)[None, :])


@triton.jit
def _gate_kernel(
        z, k, w3, b3, taps,     # (N, C1), (N, C2), (C, C1), (C,), (C, TAPS)
        gate, scales,           # (N, C), (TAPS, N, C)
        N, T, C, C1, C2,
        HAS_BIAS: tl.constexpr,
        TAPS: tl.constexpr,     # 0: no TIM
        BLOCK_T: tl.constexpr,  # all frames of a clip
        BLOCK_C: tl.constexpr,
        BLOCK_J: tl.constexpr,  # of C2
        BLOCK_K: tl.constexpr,  # of C1
):
    """Equations (4) to (6) for one clip and a block of channels; each block attends anew, which is cheap.

    W3 comes before the fusion, W3 (z + d z) = v + d v with v = W3 z, so that nothing but v is kept. The gates leave
    multiplied with the taps, too, so that the pass over the frames reads one factor per tap.
    """
    first = tl.program_id(0).to(tl.int64) * T
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    dots = tl.zeros([BLOCK_T, BLOCK_T, BLOCK_J], tl.float32)
    for start in range(0, C2, BLOCK_J):
        r = start + tl.arange(0, BLOCK_J)
        keys = tl.load(k + (first + t)[:, None] * C2 + r[None, :], mask=(t < T)[:, None] & (r < C2)[None, :], other=0.)
        dots += keys[:, None, :] * keys[None, :, :]
    d = tl.where((t < T)[None, :], -tl.sum(dots, 2), -float('inf'))                 # (4)
    d = tl.exp(d - tl.max(d, 1)[:, None])
    d = d / tl.sum(d, 1)[:, None]
    products = tl.zeros([BLOCK_T, BLOCK_C, BLOCK_K], tl.float32)
    for start in range(0, C1, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        rows = tl.load(z + (first + t)[:, None] * C1 + r[None, :], mask=(t < T)[:, None] & (r < C1)[None, :], other=0.)
        w = tl.load(w3 + c[:, None] * C1 + r[None, :], mask=(c < C)[:, None] & (r < C1)[None, :], other=0.)
        products += rows[:, None, :] * w.to(tl.float32)[None, :, :]
    v = tl.sum(products, 2)
    v += tl.sum(d[:, :, None] * v[None, :, :], 1)                                   # (5)
    if HAS_BIAS:
        v += tl.load(b3 + c, mask=c < C, other=0.).to(tl.float32)[None, :]
    a = 1 / (1 + tl.exp(-v))                                                        # (6)
    at = (first + t)[:, None] * C + c[None, :]
    inside = (t < T)[:, None] & (c < C)[None, :]
    tl.store(gate + at, a, mask=inside)
    for tap in tl.static_range(TAPS):
        w = tl.load(taps + c * TAPS + tap, mask=c < C, other=0.).to(tl.float32)
        tl.store(scales + tap * N * C + at, w[None, :] * a, mask=inside)


@triton.jit
def _mix_kernel(
        x, scales, offset, y,               # (N, C, P) in any order, (TAPS, N or 1, C) in any, (N, C), as x
        T, C, P,
        stride_n, stride_c, stride_p,
        scales_k, scales_n, scales_c,       # strides of the scales
        TAPS: tl.constexpr,                 # 1 or 3
        TRANSPOSED: tl.constexpr,
        HAS_OFFSET: tl.constexpr,
        PREFIX: tl.constexpr,               # pixels that come first, and get no offset
        FRAMES: tl.constexpr,               # of a program
        PIXELS: tl.constexpr,               # of a program
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """One pass over the frames: y_t = sum_k scale_{k,t+k-1} x_{t+k-1}, equation (1) and TIM.

    Its transpose has the scales of the frame that is written, the taps reversed, and an offset, the gradient through
    the pooling. Scales are twice as long as half-precision frames, so a program loads its own once, for many pixels.
    A frame is loaded once for each tap; the first-level cache serves two of the three.
    """
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, PIXELS)
    pid = tl.program_id(0)
    c = ((pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]
    pid = pid // blocks_c
    pixel = (pid % blocks_p) * PIXELS
    pid = pid // blocks_p
    chunks = tl.cdiv(T, FRAMES)
    t = ((pid % chunks) * FRAMES + tl.arange(0, FRAMES))[:, None, None]
    first = (pid // chunks).to(tl.int64) * T
    frame = (t < T) & (c < C)
    middle: tl.constexpr = TAPS // 2
    scale = scales + c * scales_c + (first + t) * scales_n
    before, after = frame & (t > 0), frame & (t + 1 < T)
    other = 0 if TRANSPOSED else scales_n
    same = tl.load(scale + middle * scales_k, mask=frame, other=0.).to(tl.float32)
    if TAPS == 3:
        previous = tl.load(scale + (2 if TRANSPOSED else 0) * scales_k - other, mask=before, other=0.).to(tl.float32)
        following = tl.load(scale + (0 if TRANSPOSED else 2) * scales_k + other, mask=after, other=0.).to(tl.float32)
    if HAS_OFFSET:
        shift = tl.load(offset + (first + t) * C + c, mask=frame, other=0.)
    for start in range(0, PIXELS, BLOCK_P):
        p = (pixel + start + tl.arange(0, BLOCK_P))[None, :, None]
        at = (first + t) * stride_n + p * stride_p + c * stride_c
        v = same * tl.load(x + at, mask=frame & (p < P), other=0.).to(tl.float32)
        if TAPS == 3:
            v += previous * tl.load(x + at - stride_n, mask=before & (p < P), other=0.).to(tl.float32)
            v += following * tl.load(x + at + stride_n, mask=after & (p < P), other=0.).to(tl.float32)
        if HAS_OFFSET:
            v += shift if PREFIX == 0 else tl.where(p >= PREFIX, shift, 0.)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=frame & (p < P))


@triton.jit
def _correlate_kernel(
        x, g, partial,                  # (N, C, P) in any order, as x, (blocks of pixels, TAPS, N, C)
        N, T, C, P,
        stride_n, stride_c, stride_p,
        TAPS: tl.constexpr,
        FRAMES: tl.constexpr,
        PIXELS: tl.constexpr,           # of a program
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """What the gradients of gates and taps are made of: sums over the pixels of x_t g_{t+1}, x_t g_t and x_t g_{t-1}.

    They are in the order of the taps: tap k of frame t - k + 1 met frame t. Each is summed once, behind the loop.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    chunks = tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks
    frame = (pid % chunks) * FRAMES + tl.arange(0, FRAMES)
    t = frame[:, None, None]
    first = (pid // chunks).to(tl.int64) * T
    block = tl.program_id(1).to(tl.int64)
    later = tl.zeros([FRAMES, BLOCK_P, BLOCK_C], tl.float32)
    same = tl.zeros([FRAMES, BLOCK_P, BLOCK_C], tl.float32)
    earlier = tl.zeros([FRAMES, BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        p = (block * PIXELS + start + tl.arange(0, BLOCK_P))[None, :, None]
        at = (first + t) * stride_n + p * stride_p + c[None, None, :] * stride_c
        inside = (t < T) & (p < P) & (c < C)[None, None, :]
        u = tl.load(x + at, mask=inside, other=0.).to(tl.float32)
        same += u * tl.load(g + at, mask=inside, other=0.).to(tl.float32)
        if TAPS == 3:
            later += u * tl.load(g + at + stride_n, mask=inside & (t + 1 < T), other=0.).to(tl.float32)
            earlier += u * tl.load(g + at - stride_n, mask=inside & (t > 0), other=0.).to(tl.float32)
    sums = partial + (block * TAPS * N + first + frame)[:, None] * C + c[None, :]
    stored = (frame < T)[:, None] & (c < C)[None, :]
    tl.store(sums + TAPS // 2 * N * C, tl.sum(same, 1), mask=stored)
    if TAPS == 3:
        tl.store(sums, tl.sum(later, 1), mask=stored)
        tl.store(sums + 2 * N * C, tl.sum(earlier, 1), mask=stored)


def launch(table: Launches, kernel: str, x: Tensor) -> Dict[str, Any]:
    """Compile-time arguments of a kernel for frames x, from a table of them for contiguous and channels_last frames."""
    return {**table[kernel][is_channels_last(x)], 'enable_fp_fusion': True}


def strides(x: Tensor) -> Tuple[int, int, int]:
    """Of frame, channel and pixel of (N, C, H, W), contiguous or channels_last."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    return (channels * pixels, *((1, channels) if is_channels_last(x) else (pixels, 1)))


def gates(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor], taps: Optional[Tensor],
        partial: Optional[Tensor] = None, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
    """As :func:`.plain_cme_tim.gates`, in three launches, or in two where the pooled vectors are known."""
    if num_frames > MAX_FRAMES:
        return plain.gates(x, num_frames, w1, w2, w3, b3, taps, partial, prefix)
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * (x.shape[3] - prefix)
    c1, c2 = w1.shape[0], w2.shape[0]
    if w1.dtype != w2.dtype:  # under autocast; one pointer of the kernel points into either
        w1, w2 = w1.float(), w2.float()
    grid: Any
    if partial is None:
        meta = launch(_LAUNCH, 'pool', x)
        splits = min(MAX_SPLITS, triton.cdiv(pixels, 512))
        partial = x.new_empty(splits, n, channels, dtype=torch.float32)
        grid = (n * triton.cdiv(channels, meta['BLOCK_C']), splits)
        _pool_kernel[grid](
            x[..., prefix:], partial, n, channels, pixels, *strides(x), triton.cdiv(pixels, splits), **meta)

    pooled, z, k, gate = (x.new_empty(n, width, dtype=torch.float32) for width in (channels, c1, c2, channels))
    # with many frames there are programs enough without the larger ones, which fill the registers
    meta = launch(_LAUNCH, 'project, wide' if channels > 512 and n <= 16 else 'project', x)
    meta['BLOCK_K'] = min(meta['BLOCK_K'], triton.next_power_of_2(channels))
    blocks = triton.cdiv(c1, meta['BLOCK_O']) + triton.cdiv(c2, meta['BLOCK_O'])
    _project_kernel[(triton.cdiv(n, meta['BLOCK_N']), blocks)](
        partial, w1.contiguous(), w2.contiguous(), pooled, z, k, n, channels, c1, c2, plain.key_bound(c2),
        SPLITS=partial.shape[0], **meta)

    meta = launch(_LAUNCH, 'gate', x)
    # what the registers hold: BLOCK_T x BLOCK_C x BLOCK_K products, BLOCK_T x BLOCK_T x BLOCK_J
    block_t = triton.next_power_of_2(num_frames)
    block_c, block_j = max(1, 128 // block_t), min(meta['BLOCK_K'], 2 ** 12 // block_t ** 2)
    number = 0 if taps is None else taps.shape[2]
    scales = gate[None] if taps is None else x.new_empty(number, n, channels, dtype=torch.float32)
    _gate_kernel[(n // num_frames, triton.cdiv(channels, block_c))](
        z, k, w3.contiguous(), None if b3 is None else b3.contiguous(), None if taps is None else taps.contiguous(),
        gate, scales, n, num_frames, channels, c1, c2,
        HAS_BIAS=b3 is not None, TAPS=number, BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_J=block_j, **meta)
    return pooled, z, k, gate, scales


def mix(
        x: Tensor, num_frames: int, gate: Optional[Tensor], taps: Optional[Tensor],
        offset: Optional[Tensor] = None, transpose: bool = False, scales: Optional[Tensor] = None,
        prefix: int = 0,
) -> Tensor:
    """As :func:`.plain_cme_tim.mix`, for 1 or 3 taps."""
    if scales is None:
        scales = plain.scales_of(gate, taps)
    y = torch.empty_like(x)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    meta = launch(_LAUNCH, 'mix', x)
    frames = min(meta.pop('FRAMES'), triton.next_power_of_2(num_frames))
    blocks = triton.cdiv(channels, meta['BLOCK_C']) * triton.cdiv(pixels, meta['PIXELS'])
    _mix_kernel[(x.shape[0] // num_frames * triton.cdiv(num_frames, frames) * blocks,)](
        x, scales, None if offset is None else offset.contiguous(), y, num_frames, channels, pixels, *strides(x),
        *scales.expand(-1, x.shape[0], channels).stride(), TAPS=scales.shape[0], TRANSPOSED=transpose,
        HAS_OFFSET=offset is not None, PREFIX=prefix if offset is not None else 0, FRAMES=frames, **meta)
    return y


def correlate(x: Tensor, gy: Tensor, num_frames: int, num_taps: int) -> Tensor:
    """As :func:`.plain_cme_tim.correlate`, for 1 or 3 taps."""
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    meta = launch(_LAUNCH, 'correlate', x)
    frames = min(meta.pop('FRAMES'), triton.next_power_of_2(num_frames))
    blocks = triton.cdiv(pixels, meta['PIXELS'])
    partial = x.new_empty(blocks, num_taps, n, channels, dtype=torch.float32)
    grid = (n // num_frames * triton.cdiv(num_frames, frames) * triton.cdiv(channels, meta['BLOCK_C']), blocks)
    _correlate_kernel[grid](
        x, gy, partial, n, num_frames, channels, pixels, *strides(x), TAPS=num_taps, FRAMES=frames, **meta)
    return partial.sum(0)
