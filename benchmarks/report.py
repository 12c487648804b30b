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
from benchmarks.coverage import summary as coverage
from benchmarks.gpu import tables as gpu
from benchmarks.kernels.tables import render_kernels, render_prediction
from benchmarks.markdown import table
from benchmarks.motion import plot as motion_plot
from benchmarks.motion import tables as motion
from benchmarks.plots import stale
from benchmarks.runtime import goals, plot, tables

ROOT = Path(__file__).parents[1]
DEVICES = ('cpu', 'cuda')

_Results = dict[str, Any]


def render_timm_suite(results: _Results) -> str:
    return f'{results["passed"]} of {results["wanted"]} tests'


_FROZEN = {
    'head': 'the classifier', 'identity': 'temporal layers and classifier, from the identity',
    'shift': "temporal layers and classifier, from TSM's shift", 'plain': 'all, without temporal layers',
    'all': "all, with temporal layers, from TSM's shift"}


def render_frozen(results: _Results, full: bool = True) -> str:
    """What learned, and how much was right; ``full``: also what it cost, and how it was measured."""
    head = ['what learns', 'weights that learn', f'right (chance {results["chance"]:.1%})', 'training, minutes']
    rows = []
    for name, what in _FROZEN.items():
        row = results['rows'].get(name)
        if row is None:
            continue
        share = f'{row["trained"]:,} ({row["trained"] / row["parameters"]:.1%})'
        rows.append([what, share, _share(row['right'], row['videos'], row['interval']), f'{row["seconds"] / 60:.1f}'])
        if full:
            rows[-1] += [f'{row["clips_per_second"]:.1f}', f'{row["memory_mb"]:,}',
                         f'{_share(row["right"], row["along"], row["interval_along"])} of {row["along"]}']
    if not full:
        return table(head, rows)
    how, classes = results['settings'], round(1 / results['chance'])
    return table([*head, 'clips/s', 'memory, MB', 'direction, of those on their line (chance 50%)'], rows) + (
        f'\n\n{classes * how["train"]:,} training and {classes * how["val"]} test videos, {how["epochs"]} epochs, '
        f'{how["size"]}x{how["size"]} pixels, {how["batch"]} clips an update, AdamW with a learning rate of '
        f'{how["lr"]}, {how["temporal_lr"]:g} times that for temporal layers, one seed. In brackets are 95% intervals. '
        f'{results["machine"]}, {results["threads"]} threads, {results["date"][:10]}, torch '
        f'{results["versions"]["torch"]}: `benchmarks/results/frozen-cpu.json`.')


def _share(right: int, count: int, interval: list[float]) -> str:
    return f'{right / max(count, 1):.1%} ({interval[0]:.1%} to {interval[1]:.1%})'


class Section(NamedTuple):
    """What stands between two markers: where, of which file, how it is rendered, and the command that makes it."""
    page: str
    file: str
    show: Callable[[_Results], str]
    command: str


_GPU = '-m benchmarks.gpu'
_FROZEN_STUDY = '-m examples.action_recognition.studies.frozen'


def _runtime(device: str) -> dict[str, Section]:
    file, command = f'runtime-{device}.json', _GPU if device == 'cuda' else '-m benchmarks.runtime --device cpu'
    found = {f'{device}-{name}': Section('docs/benchmarks.md', file, partial(tables.section, name=name), command)
             for name in tables.SECTIONS}
    if device == 'cpu':  # was measured by itself, on another machine
        found['cpu-backbones'] = found['cpu-backbones']._replace(
            file='backbones-cpu.json', command=f'{command} --studies backbones')
    return found


def _coverage() -> dict[str, Section]:
    shows = {
        'coverage': ('README.md', coverage.render_groups),
        'coverage-total': ('docs/backbones.md', coverage.render_total),
        'coverage-families': ('docs/backbones.md', coverage.render),
        'coverage-failures': ('docs/backbones.md', coverage.render_failures),
        'coverage-values': ('docs/backbones.md', coverage.render_values)}
    return {name: Section(page, 'coverage.json', show, '-m benchmarks.coverage')
            for name, (page, show) in shows.items()}


SECTIONS: dict[str, Section] = {
    'flops': Section('docs/paper.md', 'flops.json', flops.render, '-m benchmarks.flops'),
    'timm-suite': Section('docs/testing.md', 'timm_suite.json', render_timm_suite, 'tests/tools/timm_suite.py'),
    'kernels': Section('docs/performance.md', 'kernels.json', render_kernels, '-m benchmarks.kernels'),
    'kernels-prediction': Section(
        'docs/performance.md', 'kernels-prediction.json', render_prediction, '-m benchmarks.kernels --predict'),
    'gpu-checks': Section('docs/performance.md', 'gpu/check.json', gpu.render_checks, _GPU),
    'gpu-kernels': Section('docs/performance.md', 'gpu/kernels.json', gpu.render_kernels, _GPU),
    'gpu-bf16': Section('docs/performance.md', 'runtime-cuda-bf16.json', gpu.render_bf16, _GPU),
    'counts': Section('docs/benchmarks.md', 'flops.json', flops.render_peers, '-m benchmarks.flops'),
    'frozen': Section('README.md', 'frozen-cpu.json', partial(render_frozen, full=False), _FROZEN_STUDY),
    'frozen-training': Section('docs/training.md', 'frozen-cpu.json', render_frozen, _FROZEN_STUDY),
    **_runtime('cpu'), **_runtime('cuda'), **_coverage(),
    **{name: Section('docs/motion.md', 'motion-cpu.json', show, '-m benchmarks.motion')
       for name, show in motion.SECTIONS.items()},
    'motion-gates': Section(
        'docs/motion.md', 'motion-gates-cpu.json', motion.render_gates, '-m benchmarks.motion.gates'),
    'motion-search': Section(
        'docs/motion.md', 'motion-search-cpu.json', motion.render_search, '-m benchmarks.motion.search'),
}
# These are of all devices' files, or of none: the goals, and the plots
_TABLES_PAGE = 'docs/benchmarks.md'


def plot_file(device: str) -> str:
    """The plot's file beside its page."""
    return f'benchmarks-{device}.svg'


def _load(root: Path, file: str) -> _Results | None:
    path = root / 'benchmarks/results' / file
    results: _Results | None = json.loads(path.read_text()) if path.exists() else None
    if results and results.get('rehearsal'):
        raise ValueError(f"{path.name} is a rehearsal's: it measured nothing, and no page shows it")
    return results


def _runs(root: Path) -> dict[str, _Results]:
    found = {device: _load(root, f'runtime-{device}.json') for device in DEVICES}
    return {device: results for device, results in found.items() if results}


def pages(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """All generated sections, by page and name."""
    found: dict[str, dict[str, str]] = {}
    for name, section in SECTIONS.items():
        results = _load(root, section.file)
        where = '' if section.command == _GPU else f' --out benchmarks/results/{section.file}'
        text = section.show(results) if results else f'not measured yet: `python {section.command}{where}`'
        found.setdefault(section.page, {})[name] = text
    prediction = _load(root, 'kernels-prediction.json')
    if prediction:  # beside the one it is compared with
        found['docs/performance.md']['kernels-prediction'] = render_prediction(
            prediction, *(_load(root, f'kernels-prediction-{name}.json') for name in ('before', 'fused')))
    learned, costs = (_load(root, f'motion-{name}.json') for name in ('cpu', 'latency-cpu'))
    found['docs/motion.md']['motion-latency'] = (
        '![Points over TIM against latency, all rows that have TIM or a peer](motion-latency.svg)\n\n'
        f'{costs["machine"]}, {costs["threads"]} threads, {costs["date"][:10]}, torch {costs["versions"]["torch"]}; '
        f'medians of {costs["rounds"]} rounds. Command: `{costs["command"]}`.\n\n'
        f'{motion_plot.render_costs(learned, costs)}' if learned and costs else
        'not measured yet: `python -m benchmarks.motion.latency --out benchmarks/results/motion-latency-cpu.json`')
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


def stale_plots(root: Path = ROOT) -> dict[Path, Callable[[Path], None]]:
    """The pictures that show something else than the results, and how to draw them."""
    shown: dict[str, tuple[Any, Callable[[Path], None]]] = {
        plot_file(device): (plot.points(results), partial(plot.draw, results))
        for device, results in _runs(root).items()}
    learned, latency = (_load(root, f'motion-{name}.json') for name in ('cpu', 'latency-cpu'))
    if learned:
        shown['motion-curves.svg'] = motion_plot.curves(learned), partial(motion_plot.draw_curves, learned)
    if learned and latency:
        shown['motion-latency.svg'] = (
            motion_plot.costs(learned, latency), partial(motion_plot.draw_costs, learned, latency))
    return {root / 'docs' / name: draw for name, (what, draw) in shown.items() if stale(what, root / 'docs' / name)}


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
    texts = stale_pages()
    for page, text in texts.items():
        if args.check:
            print(f'{page.name} is stale: run python -m benchmarks.report', file=sys.stderr)
        else:
            page.write_text(text)
    plots = stale_plots()
    for path, draw in plots.items():
        if args.check:
            print(f'{path.name} is stale: run python -m benchmarks.report', file=sys.stderr)
        else:
            draw(path)
    return int(args.check and bool(texts or plots))


if __name__ == '__main__':
    sys.exit(main())
