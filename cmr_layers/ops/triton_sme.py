"""SME as Triton kernels: the similarity in one pass, the motion term inside the matrix product that writes it.

The scale 1 - s belongs to a pixel, so it commutes with the 1x1 convolution, W (x (1 - s)) = (1 - s) W x, and becomes an
epilogue of the product, with the batch norm and the residual behind it.

Frames are folded, row n = b * T + t, and lie in memory as (N, C, P) or (N, P, C), P = H * W. All sums are float32.
"""
from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .configs import config, next_power_of_2
from .layout import is_channels_last
from .triton_front import strides

__all__ = ['motion_conv', 'motion_gradient', 'motion_product', 'rectified_sum', 'similarity', 'sme']


@triton.jit
def _pixels(x, shortcut, at, mask, SUM: tl.constexpr):
    """Features of pixels; of a block's end, the rectified sum of both branches, rounded as it is stored."""
    u = tl.load(x + at, mask=mask, other=0.)
    if SUM:
        v = tl.load(shortcut + at, mask=mask, other=0.).to(tl.float32)
        u = tl.maximum(u.to(tl.float32) + v, 0.).to(x.dtype.element_ty)
    return u.to(tl.float32)


@triton.jit
def _pair_sums(
        x, shortcut, y, here, there, is_last, C, stride_c, inside, scale_here, scale_there,
        SUM: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Squares of two frames' pixels and their product, summed over the channels."""
    squares_here = tl.zeros([ROWS], tl.float32)
    squares_there = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        u = _pixels(x, shortcut, here[:, None] + c[None, :] * stride_c, mask, SUM)
        v = _pixels(x, shortcut, there[:, None] + c[None, :] * stride_c, mask, SUM)
        if STORE:
            own = tl.where(is_last, there, here)[:, None] + c[None, :] * stride_c
            tl.store(y + own, tl.where(is_last[:, None], v, u).to(y.dtype.element_ty), mask=mask)
        u *= scale_here[:, None]
        v *= scale_there[:, None]
        squares_here += tl.sum(u * u, 1)
        squares_there += tl.sum(v * v, 1)
        product += tl.sum(u * v, 1)
    return squares_here, squares_there, product


@triton.jit
def _similarity_kernel(
        x, shortcut, y,         # (N, C, P) in any order, all alike
        s, inverse_norm,        # (N, P) each
        T, C, P,
        stride_n, stride_c, stride_p,
        SUM: tl.constexpr,      # the frames are y = relu(x + shortcut), which is stored on the way
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
    e, f, product = _pair_sums(
        x, shortcut, y, here, there, t != pair, C, stride_c, inside, one, one, SUM, SUM, ROWS, BLOCK_C)
    scale_e, scale_f = one, one
    if tl.max(tl.maximum(e, f), 0) > 1e37:
        # Squares that overflow, or are about to: once more, with those pixels scaled. A cosine does not mind.
        scale_e = tl.where(e > 1e37, 2.**-75, 1.)
        scale_f = tl.where(f > 1e37, 2.**-75, 1.)
        e, f, product = _pair_sums(
            x, shortcut, y, here, there, t != pair, C, stride_c, inside, scale_e, scale_f, SUM, False, ROWS, BLOCK_C)
    # a norm below 1e-12 counts as zero
    e = tl.where(e > 1e-24, tl.rsqrt(e), 1.)
    f = tl.where(f > 1e-24, tl.rsqrt(f), 1.)
    at = (first + t) * P + p
    tl.store(s + at, product * e * f, mask=inside)
    tl.store(inverse_norm + at, tl.where(t == pair, e * scale_e, f * scale_f), mask=inside)


@triton.jit
def _motion_kernel(
        x, weight, s,                       # (N, C, P) in any order, (C, C), (N, P)
        bias, mean, var, gamma, beta, y,    # 5 x (C,), as x
        P, C,
        stride_n, stride_c, stride_p,
        eps,
        HAS_BIAS: tl.constexpr,
        NORM: tl.constexpr,                             # batch norm with its running statistics
        HAS_GAMMA: tl.constexpr,
        HAS_BETA: tl.constexpr,
        RESIDUAL: tl.constexpr,
        DOT: tl.constexpr,                              # what the matrix unit multiplies
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,                          # pixels
        BLOCK_N: tl.constexpr,                          # output channels
        BLOCK_K: tl.constexpr,                          # input channels
        GROUP: tl.constexpr,                            # blocks of pixels that share the weight's blocks in the cache
):
    """Equation (8), all of it or up to the batch norm: (1 - s) W x [+ bias] [norm] [+ x]."""
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
    known = o < C
    acc *= 1 - tl.load(s + n * P + p, mask=p < P, other=0.)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=known, other=0.).to(tl.float32)[None, :]
    if NORM:
        scale = tl.rsqrt(tl.load(var + o, mask=known, other=1.).to(tl.float32) + eps)
        shift = -tl.load(mean + o, mask=known, other=0.).to(tl.float32) * scale
        if HAS_GAMMA:
            factor = tl.load(gamma + o, mask=known, other=0.).to(tl.float32)
            scale *= factor
            shift *= factor
        if HAS_BETA:
            shift += tl.load(beta + o, mask=known, other=0.).to(tl.float32)
        acc = acc * scale[None, :] + shift[None, :]
    inside = (p < P)[:, None] & known[None, :]
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
    """The gradient of the clip: (1 - s) q, and what s passes on to the two frames of each pair."""
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
    _, s, inverse_norm = _similarity(x, None, num_frames)
    return s, inverse_norm


def rectified_sum(x: Tensor, shortcut: Tensor, num_frames: int) -> Tuple[Tensor, Tensor, Tensor]:
    """relu(x + shortcut), and what :func:`similarity` returns of it, in the launch that writes it."""
    return _similarity(x, shortcut, num_frames)


def _similarity(x: Tensor, shortcut: Optional[Tensor], num_frames: int) -> Tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    s, inverse_norm = (x.new_empty(n, height, width, dtype=torch.float32) for _ in range(2))
    meta = config('similarity', x)
    frames = min(next_power_of_2(num_frames), 8)
    grid = (
        n // num_frames * triton.cdiv(num_frames, frames) * triton.cdiv(height * width, meta['ROWS'] // frames),)
    y = x if shortcut is None else torch.empty_like(x)
    _similarity_kernel[grid](
        x, shortcut, y, s, inverse_norm, num_frames, channels, height * width, *strides(x),
        SUM=shortcut is not None, FRAMES=frames, **meta)
    return y, s, inverse_norm


def _has_matrix_unit(x: Tensor) -> bool:
    """Whether tensor cores may multiply: float32 only where PyTorch's convolutions may use tf32, as they do unless told
    otherwise. Without them a library's product is the faster one.
    """
    return x.dtype is not torch.float32 or torch.backends.cudnn.conv.fp32_precision == 'tf32'  # type: ignore[attr-defined]


def _product(
        x: Tensor, s: Tensor, weight: Tensor, bias: Optional[Tensor], norm: Any, residual: bool, dot: Any = None,
) -> Tensor:
    """The matrix product with the epilogue that is asked for; ``dot`` is the dtype it is taken in, x's by default."""
    n, channels, height, width = x.shape
    y = torch.empty_like(x)
    mean, var, gamma, beta, eps = norm
    images, pixels = n, height * width
    if is_channels_last(x):  # channels_last is one long row of pixels: no ragged edge at each frame
        images, pixels = 1, n * pixels
    meta = config('motion, float32' if x.dtype is torch.float32 else 'motion', x)
    grid = (images * triton.cdiv(pixels, meta['BLOCK_M']) * triton.cdiv(channels, meta['BLOCK_N']),)
    _motion_kernel[grid](
        x, weight.flatten(1).contiguous(), s, bias, mean, var, gamma, beta, y, pixels, channels, *strides(x), eps,
        HAS_BIAS=bias is not None, NORM=mean is not None, HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None, RESIDUAL=residual,
        DOT=dot or getattr(tl, str(x.dtype).removeprefix('torch.')),
        PRECISION='tf32' if x.dtype is torch.float32 else 'ieee', **meta)
    return y


def motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor]:
    """As :func:`.plain.motion_conv`, in two launches."""
    s, inverse_norm = similarity(x, num_frames)
    return motion_product(x, weight, bias, s), s, inverse_norm


def motion_product(x: Tensor, weight: Tensor, bias: Optional[Tensor], s: Tensor) -> Tensor:
    """:func:`motion_conv` of known similarities."""
    if not _has_matrix_unit(x):
        return plain.product(x, s, weight.flatten(1), bias, residual=False)
    return _product(x, s, weight, bias, (None, None, None, None, 0.), False)


def sme(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor], mean: Optional[Tensor],
        var: Optional[Tensor], gamma: Optional[Tensor], beta: Optional[Tensor], eps: float, s: Optional[Tensor] = None,
) -> Tensor:
    """As :func:`.plain.sme`, in two launches, or in one if the similarities are known."""
    if s is None:
        s, _ = similarity(x, num_frames)
    if not _has_matrix_unit(x):
        return plain.normed_product(x, s, weight, bias, mean, var, gamma, beta, eps)
    return _product(x, s, weight, bias, (mean, var, gamma, beta, eps), True)


def motion_gradient(
        q: Tensor, x: Tensor, num_frames: int, s: Tensor, inverse_norm: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Gradient of the clip given that of x (1 - s), q, and x (1 - s) itself: (gx, m), both like x."""
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    m, gx, gs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(s)
    meta = config('product', x)
    _product_kernel[(n * triton.cdiv(pixels, meta['BLOCK_P']),)](x, q, s, m, gs, channels, pixels, *strides(x), **meta)
    meta = config('unmotion', x)
    frames = min(meta.pop('FRAMES'), num_frames)
    blocks = triton.cdiv(channels, meta['BLOCK_C']) * triton.cdiv(pixels, meta['BLOCK_P'])
    grid = (n // num_frames * triton.cdiv(num_frames, frames) * blocks,)
    _unmotion_kernel[grid](
        x, q, s, inverse_norm, gs, gx, num_frames, channels, pixels, *strides(x), FRAMES=frames, **meta)
    return gx, m
