"""The plots of docs/motion.md: how rows learn and what they bear, and what their accuracy costs.

Needs the extra [bench].
"""
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.motion.movers import SWEEPS
from benchmarks.motion.results import after, difference_of, estimate, runs_of, swept
from benchmarks.motion.rows import ROWS
from benchmarks.motion.statistics import Estimate
from benchmarks.motion.tables import curved, seed_names
from benchmarks.plots import write

__all__ = ['CURVES', 'curves', 'draw_costs', 'draw_curves', 'costs', 'render_costs']

_Results = dict[str, Any]
_Curve = list[tuple[float, Estimate]]
#: Rows of the curves, and their colours.
CURVES = {'plain': '#9a9a9a', 'cme_sme': '#d9a441', 'tim': '#3d5a80', 'cme': '#6a994e', 'sme': '#8e5ea2',
          'all': '#b3371f'}
#: What differences are to, and rows that differ from it by too much.
BASE, UNORDERED = 'tim', {'plain', 'only_cme', 'only_sme', 'cme_sme', 'broken_sme', 'shuffled_sme'}
_AXES = {'clips': 'training clips', 'step': 'step: pixels in an eighth of a clip',
         'clutter': 'clutter: opacity of the distractors', 'share': 'share of frames that show the bar'}


def curves(results: _Results) -> dict[str, dict[str, _Curve]]:
    """Right answers by training clips and by each knob, for each row that was measured."""
    measured, results = curved(results)
    rows = [row for row in CURVES if row in measured]
    if not results['runs']:
        return {}
    found: dict[str, dict[str, _Curve]] = {name: {} for name in _AXES}
    for row in rows:
        seen = [point[0] for point in next(iter(runs_of(results, row).values()))['curve']]
        found['clips'][row] = [(clips, _sure(estimate(results, row, after(i)))) for i, clips in enumerate(seen)]
        for knob, values in SWEEPS.items():
            found[knob][row] = [(value, _sure(estimate(results, row, swept(knob, value)))) for value in values]
    return found


def costs(results: _Results, latency: _Results) -> list[tuple[str, float, float, float, Estimate]]:
    """Rows with TIM or something in its place: name, latency over TIM's with its interval, points over TIM.

    The others, without anything that tells the order of frames, are too far below to be shown beside them. The deeper
    networks of Table 5 have no TIM of their depth to be compared with.
    """
    found = []
    for row, time in latency['rows'].items():
        points = difference_of(results, row, BASE)
        if points and row not in UNORDERED and ROWS[row].image != 'deep':
            ratio = time['ratio']
            found.append((row, ratio['median'], ratio['low'], ratio['high'], points))
    return found


def render_costs(results: _Results, latency: _Results) -> str:
    """The same as a table."""
    lines = []
    for number, (row, ratio, low, high, points) in enumerate(costs(results, latency), 1):
        seeds = seed_names(runs_of(results, row).keys() & runs_of(results, BASE).keys())
        lines.append([f'{number}', ROWS[row].label, f'{ratio:.2f} ({low:.2f} to {high:.2f})', points.show(True), seeds])
    return table(['', 'row', 'latency, TIM = 1', 'points over TIM', 'seeds'], lines)


def _sure(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def draw_curves(results: _Results, path: Path) -> None:
    """Write the curves as SVG."""
    shown = curves(results)

    def fill(figure: Any) -> None:
        for axes, (name, rows) in zip(figure.subplots(1, 4, sharey=True), shown.items()):
            for row, points in rows.items():
                x = [point for point, _ in points]
                axes.plot(x, [100 * e.mean for _, e in points], color=CURVES[row], marker='.', label=ROWS[row].label)
                axes.fill_between(x, [100 * e.ends[0] for _, e in points], [100 * e.ends[1] for _, e in points],
                                  color=CURVES[row], alpha=.12, linewidth=0)
            axes.axhline(50, color='black', linewidth=.6, linestyle=':')
            axes.set_xlabel(_AXES[name])
            axes.set_ylim(0, 100)
            axes.spines[['top', 'right']].set_visible(False)
            if name == 'clips':
                axes.set_ylabel('right, % (bands: 95% intervals;\ndotted: all frames without their order)')
                axes.legend(frameon=False, fontsize=7, loc='upper left')
    write(shown, path, (12, 3.4), fill)


def draw_costs(results: _Results, latency: _Results, path: Path) -> None:
    """Write accuracy against latency as SVG."""
    shown = costs(results, latency)

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(0, color='black', linewidth=.6, linestyle=':')
        for number, (row, ratio, low, high, points) in enumerate(shown, 1):
            color = CURVES.get(row, '#555555')
            bars = {} if points.seeds == 1 else {
                'yerr': [[100 * (points.mean - points.ends[0])], [100 * (points.ends[1] - points.mean)]]}
            axes.errorbar(
                ratio, 100 * points.mean, xerr=[[ratio - low], [high - ratio]], fmt='o', markersize=3, color=color,
                elinewidth=.5, capsize=1.5, **bars)
            axes.annotate(f'{number}', (ratio, 100 * points.mean), xytext=(3, 3), textcoords='offset points',
                          color=color, fontsize=7)
            axes.plot([], [], ' ', label=f'{number}  {ROWS[row].label}')
        axes.legend(frameon=False, fontsize=7, loc='center left', bbox_to_anchor=(1, .5), handlelength=0)
        axes.set_xscale('log')
        ticks = [.8, 1, 1.2, 1.5, 2, 3, 4]
        axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel('latency as a ResNet-50, TIM = 1')
        axes.set_ylabel('points over TIM (bars: 95% intervals; of two seeds, their values)')
        axes.spines[['top', 'right']].set_visible(False)
    write(shown, path, (9, 5), fill)
