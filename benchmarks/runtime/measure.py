"""One pass of a study: build everything, check it, time it side by side."""
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.runtime import timing
from benchmarks.runtime.candidate import MODES, Candidate
from benchmarks.runtime.memory import peak_bytes
from benchmarks.runtime.models import OPERATORS
from benchmarks.runtime.plan import Study
from benchmarks.runtime.results import NO_TIME
from benchmarks.runtime.workshop import TrainingStep, Workshop, relative_error

__all__ = ['LIMITS', 'measure']

# How far logits may be from the truth, in units of the largest of them
LIMITS = {'fp32': 1e-3, 'tf32': 2e-2, 'fp16': 5e-2, 'bf16': .3}


def measure(
        study: Study, number: int, deadline: timing.Deadline, tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """One pass of a study.

    Args:
        study: What to measure.
        number: Of the pass. The first one also measures memory, and how far every mode is from the reference path in
            float64; the number seeds the order.
        deadline: What does not start before it is left out, and says so.
        tick: Called for every candidate that is made and for every sample.

    Returns:
        For each candidate its fields, and ``samples`` (seconds), ``host`` (CUDA), ``error``, ``memory_bytes`` and, for
        training, ``held_bytes``; or ``missing``, with the reason.
    """
    spent: dict[bool, list[float]] = {False: [], True: []}  # seconds to make a candidate, not compiled and compiled
    return [
        entry for group in study.of_pass(number).groups() for entry in _measure(group, number, deadline, spent, tick)]


def _measure(
        study: Study, number: int, deadline: timing.Deadline, spent: dict[bool, list[float]],
        tick: Callable[[], object],
) -> list[dict[str, Any]]:
    device = study.candidates[0].setting.device
    _prepare(device)
    workshop = Workshop()
    entries: dict[Candidate, dict[str, Any]] = {}
    calls: dict[Candidate, timing.Call] = {}
    for c in study.candidates:
        fields = c._asdict()
        entry = entries[c] = {**fields.pop('setting')._asdict(), **fields}
        start = time.monotonic()
        compiles = c.compiles and not workshop.has_compiled(c)
        if deadline.left() < max(spent[compiles], default=120 if compiles else 0):  # a guess at first
            entry['missing'] = NO_TIME
            continue
        try:
            calls[c] = _prepared(c, workshop, entry, number == 0)
        except Exception as reason:  # the other candidates are worth their time
            traceback.print_exc()
            entry['missing'] = f'{type(reason).__name__}: {str(reason).partition(chr(10))[0]}'
            if device == 'cuda':
                torch.cuda.synchronize()  # raises again if the device is lost to all that would follow
        spent[compiles].append(time.monotonic() - start)
        tick()
    if calls:
        samples = timing.interleave(calls, device, study.rounds, max(0, deadline.left()), number, tick)
        for c, values in samples.time.items():
            entries[c]['samples'] = _short(values)
            if c in samples.host:
                entries[c]['host'] = _short(samples.host[c])
    return list(entries.values())


def _prepare(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and each is a new case of it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == 'cuda':
        torch.cuda.empty_cache()


def _prepared(c: Candidate, workshop: Workshop, entry: dict[str, Any], first: bool) -> timing.Call:
    """What to time, checked and warmed up."""
    run, inputs = workshop.run(c), workshop.inputs(c)
    if first and (not c.training or c.model in OPERATORS):
        entry['error'] = _error(c, run, workshop)
    call = timing.rotate(run, [[x] for x in inputs])
    if 'error' not in entry:
        call()  # an optimizer makes its state, a library chooses its algorithm
    if first and not MODES[c.mode].graph:  # whose memory is its own, and was there before the call
        entry['memory_bytes'] = peak_bytes(call, c.setting.device)
    if isinstance(run, TrainingStep):
        entry['held_bytes'] = run.held_bytes()
    if c.setting.device == 'cuda':
        torch.cuda.synchronize()  # a fault of these kernels is this candidate's
    return call


def _error(c: Candidate, run: Callable[[Tensor], Any], workshop: Workshop) -> float:
    """Of what will be timed, on the first clip; of an operator's gradients, the worst.

    Raises:
        FloatingPointError: It is not finite.
        ArithmeticError: It is beyond the limit of the data type. Who computes something else is not timed.
    """
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it runs once
    try:
        truth = workshop.truth(c)
    finally:
        torch.backends.cudnn.benchmark = searching
    found = run(workshop.inputs(c)[0])
    error = relative_error(found if c.training else [found[:len(truth[0])]], truth)
    # gradients of W1 and W2 are small differences where frames are alike: they have no limit but being finite
    if error > LIMITS[c.setting.dtype] and not c.training:
        raise ArithmeticError(f'off by {error:.0e} of the largest logit')
    return error


def _short(values: list[float]) -> list[float]:
    return [float(f'{value:.5g}') for value in values]
