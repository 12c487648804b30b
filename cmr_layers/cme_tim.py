"""CME, the TIM behind it and the convolution behind both, run with as few passes over the frames as they allow.

Alone each of the three reads and writes its frames. :mod:`.ops.cme_tim` computes them together.
"""
from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .bypass import is_own, is_pytorch_conv
from .cme import CME
from .tim import TIM

__all__ = ['cme_tim_conv', 'run']


def _fit(cme: nn.Module, tim: nn.Module, x: Any) -> bool:
    """Whether two modules are a CME and a TIM that compute what the operator computes, of frames x."""
    return (
        isinstance(x, Tensor) and is_own(cme, CME) and is_own(tim, TIM)  # FX passes a proxy
        and x.ndim == cme.frame_ndim
        and cme.num_frames == tim.num_frames and cme.channels == tim.channels
        and (cme.input_fmt, cme.num_prefix_tokens) == (tim.input_fmt, tim.num_prefix_tokens))


def cme_tim_conv(cme: Any, tim: Any, conv: Any, x: Any, pooled: Optional[Tensor] = None) -> Tensor:
    """``conv(tim(cme(x)))``; ``pooled``: as for :func:`.ops.cme_tim`."""
    if not _fit(cme, tim, x) or cme.input_fmt != 'NCHW':
        y: Tensor = conv(tim(cme(x)))
        return y
    frames, num_frames = cme.frames(x)
    if is_pytorch_conv(conv) and not torch.jit.is_tracing():
        convolution = ops.Convolution(
            conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return ops.cme_tim(frames, num_frames, cme.weights(), tim.weight, convolution, owner=cme, pooled=pooled)
    y = conv(ops.cme_tim(frames, num_frames, cme.weights(), tim.weight, owner=cme, pooled=pooled))
    return y


def run(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Layers one after the other, a CME and the TIM behind it as one."""
    done = 0
    while done < len(layers):
        if done + 1 < len(layers) and _fit(layers[done], layers[done + 1], x):
            cme, tim = layers[done:done + 2]
            frames, num_frames = cme.frames(x)
            y = ops.cme_tim(
                frames, num_frames, cme.weights(), tim.weight, owner=cme, prefix=cme.num_prefix_tokens)
            x = cme.like_input(y, x)
            done += 2
        else:
            x = layers[done](x)
            done += 1
    return x
