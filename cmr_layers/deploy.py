"""Trained networks made ready for inference: batch norms folded into convolutions, the forward pass as a CUDA graph."""
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .attach import all_or_nothing
from .bypass import is_bare
from .checks import check_module
from .fuse import fold_pair, joint
from .stage import StageFusion, fuse_stages
from .trial import buffers_kept, check_eval, check_example, check_result, distance, make_trial, run_reference
from .watch import Watch

__all__ = ['Folding', 'StageFusion', 'fold', 'fuse_stages', 'graphed']


@dataclass(frozen=True)
class Folding:
    """What :func:`fold` did; print it.

    Attributes:
        model: Class of the network.
        pairs: Names of the convolutions and of the batch norms that are part of them now.
        left: Names of the batch norms that stay, and why.
    """
    model: str
    pairs: List[Tuple[str, str]]
    left: Dict[str, str]

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        lines = [f'{self.model}: {len(self.pairs)} batch norms folded, {len(self.left)} left alone']
        width = max(map(len, self.left), default=0)
        return '\n'.join(lines + [f'  {name:<{width}}  {reason}' for name, reason in self.left.items()])


def fold(model: nn.Module, example_input: Tensor) -> Folding:
    """Fold batch norms into the convolutions before them, in place, wherever they are in a network.

    The network is run on the example and watched: a batch norm is folded if it gets what a convolution returns, and
    nobody else reads that. Then a copy is folded and has to compute what it did, in float64 where the network runs
    there; only then the network itself is changed. A batch norm of which this can't be shown stays, and is reported.

    An identity takes the place of a batch norm. Where timm's batch norm has an activation or a drop in it, an
    ``nn.Sequential`` of those takes its place, with their names. The convolution has new parameters, of the same data
    type, memory format and ``requires_grad``; half precision is computed in float32 and rounded once. What the network
    computes moves by rounding only.

    Fold a network before it is compiled, and after it is saved: the folded form is none that :func:`save_model` knows;
    its state dict fits a network that was folded likewise. ``timm.utils.reparameterize_model`` needs no example, but
    asks blocks and layers alone, so that a stem's batch norm stays, and most of those in the networks of others.

    What the example does not show is not known. A network that takes another way for another input, or reads in another
    thread what it does not read here, is folded all the same.

    Args:
        model: The network, in eval mode.
        example_input: What it takes, of its device and dtype. Any shape will do that shows all of the network.

    Returns:
        What was folded, and what was left alone for which reason. If a call is interrupted or raises an error, the
        network is left as it was.

    Raises:
        ValueError: model is in training mode, or example_input leads to no finite number.
        TypeError: model is no module or a compiled one, example_input is no tensor, or the model returns none.
        RuntimeError: The folded copy computes something else; a layer that was inserted is not at its place.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model('mobilenetv3_small_050').eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> want = model(x)
        >>> print(fold(model, x))
        MobileNetV3: 34 batch norms folded, 0 left alone
        >>> torch.allclose(model(x), want, atol=1e-4)
        True
    """
    check_example(model, example_input)
    with all_or_nothing(model), buffers_kept(model):
        x = example_input.detach().clone()
        watch = Watch(model)
        want = watch.run(lambda: run_reference(model, x))
        pairs, left = watch.pairs, watch.left
        for conv, norm in watch.pairs:
            reason = _rounding(model.get_submodule(conv), model.get_submodule(norm))
            if reason:
                left[norm] = reason
        pairs = [pair for pair in pairs if pair[1] not in left]
        if pairs:
            check_result(want)
            _check(model, pairs, x, want)
            _fold(model, pairs)
    return Folding(type(model).__name__, pairs, left)


def _rounding(conv: Any, norm: Any) -> str:
    """What rounding the folded weights to the convolution's data type would do to them, if that is too much."""
    dtype, eps = conv.weight.dtype, 4 * torch.finfo(conv.weight.dtype).eps
    weight, bias = joint(conv, norm)
    if weight.is_meta:
        return ''
    if not all(bool(v.to(dtype).isfinite().all()) for v in (weight, bias)):
        return 'would make its convolution overflow'
    gain = torch.ones_like(bias) if norm.weight is None else norm.weight.to(bias.dtype)
    # small numbers have few digits in half precision, or none: each channel has to keep its own
    for value, size in (weight.flatten(1), weight.flatten(1)), (bias[:, None], torch.stack([bias, gain], 1)):
        if bool(((value - value.to(dtype)).abs().amax(1) > eps * size.abs().amax(1)).any()):
            return f'would lose digits in the {str(dtype).removeprefix("torch.")} of its convolution'
    return ''


def _fold(model: nn.Module, pairs: List[Tuple[str, str]]) -> None:
    for conv, norm in pairs:
        replaced = model.get_submodule(norm)
        fold_pair(model.get_submodule(conv), replaced)
        # timm's batch norm may have a drop and an activation in it: they stay, with their names
        rest = OrderedDict(
            (name, child) for name, child in replaced.named_children()
            if type(child) is not nn.Identity or not is_bare(child))
        model.set_submodule(norm, (nn.Sequential(rest) if rest else nn.Identity()).eval())


class _Undo(Exception):
    pass


def _check(model: nn.Module, pairs: List[Tuple[str, str]], x: Tensor, want: Any) -> None:
    """Raise a RuntimeError if pairs can't be folded: the operations that were seen are not all that there is to it."""
    trial, wide, truth, tolerance = make_trial(model, x, want)
    moved = _moved(trial, pairs, wide, truth)
    if moved <= tolerance:
        return
    wrong = (pair for pair in pairs if not _moved(trial, [pair], wide, truth) <= tolerance)
    conv, norm = next(wrong, ('the convolutions', 'all batch norms together'))
    raise RuntimeError(
        f'{norm} can not be folded into {conv}: the {type(model).__name__} would compute something else on '
        f'example_input, by {moved:.1e} of its size, and was left as it is. Something else than an operation of '
        f'PyTorch reads what {conv} returns, or reads attributes of {norm}. If it is a detector, whose results jump '
        f'with rounding, fold its backbone alone'
    )


def _moved(trial: nn.Module, pairs: List[Tuple[str, str]], x: Tensor, want: Any) -> float:
    """How far pairs move what a network computes, if they are folded; the network is left as it is."""
    moved = math.inf
    try:
        with all_or_nothing(trial):
            _fold(trial, pairs)
            moved = distance(want, run_reference(trial, x))
            raise _Undo
    except Exception:
        pass
    return moved


def graphed(model: nn.Module, example_input: Tensor) -> Callable[[Tensor], Any]:
    """Capture a model's forward pass into a CUDA graph, which replays all its kernels with one launch.

    It pays where launching the kernels takes longer than running them: small batches of short clips.

    Args:
        model: A network in eval mode on a CUDA device; its forward must not wait for the device.
        example_input: CUDA tensor of the one shape, dtype and device that the graph is for.

    Returns:
        A function from x to ``model(x)``, without gradients. Its results are copies and stay valid after the next
        call; calls must not overlap, in threads or streams. The graph reads the weights where they are: it sees those
        that are changed in place, as ``load_state_dict`` does, but when the model is moved, cast or folded, a module
        of it is exchanged, or ``set_num_frames`` is called, capture a new one.

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
    # The graph holds what these modules did, whatever comes and goes in the network later. A list of them is looked
    # through sixteen times faster than the network, so that every replay can afford to look at all of them.
    modules = list(model.modules())
    check_eval(modules)
    if not _on_cuda(example_input):
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
        check_eval(modules)
        _check_like(x, static)
        with torch.cuda.device(static.device):
            with torch.inference_mode():
                static.copy_(x)
                graph.replay()
            return tree_map_only(Tensor, torch.clone, output)  # outside: inference tensors would be of little use

    return run


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == 'cuda'


def _check_like(x: Tensor, static: Tensor) -> None:
    wanted = f'{list(static.shape)}, {static.dtype} on {static.device}, as the graph was captured with'
    if not isinstance(x, Tensor):
        raise TypeError(f'x must be a tensor of {wanted}, got {type(x).__name__}')
    if x.shape != static.shape or x.dtype != static.dtype or x.device != static.device:
        raise ValueError(f'x must be a tensor of {wanted}, got {list(x.shape)}, {x.dtype} on {x.device}')
