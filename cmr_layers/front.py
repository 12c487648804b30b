"""What stands in front of a block's first convolution: CME and TIM, in one pass over the frames where both are there.

Alone each of the two reads and writes its frames. Together they are one operator, and in training the convolution
joins them, so that what it saw need not be kept.
"""
from typing import Any, Sequence, Type, TypeGuard

import torch
from torch import Tensor, nn

from . import ops
from .clip import ClipLayer
from .cme import CME
from .tim import TIM

__all__ = ['front', 'is_bare', 'is_own', 'is_plain', 'is_plain_norm', 'run']


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: nobody hooked or replaced it."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or 'forward' in vars(module) or torch.nn.modules.module._has_any_global_hook())


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is PyTorch's own and may be computed from its weights."""
    return (
        type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
        and is_bare(conv))


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module computes what PyTorch's batch norm does, and may be computed from its statistics."""
    return (
        isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward
        and norm.running_mean is not None and is_bare(norm))


def _fit(cme: nn.Module, tim: nn.Module) -> bool:
    """Whether two modules are a CME and a TIM that compute what the operator computes."""
    return (
        isinstance(cme, CME) and is_own(cme, CME) and isinstance(tim, TIM) and is_own(tim, TIM)
        and cme.num_frames == tim.num_frames and cme.channels == tim.channels)


def is_own(layer: ClipLayer, kind: Type[ClipLayer]) -> bool:
    """Whether a layer computes what its kind does: no subclass, hook or patch of anybody's changes it."""
    return (
        type(layer).forward is ClipLayer.forward and type(layer).forward_frames is kind.forward_frames
        and is_bare(layer))


def front(cme: Any, tim: Any, conv: Any, x: Any) -> Tensor:
    """``conv(tim(cme(x)))``, with as few passes over the frames as the three allow."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not _fit(cme, tim):  # FX passes a proxy
        y: Tensor = conv(tim(cme(x)))
        return y
    frames, num_frames = cme.frames(x)
    if is_plain(conv) and not torch.jit.is_tracing():
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
            x = front(layers[done], layers[done + 1], nn.Identity(), x)
            done += 2
        else:
            x = layers[done](x)
            done += 1
    return x
