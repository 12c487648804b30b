"""Which path a layer takes: the one place that decides it, a switch to force one, and a report of what was decided.

There are three paths, and they compute the same:

- ``'triton'``: operators whose kernels are written in Triton, for CUDA;
- ``'plain'``: the same operators as PyTorch calls arranged for speed and memory, for CPUs and what Triton leaves;
- ``'reference'``: the equations as :mod:`.reference` has them, differentiated by autograd, for everything else.
"""
import importlib.util
from contextlib import contextmanager
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from . import state
from .layout import is_channels_last

__all__ = ['Decision', 'Explanation', 'choose', 'explain', 'is_narrow', 'runs_triton', 'use_path']


class Decision(NamedTuple):
    """What was decided for a call of a layer, and why."""
    owner: Any
    operation: str
    path: str
    reason: str


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Force a path for the layers that are called within a ``with`` block.

    The switch is a context variable: it holds for the thread, or the asyncio task, that is in the block. A thread that
    is started there (a DataLoader's, one of ``nn.DataParallel``'s) starts with the process's default, which the
    environment variable ``CMR_LAYERS_PATH`` sets. A backward pass takes the path of its forward pass, wherever it runs.
    A forward pass that gradient checkpointing repeats is a call like any other: start the backward pass within the
    block, too. For a model on a GPU PyTorch repeats it in a thread of its own, so force that with the variable.

    Args:
        path: 'triton', 'plain' or 'reference', or 'auto' for the dispatcher's own choice.

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
    before = state.set_path(state.checked(path, 'path'))
    try:
        yield
    finally:
        state.set_path(before)


_HAS_TRITON = importlib.util.find_spec('triton') is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: Optional[int]) -> Tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_obstacle(x: Tensor, num_frames: int, taps: Optional[Tensor] = None) -> str:
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
    if taps is not None and taps.shape[2] not in (1, 3):
        return f'TIM has {taps.shape[2]} taps, the kernels know 1 and 3'
    _, channels, height, width = x.shape
    if height * width >= 2 ** 20 or num_frames * channels * height * width >= 2 ** 30:
        return f'clips of {num_frames} frames of {channels}x{height}x{width} are too large'
    return ''


def runs_triton(x: Tensor, num_frames: int, taps: Optional[Tensor] = None) -> bool:
    """Whether a call would run the Triton form, but for what else :func:`choose` looks at."""
    return state.path in ('auto', 'triton') and not triton_obstacle(x, num_frames, taps)


def is_narrow(
        x: Tensor, num_frames: int, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int,
) -> bool:
    """Whether the convolution behind CME and TIM is one that the kernel of the two can take in.

    It mixes the frames once for every 128 output channels, so a wide convolution does not pay, and its tiles hold a
    power of two of frames.
    """
    return (
        tuple(weight.shape[2:]) == (1, 1) and weight.shape[0] <= 128 and groups == 1 and set(stride) == {1}
        and set(padding) == {0} and x.dtype in (torch.float16, torch.bfloat16) and is_channels_last(x)
        and num_frames in (2, 4, 8, 16))


def _operator_obstacle(x: Tensor, weights: Sequence[Optional[Tensor]], forced: bool) -> str:
    """Why the operators, in either form, can't take the call; empty if they can."""
    if state.is_exporting() and not forced:
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
    if state.is_transformed():
        return 'a transform of torch.func is active'
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing() and not forced:
            return 'torch.jit.trace: a graph without operators of this package'
        kind = type(x)
        if kind is not Tensor and kind is not nn.Parameter and not kind.__module__.startswith('torch._subclasses'):
            return f'x is a {kind.__name__}'
    return ''


def choose(
        owner: Any, operation: str, x: Tensor, num_frames: int,
        weights: Sequence[Optional[Tensor]] = (), taps: Optional[Tensor] = None, obstacle: str = '',
) -> str:
    """Decide on the path of a call: 'triton', 'plain' or 'reference'.

    Args:
        owner: The layer, for :func:`explain`.
        operation: What is to be computed, for :func:`explain`.
        x: Frames, (B*T, C, H, W).
        num_frames: Frames T of a clip.
        weights: The layer's tensors.
        taps: TIM's taps, if it takes part.
        obstacle: A reason of the caller's not to use the operators.

    Raises:
        RuntimeError: A forced path can't take the call.
    """
    forced = state.path
    if forced == 'reference':
        path, reason = forced, 'forced'
    else:
        obstacle = obstacle or _operator_obstacle(x, weights, forced != 'auto')
        triton = obstacle or triton_obstacle(x, num_frames, taps)
        path = 'reference' if obstacle else 'plain' if triton or forced == 'plain' else 'triton'
        reason = obstacle or ('forced' if forced == 'plain' else triton)
        if forced not in ('auto', path):
            raise RuntimeError(f"the path {forced!r} is forced, but {operation} can't take it: {reason}")
    log = state.log
    if log is not None:
        log.append(Decision(owner, operation, path, reason))
    return path


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

    It runs the model once, without gradients, in the mode (training or eval) that it is in; as any forward pass, that
    moves the running statistics of a model in training mode. Calls that other threads make meanwhile are not in it.

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
    before = state.set_log(decisions)
    try:
        with torch.no_grad():
            model(x)
    finally:
        state.set_log(before)
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    return Explanation(row._replace(owner=names.get(row.owner, '?')) for row in decisions)
