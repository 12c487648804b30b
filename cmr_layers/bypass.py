"""May a module be computed from its tensors, instead of being called?

A fused operator takes weights, not modules. It may stand in for a module only if calling that module would do nothing
else: no subclass, no hook and no patch of anybody's is to be passed over.
"""
from typing import Type, TypeGuard, TypeVar

import torch
from torch import nn

from .clip import ClipLayer

__all__ = ['is_bare', 'is_own', 'is_pointwise_conv', 'is_pytorch_conv', 'is_pytorch_norm']


# What a call of a module runs, and what somebody may put in its place on an instance.
_METHODS = ('forward', '_conv_forward', 'forward_frames', 'forward_clips', 'frames')
# As they were when this was imported: somebody may patch the classes, too. torch.export patches __call__, so not that.
_CONV = nn.Conv2d.forward, nn.Conv2d._conv_forward
_NORM = nn.BatchNorm2d.forward
_LAYER = ClipLayer.forward, ClipLayer.frames


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: nobody hooked or replaced it."""
    for name in _METHODS:
        if name in vars(module):
            return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook())


def is_pytorch_conv(conv: nn.Module) -> bool:
    """Whether a module is PyTorch's own 2D convolution, padded with zeros by numbers."""
    return (
        type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
        and (type(conv).forward, type(conv)._conv_forward) == _CONV and is_bare(conv))


def is_pointwise_conv(conv: nn.Module) -> bool:
    """Whether it also is a dense 1x1 convolution that keeps the shape of its input."""
    return isinstance(conv, nn.Conv2d) and (
        is_pytorch_conv(conv) and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
        and conv.groups == 1 and conv.in_channels == conv.out_channels)


def is_pytorch_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module computes what PyTorch's batch norm does, and has running statistics."""
    return (
        isinstance(norm, nn.BatchNorm2d) and type(norm).forward is _NORM
        and type(norm).__call__ is nn.Module.__call__
        and norm.running_mean is not None and norm.running_var is not None and is_bare(norm))


_Layer = TypeVar('_Layer', bound=ClipLayer)


def is_own(layer: nn.Module, kind: Type[_Layer]) -> TypeGuard[_Layer]:
    """Whether a module is a layer of this kind that computes what its kind does."""
    return (
        isinstance(layer, kind) and (type(layer).forward, type(layer).frames) == _LAYER
        and type(layer).__call__ is ClipLayer.__call__
        and type(layer).forward_frames is kind.own_forward_frames and is_bare(layer))
