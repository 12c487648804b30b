"""Which kernels an operation launches, with what, and how long one of them takes on the device."""
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.runtime.graph import capture
from benchmarks.runtime.workshop import CACHE_BYTES

__all__ = ['Launch', 'record', 'seconds']

REPEATS = 20    # of a kernel in a graph, at least: its first one waits for the launch of the graph
COPIES = 64     # of a launch and its tensors, at most
SAMPLES = 7
SECONDS = 1e-3  # of a sample, at least: the resolution of the events is half a microsecond


class Launch(NamedTuple):
    """A kernel and what it was launched with."""
    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def bytes(self) -> int:
        """Of all its tensors, each once: the least that it has to move."""
        return sum(t.nbytes for t in {t.data_ptr(): t for t in self.tensors}.values())

    @property
    def key(self) -> str:
        """What its time depends on."""
        values = [
            f'{list(value.shape)} {list(value.stride())} {value.dtype}' if isinstance(value, Tensor) else str(value)
            for value in (*self.args, *self.kwargs.values())]
        return f'{self.name} {self.grid} {" ".join(values)}'

    def copy(self) -> 'Launch':
        """The same with tensors of its own."""
        def own(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value
        return self._replace(args=tuple(map(own, self.args)), kwargs={k: own(v) for k, v in self.kwargs.items()})

    def again(self) -> None:
        """Launch it once more."""
        self.kernel[self.grid](*self.args, **self.kwargs)


def record(call: Callable[[], object]) -> list[Launch]:
    """What a call launches, in order. It does launch it."""
    found: list[Launch] = []
    # Triton's interpreter has its own kind of kernels; if nobody has imported it, it has none
    interpreter = sys.modules.get('triton.runtime.interpreter')
    kinds: list[Any] = [JITFunction, *([interpreter.InterpretedFunction] if interpreter else [])]
    originals = [kind.run for kind in kinds]

    def wrapped(original: Any) -> Any:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if not warmup:
                found.append(Launch(self, grid, args, kwargs))
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        return run

    try:
        for kind, original in zip(kinds, originals):
            kind.run = wrapped(original)
        call()
    finally:
        for kind, original in zip(kinds, originals):
            kind.run = original
    return found


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of several calls, one behind the other in a graph: no host is in them.

    Between two kernels of a graph there is a pause of about a microsecond, which is in it, as it is in a network.
    """
    count = math.ceil(REPEATS / len(calls)) * len(calls)

    def several() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    graph, _ = capture(several)
    samples: list[float] = []
    replays = 1
    while len(samples) < SAMPLES:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the device is busy when the first event comes
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        time: float = begin.elapsed_time(end) / 1e3
        if time < SECONDS and not samples and replays < 1000:
            replays = min(1000, max(2 * replays, math.ceil(replays * SECONDS / max(time, 1e-9))))
            continue
        samples.append(time / replays / count)
    return statistics.median(samples)


def from_memory(launch: Launch) -> list[Launch]:
    """A launch and copies of it, so many that none finds its tensors in a cache."""
    return [launch, *(launch.copy() for _ in range(min(COPIES, math.ceil(CACHE_BYTES / max(1, launch.bytes)))))]
