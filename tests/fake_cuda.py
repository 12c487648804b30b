"""A GPU that is none: programs for CUDA run from end to end where there is none, on tensors that are on the CPU.

    python tests/fake_cuda.py -m benchmarks.gpu --size 64 --frames 2 --rounds 2 --out FOLDER

What they find out is worth nothing, and says so: the name of the device, and ``rehearsal`` in every result file, which
no page shows. What is rehearsed is each line of Python. Kernels run in Triton's interpreter, where a program launches
them itself; elsewhere the layers take the path of a CPU. Graphs are captured and replayed, operation by operation.
Nothing is compiled, and networks are narrow.
"""
import contextlib
import os
import runpy
import sys
import time
import types
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = 'a rehearsal without a GPU'
WIDTH = .25  # of the networks
LAUNCHES = ('benchmarks.gpu.small', 'benchmarks.gpu.kernels')  # these launch kernels themselves
FIRST = ('tsn', 'cmr')  # of Table 7
REST = ['--passes', '1', '--models', *FIRST, 'layer cme', 'cme_tim 64']
NARROW = ('tsn', 'tsm', 'tei', 'stm', 'tdrl', 'gsm', 'tim', 'cme', 'sme', 'cmr', 'released')


class Event:
    """A time on the clock of the host: the device is always done."""

    def __init__(self, enable_timing=False):
        assert enable_timing, 'an event without a time is of no use here'

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, stream):
        pass


class Graph:
    """What was computed while it was captured, to be computed again, into the same tensors."""

    def __init__(self):
        self.steps = []

    @torch.inference_mode()
    def replay(self):
        for function, args, kwargs, out in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Records every operation. It fails where a real capture does: when the host asks for what the device has."""

    def __init__(self, graph, *args, **kwargs):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError('CUDA error: operation not permitted when stream is capturing')
        out = function(*args, **kwargs)
        self.graph.steps.append((function, args, kwargs, tree_map_only(torch.Tensor, lambda t: t.detach(), out)))
        return out


def device():
    return types.SimpleNamespace(name=NAME, multi_processor_count=132, total_memory=2 ** 36)


def patches():
    """What stands where: (owner, name, value)."""
    from benchmarks import machine
    from benchmarks.gpu import check, launches, small, steps
    from benchmarks.runtime import plan, timing, workshop
    from cmr_layers import deploy

    def nothing(*args, **kwargs):
        pass

    build = workshop.build

    def narrow(name, frames, width=1):
        return build(name, frames, width * WIDTH if name in NARROW else width)

    cuda = {
        'is_available': lambda: True, 'device_count': lambda: 1, 'synchronize': nothing, 'empty_cache': nothing,
        'get_device_name': lambda *_: NAME, 'get_device_capability': lambda *_: (9, 0),
        'get_device_properties': lambda *_: device(), 'memory_allocated': lambda *_: 0,
        'max_memory_allocated': lambda *_: 10 ** 6, 'reset_peak_memory_stats': nothing, 'Event': Event,
        'Stream': Stream,
        'current_stream': lambda *_: Stream(), 'stream': lambda *_: contextlib.nullcontext(),
        'device': lambda *_: contextlib.nullcontext(), 'CUDAGraph': Graph, 'graph': Capture,
        'is_bf16_supported': lambda *_: True}
    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        (torch, 'compile', lambda model, **_: model),
        (machine, 'REHEARSAL', __file__),
        (deploy, '_on_cuda', lambda x: True),
        (workshop, 'build', narrow),
        # fewer of everything: processes, for they share a core, networks, and work for the interpreter, which is slow
        (check, 'PROCESSES', 0), (steps, 'SHARES', 1), (plan, 'MEASURED_FIRST', FIRST),
        (steps, 'RUNS', {**steps.RUNS, 'rest': REST}), (plan, 'AXES', ('batch', 'width')), (workshop, 'CACHE_BYTES', 1),
        (timing, 'SAMPLE_SECONDS', 0),
        *((launches, name, 1) for name in ('REPEATS', 'COPIES', 'SAMPLES')),
        (small, 'FRAMES', 2), (small, 'CHANNELS', 16), (small, 'SIZE', 3), (small, 'OUTPUTS', 16),
    ]


@contextlib.contextmanager
def fake_cuda():
    """Within it, there is a GPU. Modules that took a name from another one before keep what they took."""
    from benchmarks.runtime.candidate import DEVICES
    exchanged = [(owner, name, getattr(owner, name), value) for owner, name, value in patches()]
    try:
        DEVICES['cuda'] = 'cpu'
        for owner, name, _, value in exchanged:
            setattr(owner, name, value)
        yield
    finally:
        DEVICES['cuda'] = 'cuda'
        for owner, name, value, _ in exchanged:
            setattr(owner, name, value)


def main():
    """Run a module as ``python -m`` does."""
    if len(sys.argv) < 3 or sys.argv[1] != '-m':
        sys.exit(f'usage: {Path(__file__).name} -m MODULE [ARGUMENT ...]')
    sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    module = sys.argv[2]
    del sys.argv[:2]
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    from interpreter import interpreted  # before there is a GPU, which would need no interpreter
    with fake_cuda(), interpreted() if module in LAUNCHES else contextlib.nullcontext():
        if module == 'pytest':
            import pytest
            sys.exit(pytest.main(sys.argv[1:]))
        runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
