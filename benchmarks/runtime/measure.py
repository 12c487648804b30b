"""One pass of a study: build everything, check it, time it side by side."""
import gc
import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.candidates import COMPILED, Setting, Workshop, trained, trainer
from benchmarks.runtime.models import MODELS
from benchmarks.runtime.plan import MODES, Candidate, Study

__all__ = ['LIMITS', 'NO_TIME', 'build', 'measure']

NO_TIME = 'no time left'

# How far logits may be from those of the reference path in float32, in units of the largest of them
LIMITS = {'fp32': 1e-3, 'tf32': 2e-2, 'fp16': 5e-2, 'bf16': .3}
# Inputs of a small layer are so many that they don't all stay in a GPU's cache
CACHE_BYTES = 1.3e8


def build(name: str, frames: int, width: float = 1) -> nn.Module:
    """A model of :data:`~benchmarks.runtime.models.MODELS`, its values the same at every call."""
    kwargs: dict[str, Any] = {}
    if width != 1:
        kwargs['channels'] = tuple(int(64 * 2 ** stage * width) for stage in range(4))
    return trained(lambda: MODELS[name].build(num_frames=frames, **kwargs))


def measure(
        study: Study, number: int, deadline: timing.Deadline, tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """One pass of a study.

    Args:
        study: What to measure.
        number: Of the pass. The first one also measures memory, and how far every mode is from the reference path in
            float32; the number seeds the order.
        deadline: What does not start before it is left out, and says so.
        tick: Called for every candidate that is made and for every sample.

    Returns:
        For each candidate its fields, and ``samples`` (seconds), ``host`` (CUDA), ``error``, ``memory_bytes``; or
        ``missing``, with the reason.
    """
    device = study.candidates[0].setting.device
    _prepare(device)
    workshops: _Workshops = {}
    entries: dict[Candidate, dict[str, Any]] = {}
    calls: dict[Candidate, timing.Call] = {}
    longest = {False: 0., True: 120.}  # seconds to make a candidate, not compiled and compiled: a guess at first
    for candidate in study.candidates:
        fields = candidate._asdict()
        entry = entries[candidate] = {**fields.pop('setting')._asdict(), **fields}
        start = time.monotonic()
        compiled = candidate.mode in COMPILED and not _is_compiled(candidate, workshops)
        if deadline.left() < longest[compiled]:
            entry['missing'] = NO_TIME
            continue
        try:
            run, inputs = _make(candidate, workshops)
            if number == 0 and not candidate.training:
                entry['error'] = _error(candidate, run, inputs[0], workshops)
            call = timing.rotate(run, [[x] for x in inputs])
            call()  # an optimizer makes its state, a library chooses its algorithm
            if number == 0 and 'graph' not in candidate.mode:  # whose memory is its own, and was there before the call
                peak = timing.peak_bytes if device == 'cuda' else timing.peak_host_bytes
                entry['memory_bytes'] = peak(call)
            if device == 'cuda':
                torch.cuda.synchronize()  # a fault of these kernels is this candidate's
            calls[candidate] = call
        except Exception as reason:  # the other candidates are worth their time
            traceback.print_exc()
            entry['missing'] = f'{type(reason).__name__}: {str(reason).partition(chr(10))[0]}'
            if device == 'cuda':
                torch.cuda.synchronize()  # raises again if the device is lost to all that would follow
        longest[compiled] = max(longest[compiled], time.monotonic() - start)
        tick()
    if calls:
        samples = timing.interleave(calls, device, study.rounds, max(0, deadline.left()), number, tick)
        for candidate, values in samples.time.items():
            entries[candidate]['samples'] = _short(values)
            if candidate in samples.host:
                entries[candidate]['host'] = _short(samples.host[candidate])
    return list(entries.values())


def _prepare(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and each is a new case of it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == 'cuda':
        torch.cuda.empty_cache()


_Workshops = dict[tuple[Any, ...], tuple[Workshop, list[Tensor]]]


def _key(candidate: Candidate) -> tuple[Any, ...]:
    return candidate.setting, candidate.width, MODELS[candidate.model].in_channels, candidate.training


def _is_compiled(candidate: Candidate, workshops: _Workshops) -> bool:
    """Whether a graph has been compiled already that the candidate will only capture."""
    path, mode = MODES[candidate.mode]
    key = _key(candidate)
    return mode != 'frozen' and key in workshops and workshops[key][0].has_compiled(candidate.model, path)


def _make(candidate: Candidate, workshops: _Workshops) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """What to time, and what to call it with in turn."""
    setting, key = candidate.setting, _key(candidate)
    if key not in workshops:
        channels, dtype = MODELS[candidate.model].in_channels, torch.float32 if candidate.training else None
        with torch.inference_mode(not candidate.training):  # as CUDA graphs have them inside
            inputs = setting.inputs(1, dtype, channels)
            size = inputs[0].numel() * inputs[0].element_size()
            count = max(4, math.ceil(CACHE_BYTES / size)) if setting.device == 'cuda' and channels > 3 else 4
            inputs = setting.inputs(count, dtype, channels)
        workshops[key] = Workshop(
            setting, lambda name: build(name, setting.frames, candidate.width), inputs[0]), inputs
    workshop, inputs = workshops[key]
    path, mode = MODES[candidate.mode]
    if candidate.training:
        _, run, _ = trainer(setting, workshop.build(candidate.model), path)
    else:
        with precision(setting):
            run = workshop.candidate(candidate.model, path, mode)
    return _precisely(run, setting), inputs


def _error(
        candidate: Candidate, run: Callable[[Tensor], Tensor], x: Tensor, workshops: _Workshops) -> float:
    """Of what will be timed, relative to the reference path.

    Raises:
        FloatingPointError: It is not finite.
        ArithmeticError: It is beyond the limit of the data type. Who computes something else is not timed.
    """
    workshop, _ = workshops[_key(candidate)]
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it runs once
    try:
        with precision(candidate.setting._replace(dtype='fp32')):
            truth = workshop.truth(candidate.model, torch.float32)
    finally:
        torch.backends.cudnn.benchmark = searching
    error = timing.relative_error([run(x)], [truth])
    if error > LIMITS[candidate.setting.dtype]:
        raise ArithmeticError(f'off by {error:.0e} of the largest logit')
    return error


class precision:
    """Within it, float32 products may or may not be of TF32, as the setting's data type says. CUDA only."""

    def __init__(self, setting: Setting) -> None:
        self.allow = setting.dtype == 'tf32' if setting.dtype in ('fp32', 'tf32') else None

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        if self.allow is not None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.allow

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.before


def _precisely(run: Callable[[Tensor], Tensor], setting: Setting) -> Callable[[Tensor], Tensor]:
    if setting.device == 'cpu' or setting.dtype not in ('fp32', 'tf32'):
        return run

    def call(x: Tensor) -> Tensor:
        with precision(setting):
            return run(x)
    return call


def _short(values: list[float]) -> list[float]:
    return [float(f'{value:.5g}') for value in values]
