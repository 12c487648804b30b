"""Compile every kernel that a ResNet-50 launches, without a GPU, and check what the compiler made of it.

    python -m benchmarks.kernels --out benchmarks/results/kernels.json

The launchers run on meta tensors of the real shapes; what they would launch is compiled for sm_80, sm_90 and sm_120.
A kernel passes if its shared memory fits, it does not spill, matrix products use the tensor cores, and 16-bit frames in
channels_last are read 16 bytes at a time. One that fails here would fail, or crawl, at launch only.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.machine import describe, positive, result_file
from cmr_layers.ops import triton_cme_tim, triton_cme_tim_conv, triton_sme
from cmr_layers.ops.cme_tim import _has_kernel

# What a block may have: the architectures' limits.
SHARED = {80: 101376, 90: 232448, 120: 101376}  # sm_80 has more, but what is compiled for it also runs on sm_86, sm_89
TENSOR_CORES = {80: 'HMMA', 90: 'HGMMA', 120: 'HMMA'}
GRID = 65535  # second and third dimension
STACK = 32  # bytes a thread: a few registers that ptxas put aside cost nothing, hundreds would
PRODUCTS = ('_motion_kernel', '_gated_conv_kernel')
# Block inputs of a ResNet-50 at 224x224: channels, height, and width of conv1
STAGES = ((64, 56, 64), (256, 56, 64), (256, 56, 128), (512, 28, 128), (512, 28, 256), (1024, 14, 256), (1024, 14, 512),
          (2048, 7, 512))
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


class Launch(NamedTuple):
    """A kernel as it is specialised for its arguments."""
    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    name: str


class _Recorder:
    """Stands where a kernel stood and keeps what it was to be launched with."""

    def __init__(self, kernel: JITFunction[Any], launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **meta: Any) -> None:
            names = self.kernel.arg_names
            assert all(size <= GRID for size in grid[1:]), (self.kernel, grid)
            options = {key: meta.pop(key) for key in list(meta) if key not in names}
            self.launches.append(_specialise(self.kernel, {**dict(zip(names, args)), **meta}, options))
        return launch


def _specialise(kernel: JITFunction[Any], values: dict[str, Any], options: dict[str, Any]) -> Launch:
    """What Triton does at a launch: a 1 and None become constants, multiples of 16 are noted."""
    signature, constants, aligned = {}, {}, []
    for name, value in values.items():
        constexpr = kernel.params[kernel.arg_names.index(name)].is_constexpr
        if constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = 'constexpr', value
        elif isinstance(value, Tensor):
            names = {v: f'*{k}' for k, v in DTYPES.items()}
            signature[name] = names[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32' if value < 2 ** 31 else 'i64'
            aligned += [name] if value % 16 == 0 else []
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()),
                  kernel.fn.__name__)


def record(call: Callable[[], Any]) -> list[Launch]:
    """What a function would launch, given tensors on the meta device."""
    launches: list[Launch] = []
    modules = (triton_cme_tim, triton_cme_tim_conv, triton_sme)
    kernels = [(module, name, value) for module in modules for name, value in vars(module).items()
               if isinstance(value, JITFunction)]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, launches))
        call()
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return launches


def stage_calls(dtype: torch.dtype, channels_last: bool, num_frames: int, stage: tuple[int, int, int]) -> Any:
    """Everything that the blocks of a stage may call, forward and backward."""
    channels, size, width = stage
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device='meta', dtype=dtype)

    def call() -> None:
        x = new(2 * num_frames, channels, size, size).to(memory_format=layout)
        reduced = channels // 8
        weights = new(reduced, channels), new(reduced, channels), new(channels, reduced)
        taps, square, bias = new(channels, 1, 3), new(channels, channels, 1, 1), new(channels)
        gate = triton_cme_tim.gates(x, num_frames, *weights, None)[3]
        y = triton_cme_tim.mix(x, num_frames, gate, taps)
        triton_cme_tim.correlate(x, y, num_frames, 3)
        triton_cme_tim.mix(y, num_frames, gate, taps, gate, transpose=True)
        weight = new(width, channels, 1, 1)
        if _has_kernel(x, num_frames, taps, weight, None, [1, 1], [0, 0], [1, 1], 1):
            triton_cme_tim_conv.gated_conv(x, num_frames, gate, taps, weight, bias)
        triton_sme.motion_conv(x, num_frames, square.float(), bias.float(), True)  # with a batch norm folded in float32
        _, s, inverse_norm = triton_sme.motion_conv(x, num_frames, square, None)
        triton_sme.motion_conv_backward(y, x, num_frames, square, s, inverse_norm)
    return call


def compile_for(launch: Launch, capability: int) -> dict[str, Any]:
    """Resources and instructions of a kernel on an architecture."""
    positions = {name: (launch.kernel.arg_names.index(name),) for name, _ in launch.signature}
    source = ASTSource(
        launch.kernel, dict(launch.signature), {positions[name]: value for name, value in launch.constants},
        {positions[name]: [['tt.divisibility', 16]] for name in launch.aligned})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(launch.options))
    report = {'shared': compiled.metadata.shared, **_inspect(compiled.asm['cubin'])}
    return report


def _inspect(cubin: bytes) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = run(str(tools / 'cuobjdump'), '--dump-resource-usage', file.name)
        code = run(str(tools / 'cuobjdump'), '-sass', file.name)
    found = {key.lower(): int(value) for key, value in re.findall(r'\b(REG|STACK|LOCAL):(\d+)', usage)}
    return {
        **found,
        'tensor_cores': sorted(set(re.findall(r'\b(HGMMA|HMMA)\b', code))),
        'wide_loads': len(re.findall(r'\bLDG\.E(?:\.\w+)*\.128|LDGSTS\.E(?:\.\w+)*\.128', code)),
        'loads': len(re.findall(r'\b(?:LDG|LDGSTS)\.', code)),
    }


def failures(launch: Launch, capability: int, report: dict[str, Any]) -> list[str]:
    """Why a kernel must not ship."""
    wrong = []
    if report['shared'] > SHARED[capability]:
        wrong.append(f'{report["shared"]} bytes of shared memory, {SHARED[capability]} fit')
    for kind in ('stack', 'local'):
        if report[kind] > STACK:
            wrong.append(f'{report[kind]} bytes of {kind} memory')
    half = dict(launch.signature).get('x') in ('*fp16', '*bf16')
    if half and launch.name in PRODUCTS and TENSOR_CORES[capability] not in report['tensor_cores']:
        wrong.append(f'no {TENSOR_CORES[capability]}')
    constants = dict(launch.constants)
    channels_last = constants.get('CHANNELS_LAST') or constants.get('stride_c') == 1
    if half and channels_last and not report['wide_loads']:
        wrong.append('no 16-byte loads')
    return wrong


def collect(dtypes: list[str], layouts: list[bool], frames: list[int], stages: Any = STAGES) -> list[Launch]:
    """The different kernels of all stages, in order."""
    launches = (
        launch for dtype in dtypes for layout in layouts for num_frames in frames for stage in stages
        for launch in record(stage_calls(DTYPES[dtype], layout, num_frames, stage)))
    return list(dict.fromkeys(launches))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtypes', nargs='+', choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument('--sm', nargs='+', type=int, choices=list(SHARED), default=list(SHARED))
    parser.add_argument('--frames', nargs='+', type=positive, default=[8], help='frames of a clip')
    parser.add_argument('--out', type=result_file, help='write the report there, as JSON')
    args = parser.parse_args()
    rows, bad = [], 0
    for launch in collect(args.dtypes, [True, False], args.frames):
        for capability in args.sm:
            report = compile_for(launch, capability)
            wrong = failures(launch, capability, report)
            bad += bool(wrong)
            dtype = next((kind for _, kind in launch.signature if kind.startswith('*')), '')
            constants = {
                key: value if isinstance(value, (int, str)) else str(value)
                for key, value in launch.constants if value is not None and key.isupper()}
            rows.append({
                'kernel': launch.name, 'sm': capability, 'dtype': dtype.strip('*'), 'constants': constants,
                'options': dict(launch.options), **report, 'failures': wrong})
            print(f'{launch.name:22} sm_{capability} {dtype:6} reg {report["reg"]:3} shared {report["shared"]:6} '
                  f'stack {report["stack"]:3} wide {report["wide_loads"]:3}/{report["loads"]:3} '
                  f'{",".join(report["tensor_cores"]):5} {"; ".join(wrong) or "ok"}', flush=True)
    if args.out:
        args.out.write_text(json.dumps({**describe('triton'), 'kernels': rows}, indent=1) + '\n')
    print(f'{len(rows)} kernels, {bad} fail')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
