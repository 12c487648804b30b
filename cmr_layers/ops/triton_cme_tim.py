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
    'mix': (dict(FRAMES=8, BLOCK=1024, num_warps=4),) * 2,
    'correlate': (
        dict(FRAMES=8, BLOCK_P=128, BLOCK_C=16, num_warps=4), dict(FRAMES=8, BLOCK_P=64, BLOCK_C=64, num_warps=8)),
    'project': (dict(BLOCK_N=16, BLOCK_O=16, BLOCK_K=64, num_warps=4, num_stages=3),) * 2,
    'project, wide': (dict(BLOCK_N=16, BLOCK_O=16, BLOCK_K=128, num_warps=8, num_stages=3),) * 2,
    'gate': (dict(BLOCK_C=64, BLOCK_K=32, num_warps=4),) * 2,
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
    total = tl.zeros([BLOCK_C], tl.float32)
    end = tl.minimum(P, (split + 1) * split_size)
    for start in range(split * split_size, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
        total += tl.sum(tl.load(x + at, mask=(p < end)[:, None] & (c < C)[None, :], other=0.).to(tl.float32), 0)
    tl.store(partial + (split * N + n) * C + c, total / P, mask=c < C)


@triton.jit
def _project(
        partial, w, pooled, out, n, block, N, C, WIDTH, bound,
        CLAMP: tl.constexpr, SPLITS: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A block of the columns of pooled W^T."""
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (c < C)[None, :]
        m = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for split in tl.static_range(SPLITS):
            m += tl.load(partial + (split * N + n)[:, None] * C + c[None, :], mask=inside, other=0.)
        if not CLAMP:
            tl.store(pooled + n[:, None] * C + c[None, :], m, mask=inside & (block == 0))
        cols = tl.load(w + o[None, :] * C + c[:, None], mask=(c < C)[:, None] & (o < WIDTH)[None, :], other=0.)
        acc = tl.dot(m, cols.to(tl.float32), acc, input_precision='ieee')
    if CLAMP:
        acc = tl.minimum(tl.maximum(acc, -bound), bound)
    tl.store(out + n[:, None] * WIDTH + o[None, :], acc, mask=(n < N)[:, None] & (o < WIDTH)[None, :])


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
    """Equations (2) and (3) in one launch: the first programs take W1, the others W2."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    values = tl.cdiv(C1, BLOCK_O)
    if block < values:
        _project(partial, w1, pooled, z, n, block, N, C, C1, bound, False, SPLITS, BLOCK_N, BLOCK_O, BLOCK_K)
    else:
        _project(partial, w2, pooled, k, n, block - values, N, C, C2, bound, True, SPLITS, BLOCK_N, BLOCK_O, BLOCK_K)


@triton.jit
def _gate_kernel(
        z, k, w3, b3, gate,     # (N, C1), (N, C2), (C, C1), (C,), (N, C)
        T, C, C1, C2,
        HAS_BIAS: tl.constexpr,
        BLOCK_T: tl.constexpr,  # all frames of a clip
        BLOCK_C: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """Equations (4) to (6) for one clip and a block of channels; each block attends anew, which is cheap.

    W3 comes before the fusion, W3 (z + d z) = v + d v with v = W3 z, so that nothing but v is kept.
    """
    first = tl.program_id(0).to(tl.int64) * T
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    d = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start in range(0, C2, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        rows = tl.load(k + (first + t)[:, None] * C2 + r[None, :], mask=(t < T)[:, None] & (r < C2)[None, :], other=0.)
        cols = tl.load(k + (first + t)[None, :] * C2 + r[:, None], mask=(t < T)[None, :] & (r < C2)[:, None], other=0.)
        d -= tl.dot(rows, cols, input_precision='ieee')                             # (4)
    d = tl.where((t < T)[None, :], d, -float('inf'))
    d = tl.exp(d - tl.max(d, 1)[:, None])
    d = d / tl.sum(d, 1)[:, None]
    v = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, C1, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        rows = tl.load(z + (first + t)[:, None] * C1 + r[None, :], mask=(t < T)[:, None] & (r < C1)[None, :], other=0.)
        w = tl.load(w3 + c[None, :] * C1 + r[:, None], mask=(c < C)[None, :] & (r < C1)[:, None], other=0.)
        v += tl.dot(rows, w.to(tl.float32), input_precision='ieee')
    v += tl.dot(d, v, input_precision='ieee')                                       # (5)
    if HAS_BIAS:
        v += tl.load(b3 + c, mask=c < C, other=0.).to(tl.float32)[None, :]
    a = 1 / (1 + tl.exp(-v))                                                        # (6)
    tl.store(gate + (first + t)[:, None] * C + c[None, :], a, mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _gated(x, gate, first, t, T, i, c, C, P, inside, GATED: tl.constexpr):
    """Frame t of the clip that begins at row first, times its gates where they come first; zero beyond the clip."""
    inside = inside & (t >= 0) & (t < T)
    u = tl.load(x + (first + t) * C * P + i, mask=inside, other=0.).to(tl.float32)
    if GATED:
        u *= tl.load(gate + (first + t) * C + c, mask=inside, other=0.)
    return u


@triton.jit
def _mix_kernel(
        x, gate, taps, offset, y,       # (N, C, P) in either order, (N, C), (C, K), (N, C), as x
        T, C, P,
        TAPS: tl.constexpr,             # 0: no TIM, 1 or 3
        GATE: tl.constexpr,             # 'none', 'before' or 'after' the taps
        REVERSED: tl.constexpr,         # the taps read backwards in time
        HAS_OFFSET: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        FRAMES: tl.constexpr,           # frames of a program
        BLOCK: tl.constexpr,            # elements of a frame of a program
):
    """One pass over the frames: y_t = sum_k w_k a_{t+k-1} x_{t+k-1}, equation (1) and TIM.

    Its own transpose has the gate after the taps, the taps reversed, and an offset, the gradient through the pooling.
    A program walks over the frames and holds three of them, so each is read once.
    """
    blocks = tl.cdiv(C * P, BLOCK)
    chunks = tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // blocks
    start = (pid % chunks) * FRAMES
    first = (pid // chunks).to(tl.int64) * T
    inside = i < C * P
    c = i % C if CHANNELS_LAST else i // P
    if TAPS == 3:
        w0 = tl.load(taps + c * 3 + (2 if REVERSED else 0), mask=inside, other=0.).to(tl.float32)
        w1 = tl.load(taps + c * 3 + 1, mask=inside, other=0.).to(tl.float32)
        w2 = tl.load(taps + c * 3 + (0 if REVERSED else 2), mask=inside, other=0.).to(tl.float32)
        previous = _gated(x, gate, first, start - 1, T, i, c, C, P, inside, GATE == 'before')
        following = _gated(x, gate, first, start, T, i, c, C, P, inside, GATE == 'before')
    if TAPS == 1:
        w1 = tl.load(taps + c, mask=inside, other=0.).to(tl.float32)
    for f in tl.static_range(FRAMES):
        t = start + f
        if TAPS == 3:
            current = following
            following = _gated(x, gate, first, t + 1, T, i, c, C, P, inside, GATE == 'before')
            v = w0 * previous + w1 * current + w2 * following
            previous = current
        else:
            v = _gated(x, gate, first, t, T, i, c, C, P, inside, GATE == 'before')
            if TAPS == 1:
                v = w1 * v
        stored = inside & (t < T)
        if GATE == 'after':
            v *= tl.load(gate + (first + t) * C + c, mask=stored, other=0.)
        if HAS_OFFSET:
            v += tl.load(offset + (first + t) * C + c, mask=stored, other=0.)
        tl.store(y + (first + t) * C * P + i, v.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _correlate_kernel(
        x, g, partial,                  # (N, C, P) in any order, as x, (blocks of pixels, TAPS, N, C)
        N, T, C, P,
        stride_n, stride_c, stride_p,
        TAPS: tl.constexpr,
        FRAMES: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """What the gradients of gates and taps are made of: sums over the pixels of x_t g_{t+1}, x_t g_t and x_t g_{t-1}.

    They are in the order of the taps: tap k of frame t - k + 1 met frame t.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    chunks = tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks
    start = (pid % chunks) * FRAMES
    first = (pid // chunks).to(tl.int64) * T
    block = tl.program_id(1).to(tl.int64)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    at = p[:, None] * stride_p + c[None, :] * stride_c
    inside = (p < P)[:, None] & (c < C)[None, :]
    sums = partial + block * TAPS * N * C + c
    if TAPS == 3:
        previous = tl.load(g + (first + start - 1) * stride_n + at, mask=inside & (start > 0), other=0.).to(tl.float32)
        following = tl.load(g + (first + start) * stride_n + at, mask=inside, other=0.).to(tl.float32)
    for f in tl.static_range(FRAMES):
        t = start + f
        stored = (c < C) & (t < T)
        u = tl.load(x + (first + t) * stride_n + at, mask=inside & (t < T), other=0.).to(tl.float32)
        if TAPS == 3:
            current = following
            following = tl.load(
                g + (first + t + 1) * stride_n + at, mask=inside & (t + 1 < T), other=0.).to(tl.float32)
            tl.store(sums + (first + t) * C, tl.sum(u * following, 0), mask=stored)
            tl.store(sums + (N + first + t) * C, tl.sum(u * current, 0), mask=stored)
            tl.store(sums + (2 * N + first + t) * C, tl.sum(u * previous, 0), mask=stored)
            previous = current
        else:
            current = tl.load(g + (first + t) * stride_n + at, mask=inside & (t < T), other=0.).to(tl.float32)
            tl.store(sums + (first + t) * C, tl.sum(u * current, 0), mask=stored)


def launch(table: Launches, kernel: str, x: Tensor) -> Dict[str, Any]:
    """Compile-time arguments of a kernel for frames x, from a table of them for contiguous and channels_last frames."""
    return {**table[kernel][is_channels_last(x)], 'enable_fp_fusion': True}


def strides(x: Tensor) -> Tuple[int, int, int]:
    """Of frame, channel and pixel of (N, C, H, W), contiguous or channels_last."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    return (channels * pixels, *((1, channels) if is_channels_last(x) else (pixels, 1)))


def gates(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations (2) to (6) in three launches: pooled vectors (N, C), z (N, C1), k (N, C2) and gates (N, C)."""
    if num_frames > MAX_FRAMES:
        return plain.gates(x, num_frames, w1, w2, w3, b3)
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    c1, c2 = w1.shape[0], w2.shape[0]
    meta = launch(_LAUNCH, 'pool', x)
    splits = min(MAX_SPLITS, triton.cdiv(pixels, 512))
    partial = x.new_empty(splits, n, channels, dtype=torch.float32)
    grid: Any = (n * triton.cdiv(channels, meta['BLOCK_C']), splits)
    _pool_kernel[grid](x, partial, n, channels, pixels, *strides(x), triton.cdiv(pixels, splits), **meta)

    pooled, z, k, gate = (x.new_empty(n, width, dtype=torch.float32) for width in (channels, c1, c2, channels))
    meta = launch(_LAUNCH, 'project' if channels <= 256 else 'project, wide', x)
    blocks = triton.cdiv(c1, meta['BLOCK_O']) + triton.cdiv(c2, meta['BLOCK_O'])
    _project_kernel[(triton.cdiv(n, meta['BLOCK_N']), blocks)](
        partial, w1.contiguous(), w2.contiguous(), pooled, z, k, n, channels, c1, c2, plain.key_bound(c2),
        SPLITS=splits, **meta)

    meta = launch(_LAUNCH, 'gate', x)
    grid = (n // num_frames, triton.cdiv(channels, meta['BLOCK_C']))
    _gate_kernel[grid](
        z, k, w3.contiguous(), None if b3 is None else b3.contiguous(), gate, num_frames, channels, c1, c2,
        HAS_BIAS=b3 is not None, BLOCK_T=max(16, triton.next_power_of_2(num_frames)), **meta)
    return pooled, z, k, gate


def mix(
        x: Tensor, num_frames: int, gate: Optional[Tensor], taps: Optional[Tensor],
        offset: Optional[Tensor] = None, transpose: bool = False,
) -> Tensor:
    """The pass over the frames, or its transpose."""
    y = torch.empty_like(x)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    meta = launch(_LAUNCH, 'mix', x)
    frames = min(meta.pop('FRAMES'), num_frames)
    grid = (x.shape[0] // num_frames * triton.cdiv(num_frames, frames) * triton.cdiv(channels * pixels, meta['BLOCK']),)
    _mix_kernel[grid](
        x, *(None if v is None else v.contiguous() for v in (gate, taps, offset)), y, num_frames, channels, pixels,
        TAPS=0 if taps is None else taps.shape[2],
        GATE='none' if gate is None else 'after' if transpose else 'before',
        REVERSED=transpose, HAS_OFFSET=offset is not None, CHANNELS_LAST=is_channels_last(x), FRAMES=frames, **meta)
    return y


def correlate(x: Tensor, gy: Tensor, num_frames: int, num_taps: int) -> Tensor:
    """As :func:`.plain_cme_tim.correlate`."""
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    meta = launch(_LAUNCH, 'correlate', x)
    frames = min(meta.pop('FRAMES'), num_frames)
    blocks = triton.cdiv(pixels, meta['BLOCK_P'])
    partial = x.new_empty(blocks, num_taps, n, channels, dtype=torch.float32)
    grid = (n // num_frames * triton.cdiv(num_frames, frames) * triton.cdiv(channels, meta['BLOCK_C']), blocks)
    _correlate_kernel[grid](
        x, gy, partial, n, num_frames, channels, pixels, *strides(x), TAPS=num_taps, FRAMES=frames, **meta)
    return partial.sum(0)
