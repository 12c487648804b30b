"""SME as Triton kernels: the similarity in one pass, the motion term inside the matrix product that writes it.

The scale 1 - s belongs to a pixel, so it commutes with the 1x1 convolution, W (x (1 - s)) = (1 - s) W x, and becomes an
epilogue of the product, with the bias and the residual behind it.

Frames are folded, row n = b * T + t, and lie in memory as (N, C, P) or (N, P, C), P = H * W. All sums are float32.
"""
from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain_sme as plain
from .layout import dense, is_channels_last, like
from .triton_cme_tim import Launches, launch, strides

__all__ = ['motion_conv_backward', 'product', 'similarity']

# Launch configurations, for contiguous and for channels_last frames; see triton_cme_tim.py.
_MOTION = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3)
_LAUNCH: Launches = {
    'similarity': (dict(ROWS=256, BLOCK_C=8, num_warps=4), dict(ROWS=16, BLOCK_C=128, num_warps=4)),
    # many channels come with few pixels: half of them a program, and half the trips
    'similarity, wide': (dict(ROWS=128, BLOCK_C=16, num_warps=4), dict(ROWS=8, BLOCK_C=256, num_warps=4)),
    'motion': (
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP=8, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)),
    # the larger the tile, the less comes twice from the second-level cache, whose width is what decides
    'motion, large': (
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP=8, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=32, GROUP=8, num_warps=16, num_stages=4)),
    'motion, float32': (_MOTION, _MOTION),
    'product': (dict(BLOCK_P=128, BLOCK_C=16, num_warps=4), dict(BLOCK_P=16, BLOCK_C=128, num_warps=4)),
    'unmotion': (
        dict(FRAMES=8, BLOCK_P=128, BLOCK_C=8, num_warps=4), dict(FRAMES=8, BLOCK_P=16, BLOCK_C=64, num_warps=4)),
}


@triton.jit
def _pair_sums(
        x, here, there, C, stride_c, inside, scale_here, scale_there, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Squares of two frames' pixels and their product, summed over the channels, once, behind the loop."""
    squares_here = tl.zeros([ROWS, BLOCK_C], tl.float32)
    squares_there = tl.zeros([ROWS, BLOCK_C], tl.float32)
    product = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        u = tl.load(x + here[:, None] + c[None, :] * stride_c, mask=mask, other=0.).to(tl.float32)
        v = tl.load(x + there[:, None] + c[None, :] * stride_c, mask=mask, other=0.).to(tl.float32)
        u *= scale_here[:, None]
        v *= scale_there[:, None]
        squares_here += u * u
        squares_there += v * v
        product += u * v
    return tl.sum(squares_here, 1), tl.sum(squares_there, 1), tl.sum(product, 1)


@triton.jit
def _similarity_kernel(
        x, s, inverse_norm,     # (N, C, P) in any order, 2 x (N, P)
        T, C, P,
        stride_n, stride_c, stride_p,
        FRAMES: tl.constexpr,   # of a tile, with ROWS / FRAMES pixels of each, so that neighbours share the cache
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """Equation (7). The last frame computes the pair before it once more: s_T = s_{T-1}."""
    PIXELS: tl.constexpr = ROWS // FRAMES
    blocks, chunks = tl.cdiv(P, PIXELS), tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    row = tl.arange(0, ROWS)
    p = (pid % blocks) * PIXELS + row % PIXELS
    pid = pid // blocks
    t = (pid % chunks) * FRAMES + row // PIXELS
    first = (pid // chunks).to(tl.int64) * T
    inside = (t < T) & (p < P)
    pair = tl.minimum(t, T - 2)
    here = (first + pair) * stride_n + p * stride_p
    there = here + stride_n
    one = tl.full([ROWS], 1., tl.float32)
    e, f, product = _pair_sums(x, here, there, C, stride_c, inside, one, one, ROWS, BLOCK_C)
    scale_e, scale_f = one, one
    if tl.max(tl.maximum(e, f), 0) > 1e37:
        # Squares that overflow, or are about to: once more, with those pixels scaled. A cosine does not mind.
        scale_e = tl.where(e > 1e37, 2.**-75, 1.)
        scale_f = tl.where(f > 1e37, 2.**-75, 1.)
        e, f, product = _pair_sums(x, here, there, C, stride_c, inside, scale_e, scale_f, ROWS, BLOCK_C)
    # a norm below 1e-12 counts as zero
    e = tl.where(e > 1e-24, tl.rsqrt(e), 1.)
    f = tl.where(f > 1e-24, tl.rsqrt(f), 1.)
    at = (first + t) * P + p
    tl.store(s + at, product * e * f, mask=inside)
    tl.store(inverse_norm + at, tl.where(t == pair, e * scale_e, f * scale_f), mask=inside)


@triton.jit
def _motion_kernel(
        x, weight, s, bias, y,                          # (N, C, P) in any order, (C, C), (N, P), (C,), as x
        P, C,
        stride_n, stride_c, stride_p,
        HAS_BIAS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        DOT: tl.constexpr,                              # what the matrix unit multiplies
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,                          # pixels
        BLOCK_N: tl.constexpr,                          # output channels
        BLOCK_K: tl.constexpr,                          # input channels
        GROUP: tl.constexpr,                            # blocks of pixels that share the weight's blocks in the cache
):
    """Equation (8) up to the batch norm, or with a folded one: (1 - s) W x [+ bias] [+ x]."""
    blocks_m, blocks_n = tl.cdiv(P, BLOCK_M), tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0) % (blocks_m * blocks_n)
    group = pid // (GROUP * blocks_n) * GROUP
    members = tl.minimum(blocks_m - group, GROUP)
    block_m = group + pid % (GROUP * blocks_n) % members
    block_n = pid % (GROUP * blocks_n) // members
    n = (tl.program_id(0) // (blocks_m * blocks_n)).to(tl.int64)
    p = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        rows = tl.load(
            x + n * stride_n + p[:, None] * stride_p + c[None, :] * stride_c,
            mask=(p < P)[:, None] & (c < C)[None, :], other=0.)
        cols = tl.load(weight + o[None, :] * C + c[:, None], mask=(o < C)[None, :] & (c < C)[:, None], other=0.)
        acc = tl.dot(rows.to(DOT), cols.to(DOT), acc, input_precision=PRECISION)
    acc *= 1 - tl.load(s + n * P + p, mask=p < P, other=0.)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < C, other=0.).to(tl.float32)[None, :]
    inside = (p < P)[:, None] & (o < C)[None, :]
    at = n * stride_n + p[:, None] * stride_p + o[None, :] * stride_c
    if RESIDUAL:
        acc += tl.load(x + at, mask=inside, other=0.).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
        x, q, s, m, gs,         # (N, C, P) in any order, as x, (N, P), as x, (N, P)
        C, P,
        stride_n, stride_c, stride_p,
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """The gradient of s, -<q, x> per pixel, and the weighted clip x (1 - s) for the gradient of W."""
    blocks = tl.cdiv(P, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    kept = 1 - tl.load(s + n * P + p, mask=p < P, other=0.)
    total = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = n * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
        mask = (p < P)[:, None] & (c < C)[None, :]
        u = tl.load(x + at, mask=mask, other=0.).to(tl.float32)
        total += tl.sum(u * tl.load(q + at, mask=mask, other=0.).to(tl.float32), 1)
        tl.store(m + at, (u * kept[:, None]).to(m.dtype.element_ty), mask=mask)
    tl.store(gs + n * P + p, -total, mask=p < P)


@triton.jit
def _frame(x, at, t, T, inside):
    return tl.load(x + at, mask=inside & (t >= 0) & (t < T), other=0.).to(tl.float32)


@triton.jit
def _pair(s, inverse_norm, gs, first, t, T, P, p):
    """Of the pair (t, t + 1), zero if there is none: its gradient and the similarity, and both frames' inverse norms.

    The last pair takes in the gradient of the last frame, which copied its similarity.
    """
    mask = (p < P) & (t >= 0) & (t < T - 1)
    at = (first + t) * P + p
    g = tl.load(gs + at, mask=mask, other=0.) + tl.load(gs + at + P, mask=mask & (t == T - 2), other=0.)
    similarity = tl.load(s + at, mask=mask, other=0.)
    return (
        g, similarity, tl.load(inverse_norm + at, mask=mask, other=0.),
        tl.load(inverse_norm + at + P, mask=mask, other=0.))


@triton.jit
def _unmotion_kernel(
        x, q, s, inverse_norm, gs, gx,  # (N, C, P) in any order, as x, 3 x (N, P), as x
        T, C, P,
        stride_n, stride_c, stride_p,
        FRAMES: tl.constexpr,           # frames of a program
        BLOCK_P: tl.constexpr,
        BLOCK_C: tl.constexpr,
):
    """The gradient of the clip: (1 - s) q, and the gradient through s, which goes to both frames of a pair."""
    blocks_c, blocks_p, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P), tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks_c
    p = (pid % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    pid = pid // blocks_p
    start = (pid % chunks).to(tl.int64) * FRAMES
    first = (pid // chunks).to(tl.int64) * T
    at = first * stride_n + p[:, None] * stride_p + c[None, :] * stride_c
    inside = (p < P)[:, None] & (c < C)[None, :]
    previous = _frame(x, at + (start - 1) * stride_n, start - 1, T, inside)
    following = _frame(x, at + start * stride_n, start, T, inside)
    before_g, before_s, before_e, before_f = _pair(s, inverse_norm, gs, first, start - 1, T, P, p)
    for f in tl.static_range(FRAMES):
        t = start + f
        current = following
        following = _frame(x, at + (t + 1) * stride_n, t + 1, T, inside)
        g, similarity, here, there = _pair(s, inverse_norm, gs, first, t, T, P, p)
        # d s_t / d x_t = e_t (e_{t+1} x_{t+1} - s_t e_t x_t) and the same for the pair before
        kept = 1 - tl.load(s + (first + t) * P + p, mask=(p < P) & (t < T), other=1.)
        own = g * similarity * here * here + before_g * before_s * before_f * before_f
        stored = inside & (t < T)
        v = kept[:, None] * tl.load(q + at + t * stride_n, mask=stored, other=0.).to(tl.float32)
        v += (g * here)[:, None] * (there[:, None] * following)
        v += (before_g * before_f)[:, None] * (before_e[:, None] * previous)
        v -= own[:, None] * current
        tl.store(gx + at + t * stride_n, v.to(gx.dtype.element_ty), mask=stored)
        previous = current
        before_g, before_s, before_e, before_f = g, similarity, here, there


def similarity(x: Tensor, num_frames: int) -> Tuple[Tensor, Tensor]:
    """Similarities and inverse norms, (N, H, W) each, of clips of two frames or more."""
    n, channels, height, width = x.shape
    s, inverse_norm = (x.new_empty(n, height, width, dtype=torch.float32) for _ in range(2))
    meta = launch(_LAUNCH, 'similarity, wide' if channels > 512 else 'similarity', x)
    frames = min(triton.next_power_of_2(num_frames), 8)
    grid = (
        n // num_frames * triton.cdiv(num_frames, frames) * triton.cdiv(height * width, meta['ROWS'] // frames),)
    _similarity_kernel[grid](
        x, s, inverse_norm, num_frames, channels, height * width, *strides(x), FRAMES=frames, **meta)
    return s, inverse_norm


def _has_matrix_unit(x: Tensor) -> bool:
    """Whether tensor cores may multiply: float32 only where PyTorch's convolutions may use tf32, as they do unless told
    otherwise. Without them a library's product is the faster one.
    """
    return x.dtype is not torch.float32 or torch.backends.cudnn.conv.fp32_precision == 'tf32'  # type: ignore[attr-defined]


def product(
        x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool = False, dot: Any = None,
) -> Tensor:
    """As :func:`.plain_sme.product`. ``dot`` is the dtype that the matrix unit multiplies, x's own by default."""
    if not _has_matrix_unit(x):
        return plain.product(x, s, weight, bias, residual)
    n, channels, height, width = x.shape
    y = torch.empty_like(x)
    images, pixels = n, height * width
    if is_channels_last(x):  # channels_last is one long row of pixels: no ragged edge at each frame
        images, pixels = 1, n * pixels
    enough = images * triton.cdiv(pixels, 128) * triton.cdiv(channels, 256) >= 96  # to fill most of a card
    kind = 'motion, float32' if x.dtype is torch.float32 else 'motion, large' if enough else 'motion'
    meta = launch(_LAUNCH, kind, x)
    grid = (images * triton.cdiv(pixels, meta['BLOCK_M']) * triton.cdiv(channels, meta['BLOCK_N']),)
    _motion_kernel[grid](
        x, weight.to(x.dtype).contiguous(), s, None if bias is None else bias.contiguous(), y, pixels, channels,
        *strides(x), HAS_BIAS=bias is not None, RESIDUAL=residual,
        DOT=dot or getattr(tl, str(x.dtype).removeprefix('torch.')),
        PRECISION='tf32' if x.dtype is torch.float32 else 'ieee', **meta)
    return y


def motion_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, weight: Tensor, s: Tensor, inverse_norm: Tensor, learns: bool = True,
) -> Tuple[Tensor, Tensor]:
    """As :func:`.plain_sme.motion_conv_backward`. A library multiplies the matrices."""
    s, inverse_norm = s.contiguous(), inverse_norm.contiguous()
    convolution = torch.ops.aten.convolution_backward
    unit: Tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    q = like(convolution(gy, x, weight.to(x.dtype), None, *unit, [True, False, False])[0], x)

    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    m, gx, gs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(s)
    meta = launch(_LAUNCH, 'product', x)
    grid: Any = (x.shape[0] * triton.cdiv(pixels, meta['BLOCK_P']),)
    _product_kernel[grid](x, q, s, m, gs, channels, pixels, *strides(x), **meta)
    meta = launch(_LAUNCH, 'unmotion', x)
    frames = min(meta.pop('FRAMES'), num_frames)
    blocks = triton.cdiv(channels, meta['BLOCK_C']) * triton.cdiv(pixels, meta['BLOCK_P'])
    grid = (x.shape[0] // num_frames * triton.cdiv(num_frames, frames) * blocks,)
    _unmotion_kernel[grid](
        x, q, s, inverse_norm, gs, gx, num_frames, channels, pixels, *strides(x), FRAMES=frames, **meta)
    if not learns:
        return gx, x.new_empty(0)
    g_weight = convolution(gy, m, weight.to(x.dtype), None, *unit, [False, True, False])[1]
    return gx, dense(g_weight.to(weight.dtype).contiguous())
