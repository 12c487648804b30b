"""The paper's equations as plain functions of tensors.

This file is the law: every faster path is tested against it. Clips are (B, T, C, H, W), frames of a clip in
order along T. The functions run in eager mode, under ``torch.compile``, ``torch.export`` and TorchScript, which is
why they use tensor methods rather than ``einops.rearrange``.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['clips', 'cme_gate', 'cme', 'tim', 'similarity', 'motion']


def clips(x: Tensor, num_frames: int) -> Tensor:
    """Frames (B*T, ...) to clips (B, T, ...); the first axis has to hold whole clips."""
    size = [x.shape[0] // num_frames, num_frames] + list(x.shape[1:])
    # The expand tells a tracer that T frames are left. To it, a split of N leaves N // (N // T) frames, and such sizes
    # nest deeper with each layer, until compiling for a dynamic batch does not end. It is a reshape and no unflatten,
    # since onnxruntime can't read the graphs that torch.onnx makes of an unflatten.
    y: Tensor = x.reshape(size).expand(size)
    return y


def cme_gate(
        x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor] = None, prefix: int = 0,
) -> Tensor:
    """Channel gates of CME, equations (2)-(6).

    The frames are pooled first, so everything after the mean costs what a vector costs. It runs in float32 (in
    float64 for a float64 clip) whatever the clip's dtype and whether autocast is on or not: a softmax over
    unscaled dot products of up to C/r terms does not survive half precision.

    Args:
        x: Clip, (B, T, C, H, W).
        w1: Weight of the values, (C/r1, C).
        w2: Weight of the keys, (C/r2, C).
        w3: Weight that restores the channels, (C, C/r1).
        b3: Bias of the gate's logits, (C,). The paper has none.
        prefix: Columns at the beginning of W that are no places of the image, and are not pooled.

    Returns:
        Gates a in (0, 1), (B, T, C), float32 or float64.
    """
    if not torch.jit.is_scripting():
        # meta tensors have no autocast to ask for
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return _cme_gate(x, w1, w2, w3, b3, prefix)
    return _cme_gate(x, w1, w2, w3, b3, prefix)


def _cme_gate(
        x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor] = None, prefix: int = 0,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if prefix > 0:
        x = x[..., prefix:]
    x = x.mean((3, 4), dtype=dtype)                                         # global average pooling: (B, T, C)
    z = F.linear(x, w1.to(dtype))                                           # (2)
    k = F.linear(x, w2.to(dtype))                                           # (3)
    bound = (3e38 / k.shape[2]) ** 0.5
    k = k.clamp(-bound, bound)                                              # no overflow in (4), so no NaN in (5)
    d = -torch.matmul(k, k.transpose(1, 2))                                 # (4): (B, T, T)
    z = z + torch.matmul(d.softmax(dim=2), z)                               # (5): softmax over j
    return F.linear(z, w3.to(dtype), None if b3 is None else b3.to(dtype)).sigmoid()    # (6)


def cme(
        x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, b3: Optional[Tensor] = None, prefix: int = 0,
) -> Tensor:
    """Channel-wise motion enhancement, equation (1): each frame's channels times its gates.

    Args and shapes as :func:`cme_gate`; returns a clip of x's shape and dtype.
    """
    a = cme_gate(x, w1, w2, w3, b3, prefix).to(x.dtype)
    return x * a[:, :, :, None, None]


def tim(x: Tensor, weight: Tensor) -> Tensor:
    """Temporal interaction: a depthwise convolution over the frames of each pixel, zero padding at both ends.

    It runs as a depthwise conv2d with a (kernel_size, 1) kernel over (B, C, T, H*W), which is a free view of a
    channels_last clip. TEINet (AAAI 2020) defines the module.

    Args:
        x: Clip, (B, T, C, H, W).
        weight: Taps, (C, 1, kernel_size) with an odd kernel_size; the middle tap reads the frame itself.

    Returns:
        Clip of x's shape.
    """
    b, t, c, h, w = x.shape
    x = x.reshape(b, t, c, h * w).transpose(1, 2)
    x = F.conv2d(x, weight.unsqueeze(3), padding=(weight.shape[2] // 2, 0), groups=weight.shape[0])
    y: Tensor = x.transpose(1, 2).reshape(b, t, c, h, w)
    return y


def similarity(x: Tensor) -> Tensor:
    """Similarity of each frame with the next one, pixel by pixel, equation (7).

    The cosine is taken over the channels and accumulated in float32 (float64 for a float64 clip). A pixel whose
    features are all zero (norm below 1e-12) has similarity 0. The last frame takes the map of the one before it (the
    paper's s_T = s_{T-1}); a still (T = 1) has no neighbour and counts as similar to itself, s = 1.

    Args:
        x: Clip, (B, T, C, H, W).

    Returns:
        Similarity s in [-1, 1] up to rounding, (B, T, H, W), float32 or float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[1] == 1:
        return torch.ones_like(x[:, :, 0])
    # The squares of huge features would overflow. A cosine does not depend on their scale, so it is taken out. Other
    # features are divided by 1. A sum measures the scale, as onnxruntime can't tell the shape of a maximum, and the
    # factor keeps that sum from overflowing.
    size = (x.detach() * 2. ** -16).abs().sum(2, keepdim=True)
    x = x / torch.where(size > 1e10, size, torch.ones_like(size))
    energy = (x * x).sum(2)
    # Replaced before the root, not after: the gradient of rsqrt at 0 is infinite, and 0 * inf is NaN. Norms below
    # 1e-12 count as zero, since that gradient, norm^-3, would overflow float32.
    inverse_norm = torch.where(energy > 1e-24, energy, torch.ones_like(energy)).rsqrt()
    s = (x[:, :-1] * x[:, 1:]).sum(2) * inverse_norm[:, :-1] * inverse_norm[:, 1:]
    return torch.cat([s, s[:, -1:]], dim=1)


def motion(x: Tensor) -> Tensor:
    """The clip weighted by its motion, x * (1 - s), the input of the convolution in equation (8).

    Args:
        x: Clip, (B, T, C, H, W).

    Returns:
        Clip of x's shape and dtype.
    """
    return x * (1 - similarity(x)).to(x.dtype).unsqueeze(2)
