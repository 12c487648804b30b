"""CUDA graphs of the benchmarks' own: what is captured to be timed, and whether a process can still capture."""
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runtime.candidate import DEVICES

__all__ = ['Sweep', 'can_capture', 'capture']


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a graph, and what it returned while it was captured: a replay writes it anew."""
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):  # what happens only once can't be captured
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


def can_capture() -> bool:
    """Whether this process can still capture anything.

    In torch 2.11 a capture that fails leaves the allocator with a capture under way for ever: every later one fails,
    and so does handing memory back. A device that is lost fails here, too.
    """
    try:
        x = torch.zeros(1, device=DEVICES['cuda'])
        capture(lambda: x + 1)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except Exception:  # whatever it is, this process is not worth another candidate
        return False
    return True


class Sweep:
    """A layer over all of its inputs, as one graph.

    One call of a layer takes a few microseconds, and the launch of a graph, with a copy in and a copy out, more than
    that: a graph of one call times the host. This one has no copies.

    Attributes:
        calls: How many calls of the layer a call of this is.
    """

    first: Tensor

    def __init__(self, layer: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.calls = len(inputs)

        def run() -> Tensor:
            first: Tensor = layer(inputs[0])
            for x in inputs[1:]:
                layer(x)
            return first
        with torch.inference_mode():
            self.graph, self.first = capture(run)

    def __call__(self, x: Tensor) -> Tensor:
        """What the first input gives, whichever is asked for: all of them are run."""
        self.graph.replay()
        return self.first
