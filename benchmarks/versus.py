"""Time this checkout against another one: the same layers and networks in two processes, call by call in turns.

    git worktree add ../before HEAD~1
    python -m benchmarks.versus ../before                              # prints ratios: after / before
    python -m benchmarks.versus ../before --only SME --out versus.json

Both processes stay alive, and only one of them works at a time. What is timed is the public API, so that versions with
other insides can be compared: "folded" is by timm's ``reparameterize_model`` here. Each network is built once, so the
intervals do not show how much its place in memory matters.
"""
import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

from benchmarks.machine import positive, result_file
from benchmarks.markdown import table
from benchmarks.runtime.interval import interval, show
from benchmarks.runtime.results import environment
from cmr_layers import CME, SME, TIM, CMRBlock

ROOT = Path(__file__).parents[1]
_SECONDS = .05  # of a sample, at least


def _cases(only: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of the cases that contain ``only``, and what is timed."""
    for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7), (8, 4)):  # the last is the host's time alone
        at = f'{channels}x{size}x{size}'
        made: dict[str, Callable[[], nn.Module]] = {
            f'CME {at}': partial(CME, channels, 8), f'TIM {at}': partial(TIM, channels, 8),
            f'SME {at}': partial(SME, channels, 8),
            f'block {at}': partial(CMRBlock, channels, channels // 4, num_frames=8, sme='all')}
        yield from _modes(made, channels, size, only)
    yield from _modes({'cmr_resnet50': partial(create_model, 'cmr_resnet50', num_frames=8)}, 3, 224, only)


def _modes(made: dict[str, Callable[[], nn.Module]], channels: int, size: int, only: str) -> Iterator[
        tuple[str, Callable[[], Any]]]:
    for name, make in made.items():
        for mode in ('inference', 'folded', 'training'):
            if only in f'{name}, {mode}' and (mode != 'folded' or name.startswith(('SME', 'block', 'cmr'))):
                torch.manual_seed(0)
                module: Any = make().train(mode == 'training')
                x = torch.randn(8, channels, size, size).contiguous(memory_format=torch.channels_last)
                if mode == 'folded':
                    module = reparameterize_model(nn.Sequential(module))
                yield f'{name}, {mode}', partial(_call, module.to(memory_format=torch.channels_last), x)


def _call(module: nn.Module, x: Tensor) -> None:
    if module.training:
        y = module(x.requires_grad_())
        y.backward(torch.ones_like(y))
    else:
        with torch.inference_mode():
            module(x)


def work(only: str) -> None:
    """Make the cases, one after the other. For each number that is read, print how long so many calls take."""
    for name, function in _cases(only):
        print(json.dumps(name), flush=True)
        for line in iter(sys.stdin.readline, '\n'):
            start = time.perf_counter()
            for _ in range(int(line)):
                function()
            print(time.perf_counter() - start, flush=True)
    print('null', flush=True)


class Worker:
    """A process in a checkout."""

    def __init__(self, checkout: Path, only: str) -> None:
        # this file and its helpers from here, the package from there
        code = f'import sys; sys.path.insert(0, {str(checkout)!r}); import cmr_layers; ' \
               f'assert cmr_layers.__file__.startswith({str(checkout)!r}), cmr_layers.__file__; ' \
               f'sys.path.insert(0, {str(ROOT)!r}); from benchmarks.versus import work; work({only!r})'
        self.process: Any = subprocess.Popen(
            [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, text: str) -> None:
        self.process.stdin.write(f'{text}\n')
        self.process.stdin.flush()

    def hear(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def seconds(self, calls: int) -> float:
        self.tell(str(calls))
        return float(self.hear()) / calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', type=Path, help='the other checkout')
    parser.add_argument('--only', default='', help='cases whose names contain this')
    parser.add_argument('--rounds', type=positive, default=15, help='default: %(default)s')
    parser.add_argument('--out', type=result_file, help='write a result file')
    args = parser.parse_args()
    if not (args.before / 'cmr_layers').is_dir():
        parser.error(f'argument before: must be a checkout of this repository, got {str(args.before)!r}')
    results: dict[str, Any] = {**environment(), 'device': 'cpu', 'rounds': args.rounds, 'commits': {
        name: subprocess.check_output(['git', '-C', str(path), 'rev-parse', 'HEAD'], text=True).strip()
        for name, path in (('before', args.before), ('after', ROOT))}, 'cases': []}
    workers = [Worker(path.resolve(), args.only) for path in (args.before, ROOT)]
    while (name := max(worker.hear() or '' for worker in workers)):  # both say the same
        for worker in workers:
            worker.seconds(2)
        calls = max(1, round(_SECONDS / max(worker.seconds(1) for worker in workers)))
        samples: list[list[float]] = [[], []]
        for index in range(args.rounds):
            for which in (0, 1) if index % 2 else (1, 0):
                samples[which].append(workers[which].seconds(calls))
        for worker in workers:
            worker.tell('')
        results['cases'].append({
            'name': name, 'calls': calls, 'before': samples[0], 'after': samples[1],
            'ratio': interval([samples[1]], [samples[0]])})
        print(f'{name}: {show(results["cases"][-1]["ratio"])}', flush=True)
    if not results['cases']:
        parser.error(f'argument --only: no case contains {args.only!r}')
    print(table(['case', 'after / before'], [[case['name'], show(case['ratio'])] for case in results['cases']]))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
