"""Tries a change of a network: what the network computes before and after it, and how far rounding may move that."""
import copy
import math
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, Iterable, Iterator, Tuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attach import check_network
from .ops import use_path

__all__ = [
    'buffers_kept', 'check_eval', 'check_example', 'check_result', 'distance', 'make_trial', 'run', 'run_reference']

_training = attrgetter('training')


def check_eval(modules: Iterable[nn.Module]) -> None:
    if any(map(_training, modules)):
        raise ValueError('model must be in eval mode, got one in training mode; call model.eval() first')


def check_example(model: nn.Module, example_input: Tensor) -> None:
    """Raise if a network can't be changed by trial: a compiled one, in training mode, or an example that is no tensor.
    """
    check_network(model)
    if not isinstance(example_input, Tensor):
        raise TypeError(f'example_input must be a tensor, got {type(example_input).__name__}')
    check_eval(model.modules())


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give buffers their values back: a network may count its calls in one, or move its statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def run(model: nn.Module, x: Tensor) -> Any:
    """What a network computes on the paths that it takes, each time with the same random numbers."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad():
        return model(x)


def run_reference(model: nn.Module, x: Tensor) -> Any:
    """:func:`run` on the path 'reference'."""
    with use_path('reference'):
        return run(model, x)


def check_result(result: Any) -> None:
    """Refuse a result that would be the same whatever is changed."""
    tensors = list(_tensors(result))
    if not tensors:
        raise TypeError(f'model must return tensors, got {type(result).__name__}')
    if not any(x.is_meta or bool(x.isfinite().any()) for x in tensors):
        raise ValueError('example_input must lead to finite numbers, got a result without any')


def make_trial(model: nn.Module, x: Tensor, want: Any) -> Tuple[nn.Module, Tensor, Any, float]:
    """A network to try on, its input, its result, and how far rounding may move that, relative to its size.

    A wide type tells errors from rounding, which deep networks amplify. Some networks compute a part in float32,
    whatever they get, so what is allowed in float64 is noise of float32.
    """
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-2)):
        try:
            trial, wide = copy.deepcopy(model).to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x
            return trial, wide, run_reference(trial, wide), tolerance
        except Exception:  # it can't be copied, or does not run there
            continue
    return model, x, want, 1e-2 if torch.finfo(_dtype(want)).eps < 1e-6 else .3


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a network returned."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from _tensors([getattr(leaf, field.name) for field in fields(leaf)])


def _dtype(value: Any) -> torch.dtype:
    return next((x.dtype for x in _tensors(value) if x.is_floating_point()), torch.float32)


def distance(want: Any, got: Any) -> float:
    """The largest difference of two results of a network, relative to their size."""
    before, after = list(_tensors(want)), list(_tensors(got))
    if [(x.shape, x.dtype) for x in before] != [(x.shape, x.dtype) for x in after]:
        return math.inf
    return max(_difference(x, y) for x, y in zip(before, after))


def _difference(x: Tensor, y: Tensor) -> float:
    if x.is_meta or not x.numel():
        return 0.
    if not x.is_floating_point():
        return 0. if torch.equal(x, y) else math.inf
    finite = x.isfinite()
    if not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()) or not bool(y[finite].isfinite().all()):
        return math.inf
    if not bool(finite.any()):
        return 0.
    x, y = x[finite].double(), y[finite].double()
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-6))  # what is all zeros has only rounding in it


