"""One pass of a study: build everything, check it, time it side by side."""
import gc
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

__all__ = ['NO_TIME', 'build', 'measure']

NO_TIME = 'no time left'


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
    _prepare(study)
    workshops: dict[tuple[Any, ...], tuple[Workshop, list[Tensor]]] = {}
    entries: dict[Candidate, dict[str, Any]] = {}
    calls: dict[Candidate, timing.Call] = {}
    longest = {False: 0., True: 60.}  # seconds to make a candidate, not compiled and compiled: a guess at first
    for candidate in study.candidates:
        fields = candidate._asdict()
        entry = entries[candidate] = {**fields.pop('setting')._asdict(), **fields}
        start, compiled = time.monotonic(), candidate.mode in COMPILED
        if deadline.left() < longest[compiled]:
            entry['missing'] = NO_TIME
            continue
        try:
            call, x = _make(candidate, workshops)
            if number == 0:
                entry.update(_check(candidate, call, x, workshops))
            calls[candidate] = call
        except Exception as reason:  # the other candidates are worth their time
            traceback.print_exc()
            entry['missing'] = f'{type(reason).__name__}: {str(reason).partition(chr(10))[0]}'
        longest[compiled] = max(longest[compiled], time.monotonic() - start)
        tick()
    if calls:
        device = study.candidates[0].setting.device
        samples = timing.interleave(calls, device, study.rounds, max(0, deadline.left()), number, tick)
        for candidate, values in samples.time.items():
            entries[candidate]['samples'] = _short(values)
            if candidate in samples.host:
                entries[candidate]['host'] = _short(samples.host[candidate])
    return list(entries.values())


def _prepare(study: Study) -> None:
    gc.collect()
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and each is a new case of it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if study.candidates[0].setting.device == 'cuda':
        torch.cuda.empty_cache()


def _make(candidate: Candidate, workshops: dict[tuple[Any, ...], Any]) -> tuple[timing.Call, Tensor]:
    """What to time, and one of the inputs it is called with."""
    setting, channels = candidate.setting, MODELS[candidate.model].in_channels
    key = setting, candidate.width, channels
    if key not in workshops:
        with torch.inference_mode(not candidate.training):  # as CUDA graphs have them inside
            inputs = setting.inputs(4, torch.float32 if candidate.training else None, channels)
        workshops[key] = Workshop(
            setting, lambda name: build(name, setting.frames, candidate.width), inputs[0]), inputs
    workshop, inputs = workshops[key]
    path, mode = MODES[candidate.mode]
    if candidate.training:
        _, run, _ = trainer(setting, workshop.build(candidate.model), path)
    else:
        with precision(setting):
            run = workshop.candidate(candidate.model, path, mode)
    call = timing.rotate(_precisely(run, setting), [[x] for x in inputs])
    call()  # an optimizer makes its state, a library chooses its algorithm
    return call, inputs[0]


def _check(
        candidate: Candidate, call: timing.Call, x: Tensor, workshops: dict[tuple[Any, ...], Any],
) -> dict[str, Any]:
    """Error and memory. A captured graph's memory is its own, and was there before the call."""
    found: dict[str, Any] = {}
    setting = candidate.setting
    if not candidate.training:
        workshop, _ = workshops[setting, candidate.width, MODELS[candidate.model].in_channels]
        path, mode = MODES[candidate.mode]
        with precision(setting._replace(dtype='fp32')):
            truth = workshop.truth(candidate.model, torch.float32)
        with precision(setting):
            found['error'] = timing.relative_error([workshop.candidate(candidate.model, path, mode)(x)], [truth])
    if 'graph' not in candidate.mode:
        peak = timing.peak_bytes if setting.device == 'cuda' else timing.peak_host_bytes
        found['memory_bytes'] = peak(call)
    return found


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
