"""How the benchmarks measure time and memory: the method, in one place.

Candidates are interleaved. In each round every one of them is sampled once, in an order that is shuffled anew, so that
a machine that slows down slows all of them; ratios are taken within the rounds, for the same reason. What is reported
are medians and quartiles, never the best of many.
"""
import argparse
import gc
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import describe, result_file

__all__ = [
    'DTYPES', 'Call', 'Deadline', 'Samples', 'arguments', 'bootstrap', 'check_device', 'environment', 'interleave',
    'interval', 'origin', 'peak_bytes', 'peak_host_bytes', 'progress', 'ratio', 'relative_error', 'rotate',
    'saved_bytes', 'show', 'summary']

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}

# However little time there is: fewer rounds have no quartiles worth the name.
MIN_ROUNDS = 5
# The resolution of CUDA's events is half a microsecond; a sample is as many calls as take this long.
SAMPLE_SECONDS = 1e-3
MAX_REPEATS = 1000
# The host's clock stops after so many calls: the queue of launches is finite, and who waits at its end is not slow.
HOST_CALLS = 8

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
    millisecond, between two events, and the device is idle before it; the caches are as the calls leave them, so
    what should come from memory has to be rotated (see :func:`rotate`).

    Args:
        candidates: What to call, by name or whatever tells them apart. Each is called untimed first.
        device: 'cpu' or 'cuda'.
        rounds: Samples of each candidate.
        seconds: Stop earlier when so much time is spent, but not before there are five rounds.
        seed: Of the order within the rounds.
        tick: Called behind every sample.
    """
    if not candidates or rounds < 1:
        raise ValueError(f'there must be candidates and rounds, got {len(candidates)} and {rounds}')
    cuda = device == 'cuda'
    repeats = {name: _repeats(call) if cuda else _warm(call) for name, call in candidates.items()}
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


def _warm(call: Call) -> int:
    call()
    return 1


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


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [*values] * 3
    return {'median': median, 'q1': q1, 'q3': q3, 'rounds': len(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within the rounds."""
    if len(values) != len(base):
        raise ValueError(f'ratios are taken within rounds, got {len(values)} and {len(base)} of them')
    return summary([value / other for value, other in zip(values, base)])


def bootstrap(values: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Median of what the rounds of several passes have, and a 95% interval by a bootstrap in two steps.

    What is drawn with replacement is passes first and then their rounds. Rounds of one pass share the memory that the
    networks got and the hour, so they alone would promise more than another run keeps.

    Args:
        values: For each pass, a number for each round.
        resamples: How often to draw.
        seed: Of the draws.

    Returns:
        ``median`` over all rounds, ``low`` and ``high``, ``passes`` and ``rounds``.
    """
    lengths = [len(rounds) for rounds in values]
    if not lengths or 0 in lengths:
        raise ValueError(f'there must be passes with rounds, got {lengths} of them')
    table = torch.full((len(lengths), max(lengths)), math.nan, dtype=torch.float64)
    for row, rounds in zip(table, values):
        row[:len(rounds)] = torch.tensor(rounds, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    passes = torch.randint(len(lengths), (resamples, len(lengths)), generator=generator)
    counts = torch.tensor(lengths)[passes].unsqueeze(-1)
    chosen = (torch.rand(*passes.shape, max(lengths), generator=generator) * counts).long()
    drawn = table[passes.unsqueeze(-1), chosen]
    drawn = drawn.masked_fill(torch.arange(max(lengths)) >= counts, math.nan)  # as many rounds as the pass has
    medians = drawn.flatten(1).nanquantile(.5, 1)
    low, high = medians.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()
    return {
        'median': table.nanquantile(.5).item(), 'low': low, 'high': high, 'passes': len(lengths),
        'rounds': sum(lengths)}


def interval(values: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> dict[str, float]:
    """:func:`bootstrap` of the ratios within the rounds; both are passes of rounds."""
    lengths = [len(rounds) for rounds in values], [len(rounds) for rounds in base]
    if lengths[0] != lengths[1]:
        raise ValueError(f'ratios are taken within rounds, got {lengths[0]} and {lengths[1]} of them')
    return bootstrap([[v / b for v, b in zip(*rounds)] for rounds in zip(values, base)])


def show(entry: dict[str, float] | None, scale: float = 1, digits: int = 2) -> str:
    """``median [lower quartile, upper quartile]``, as every table has it."""
    if entry is None:
        return ''
    median, q1, q3 = (f'{entry[key] * scale:.{digits}f}' for key in ('median', 'q1', 'q3'))
    return f'{median} [{q1}, {q3}]'


def peak_bytes(call: Call, base: int | None = None) -> int:
    """Most CUDA memory in use during a call, beyond ``base``: what was in use before it, unless told."""
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated() if base is None else base
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - base


def peak_host_bytes(call: Call) -> int:
    """Most CPU memory that PyTorch's allocator handed out during a call, beyond what was in use before it.

    What oneDNN and others allocate for themselves is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    in_use = itertools.accumulate((event.nbytes() for event in events), initial=0)
    return int(max(in_use))


def saved_bytes(call: Call, owned: Iterable[Tensor] = ()) -> int:
    """Bytes that a call keeps for its backward pass: storages, each counted once.

    Not those of ``owned``, inputs and parameters, which are there anyway. This is no peak: what lives for a moment
    only is not in it.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves: an address may be handed out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for tensor in owned:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def relative_error(tensors: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest difference from the truth, in units of its largest value; of several tensors, the worst.

    Raises:
        FloatingPointError: A tensor is not finite. A NaN would compare as small as anything.
    """
    errors = [
        float((got.to(want) - want).abs().max() / want.abs().max().clamp_min(1e-300))
        for got, want in zip(tensors, truth, strict=True)]
    if not all(map(math.isfinite, errors)):
        raise FloatingPointError(f'the results are not finite: relative errors {errors}')
    return max(errors)


class Deadline:
    """Time that a run has left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def progress(text: str) -> None:
    print(f'{time.strftime("%H:%M:%S")} {text}', file=sys.stderr, flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all timed benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: %(default)s')
    parser.add_argument('--layout', choices=['channels_last', 'contiguous'], default='channels_last')
    parser.add_argument('--rounds', type=_positive(int), help='samples of each candidate')
    parser.add_argument('--minutes', type=_positive(float), help='time limit; what does not fit is left out and said')
    parser.add_argument('--quick', action='store_true', help='a smoke run: small, few rounds, no numbers to quote')
    parser.add_argument('--out', type=result_file, help='write the results there, as JSON')
    return parser


def _positive(kind: type) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'must be more than 0, got {text}')
        return value
    number.__name__ = kind.__name__  # argparse's "invalid int value"
    return number


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('argument --device: cuda, but there is none here; choose cpu')


def environment() -> dict[str, Any]:
    """As :func:`benchmarks.machine.describe`, with what else a time depends on."""
    found = {**describe(*['triton'] * (find_spec('triton') is not None)), 'threads': torch.get_num_threads()}
    if torch.cuda.is_available():
        found['versions'].update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    return found


def origin(entry: dict[str, Any]) -> str:
    """What :func:`environment` put into a result, in a line."""
    versions = entry['versions']
    packages = ', '.join(f'{name} {versions[name]}' for name in ('torch', 'triton') if name in versions)
    where = f'{entry["machine"]}, {entry["threads"]} threads'
    if entry.get('device') == 'cuda':
        where = f'{entry["gpu"]}, host {where}'
    smoke = 'smoke run, no numbers to quote; ' if entry.get('quick') else ''
    return f'{smoke}{entry["date"][:10]}, {where}, {packages}: `{entry["command"]}`'
