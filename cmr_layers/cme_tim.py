"""CME, the TIM behind it and the convolution behind both, run with as few passes over the frames as they allow.

Alone each of the three reads and writes its frames. :mod:`.ops.cme_tim` computes them together.
"""
from typing import Any, Sequence

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
        isinstance(x, Tensor) and x.ndim == 4 and is_own(cme, CME) and is_own(tim, TIM)  # FX passes a proxy
        and cme.num_frames == tim.num_frames and cme.channels == tim.channels)


def cme_tim_conv(cme: Any, tim: Any, conv: Any, x: Any) -> Tensor:
    """``conv(tim(cme(x)))``"""
    if not _fit(cme, tim, x):
        y: Tensor = conv(tim(cme(x)))
        return y
    frames, num_frames = cme.frames(x)
    if is_pytorch_conv(conv) and not torch.jit.is_tracing():
        convolution = ops.Convolution(
            conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return ops.cme_tim(frames, num_frames, cme.weights(), tim.weight, convolution, owner=cme)
    y = conv(ops.cme_tim(frames, num_frames, cme.weights(), tim.weight, owner=cme))
    return y


def run(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Layers one after the other, a CME and the TIM behind it as one."""
    done = 0
    while done < len(layers):
        if done + 1 < len(layers) and _fit(layers[done], layers[done + 1], x):
            cme, tim = layers[done:done + 2]
            frames, num_frames = cme.frames(x)
            x = ops.cme_tim(frames, num_frames, cme.weights(), tim.weight, owner=cme)
            done += 2
        else:
            x = layers[done](x)
            done += 1
    return x
