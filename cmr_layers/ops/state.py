"""What a decision depends on besides its arguments.

``path`` and ``log``, attributes of this module, are what :func:`.dispatch.use_path` and :func:`.dispatch.explain` set.
Behind them are context variables, so that no thread and no asyncio task sees what another one set. They are read as
attributes because torch.compile has to know when a graph no longer holds: it guards on a module's attributes, in every
version that the package supports, and on context variables only in the newer ones.
"""
import os
from contextvars import ContextVar
from typing import Any, List, Optional

import torch

__all__ = ['PATHS', 'VARIABLE', 'checked', 'is_exporting', 'is_transformed', 'log', 'path', 'set_log', 'set_path']

PATHS = ('auto', 'triton', 'plain', 'reference')
VARIABLE = 'CMR_LAYERS_PATH'


def checked(path: Any, source: str) -> str:
    if path not in PATHS:
        raise ValueError(f'{source} must be one of {", ".join(map(repr, PATHS))}, got {path!r}')
    return str(path)


_DEFAULT: str = checked(os.environ.get(VARIABLE) or 'auto', VARIABLE)
_path: ContextVar[str] = ContextVar(f'{__name__}.path', default=_DEFAULT)
_log: ContextVar[Optional[List[Any]]] = ContextVar(f'{__name__}.log', default=None)
path: str
log: Optional[List[Any]]


def __getattr__(name: str) -> Any:
    if name == 'path':
        return _path.get()
    if name == 'log':
        return _log.get()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def set_path(path: str) -> str:
    """Force a path in this context, and return what was forced before."""
    before = _path.get()
    _path.set(path)
    return before


def set_log(log: Optional[List[Any]]) -> Optional[List[Any]]:
    """Record decisions in this context, None for not, and return what they were recorded in before."""
    before = _log.get()
    _log.set(log)
    return before


# Constants to torch.compile, which cannot look into the first and, in torch 2.11, takes the second to be always true.

@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether a transform of torch.func is active: vmap, grad, jvp, ..."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether torch.export makes a graph."""
    return torch.compiler.is_exporting()
