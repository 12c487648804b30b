"""May a module be computed from its tensors, instead of being called?

A fused operator takes weights, not modules. It may stand in for a module only if calling that module would do nothing
else: no subclass, no hook and no patch of anybody's is to be passed over.
"""
from typing import Type, TypeGuard, TypeVar

import torch
from torch import nn

from .clip import ClipLayer

__all__ = ['is_bare', 'is_own', 'is_pytorch_conv', 'is_pytorch_norm']


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: nobody hooked or replaced it."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or 'forward' in vars(module) or torch.nn.modules.module._has_any_global_hook())


def is_pytorch_conv(conv: nn.Module) -> bool:
    """Whether a module is PyTorch's own 2D convolution, padded with zeros by numbers."""
    return (
        type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
        and is_bare(conv))


def is_pytorch_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module computes what PyTorch's batch norm does, and has running statistics."""
    return (
        isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.BatchNorm2d.forward
        and norm.running_mean is not None and is_bare(norm))


_Layer = TypeVar('_Layer', bound=ClipLayer)


def is_own(layer: nn.Module, kind: Type[_Layer]) -> TypeGuard[_Layer]:
    """Whether a module is a layer of this kind that computes what its kind does."""
    return (
        isinstance(layer, kind) and type(layer).forward is ClipLayer.forward
        and type(layer).forward_frames is kind.forward_frames and is_bare(layer))
