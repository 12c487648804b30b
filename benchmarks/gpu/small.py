"""Every kernel once, on small frames, under compute-sanitizer where that is installed.

It finds what a test can't: a read or a write beside a tensor that happens to do no harm.
"""
import argparse
import shutil
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import launcher, result_file, write
from benchmarks.runtime.candidate import DEVICES
from benchmarks.runtime.operators import PASSES, Case, Operator
from benchmarks.runtime.results import environment
from cmr_layers.ops import use_path

FRAMES, CHANNELS, SIZE, OUTPUTS = 8, 64, 7, 64
LIMIT = .05  # of the largest value: a wrong kernel is off by more, a rounding in half precision by less
REPORT = 2000  # characters of what the tool says


def gradients(layer: Operator, x: Tensor, path: str, backward: bool) -> list[Tensor]:
    """What an operator returns, and the gradients of its frames and weights."""
    x = x.detach().requires_grad_(backward)
    with use_path(path), torch.set_grad_enabled(backward):
        y = layer(x)
        found = torch.autograd.grad(y, [x, *layer.weights], torch.ones_like(y)) if backward else ()
    return [y.detach(), *found]


def case() -> None:
    """Run all operators' kernels, forward and backward, and compare them with the reference.

    Raises:
        ArithmeticError: One of them computes something else.
    """
    torch.manual_seed(0)
    device = DEVICES['cuda']
    for op, passes in PASSES.items():
        layer = Operator(Case(op, CHANNELS, SIZE, OUTPUTS), FRAMES)
        for dtype in (torch.float16, torch.float32):
            layer = layer.to(device, dtype)
            x = torch.randn(2 * FRAMES, CHANNELS, SIZE, SIZE, device=device).relu_().to(dtype)
            for memory_format in (torch.channels_last, torch.contiguous_format):
                x = x.contiguous(memory_format=memory_format)
                for backward in passes:
                    got = gradients(layer, x, 'triton', backward)
                    want = gradients(layer, x, 'reference', backward)
                    for value, truth in zip(got, want, strict=True):
                        off = float((value - truth).abs().max() / truth.abs().max())
                        if not off <= LIMIT:
                            raise ArithmeticError(f'{op} in {dtype}: off by {off:.0e} of the largest value')
    torch.cuda.synchronize()


def sanitize() -> dict[str, Any]:
    """The small case in a process that compute-sanitizer watches."""
    tool = shutil.which('compute-sanitizer')
    if tool is None:
        return {**environment(), 'complete': True, 'outcome': 'compute-sanitizer is not installed'}
    done = subprocess.run(
        [tool, '--tool', 'memcheck', '--error-exitcode', '9', *launcher(), '-m', 'benchmarks.gpu.small', '--case'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    outcome = {0: 'no errors', 9: 'errors of memory'}.get(done.returncode, f'it ended with status {done.returncode}')
    return {**environment(), 'complete': True, 'outcome': outcome,
            'report': '' if done.returncode == 0 else done.stdout[-REPORT:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--case', action='store_true', help='the small case itself')
    what.add_argument('--out', type=result_file, help='run it under compute-sanitizer and write there how it ended')
    args = parser.parse_args()
    if args.case:
        case()
        return 0
    found = sanitize()
    write(args.out, found)
    print(found['outcome'])
    return int(bool(found.get('report')))


if __name__ == '__main__':
    sys.exit(main())
