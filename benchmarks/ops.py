"""Time each operator at the real shapes of ResNet-50's stages, beside the reference and the compiled reference.

    python -m benchmarks.ops --out benchmarks/results/ops-cpu.json
    python -m benchmarks.ops --quick                                    # a smoke run

Every time stands beside a floor: what the bytes and the operations take at the rates of a large copy and a large
matrix product, measured in the same run. The inputs are rotated, so frames come from memory and not from a cache; in a
network they may have been written a moment before. :mod:`benchmarks.timing` is the method.
"""
import argparse
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.flops import table
from cmr_layers import ops
from cmr_layers.ops import use_path

FRAMES = 8  # of a clip

# Block inputs of a ResNet-50 at 224x224: channels, height = width, and width of conv1 where it takes part
FRONT = ((64, 56, 64), (256, 56, 64), (512, 28, 128), (1024, 14, 256), (2048, 7, 512))
MOTION = ((256, 56, 256), (512, 28, 512), (1024, 14, 1024), (2048, 7, 2048))
QUICK = {'front': (64, 14, 64), 'front_conv': (64, 14, 64), 'sme': (64, 14, 64), 'motion_conv': (64, 14, 64)}

# Path that is forced, and whether torch.compile has it
VARIANTS = {'dispatched': ('auto', False), 'reference': ('reference', False), 'compiled reference': ('reference', True)}


class Case(NamedTuple):
    """An operator at a shape; ``width`` is the number of channels that come out, where they are not those of x."""
    op: str
    backward: bool
    channels: int
    size: int
    width: int
    batch: int

    @property
    def outputs(self) -> int:
        return self.channels if self.op == 'front' else self.width

    @property
    def label(self) -> str:
        return f'{self.op}, forward{" + backward" * self.backward}'

    @property
    def stage(self) -> str:
        to = f' to {self.width}' if self.op == 'front_conv' else ''
        return f'{self.channels}x{self.size}x{self.size}{to}'


def cases(names: list[str], batches: list[int], quick: bool = False) -> list[Case]:
    """What is measured: SME as one operator has no derivative, and its training form is for training."""
    passes = {'front': (False, True), 'front_conv': (False, True), 'sme': (False,), 'motion_conv': (True,)}
    shapes = {'front': FRONT, 'front_conv': FRONT, 'sme': MOTION, 'motion_conv': MOTION}
    return [
        Case(name, backward, *shape, batch)
        for batch in batches for name in names for shape in ([QUICK[name]] if quick else shapes[name])
        for backward in passes[name]]


def floor_bytes(case: Case, itemsize: int) -> int:
    """Bytes of the frames that have to move. Weights and vectors are not counted.

    X are the frames that come in, Y those that go out. What is needed before a sum over a frame or over the channels
    is complete is read again after it. A gradient gx or gy is as large as its frames.

    ============ ======================= ==================================================
    operator     forward                 backward, besides
    ============ ======================= ==================================================
    front        2 X read, Y = X written gy (X) read twice, x read, gx written: 4 X
    front_conv   2 X read, Y written     gy (Y) read twice, x read, gx written: 2 X + 2 Y
    sme          2 X read, Y = X written (none)
    motion_conv  2 X read, Y = X written gy (X) and x read twice, gx written: 5 X
    ============ ======================= ==================================================

    front: the gates need all of a frame before its first pixel is gated, and their gradient all of gy before gx.
    sme, motion_conv: a similarity needs all channels of a pixel, and so does the matrix product that it scales.
    """
    pixels = case.batch * FRAMES * case.size ** 2 * itemsize
    x, y = pixels * case.channels, pixels * case.outputs
    forward = 2 * x + y
    backward = {'front': 4 * x, 'front_conv': 2 * x + 2 * y, 'sme': 0, 'motion_conv': 5 * x}
    return forward + backward[case.op] * case.backward


def floor_flops(case: Case) -> int:
    """Operations of the 1x1 convolution, three times as many with the two products of its backward pass."""
    if case.op == 'front':
        return 0
    forward = 2 * case.batch * FRAMES * case.size ** 2 * case.channels * case.width
    return forward * (3 if case.backward else 1)


def _front(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, taps: Tensor) -> Tensor:
    return ops.front(x, FRAMES, ops.CMEWeights(w1, w2, w3), taps)


def _front_conv(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, taps: Tensor, weight: Tensor) -> Tensor:
    conv = ops.Convolution(weight, None, (1, 1), (0, 0), (1, 1), 1)
    return ops.front_conv(x, FRAMES, ops.CMEWeights(w1, w2, w3), taps, conv)


def _sme(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return ops.sme(x, FRAMES, weight, None, mean, var, gamma, beta, 1e-5)


def _motion_conv(x: Tensor, weight: Tensor) -> Tensor:
    return ops.motion_conv(x, FRAMES, weight, None)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    'front': _front, 'front_conv': _front_conv, 'sme': _sme, 'motion_conv': _motion_conv}


def _weights(case: Case) -> list[Tensor]:
    """At the scale of trained ones: no term hides behind a zero, none overflows."""
    channels, width = case.channels, case.width
    reduced = channels // 8
    cme = [torch.randn(reduced, channels) / channels ** .5, torch.randn(reduced, channels) / channels ** .5,
           torch.randn(channels, reduced) / reduced ** .5, torch.rand(channels, 1, 3)]
    weight = torch.randn(width, channels, 1, 1) / channels ** .5
    norm = [torch.randn(width) / 4, torch.rand(width) + .5, torch.rand(width) + .5, torch.randn(width) / 4]
    return {'front': cme, 'front_conv': [*cme, weight], 'sme': [weight, *norm], 'motion_conv': [weight]}[case.op]


def _inputs(case: Case, args: argparse.Namespace, spill: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Pairs of frames and gradient, enough of them that together they do not fit the cache, and the weights."""
    torch.manual_seed(0)
    dtype, layout = timing.DTYPES[args.dtype], _layout(args)

    def place(tensor: Tensor) -> Tensor:
        tensor = tensor.to(args.device, dtype)
        tensor = tensor.to(memory_format=layout) if tensor.ndim == 4 else tensor
        return tensor.requires_grad_(case.backward)

    weights = [place(weight) for weight in _weights(case)]
    frames = case.batch * FRAMES, case.channels, case.size, case.size
    grads = case.batch * FRAMES, case.outputs, case.size, case.size
    count = max(2, min(64, -(-spill // (torch.Size(frames).numel() * dtype.itemsize))))
    # frames as a ReLU leaves them
    pairs = [[place(torch.randn(frames).relu()), place(torch.randn(grads)).detach()] for _ in range(min(count, 4))]
    while len(pairs) < count:  # of small frames copies do: only their addresses have to differ
        x, gy = pairs[len(pairs) % 4]
        pairs.append([x.detach().clone().requires_grad_(case.backward), gy.clone()])
    return pairs, weights


def _layout(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.layout == 'channels_last' else torch.contiguous_format


def _runner(case: Case, weights: list[Tensor], path: str, compiled: bool) -> Callable[[Tensor, Tensor], Any]:
    """The operator, or it and its derivatives, on a path."""
    function = FUNCTIONS[case.op]
    if compiled:
        function = torch.compile(function, dynamic=False)

    def run(x: Tensor, gy: Tensor) -> Any:
        with use_path(path):
            if not case.backward:
                with torch.no_grad():
                    return [function(x, *weights)]
            return torch.autograd.grad(function(x, *weights), [x, *weights], gy)
    return run


class Planner:
    """Decides whether there is time to compile: the rows that are left have to be measured all the same."""

    def __init__(self, minutes: float, device: str) -> None:
        self.deadline = timing.Deadline(60 * minutes)
        # what a thing takes is the mean so far; these are the first guesses
        self.spent = {'compile': [30.], 'row': [2. if device == 'cuda' else 10.]}

    def note(self, kind: str, seconds: float) -> None:
        self.spent[kind].append(seconds)

    def _mean(self, kind: str) -> float:
        seconds = self.spent[kind][1:] or self.spent[kind]
        return sum(seconds) / len(seconds)

    def may_compile(self, rows_left: int) -> bool:
        return self.deadline.left() > self._mean('compile') + rows_left * self._mean('row')

    def may_measure(self) -> bool:
        return self.deadline.left() > self._mean('row')


def rates(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What this machine does at best: bytes per second of a large copy, FLOPs per second of a large product."""
    dtype, cuda = timing.DTYPES[args.dtype], args.device == 'cuda'
    size = 512 if args.quick else 8192 if cuda else 2048
    bytes_ = 2 ** (24 if args.quick else 30 if cuda else 27)
    source = torch.zeros(bytes_, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    if cuda and torch.backends.cudnn.allow_tf32:  # convolutions may round to it, so the floor has to
        torch.set_float32_matmul_precision('high')
    try:
        samples = timing.interleave(
            {'copy': lambda: target.copy_(source), 'product': lambda: left @ right}, args.device, args.rounds, 10)
    finally:
        torch.set_float32_matmul_precision(precision)
    work = {'copy': 2 * bytes_, 'product': 2 * size ** 3}
    return {name: timing.summary([work[name] / seconds for seconds in samples.time[name]]) for name in work}


def measure(case: Case, args: argparse.Namespace, best: dict[str, dict[str, float]], planner: Planner, rows_left: int,
            ) -> dict[str, Any]:
    """A row: every variant of a case side by side."""
    itemsize = timing.DTYPES[args.dtype].itemsize
    bytes_, flops = floor_bytes(case, itemsize), floor_flops(case)
    start, compiling = timing.Deadline(0), 0.
    floor = max(bytes_ / best['copy']['median'], flops / best['product']['median'])
    row: dict[str, Any] = {
        **case._asdict(), 'bytes': bytes_, 'flops': flops, 'floor_seconds': floor,
        'bound': 'bytes' if floor == bytes_ / best['copy']['median'] else 'flops', 'variants': {}}
    spill = 2 * torch.cuda.get_device_properties().L2_cache_size if args.device == 'cuda' else 2 ** 26
    inputs, weights = _inputs(case, args, spill)
    double = [weight.detach().double().requires_grad_(case.backward) for weight in weights]
    x, gy = inputs[0]
    truth = _runner(case, double, 'reference', False)(
        x.detach().double().requires_grad_(case.backward), gy.double())
    del double

    calls: dict[str, timing.Call] = {}
    for name, (path, compiled) in VARIANTS.items():
        if compiled and not planner.may_compile(rows_left):
            row['variants'][name] = {'missing': 'no time to compile'}
            continue
        deadline = timing.Deadline(0)
        try:
            run = _runner(case, weights, path, compiled)
            error = timing.relative_error(run(x, gy), truth)
            memory = _memory(case, run, inputs[0], weights, args.device)
        except Exception as reason:  # the other variants and rows are worth their time
            traceback.print_exc()
            row['variants'][name] = {'missing': type(reason).__name__}
            continue
        if compiled:
            compiling = -deadline.left()
            planner.note('compile', compiling)
        calls[name] = timing.rotate(run, inputs)
        row['variants'][name] = {'error': error, 'memory_bytes': memory}
    if not calls:
        return row
    samples = timing.interleave(calls, args.device, args.rounds, 10)
    planner.note('row', -start.left() - compiling)
    for name, seconds in samples.time.items():
        entry = row['variants'][name]
        entry['seconds'] = timing.summary(seconds)
        entry['over_floor'] = timing.summary([value / floor for value in seconds])
        entry['bytes_per_second'] = timing.summary([bytes_ / value for value in seconds])
        if name in samples.host:
            entry['host_seconds'] = timing.summary(samples.host[name])
    row['ratios'] = {
        name: timing.ratio(samples.time['dispatched'], samples.time[name])
        for name in calls if name != 'dispatched' and 'dispatched' in calls}
    return row


def _memory(case: Case, run: Callable[..., Any], pair: list[Tensor], weights: list[Tensor], device: str) -> int | None:
    """CUDA: the peak beyond inputs and weights. CPU: what is kept for the backward pass, where there is one."""
    if device == 'cuda':
        return timing.peak_bytes(lambda: run(*pair))
    if not case.backward:
        return None
    return timing.saved_bytes(lambda: run(*pair), [*pair, *weights])


def render(results: dict[str, Any]) -> str:
    """The rows as Markdown: times in ms, ratios, distance from the floor, memory in MB."""
    cuda = results['device'] == 'cuda'
    head = ['operator', 'block input', 'clips', *(f'{name}, ms' for name in VARIANTS), 'dispatched / reference',
            'dispatched / compiled', 'dispatched / floor', 'GB/s',
            f'{"peak" if cuda else "saved"} MB: dispatched, reference, compiled', 'largest error of dispatched']
    if cuda:
        head.append('host, ms')
    lines = []
    for row in results['rows']:
        variants, ratios = row['variants'], row.get('ratios', {})
        own = variants.get('dispatched', {})
        case = Case(*(row[field] for field in Case._fields))
        memory = [variants.get(name, {}).get('memory_bytes') for name in VARIANTS]
        cells = [
            case.label, case.stage, str(case.batch),
            *(timing.show(entry.get('seconds'), 1e3) or f'({entry.get("missing", "not measured")})'
              for entry in (variants.get(name, {}) for name in VARIANTS)),
            timing.show(ratios.get('reference')), timing.show(ratios.get('compiled reference')),
            timing.show(own.get('over_floor')), timing.show(own.get('bytes_per_second'), 1e-9, 0 if cuda else 1),
            ', '.join('-' if size is None else f'{size / 1e6:.1f}' for size in memory),
            f'{own["error"]:.0e}' if 'error' in own else '']
        lines.append(cells + [timing.show(own.get('host_seconds'), 1e3)] * cuda)
    copy, product = results['rates']['copy'], results['rates']['product']
    return (
        f'**{results["device"]}, {results["dtype"]}, {results["layout"]}, {FRAMES} frames a clip** '
        f'({timing.origin(results)}). Floors: a copy moves '
        f'{timing.show(copy, 1e-9, 1)} GB/s, a matrix product makes {timing.show(product, 1e-12)} TFLOP/s.\n\n'
        f'{table(head, lines)}')


def main() -> int:
    parser = timing.arguments(__doc__)
    parser.add_argument('--ops', nargs='+', choices=list(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument('--batch', nargs='+', type=int, help='clips (default: 1 and 8 on a GPU, 1 on a CPU)')
    parser.add_argument('--dtype', choices=list(timing.DTYPES), help='default: fp16 on a GPU, fp32 on a CPU')
    args = parser.parse_args()
    timing.check_device(parser, args)
    torch.backends.cudnn.benchmark = True  # the reference is to be as fast as it gets
    cuda = args.device == 'cuda'
    args.batch = args.batch or ([1, 8] if cuda and not args.quick else [1])
    args.dtype = args.dtype or ('fp16' if cuda else 'fp32')
    args.rounds = args.rounds or (2 if args.quick else 30 if cuda else 9)
    if min(args.batch) < 1:
        parser.error(f'argument --batch: must be 1 or more, got {min(args.batch)}')

    planner = Planner(args.minutes or 8.5, args.device)
    best = rates(args)
    todo = cases(args.ops, args.batch, args.quick)
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(todo):
        if not planner.may_measure():
            timing.progress(f'no time left: {len(todo) - i} of {len(todo)} rows are not measured')
            break
        timing.progress(f'{i + 1}/{len(todo)} {case.label} {case.stage} batch {case.batch}')
        torch.compiler.reset()  # the graphs of the case before are of no more use
        rows.append(measure(case, args, best, planner, len(todo) - i))
    results = {
        **timing.environment(), 'device': args.device, 'dtype': args.dtype, 'layout': args.layout,
        'quick': args.quick, 'rows_left_out': len(todo) - len(rows), 'rates': best, 'rows': rows}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + '\n')
    print(render(results))
    failed = [entry['missing'] for row in rows for entry in row['variants'].values()
              if entry.get('missing', 'no time to compile') != 'no time to compile']
    if failed:
        print(f'{len(failed)} variants failed: {", ".join(sorted(set(failed)))}', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
