"""Which path a call of a layer takes: the one place that decides it, a switch to force one, and a report.

There are three paths, and they compute the same:

- ``'triton'``: operators whose kernels are written in Triton, for CUDA;
- ``'plain'``: the same operators as PyTorch calls arranged for speed and memory, for CPUs and where Triton can't run;
- ``'reference'``: the equations as :mod:`.reference` has them, differentiated by autograd, for everything else.

Each operation asks :func:`choose` once a call. The answer is an argument of its operator, which saves it for the
backward pass.
"""
import importlib.util
import os
import sys
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

__all__ = ['Decision', 'Explanation', 'choose', 'explain', 'is_exporting', 'is_transformed', 'undisturbed', 'use_path']

PATHS = ('auto', 'triton', 'plain', 'reference')
VARIABLE = 'CMR_LAYERS_PATH'


class Decision(NamedTuple):
    """What was decided for a call of a layer, and why."""
    owner: Any
    operation: str
    path: str
    reason: str


def _checked(path: Any, source: str) -> str:
    if path not in PATHS:
        raise ValueError(f'{source} must be one of {", ".join(map(repr, PATHS))}, got {path!r}')
    return str(path)


# A context variable is seen by one thread or asyncio task only. Both are read as attributes of this module, forced and
# log. torch.compile has to know when a graph no longer holds. It guards on a module's attributes in every version that
# the package supports, and on context variables only in the newer ones.
_default = _checked(os.environ.get(VARIABLE) or 'auto', VARIABLE)
_forced: ContextVar[str] = ContextVar(f'{__name__}.forced', default=_default)
_log: ContextVar[Optional[List[Decision]]] = ContextVar(f'{__name__}.log', default=None)
_here = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name == 'forced':
        return _forced.get()
    if name == 'log':
        return _log.get()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Force a path for the layers that are called within a ``with`` block.

    The switch is a context variable: it holds for the thread, or the asyncio task, that is in the block. A thread that
    starts there (one of a DataLoader, or of ``nn.DataParallel``) begins with the default of the process, which the
    environment variable ``CMR_LAYERS_PATH`` sets. A backward pass takes the path of its forward pass, wherever it runs.

    Gradient checkpointing repeats the forward pass, and the repeated layers choose anew: start the backward pass within
    the block, too. For a model on a GPU, PyTorch repeats the forward pass in a thread of its own: set the variable.

    Args:
        path: 'triton', 'plain' or 'reference', or 'auto' to let each call choose.

    Raises:
        ValueError: path is none of these.
        RuntimeError: At the call of a layer that can't take the path; the message says why.

    Example:
        >>> from cmr_layers import CME
        >>> layer, x = CME(8, num_frames=4), torch.randn(4, 8, 6, 6)
        >>> with use_path('reference'):
        ...     want = layer(x)
        >>> torch.allclose(layer(x), want, atol=1e-6)
        True
    """
    before = _forced.get()
    _forced.set(_checked(path, 'path'))
    try:
        yield
    finally:
        _forced.set(before)


# Constants to torch.compile, which cannot look into the first and, in torch 2.11, takes the second to be always true.

@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether a transform of torch.func is active: vmap, grad, jvp, ..."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether torch.export makes a graph."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: Optional[int]) -> Tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_HAS_TRITON = importlib.util.find_spec('triton') is not None


def _operator_obstacle(x: Tensor, weights: Sequence[Optional[Tensor]], forced: bool) -> str:
    """Why the operators, in either form, can't take the call; empty if they can."""
    if is_exporting() and not forced:
        return 'torch.export: a graph without operators of this package'
    device = x.device.type
    if device not in ('cpu', 'cuda'):
        return f'x is on {device}'
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'x is {x.dtype}'
    if x.shape[0] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        return 'x is empty'
    if torch.is_autocast_enabled(device):
        if x.dtype != torch.get_autocast_dtype(device):
            return f'autocast to {torch.get_autocast_dtype(device)} would round x, which is {x.dtype}'
    else:
        for weight in weights:
            if weight is not None and weight.dtype != x.dtype:
                return f'x is {x.dtype} and a weight {weight.dtype}'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation is active'
    if is_transformed():
        return 'a transform of torch.func is active'
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing() and not forced:
            return 'torch.jit.trace: a graph without operators of this package'
        kind = type(x)
        if kind is not Tensor and kind is not nn.Parameter and not kind.__module__.startswith('torch._subclasses'):
            return f'x is a {kind.__name__}'
    return ''


def _triton_obstacle(x: Tensor, num_frames: int) -> str:
    """Why the Triton kernels can't take frames x (N, C, H, W); empty if they can."""
    if x.device.type != 'cuda':
        return f'x is on {x.device.type}'
    if torch.version.hip is not None:
        return 'the kernels have not been tried on ROCm'
    if not _HAS_TRITON:
        return 'triton is not installed'
    major, minor = _capability(x.device.index)
    if major < 8:
        return f'the GPU has compute capability {major}.{minor}, 8.0 is wanted'
    _, channels, height, width = x.shape
    if height * width >= 2 ** 20 or num_frames * channels * height * width >= 2 ** 30:
        return f'clips of {num_frames} frames of {channels}x{height}x{width} are too large'
    return ''


def choose(
        owner: Any, operation: str, x: Tensor, num_frames: int, weights: Sequence[Optional[Tensor]] = (),
        obstacle: str = '', no_kernel: str = '', slower: str = '',
) -> str:
    """Decide on the path of a call: 'triton', 'plain' or 'reference'.

    Args:
        owner: The layer, for :func:`explain`.
        operation: What is to be computed, for :func:`explain`.
        x: Frames, (B*T, C, H, W).
        num_frames: Frames T of a clip.
        weights: The layer's tensors.
        obstacle: A reason of the caller's not to use the operators.
        no_kernel: A reason of the caller's not to use Triton.
        slower: A reason of the caller's to prefer the reference to the plain form, if nothing is forced.

    Raises:
        RuntimeError: A forced path can't take the call.
    """
    forced: str = _here.forced
    if forced == 'reference':
        path, reason = forced, 'forced'
    else:
        obstacle = obstacle or _operator_obstacle(x, weights, forced != 'auto')
        no_kernel = obstacle or _triton_obstacle(x, num_frames) or no_kernel
        path = 'reference' if obstacle else 'plain' if no_kernel or forced == 'plain' else 'triton'
        reason = obstacle or ('forced' if forced == 'plain' else no_kernel)
        if path == 'plain' and forced == 'auto' and slower:
            path, reason = 'reference', slower
        if forced not in ('auto', path):
            raise RuntimeError(f"the path {forced!r} is forced, but {operation} can't take it: {reason}")
    log: Optional[List[Decision]] = _here.log
    if log is not None:
        log.append(Decision(owner, operation, path, reason))
    return path


def undisturbed(x: Tensor) -> ExitStack:
    """For an operator's own calls: no autocast, as the dtypes are its business, and x's device is the current one."""
    stack = ExitStack()
    if torch.is_autocast_enabled(x.device.type):
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if x.device.type == 'cuda' and x.device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(x.device))
    return stack


class Explanation(List[Decision]):
    """What :func:`explain` found; print it. The owners are names here."""

    def __str__(self) -> str:
        width = max((len(row.owner) for row in self), default=0)
        depth = max((len(row.operation) for row in self), default=0)
        return '\n'.join(
            f'{row.owner:<{width}}  {row.operation:<{depth}}  {row.path}{f" ({row.reason})" if row.reason else ""}'
            for row in self)


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Which path each layer of a model takes for an input, and why not a faster one.

    It runs the model once, without gradients, in its present mode (training or eval). Like any forward pass, that moves
    the running statistics of a model in training mode. A call with gradients may take another path than it says. Calls
    that other threads make meanwhile are not in it.

    Args:
        model: Any module with CME, SME or TIM in it, or a layer.
        x: Its input.

    Returns:
        A list of (owner, operation, path, reason), in the order of the calls.

    Raises:
        TypeError: model is no module, or one that torch.compile made, whose layers decided when it was traced.

    Example:
        >>> from cmr_layers import TIM
        >>> print(explain(TIM(8, num_frames=4), torch.randn(4, 8, 6, 6)))
        TIM  TIM  plain (x is on cpu)
    """
    if not isinstance(model, nn.Module) or hasattr(model, '_orig_mod'):
        raise TypeError(f'model must be an nn.Module that is not compiled, got {type(model).__name__}')
    decisions: List[Decision] = []
    before = _log.get()
    _log.set(decisions)
    try:
        with torch.no_grad():
            model(x)
    finally:
        _log.set(before)
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    return Explanation(row._replace(owner=names.get(row.owner, '?')) for row in decisions)
