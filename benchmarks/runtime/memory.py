"""How memory is measured."""
import itertools

import torch

from benchmarks.runtime.timing import Call

__all__ = ['peak_bytes']


def peak_bytes(call: Call, device: str) -> int:
    """Most memory that PyTorch's allocator handed out during a call, beyond what was in use before it.

    What cuDNN, oneDNN and others allocate for themselves is not in it.
    """
    return _peak_on_cuda(call) if device == 'cuda' else _peak_on_host(call)


def _peak_on_cuda(call: Call) -> int:
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - base


def _peak_on_host(call: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    in_use = itertools.accumulate((event.nbytes() for event in events), initial=0)
    return int(max(in_use))
