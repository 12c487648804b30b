"""Write the committed results into docs/performance.md and the README, between ``<!-- NAME -->`` and its end mark.

    python -m benchmarks.report             # rewrite the generated sections
    python -m benchmarks.report --check     # write nothing; exit 1 if they are not what the results say

What has no result file yet says so, and which command makes it.
"""
import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import networks, ops
from benchmarks.flops import table

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


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """All generated sections of the page, by name."""
    found = {
        name: json.loads((folder / file).read_text())
        for name, (file, _, _) in SECTIONS.items() if (folder / file).exists()}
    rendered = {
        name: render(found[name]) if name in found
        else f'not measured yet: `python -m benchmarks.{command} --out benchmarks/results/{file}`'
        for name, (file, render, command) in SECTIONS.items()}
    settings = [
        setting for name in ('networks-cpu', 'networks-cuda') for setting in found.get(name, {}).get('settings', [])]
    return {**rendered, 'goals': networks.render_goals(networks.judge(settings))}


def stale_pages(root: Path = ROOT) -> dict[Path, str]:
    """What the pages whose sections are not those of the results should be."""
    found = sections(root / 'benchmarks/results')
    wanted = {root / 'docs/performance.md': found, root / 'README.md': {'goals': found['goals']}}
    pages = {page: replace(page.read_text(), parts) for page, parts in wanted.items()}
    return {page: text for page, text in pages.items() if text != page.read_text()}


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
    return int(args.check and bool(stale))


if __name__ == '__main__':
    sys.exit(main())
