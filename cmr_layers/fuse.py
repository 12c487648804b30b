"""A batch norm folded into the convolution before it, and the ``fuse`` of timm's protocol.

``timm.utils.reparameterize_model(model)`` asks every module of a network, except the network itself, for ``fuse()`` and
puts in its place what that returns. Our blocks and layers answer with :func:`fold_norms`. The batch norm of a network's
stem belongs to the network, and so stays; :func:`cmr_layers.deploy.fold` finds that one, too, and all others.
"""
from typing import Any, Optional, Set, Tuple, Type, TypeVar

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .bypass import is_bare, is_pytorch_norm

__all__ = ['fold_norms', 'fold_pair', 'is_conv', 'is_conv_class', 'joint', 'register_conv']

# Whatever the padding is, it comes before the convolution.
_CONVS: Set[Type[nn.Module]] = {nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame}
# What a subclass must not change.
_COMPUTES = ('forward', '_conv_forward', '__call__', 'weight', 'bias')

_Class = TypeVar('_Class', bound=Type[nn.Module])


def register_conv(kind: _Class) -> _Class:
    """Say of a class of modules that it convolves with its ``weight``, adds its ``bias``, and does nothing else."""
    _CONVS.add(kind)
    return kind


def is_conv_class(kind: Type[nn.Module]) -> bool:
    """Whether modules of a class convolve with their weight, add their bias, and do nothing else."""
    return any(
        issubclass(kind, conv) and all(getattr(kind, name, None) is getattr(conv, name, None) for name in _COMPUTES)
        for conv in _CONVS)


def is_conv(module: nn.Module) -> bool:
    """Whether calling a module is a convolution and nothing else."""
    return is_conv_class(type(module)) and is_bare(module)


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, in place: the ``fuse`` of blocks and layers.

    Each child that is a batch norm is replaced by an identity, and the convolution before it takes over what it
    computes; likewise in children that are an ``nn.Sequential``. The children have to be registered in the order in
    which they run.

    These stay as they are: a batch norm without running statistics, one whose forward is not PyTorch's (synchronized
    or frozen; load the weights in a fresh network to fold them), and a pair with hooks.

    Args:
        module: The module that holds the convolutions and the batch norms.

    Returns:
        The same module.

    Raises:
        ValueError: A batch norm is in training mode, where it normalises with the statistics of the batch.

    Example:
        >>> import timm, torch, cmr_layers
        >>> model = timm.create_model('cmr_resnet18', num_frames=4).eval()
        >>> folded = timm.utils.reparameterize_model(model)  # a copy, with inplace=True the model itself
        >>> [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
        ['bn1']
        >>> x = torch.randn(1, 4, 3, 64, 64)
        >>> torch.allclose(folded(x), model(x), atol=1e-4)
        True
    """
    before: Optional[nn.Module] = None
    for name, child in list(module._modules.items()):  # not named_children, which leaves out what it has seen before
        if type(child) is nn.Sequential:
            fold_norms(child)
        elif before is not None and child is not None and is_conv(before) and is_pytorch_norm(child):
            weight: Any = before.weight
            if weight.ndim == 4:
                fold_pair(before, child)
                setattr(module, name, nn.Identity().eval())
        before = child
    return module


@torch.no_grad()
def fold_pair(conv: Any, norm: Any) -> None:
    """Have a convolution compute what it and the batch norm behind it do; the batch norm is not touched.

    Half precision is computed in float32 and rounded once. The convolution gets new parameters, of the old data type,
    memory format and ``requires_grad``.

    Args:
        conv: A convolution, which has parameters weight and bias; bias may be None.
        norm: A batch norm with running statistics.

    Raises:
        ValueError: The batch norm is in training mode, where it normalises with the statistics of the batch.

    Example:
        >>> conv, norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8).eval()
        >>> x = torch.randn(1, 3, 5, 5)
        >>> want = norm(conv(x))
        >>> fold_pair(conv, norm)
        >>> torch.allclose(conv(x), want, atol=1e-6)
        True
    """
    weight, bias = (v.to(conv.weight.dtype) for v in joint(conv, norm))
    learns = conv.weight.requires_grad
    bias_learns = learns if conv.bias is None else conv.bias.requires_grad
    conv.weight = nn.Parameter(weight, learns)
    conv.bias = nn.Parameter(bias, bias_learns)


@torch.no_grad()
def joint(conv: Any, norm: Any) -> Tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that :func:`fold_pair` makes, before they are rounded to its data type."""
    if norm.training:
        raise ValueError(
            f'model must be in eval mode to fold its batch norms, got {norm} in training mode, where its statistics '
            f'still change; call model.eval() first'
        )
    wide = torch.promote_types(torch.promote_types(conv.weight.dtype, norm.running_var.dtype), torch.float32)
    tensors = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    w, b, mean, var, scale, shift = (None if t is None else t.to(wide) for t in tensors)
    assert w is not None and mean is not None and var is not None
    return fuse_conv_bn_weights(w, b, mean, var, norm.eps, scale, shift)
