"""How an operator of ours is registered: the typed signature of a function is its schema.

``torch.library.custom_op`` reads signatures, too. But each of its calls takes over a microsecond more, and the first
one imports ``torch._dynamo``, which takes over a second.
"""
from typing import Any, Callable

import torch

__all__ = ['LIBRARY', 'no_derivative', 'no_second_derivative', 'operator']

LIBRARY = torch.library.Library('cmr_layers', 'DEF')


def operator(function: Callable[..., Any]) -> Any:
    """Register a function ``_name`` of tensors as ``torch.ops.cmr_layers.name``, and return that."""
    name = function.__name__.lstrip('_')
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    for device in ('CPU', 'CUDA'):
        LIBRARY.impl(name, function, device)
    return getattr(torch.ops.cmr_layers, name)


def no_second_derivative(name: str) -> None:
    """Have the operator of a backward pass refuse to be differentiated."""
    _refuse(name, 'the operators of cmr_layers have no second derivatives')


def no_derivative(name: str) -> None:
    """Have an operator that is for inference refuse to be differentiated."""
    _refuse(name, f'cmr_layers::{name} is for inference and has no derivative')


def _refuse(name: str, why: str) -> None:

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{why}: run the layers under cmr_layers.ops.use_path('reference')")

    def save(**kwargs: Any) -> None:
        pass

    torch.library.register_autograd(f'cmr_layers::{name}', refuse, setup_context=save, lib=LIBRARY)
