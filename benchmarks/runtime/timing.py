"""How time is measured.

Candidates are interleaved. In each round every one of them is sampled once, in an order that is shuffled anew, so a
machine that slows down slows all of them. Ratios are taken within the rounds, for the same reason. Medians are
reported (:mod:`.interval`), never the best of many.
"""
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ['Call', 'Deadline', 'Samples', 'interleave', 'rotate']

# However little time there is: fewer rounds have no spread worth the name.
MIN_ROUNDS = 5
# The resolution of CUDA's events is half a microsecond; a sample is as many calls as take this long.
SAMPLE_SECONDS = 4e-3
MAX_REPEATS = 1000
# The host's clock stops after so many calls: the queue of launches is finite, and who waits at its end is not slow.
HOST_CALLS = 4

Call = Callable[[], object]


class Samples(NamedTuple):
    """Seconds per call, one entry for each round, in the order of the rounds for all candidates."""
    time: dict[Any, list[float]]
    host: dict[Any, list[float]]  # CUDA only: seconds until a call returned, whatever the device still had to do


def interleave(
        candidates: Mapping[Any, Call], device: str, rounds: int, seconds: float, seed: int = 0,
        tick: Callable[[], object] = lambda: None,
) -> Samples:
    """Time candidates side by side.

    On the CPU a sample is one call between two readings of the clock. On CUDA it is as many calls as take a
    few milliseconds, between two events. One more call goes before the first event: an idle device would wait there
    for all that the host does before its first launch, and a sample of two calls would be charged half of it. Behind
    that call the device is as busy as it gets: a call that is bound by the device takes what the device takes, one
    that is bound by the host what the host takes, both as they do in a stream of calls. A spin of the device instead
    would hide the host of the second kind. The caches are as the calls leave them, so what should come from memory
    has to be rotated (see :func:`rotate`).

    Args:
        candidates: What to call, by name or whatever tells them apart. Each has been called before, or its first
            sample is of its warming up.
        device: 'cpu' or 'cuda'.
        rounds: Samples of each candidate.
        seconds: Stop earlier when so much time is spent, but not before there are five rounds.
        seed: Of the order within the rounds.
        tick: Called behind every sample.
    """
    if not candidates or rounds < 1:
        raise ValueError(f'there must be candidates and rounds, got {len(candidates)} and {rounds}')
    cuda = device == 'cuda'
    repeats = {name: _repeats(call) for name, call in candidates.items()} if cuda else {}
    samples = Samples({name: [] for name in candidates}, {name: [] for name in candidates} if cuda else {})
    order, shuffle = list(candidates), random.Random(seed).shuffle
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is here now need not be looked through in every round
    start = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            gc.collect()
            gc.disable()  # as timeit does: a collection would be charged to whoever runs when it is due
            shuffle(order)
            for name in order:
                if cuda:
                    device_time, host_time = _sample_cuda(candidates[name], repeats[name])
                    samples.host[name].append(host_time)
                else:
                    device_time = _sample_cpu(candidates[name])
                samples.time[name].append(device_time)
                tick()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return samples


def _repeats(call: Call) -> int:
    """Warm up, and find how many calls take :data:`SAMPLE_SECONDS`."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return max(1, min(MAX_REPEATS, math.ceil(SAMPLE_SECONDS * 3 / (time.perf_counter() - start))))


def _sample_cpu(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # its memory is handed back outside of the clock
    return seconds


def _sample_cuda(call: Call, repeats: int) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first = min(repeats, HOST_CALLS)
    torch.cuda.synchronize()
    call()
    begin.record()
    start = time.perf_counter()
    for _ in range(first):
        call()
    host = time.perf_counter() - start
    for _ in range(repeats - first):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats, host / first


def rotate(function: Callable[..., object], inputs: Iterable[Sequence[Any]]) -> Call:
    """A candidate that takes the next of several inputs at each call, so that none is found in a cache."""
    turn = itertools.cycle(inputs)

    def call() -> object:
        return function(*next(turn))
    return call


class Deadline:
    """Time that a run has left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()
