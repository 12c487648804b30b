"""What stands in front of a block's first convolution: CME and TIM, in one pass over the frames where both are there.

Alone each of the two reads and writes its frames. Together they are one operator, and in training the convolution
joins them, so that what it saw need not be kept.
"""
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .bypass import is_own, is_pytorch_conv
from .cme import CME
from .tim import TIM

__all__ = ['cme_tim_conv', 'run']


def _fit(cme: nn.Module, tim: nn.Module) -> bool:
    """Whether two modules are a CME and a TIM that compute what the operator computes."""
    return (
        is_own(cme, CME) and is_own(tim, TIM)
        and cme.num_frames == tim.num_frames and cme.channels == tim.channels)


def cme_tim_conv(cme: Any, tim: Any, conv: Any, x: Any) -> Tensor:
    """``conv(tim(cme(x)))``, with as few passes over the frames as the three allow."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not _fit(cme, tim):  # FX passes a proxy
        y: Tensor = conv(tim(cme(x)))
        return y
    frames, num_frames = cme.frames(x)
    if is_pytorch_conv(conv) and not torch.jit.is_tracing():
        arguments = ops.Convolution(
            conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if torch.is_grad_enabled() or ops.joins(frames, num_frames, tim.weight, arguments):
            return ops.front_conv(frames, num_frames, cme.weights(), tim.weight, arguments, owner=cme)
    y = conv(ops.front(frames, num_frames, cme.weights(), tim.weight, owner=cme))
    return y


def run(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Layers one after the other, a CME and the TIM behind it as one."""
    done = 0
    while done < len(layers):
        if done + 1 < len(layers) and isinstance(x, Tensor) and _fit(layers[done], layers[done + 1]):  # no proxy of FX
            x = cme_tim_conv(layers[done], layers[done + 1], nn.Identity(), x)
            done += 2
        else:
            x = layers[done](x)
            done += 1
    return x
