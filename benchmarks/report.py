"""Write the committed results into docs and README, between ``<!-- NAME -->`` and its end mark, and draw the plots.

    python -m benchmarks.report             # rewrite the generated sections
    python -m benchmarks.report --check     # write nothing; exit 1 if they are not what the results say

What has no result file yet says so, and which command makes it.
"""
import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import flops, networks, ops, timing
from benchmarks.flops import table
from benchmarks.runtime import plot, render

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks/results'

_Results = dict[str, Any]


def render_kernels(results: _Results) -> str:
    """What the compiler made of the kernels, the worst of each kernel's variants."""
    groups: dict[tuple[str, int], list[_Results]] = {}
    for row in results['kernels']:
        groups.setdefault((row['kernel'], row['sm']), []).append(row)
    rows = []
    for (name, sm), variants in sorted(groups.items()):
        units = sorted({unit for row in variants for unit in row['tensor_cores']})
        failed = sum(bool(row['failures']) for row in variants)
        rows.append([
            f'`{name}`', f'sm_{sm}', str(len(variants)), str(max(row['reg'] for row in variants)),
            str(max(row['shared'] for row in variants)), str(max(row['stack'] for row in variants)),
            ', '.join(units), f'{failed} fail' if failed else 'ok'])
    head = ['kernel', 'for', 'variants', 'registers, at most', 'bytes of shared memory, at most',
            'bytes of stack, at most', 'tensor cores', 'checks']
    versions = results['versions']
    return (f'{results["date"][:10]}, torch {versions["torch"]}, triton {versions["triton"]}: '
            f'`{results["command"]}`\n\n{table(head, rows)}')


# Section: file, what renders it, and the module and arguments that make it
SECTIONS: dict[str, tuple[str, Callable[[_Results], str], str]] = {
    'ops-cpu': ('ops-cpu.json', ops.render, 'ops --device cpu'),
    'ops-cuda': ('ops-cuda.json', ops.render, 'ops --device cuda'),
    'networks-cpu': ('networks-cpu.json', networks.render, 'networks --device cpu'),
    'networks-cuda': ('networks-cuda.json', networks.render, 'networks --device cuda'),
    'kernels': ('kernels.json', render_kernels, 'kernels'),
}
DEVICES = ('cpu', 'cuda')
RUNTIME: dict[str, tuple[str, Callable[[_Results], str], str]] = {
    'counts': ('flops.json', flops.render_peers, 'flops'),
    **{f'{device}-{name}': (
        f'runtime-{device}.json', partial(render.section, name=name), f'runtime --device {device}')
       for device in DEVICES for name in render.SECTIONS},
}


def device_plot(device: str) -> str:
    """The plot's file beside docs/benchmarks.md."""
    return f'benchmarks-{device}.svg'


def _load(folder: Path, file: str) -> _Results | None:
    path = folder / file
    return json.loads(path.read_text()) if path.exists() else None


def _rendered(
        parts: dict[str, tuple[str, Callable[[_Results], str], str]], folder: Path) -> dict[str, str]:
    found = {file: _load(folder, file) for file, _, _ in parts.values()}
    rendered = {}
    for name, (file, show, command) in parts.items():
        results = found[file]
        rendered[name] = show(results) if results else (
            f'not measured yet: `python -m benchmarks.{command} --out benchmarks/results/{file}`')
    return rendered


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """All generated sections of docs/performance.md, by name."""
    settings = [
        setting for device in DEVICES
        for setting in (_load(folder, f'networks-{device}.json') or {}).get('settings', [])]
    return {**_rendered(SECTIONS, folder), 'goals': networks.render_goals(networks.judge(settings))}


def runtime_sections(folder: Path = RESULTS) -> dict[str, str]:
    """All generated sections of docs/benchmarks.md, by name."""
    first, again = (_load(folder, f'runtime-cpu{which}.json') for which in ('', '-again'))
    repeated = render.compare(again, first) if first and again else None
    plots = {
        f'{device}-plot': f'![Latency against accuracy, and the ratios to TSM as bars]({device_plot(device)})'
        if (folder / f'runtime-{device}.json').exists() else 'not measured yet' for device in DEVICES}
    return {
        **_rendered(RUNTIME, folder), **plots,
        'repeated': f'{repeated.text}\n\n{timing.origin(again)}' if repeated and again else 'not measured yet'}


def stale_pages(root: Path = ROOT) -> dict[Path, str]:
    """What the pages whose sections are not those of the results should be."""
    found = sections(root / 'benchmarks/results')
    wanted = {
        root / 'docs/performance.md': found,
        root / 'docs/benchmarks.md': runtime_sections(root / 'benchmarks/results'),
        root / 'README.md': {'goals': found['goals']}}
    pages = {page: replace(page.read_text(), parts) for page, parts in wanted.items()}
    return {page: text for page, text in pages.items() if text != page.read_text()}


def stale_plots(root: Path = ROOT) -> dict[Path, _Results]:
    """Plots that show something else than the results, with these."""
    results = {device: _load(root / 'benchmarks/results', f'runtime-{device}.json') for device in DEVICES}
    plots = {root / 'docs' / device_plot(device): found for device, found in results.items() if found}
    return {path: found for path, found in plots.items() if plot.stale(found, path)}


def replace(text: str, rendered: dict[str, str]) -> str:
    """The page with its sections written anew; each has to have its markers, once."""
    for name, content in rendered.items():
        parts = re.split(rf'(<!-- /?{re.escape(name)} -->)', text)
        if parts[1::2] != [f'<!-- {name} -->', f'<!-- /{name} -->']:
            raise ValueError(f'there must be one <!-- {name} --> and one <!-- /{name} --> after it')
        parts[2] = f'\n{content}\n'
        text = ''.join(parts)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if a page is stale')
    args = parser.parse_args()
    stale = stale_pages()
    for page, text in stale.items():
        if args.check:
            print(f'{page.name} is stale: run python -m benchmarks.report', file=sys.stderr)
        else:
            page.write_text(text)
    plots = stale_plots()
    for path, results in plots.items():
        if args.check:
            print(f'{path.name} is stale: run python -m benchmarks.report', file=sys.stderr)
        else:
            plot.draw(results, path)
    return int(args.check and bool(stale or plots))


if __name__ == '__main__':
    sys.exit(main())
