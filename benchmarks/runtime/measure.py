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
from benchmarks.runtime.graph import Sweep, can_capture
from benchmarks.runtime.journal import Journal, fields
from benchmarks.runtime.memory import peak_bytes
from benchmarks.runtime.models import OPERATORS
from benchmarks.runtime.plan import Study
from benchmarks.runtime.results import NO_TIME
from benchmarks.runtime.workshop import TrainingStep, Workshop, relative_error

__all__ = ['LIMITS', 'ProcessLost', 'measure', 'prepare']

# How far logits may be from the truth, in units of the largest of them
LIMITS = {'fp32': 1e-3, 'tf32': 2e-2, 'fp16': 5e-2, 'bf16': .3}
# Seconds that compiling a network may take, before the first has been seen: C++ takes longer than Triton
COMPILING = {'cpu': 120, 'cuda': 45}


class ProcessLost(RuntimeError):
    """A candidate failed, and nothing that this process does to the device can be trusted any more.

    Attributes:
        entries: What was measured all the same, and what was not, as :func:`measure` returns them.
    """

    def __init__(self, reason: str, entries: list[dict[str, Any]]) -> None:
        super().__init__(reason)
        self.entries = entries


def measure(
        study: Study, number: int, deadline: timing.Deadline, tick: Callable[[], object] = lambda: None,
        journal: Journal | None = None,
) -> list[dict[str, Any]]:
    """One pass of a study.

    Args:
        study: What to measure.
        number: Of the pass. A candidate's first one also measures memory, and how far it is from the reference path in
            float64; the number seeds the order.
        deadline: What does not start before it is left out, and says so.
        tick: Called for every candidate that is made and for every sample.
        journal: Who failed before and is not tried again; it learns who costs this process its life.

    Returns:
        For each candidate its fields, and ``samples`` (seconds), ``host`` (CUDA), ``error``, ``memory_bytes`` and, for
        training, ``held_bytes``; or ``missing``, with the reason.

    Raises:
        ProcessLost: The process can't go on. A new one can, with the same journal.
    """
    spent: dict[bool, list[float]] = {False: [], True: []}  # seconds to make a candidate, not compiled and compiled
    journal, found, lost = journal or Journal(), [], ''
    for group in study.of_pass(number).groups():
        entries, lost = _measure(group, number, deadline, spent, tick, journal, lost)
        found += entries
    if lost:
        raise ProcessLost(lost, found)
    return found


def _measure(
        study: Study, number: int, deadline: timing.Deadline, spent: dict[bool, list[float]],
        tick: Callable[[], object], journal: Journal, lost: str,
) -> tuple[list[dict[str, Any]], str]:
    """The entries of what is interleaved, and why the process is lost, if it is."""
    device = study.candidates[0].setting.device
    entries: dict[Candidate, dict[str, Any]] = {c: fields(c) for c in study.candidates}
    calls: dict[Candidate, timing.Call] = {}
    several: dict[Candidate, int] = {}  # calls that one call of it is
    workshop = Workshop()
    if not lost:
        prepare(device)
    for c, entry in entries.items():
        start = time.monotonic()
        compiles = c.compiles and not workshop.has_compiled(c)
        if c in journal.failed:
            entry['missing'] = journal.failed[c]
            continue
        if lost or deadline.left() < max(spent[compiles], default=COMPILING[device] if compiles else 0):
            entry['missing'] = NO_TIME
            continue
        try:
            with journal.attempt(c):
                calls[c], several[c] = _prepared(c, workshop, entry, number == study.first_pass(c))
        except Exception as reason:  # the other candidates are worth their time
            traceback.print_exc()
            entry['missing'] = f'{type(reason).__name__}: {str(reason).partition(chr(10))[0]}'
            if device == 'cuda' and not can_capture():
                journal.fail(c, entry['missing'])
                lost = f'{c.model}, {c.mode} ({entry["missing"]})'
        spent[compiles].append(time.monotonic() - start)
        tick()
    if calls:
        try:
            samples = timing.interleave(calls, device, study.rounds, max(0, deadline.left()), number, tick)
        except Exception as reason:
            if device != 'cuda' or can_capture() or _lives():
                raise
            traceback.print_exc()  # nobody knows whose fault it is, only that all have to be made again
            lost = lost or f'{type(reason).__name__} while {study.name} was timed'
            return [{**fields(c), 'missing': entry.get('missing', NO_TIME)} for c, entry in entries.items()], lost
        for c, values in samples.time.items():
            entries[c]['samples'] = _short(values, several[c])
            if c in samples.host:
                entries[c]['host'] = _short(samples.host[c], several[c])
    return list(entries.values()), lost


def _lives() -> bool:
    """Whether the device does anything at all: where nothing can be captured, it may still replay."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def prepare(device: str) -> None:
    """Settings of PyTorch for what is built next; what was built before is gone."""
    torch.compiler.reset()
    gc.collect()
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and each is a new case of it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == 'cuda':
        torch.cuda.empty_cache()


def _prepared(c: Candidate, workshop: Workshop, entry: dict[str, Any], first: bool) -> tuple[timing.Call, int]:
    """What to time, checked and warmed up, and how many calls a call of it is."""
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
    return call, run.calls if isinstance(run, Sweep) else 1


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


def _short(values: list[float], calls: int) -> list[float]:
    return [float(f'{value / calls:.5g}') for value in values]
