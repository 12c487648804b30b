"""Trained networks made ready for inference: batch norms folded into convolutions, the forward pass as a CUDA graph.

Folding follows timm's protocol: ``timm.utils.reparameterize_model(model)`` asks every module of a network, except the
network itself, for ``fuse()`` and puts in its place what that returns. It leaves no batch norm in the ``cmr_resnet``
family and its released variants, and that of the stem in a ResNet of timm's or torchvision's that
:func:`cmr_layers.retrofit` changed. Elsewhere only SME's batch norms fold, and those of the image network stay: which
convolution is in front of them is not known.
"""
from typing import Any, Callable, Optional

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._pytree import tree_map_only

from .bypass import is_bare, is_pytorch_conv, is_pytorch_norm
from .clip import OneNode, check_module

__all__ = ['Stem', 'StemNorm', 'fold_norms', 'graphed']


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, in place: the ``fuse`` of blocks and layers.

    Each child that is a batch norm is replaced by an identity, and the convolution before it takes over what it
    computes; likewise in children that are an ``nn.Sequential``. The children have to be registered in the order in
    which they run. Half precision is computed in float32 and rounded once. The logits move by rounding only: by less
    than 1e-5 of their size in float32 and 0.05 in bfloat16 with 50 layers, as the tests hold on random weights.

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
        >>> any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        False
        >>> x = torch.randn(1, 4, 3, 64, 64)
        >>> torch.allclose(folded(x), model(x), atol=1e-4)
        True
    """
    before: Optional[nn.Module] = None
    for name, child in list(module._modules.items()):  # not named_children, which leaves out what it has seen before
        if type(child) is nn.Sequential:
            fold_norms(child)
        elif isinstance(before, nn.Conv2d) and isinstance(child, nn.BatchNorm2d) and _is_pair(before, child):
            _fold(before, child)
            setattr(module, name, nn.Identity().eval())
        before = child
    return module


def _is_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return is_pytorch_conv(conv) and is_pytorch_norm(norm)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.training:
        raise ValueError(
            f'model must be in eval mode to fold its batch norms, got {norm} in training mode, where its statistics '
            f'still change; call model.eval() first'
        )
    dtype, wide = conv.weight.dtype, torch.promote_types(conv.weight.dtype, torch.float32)
    tensors = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    w, b, mean, var, scale, shift = (None if t is None else t.to(wide) for t in tensors)
    assert w is not None and mean is not None and var is not None
    weight, bias = fuse_conv_bn_weights(w, b, mean, var, norm.eps, scale, shift)
    learns = conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.to(dtype), learns)
    conv.bias = nn.Parameter(bias.to(dtype), learns)


class Stem(nn.Sequential):
    """A stem of several convolutions, which folds its own batch norms."""
    fuse = fold_norms


@register_notrace_module
class StemNorm(OneNode, nn.BatchNorm2d):
    """The batch norm behind a network's stem. It knows the stem, and so can fold though timm won't ask the network.

    Args:
        norm: The batch norm whose place it takes, with its tensors.
        stem: The convolution in front of it, or the ``nn.Sequential`` that ends with it.

    Example:
        >>> conv, norm = nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8)
        >>> StemNorm(norm, conv).eval().fuse()
        Identity()
    """

    def __init__(self, norm: nn.BatchNorm2d, stem: nn.Module) -> None:
        super().__init__(norm.num_features, device='meta')
        vars(self).update(vars(norm))
        self.stem = (stem,)  # in a tuple, else the stem would be a child and have its keys twice

    def fuse(self) -> nn.Module:
        """Fold into the stem; what takes the place of the batch norm."""
        stem, = self.stem
        # Only now, as somebody may have replaced it. The stem's other batch norms are not touched: in a graph of FX
        # they stand elsewhere.
        last = stem[-1] if isinstance(stem, nn.Sequential) and len(stem) and is_bare(stem) else stem
        return fold_norms(nn.Sequential(last, self)).get_submodule('1')


def graphed(model: nn.Module, example_input: Tensor) -> Callable[[Tensor], Any]:
    """Capture a model's forward pass into a CUDA graph, which replays all its kernels with one launch.

    It pays where launching the kernels takes longer than running them: small batches of short clips.

    Args:
        model: A network in eval mode on a CUDA device; its forward must not wait for the device.
        example_input: CUDA tensor of the one shape, dtype and device that the graph is for.

    Returns:
        A function from x to ``model(x)``, without gradients. Its results are copies and stay valid after the next
        call; calls must not overlap, in threads or streams. The graph reads the weights where they are: it sees those
        that are changed in place, as ``load_state_dict`` does, but when the model is moved, cast or folded, or when
        ``set_num_frames`` is called, capture a new one.

    Raises:
        TypeError: model is no module, or example_input is no tensor.
        ValueError: model is in training mode, or example_input is not on a CUDA device; at call time, x has another
            shape, dtype or device, or the model is in training mode.
        RuntimeError: Autocast is on with its cache, whose tensors the graph would outlive.

    Example:
        >>> model = timm.create_model('cmr_resnet50', num_frames=8).cuda().eval()  # doctest: +SKIP
        >>> run = graphed(model, torch.randn(1, 8, 3, 224, 224, device='cuda'))  # doctest: +SKIP
        >>> logits = run(x)  # doctest: +SKIP
    """
    check_module('model', model)
    if not isinstance(example_input, Tensor):
        raise TypeError(f'example_input must be a tensor, got {type(example_input).__name__}')
    _check_eval(model)
    if example_input.device.type != 'cuda':
        raise ValueError(f'example_input must be on a CUDA device, got a tensor on {example_input.device}')
    if torch.is_autocast_enabled('cuda') and torch.is_autocast_cache_enabled():
        raise RuntimeError('autocast must be without a cache here: torch.autocast(..., cache_enabled=False)')

    with torch.cuda.device(example_input.device), torch.inference_mode():
        static = example_input.clone()
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):  # what happens only once, as compiling and choosing kernels, can't be captured
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)

    def run(x: Tensor) -> Any:
        _check_eval(model)
        _check_like(x, static)
        with torch.cuda.device(static.device):
            with torch.inference_mode():
                static.copy_(x)
                graph.replay()
            return tree_map_only(Tensor, torch.clone, output)  # outside: inference tensors would be of little use

    return run


def _check_eval(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError('model must be in eval mode, got one in training mode; call model.eval() first')


def _check_like(x: Tensor, static: Tensor) -> None:
    wanted = f'{list(static.shape)}, {static.dtype} on {static.device}, as the graph was captured with'
    if not isinstance(x, Tensor):
        raise TypeError(f'x must be a tensor of {wanted}, got {type(x).__name__}')
    if x.shape != static.shape or x.dtype != static.dtype or x.device != static.device:
        raise ValueError(f'x must be a tensor of {wanted}, got {list(x.shape)}, {x.dtype} on {x.device}')
