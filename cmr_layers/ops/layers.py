"""What the layers call: frames in, frames out, by the path that :mod:`.dispatch` chooses.

Frames x are (N, C, H, W), N = B * T, the frames of a clip next to each other. ``owner`` is the layer that calls, for
:func:`.dispatch.explain`.
"""
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators, reference  # noqa: F401  (registers the operators)
from .dispatch import choose, is_narrow, runs_triton

__all__ = [
    'CMEWeights', 'Convolution', 'front', 'front_conv', 'joins', 'knows_similarity', 'motion_conv',
    'rectified_sum', 'sme',
]


class CMEWeights(NamedTuple):
    """W1 (C/r1, C), W2 (C/r2, C), W3 (C, C/r1) and the bias of the gates' logits (C,)."""
    w1: Optional[Tensor] = None
    w2: Optional[Tensor] = None
    w3: Optional[Tensor] = None
    b3: Optional[Tensor] = None


Known = Tuple[Tensor, Tensor]  # similarities and inverse norms of frames, (N, H, W) each


class Convolution(NamedTuple):
    """Arguments of a 2D convolution."""
    weight: Tensor
    bias: Optional[Tensor]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def _name(cme: CMEWeights, taps: Optional[Tensor]) -> str:
    return ' + '.join((['CME'] if cme.w1 is not None else []) + (['TIM'] if taps is not None else []))


def front(x: Tensor, num_frames: int, cme: CMEWeights, taps: Optional[Tensor], owner: Any = None) -> Tensor:
    """CME and then TIM, either of which may be missing: equations (1) to (6), and a convolution over the frames."""
    path = choose(owner, _name(cme, taps), x, num_frames, [*cme, taps], taps)
    if path == 'reference':
        return _reference_front(x, num_frames, cme, taps)
    y: Tensor = torch.ops.cmr_layers.front(x, num_frames, *cme, taps, triton=path == 'triton')[0]
    return y


def _reference_front(x: Tensor, num_frames: int, cme: CMEWeights, taps: Optional[Tensor]) -> Tensor:
    clips = reference.clips(x, num_frames)
    if cme.w1 is not None and cme.w2 is not None and cme.w3 is not None:
        clips = reference.cme(clips, cme.w1, cme.w2, cme.w3, cme.b3)
    if taps is not None:
        clips = reference.tim(clips, taps)
    return clips.reshape(x.shape)


def front_conv(
        x: Tensor, num_frames: int, cme: CMEWeights, taps: Optional[Tensor], conv: Convolution, owner: Any = None,
) -> Tensor:
    """CME, TIM and the convolution behind them. What the convolution sees is not kept for the backward pass."""
    path = choose(owner, f'{_name(cme, taps)} + conv', x, num_frames, [*cme, taps, conv.weight, conv.bias], taps)
    if path == 'reference':
        return F.conv2d(_reference_front(x, num_frames, cme, taps), *conv)
    y: Tensor = torch.ops.cmr_layers.front_conv(x, num_frames, *cme, taps, *conv, triton=path == 'triton')[0]
    return y


def joins(x: Tensor, num_frames: int, taps: Tensor, conv: Convolution) -> bool:
    """Whether a convolution is faster as a part of what stands in front of it, and not only leaner in training."""
    return runs_triton(x, num_frames, taps) and is_narrow(
        x, num_frames, conv.weight, conv.stride, conv.padding, conv.groups)


def knows_similarity(x: Tensor, num_frames: int, weight: Tensor, owner: Any = None) -> bool:
    """Whether the kernel that writes a block's output, :func:`rectified_sum`, should see to SME's similarities, too."""
    return (
        num_frames > 1 and runs_triton(x, num_frames)
        and choose(owner, 'block end + SME', x, num_frames, [weight]) == 'triton')


def rectified_sum(x: Tensor, shortcut: Tensor, num_frames: int) -> Tuple[Tensor, Known]:
    """relu(x + shortcut), and the similarities of these frames."""
    triton = runs_triton(x, num_frames)
    y, s, inverse_norm = torch.ops.cmr_layers.rectified_sum(x, shortcut, num_frames, triton=triton)
    return y, (s, inverse_norm)


def motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor], owner: Any = None,
        known: Optional[Known] = None,
) -> Tensor:
    """The 1x1 convolution of equation (8), of the frames weighted by their motion."""
    if known is not None:
        triton = runs_triton(x, num_frames)
        h: Tensor = torch.ops.cmr_layers.motion_product(x, num_frames, weight, bias, *known, triton=triton)
        return h
    path = choose(owner, 'SME', x, num_frames, [weight, bias], obstacle=_still(num_frames))
    if path == 'reference':
        return _reference_motion_conv(x, num_frames, weight, bias)
    h = torch.ops.cmr_layers.motion_conv(x, num_frames, weight, bias, triton=path == 'triton')[0]
    return h


def _reference_motion_conv(x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return F.conv2d(reference.motion(reference.clips(x, num_frames)).reshape(x.shape), weight, bias)


def sme(
        x: Tensor, num_frames: int, weight: Tensor, bias: Optional[Tensor], mean: Optional[Tensor],
        var: Optional[Tensor], gamma: Optional[Tensor], beta: Optional[Tensor], eps: float, owner: Any = None,
        known: Optional[Known] = None,
) -> Tensor:
    """All of equation (8) with the batch norm's running statistics, or without one; it has no derivative."""
    if known:
        path = 'triton' if runs_triton(x, num_frames) else 'plain'
    else:
        path = choose(owner, 'SME, inference', x, num_frames, [weight, bias], obstacle=_still(num_frames))
    if path == 'reference':
        h = _reference_motion_conv(x, num_frames, weight, bias)
        return x + (h if mean is None or var is None else F.batch_norm(h, mean, var, gamma, beta, eps=eps))
    s = known[0] if known else None
    v: Tensor = torch.ops.cmr_layers.sme(
        x, num_frames, weight, bias, mean, var, gamma, beta, eps, s, triton=path == 'triton')
    return v


def _still(num_frames: int) -> str:
    return 'a still has no motion' if num_frames == 1 else ''
