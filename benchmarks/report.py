"""Write the committed results into the pages, between ``<!-- NAME -->`` and its end mark, and draw the plots.

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
from typing import Any, NamedTuple

from benchmarks import flops
from benchmarks.markdown import table
from benchmarks.runtime import goals, plot, tables

ROOT = Path(__file__).parents[1]
DEVICES = ('cpu', 'cuda')

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


def render_timm_suite(results: _Results) -> str:
    return f'{results["passed"]} of {results["wanted"]} tests'


class Section(NamedTuple):
    """What stands between two markers: where, of which file, how it is rendered, and the command that makes it."""
    page: str
    file: str
    show: Callable[[_Results], str]
    command: str


def _runtime(device: str) -> dict[str, Section]:
    file, command = f'runtime-{device}.json', f'-m benchmarks.runtime --device {device}'
    return {f'{device}-{name}': Section('docs/benchmarks.md', file, partial(tables.section, name=name), command)
            for name in tables.SECTIONS}


SECTIONS: dict[str, Section] = {
    'flops': Section('docs/paper.md', 'flops.json', flops.render, '-m benchmarks.flops'),
    'timm-suite': Section('docs/testing.md', 'timm_suite.json', render_timm_suite, 'tests/tools/timm_suite.py'),
    'kernels': Section('docs/performance.md', 'kernels.json', render_kernels, '-m benchmarks.kernels'),
    'counts': Section('docs/benchmarks.md', 'flops.json', flops.render_peers, '-m benchmarks.flops'),
    **_runtime('cpu'), **_runtime('cuda'),
}
# These are of all devices' files, or of none: the goals, and the plots
_TABLES_PAGE = 'docs/benchmarks.md'


def plot_file(device: str) -> str:
    """The plot's file beside its page."""
    return f'benchmarks-{device}.svg'


def _load(root: Path, file: str) -> _Results | None:
    path = root / 'benchmarks/results' / file
    return json.loads(path.read_text()) if path.exists() else None


def _runs(root: Path) -> dict[str, _Results]:
    found = {device: _load(root, f'runtime-{device}.json') for device in DEVICES}
    return {device: results for device, results in found.items() if results}


def pages(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """All generated sections, by page and name."""
    found: dict[str, dict[str, str]] = {}
    for name, section in SECTIONS.items():
        results = _load(root, section.file)
        text = section.show(results) if results else (
            f'not measured yet: `python {section.command} --out benchmarks/results/{section.file}`')
        found.setdefault(section.page, {})[name] = text
    runs = _runs(root)
    found[_TABLES_PAGE]['goals'] = goals.render(list(runs.values()))
    for device in DEVICES:
        image = f'![Latency against accuracy, and the ratios to TSM as bars]({plot_file(device)})'
        found[_TABLES_PAGE][f'{device}-plot'] = image if device in runs else 'not measured yet'
    return found


def stale_pages(root: Path = ROOT) -> dict[Path, str]:
    """What the pages whose sections are not those of the results should be."""
    written = {root / page: replace((root / page).read_text(), parts) for page, parts in pages(root).items()}
    return {page: text for page, text in written.items() if text != page.read_text()}


def stale_plots(root: Path = ROOT) -> dict[Path, _Results]:
    """Plots that show something else than the results, with these."""
    plots = {root / 'docs' / plot_file(device): results for device, results in _runs(root).items()}
    return {path: results for path, results in plots.items() if plot.stale(results, path)}


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
