"""The plot of docs/benchmarks.md: what a model costs against how accurate the paper found it, and all ratios as bars.

Needs the extra [bench].
"""
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plots import write
from benchmarks.runtime.candidate import Setting
from benchmarks.runtime.models import OFF_THE_SHELF, TABLE_7
from benchmarks.runtime.results import measured, ratio
from benchmarks.runtime.tables import best_mode

__all__ = ['Point', 'draw', 'points']

OURS, PEER, PAPER = '#b3371f', '#3d5a80', '#9a9a9a'
_OWN = ('tim', 'cme', 'sme', 'cmr', 'released')


class Point(NamedTuple):
    """A model's latency over TSM's in the same mode, with its interval; the paper's ratio, and its accuracy in %."""
    name: str
    label: str
    ratio: float
    low: float
    high: float
    paper: float | None
    accuracy: float | None


def points(results: dict[str, Any]) -> list[Point]:
    """What is drawn of a result file: the study 'latency', in one mode."""
    latency = measured(results, 'latency')
    mode = best_mode(latency)
    ms = {m.model: m for m in latency if m.mode == mode}
    found = []
    for name, model in {**TABLE_7, **OFF_THE_SHELF}.items():
        cost = ratio(ms[name], ms.get('tsm')) if name in ms else None
        if cost:
            paper = model.latency / TABLE_7['tsm'].latency if model.latency else None  # type: ignore[operator]
            low, median, high = (round(cost[key], 4) for key in ('low', 'median', 'high'))
            found.append(Point(name, model.label, median, low, high, paper, model.accuracy))
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot as SVG.

    Raises:
        ImportError: matplotlib is missing.
    """
    found = points(results)
    where = results['gpu'] if results['device'] == 'cuda' else f'{results["machine"]}, {results["threads"]} threads'
    mode = best_mode(measured(results, 'latency'))
    title = f'{where}: {Setting(**results["base"]).label}, {mode} mode, {results["date"][:10]}'

    def fill(figure: Any) -> None:
        scatter, bars = figure.subplots(1, 2, width_ratios=(1, 1.1))
        _scatter(scatter, found)
        _bars(bars, found)
        figure.suptitle(title, fontsize=9)
    write(found, path, (11, 4.8), fill)


def _scatter(axes: Any, found: list[Point]) -> None:
    for point in found:
        if point.accuracy is None or point.name == 'tsn':  # at 18.1% it would press the others together
            continue
        color = OURS if point.name in _OWN else PEER
        if point.paper:
            axes.plot([point.ratio, point.paper], [point.accuracy] * 2, color=PAPER, linewidth=.8, zorder=1)
            axes.scatter(point.paper, point.accuracy, s=26, facecolors='white', edgecolors=PAPER, zorder=2)
        axes.errorbar(
            point.ratio, point.accuracy, xerr=[[point.ratio - point.low], [point.high - point.ratio]], fmt='o',
            markersize=5, color=color, capsize=2, zorder=3)
        below = point.name == 'cme'  # whose accuracy is that of 'sme'
        axes.annotate(
            point.label, (point.ratio, point.accuracy), xytext=(4, -13 if below else 5), textcoords='offset points',
            color=color)
    axes.set_xscale('log')
    ticks = [1, 1.5, 2, 3, 4, 5]
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel('latency, TSM = 1 (filled: measured here; hollow: the paper, V100)')
    axes.set_ylabel("top-1 on Something-Something V1, the paper's, %")
    axes.spines[['top', 'right']].set_visible(False)


def _bars(axes: Any, found: list[Point]) -> None:
    rows = range(len(found))
    axes.barh(
        [row - .18 for row in rows], [point.ratio for point in found], height=.36,
        xerr=[[point.ratio - point.low for point in found], [point.high - point.ratio for point in found]],
        color=[OURS if point.name in _OWN else PEER for point in found], error_kw={'linewidth': .8, 'capsize': 2})
    axes.barh([row + .18 for row in rows], [point.paper or 0 for point in found], height=.36, color='#d5d5d5')
    axes.set_yticks(list(rows), [point.label for point in found])
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=.8)
    axes.set_xlabel('latency, TSM = 1, 95% interval (light: the paper, V100)')
    axes.spines[['top', 'right']].set_visible(False)
