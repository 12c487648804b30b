"""Two result files: whether the ratios of one came out again in the other."""
from typing import NamedTuple

from benchmarks.markdown import table
from benchmarks.runtime import interval
from benchmarks.runtime.plan import BASES, STUDIES
from benchmarks.runtime.results import Measured, Results, find, measured, ratio

__all__ = ['Comparison', 'compare']


class Comparison(NamedTuple):
    text: str
    inside: int
    overlapping: int
    apart: int


def compare(new: Results, old: Results) -> Comparison:
    """Whether another run's ratios to the baseline and to TSM came out again, and those of operators to the reference.

    Inside: the new ratio lies within the old interval. Overlapping: the two intervals do. Apart: not even that.
    """
    rows, counts = [], {'inside': 0, 'overlapping': 0, 'apart': 0}
    for study in STUDIES:
        olds, news = measured(old, study), measured(new, study)
        for m in news:
            before = find(olds, m)
            for base in [find(news, m, model=base) for base in BASES] if study != 'operators' else [
                    find(news, m, mode='reference')]:
                now = ratio(m, base) if base != m else None
                then = ratio(before, find(olds, base)) if base else None
                if not base or not now or not then:
                    continue
                verdict = (
                    'inside' if then['low'] <= now['median'] <= then['high'] else
                    'overlapping' if now['low'] <= then['high'] and then['low'] <= now['high'] else 'apart')
                counts[verdict] += 1
                rows.append([study, _name(m), m.mode, m.setting.label, f'{_name(base)}, {base.mode}',
                             interval.show(then, digits=3), interval.show(now, digits=3), verdict])
    head = ['study', 'model', 'mode', 'setting', 'to', 'before', 'now', '']
    summary = ', '.join(f'{count} {verdict}' for verdict, count in counts.items())
    return Comparison(f'{table(head, rows)}\n\n{len(rows)} ratios: {summary}', **counts)


def _name(m: Measured) -> str:
    return f'{m.row.label}{" + backward" * (m.training and m.row.in_channels > 3)}'
