"""Checks of arguments: each error names the argument, the value received and the value wanted."""
import operator
from typing import Any, Tuple

from torch import nn

__all__ = ['check_choice', 'check_module', 'check_positive']


def check_positive(name: str, value: Any) -> int:
    """Return value as an int if it is a positive one, or raise a ValueError that names the argument."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f'{name} must be a positive int, got {value!r}')
    return number


def check_choice(name: str, value: Any, choices: Tuple[str, ...]) -> str:
    """Return value if it is one of the choices, or raise a ValueError that names the argument."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}')
    return str(value)


def check_module(name: str, value: Any) -> None:
    """Raise a TypeError that names the argument if value is no module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f'{name} must be an nn.Module, got {value!r:.99}')
