"""How long each kernel takes, at the shapes of a ResNet-50, beside its byte floor.

The kernels are whatever the operators launch. Each launch is repeated in a CUDA graph, so no host is in its time: with
the tensors that the launch before left in the cache (``cached``), and with others each time (``from memory``). The
floor is what all tensors of a launch take at the rate of a large copy, each moved once.
"""
import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.launches import Launch, from_memory, record, seconds
from benchmarks.machine import positive, read_json, result_file, write
from benchmarks.runtime.candidate import DEVICES
from benchmarks.runtime.graph import can_capture
from benchmarks.runtime.operators import CASES, PASSES, Case, Operator
from benchmarks.runtime.results import environment
from cmr_layers.ops import use_path

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}
COPY_BYTES = 2 ** 28
_IDENTITY = ('machine', 'gpu', 'versions', 'size', 'frames', 'rehearsal')


class Work(NamedTuple):
    """An operator at a shape, forward or with its backward pass."""
    case: Case
    batch: int
    dtype: str
    backward: bool

    @property
    def name(self) -> str:
        return f'{self.case.name}, batch {self.batch}, {self.dtype}{", backward" * self.backward}'


def works() -> Iterator[Work]:
    """Everything, in the order of its worth: inference before training, fp16 before bf16."""
    for backward in (False, True):
        for dtype in DTYPES:
            for batch in (1, 8):
                yield from (
                    Work(case, batch, dtype, backward) for case in CASES.values() if backward in PASSES[case.op])


def launches(work: Work, frames: int, size: int) -> list[Launch]:
    """What the kernels of an operator are launched with.

    Args:
        work: The operator.
        frames: Of a clip.
        size: Height and width of a network's frames.
    """
    torch.manual_seed(0)
    device, dtype, side = DEVICES['cuda'], DTYPES[work.dtype], max(2, work.case.size * size // 224)
    layer = Operator(work.case, frames).to(device, dtype)
    x = torch.randn(work.batch * frames, work.case.channels, side, side, device=device).relu_().to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(work.backward)

    def call() -> None:
        with use_path('triton'), torch.set_grad_enabled(work.backward):
            y = layer(x)
            if work.backward:
                torch.autograd.grad(y, [x, *layer.weights], torch.ones_like(y))
    return record(call)


def rate(size: int = COPY_BYTES) -> float:
    """Bytes a second that a large copy reads and writes."""
    x = torch.empty(size, dtype=torch.uint8, device=DEVICES['cuda'])
    y = torch.empty_like(x)
    return 2 * size / seconds([lambda: y.copy_(x)])


def rows(work: Work, found: list[Launch], known: set[str], copy: float) -> Iterator[dict[str, Any]]:
    """A row for each launch that is not known yet."""
    for launch in found:
        if launch.key in known:
            continue
        known.add(launch.key)
        yield {
            'kernel': launch.name, 'operator': work.case.op, 'frames': f'{work.case.channels}x{work.case.size}',
            'outputs': work.case.outputs, 'batch': work.batch, 'dtype': work.dtype, 'backward': work.backward,
            'grid': list(launch.grid),
            'bytes': launch.bytes, 'floor_us': short(launch.bytes / copy), 'cached_us': short(seconds([launch.again])),
            'from_memory_us': short(seconds([copied.again for copied in from_memory(launch)]))}


def short(value: float) -> float:
    """Microseconds, in four digits."""
    return float(f'{value * 1e6:.4g}')


def resumed(head: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is there already, if it was measured here and likewise."""
    old = read_json(out)
    if old and all(old.get(key) == head.get(key) for key in _IDENTITY):
        return {**old, 'date': head['date']}
    return {**head, 'copy_bytes_per_second': None, 'complete': False, 'done': [], 'failed': {}, 'trying': None,
            'kernels': []}


def measure(out: Path, head: dict[str, Any], limit: float, number: int | None) -> dict[str, Any]:
    """Time all kernels, and write the results behind each operator.

    Args:
        out: The result file; it is gone on with.
        head: Where and how.
        limit: When no further operator is begun, by the clock of ``time.monotonic``.
        number: Only so many operators, the first ones; None: all.
    """
    results = resumed(head, out)
    if results['trying']:  # with its process it came to an end
        results['failed'][results['trying']] = 'its process ended'
    known: set[str] = set()
    results['copy_bytes_per_second'] = results['copy_bytes_per_second'] or rate()
    for work in list(works())[:number]:
        if work.name in results['done'] or work.name in results['failed']:
            continue
        if time.monotonic() > limit:
            return results
        results['trying'] = work.name
        write(out, results)
        try:
            found = launches(work, head['frames'], head['size'])
            results['kernels'] += rows(work, found, known, results['copy_bytes_per_second'])
            results['done'].append(work.name)
        except Exception as reason:
            traceback.print_exc()
            results['failed'][work.name] = f'{type(reason).__name__}: {str(reason).partition(chr(10))[0]}'
            if not can_capture():  # a fresh process goes on behind it
                results['trying'] = None
                write(out, results)
                raise
        results['trying'] = None
        write(out, results)
    results['complete'] = True
    write(out, results)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, help='write the times there; without it, the kernels are compiled')
    parser.add_argument('--seconds', type=float, default=600, help='begin nothing later; default: %(default)s')
    parser.add_argument('--dtype', choices=list(DTYPES), help='what to compile for; default: all')
    parser.add_argument('--frames', type=positive, default=8, help='of a clip; default: %(default)s')
    parser.add_argument('--size', type=positive, default=224, help='height and width of frames; default: %(default)s')
    parser.add_argument('--number', type=positive, help='so many operators only')
    args = parser.parse_args()
    limit = time.monotonic() + args.seconds
    if args.out is None:
        for work in list(works())[:args.number]:
            if work.batch == 1 and args.dtype in (None, work.dtype) and time.monotonic() < limit:
                launches(work, args.frames, args.size)
        return 0
    results = measure(args.out, {**environment(), 'size': args.size, 'frames': args.frames}, limit, args.number)
    print(f'{len(results["kernels"])} launches, {len(results["failed"])} operators failed: {results["failed"]}')
    return int(bool(results['failed']))


if __name__ == '__main__':
    sys.exit(main())
