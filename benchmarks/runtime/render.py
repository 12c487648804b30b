"""The tables of a result file as Markdown, and two files compared."""
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.candidates import Setting
from benchmarks.flops import table
from benchmarks.runtime.models import MODELS, OFF_THE_SHELF, PLACEMENTS, REDUCTIONS, TABLE_7, Model
from benchmarks.runtime.plan import BASES, STUDIES

__all__ = ['SECTIONS', 'Measured', 'compare', 'measured', 'ratio', 'render']

_Results = dict[str, Any]
_BOUND = 'bound by (host, ms)'
_HOST_BOUND = .9  # the host needs so much of the time for the launches alone


class Measured(NamedTuple):
    """A candidate over all passes. ``time`` and ``host`` are seconds, by pass and round."""
    model: str
    mode: str
    setting: Setting
    width: float
    time: dict[int, list[float]]
    host: dict[int, list[float]]
    error: float | None
    memory: int | None
    missing: str | None

    @property
    def row(self) -> Model:
        return MODELS[self.model]

    def at(self) -> tuple[Any, ...]:
        """What it has in common with those that it may be compared with."""
        return self.mode, self.setting, self.width

    def pooled(self) -> list[float]:
        return [value for rounds in self.time.values() for value in rounds]

    def summary(self) -> dict[str, float] | None:
        return timing.summary(self.pooled()) if self.time else None

    def host_time(self) -> float | None:
        """Seconds that the host takes for the launches, median; None on a CPU."""
        host = [value for rounds in self.host.values() for value in rounds]
        return timing.summary(host)['median'] if host else None

    def host_bound(self) -> bool:
        """Whether a GPU waits for its host."""
        host = self.host_time()
        return host is not None and host > _HOST_BOUND * timing.summary(self.pooled())['median']


def measured(results: _Results, study: str) -> list[Measured]:
    """The candidates of a study, in the order in which they were planned."""
    found: dict[tuple[Any, ...], Measured] = {}
    for unit in results['units']:
        if unit['study'] != study:
            continue
        for entry in unit['entries']:
            setting = Setting.of(entry)
            key = entry['model'], entry['mode'], setting, entry['width']
            m = found.get(key) or Measured(*key, {}, {}, None, None, None)
            m = m._replace(
                error=entry.get('error', m.error), memory=entry.get('memory_bytes', m.memory),
                missing=entry.get('missing', m.missing))
            if 'samples' in entry:
                m.time[unit['pass']] = entry['samples']
            if 'host' in entry:
                m.host[unit['pass']] = entry['host']
            found[key] = m
    return list(found.values())


def ratio(m: Measured, base: Measured | None) -> dict[str, float] | None:
    """Ratio of times in the passes that both have, with its interval."""
    both = sorted(m.time.keys() & base.time.keys()) if base else []
    if base is None or not both:
        return None
    return timing.interval([m.time[i] for i in both], [base.time[i] for i in both])


def _like(m: Measured, others: Iterable[Measured], model: str) -> Measured | None:
    return next((other for other in others if other.model == model and other.at() == m.at()), None)


# Cells

def _interval(entry: dict[str, float] | None, digits: int = 2) -> str:
    if entry is None:
        return ''
    return ' '.join([f'{entry["median"]:.{digits}f}', f'({entry["low"]:.{digits}f}-{entry["high"]:.{digits}f})'])


def _time(m: Measured | None) -> str:
    if m is None:
        return ''
    entry = m.summary()
    if entry is None:
        return f'({m.missing})'
    return timing.show(entry, 1e3, 1 if entry['median'] > .1 else 2)


def _memory(m: Measured | None) -> str:
    return '' if m is None or m.memory is None else f'{m.memory / 1e6:.0f}'


def _error(m: Measured) -> str:
    return '' if m.error is None else f'{m.error:.0e}'


def _bound(m: Measured | None) -> str:
    host = m.host_time() if m else None
    if m is None or host is None:
        return ''
    return f'{"host" if m.host_bound() else "device"} ({host * 1e3:.2f})'


def _number(value: float | None, digits: int = 2) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


# Sections

def _find(ms: Sequence[Measured], model: str, mode: str) -> Measured | None:
    return next((m for m in ms if (m.model, m.mode) == (model, mode)), None)


def _to(m: Measured | None, ms: Sequence[Measured], base: str) -> str:
    return _interval(ratio(m, _like(m, ms, base))) if m else ''


def best_mode(ms: Iterable[Measured]) -> str | None:
    """The mode that a plot shows: without compiling, the one that hides least behind launches."""
    there = {m.mode for m in ms if m.time}
    return next((mode for mode in ('graph', 'fused', 'folded', 'eager') if mode in there), None)


def table_7(results: _Results) -> str:
    """Latency and throughput of the paper's rows and ours, the paper's figures beside them; by mode, if several."""
    found = {m.mode for study in ('latency', 'throughput') for m in measured(results, study)}
    shown: list[str] = [mode for mode in ('graph', 'fused') if mode in found] or sorted(found)
    return '\n\n'.join(_table_7(results, mode) for mode in shown)


def _table_7(results: _Results, mode: str) -> str:
    latency, throughput = measured(results, 'latency'), measured(results, 'throughput')
    cuda, tsm = results['device'] == 'cuda', TABLE_7['tsm']
    head = [f'{mode} mode', 'latency, ms', *[_BOUND] * cuda, 'to ResNet-50', 'to TSM', "to TSM, paper's",
            'throughput, clips/s', 'to ResNet-50', 'to TSM', "to TSM, paper's", "top-1, paper's"]
    rows = []
    for name, model in {**TABLE_7, **OFF_THE_SHELF}.items():
        m, n = _find(latency, name, mode), _find(throughput, name, mode)
        if not m and not n:
            continue
        rows.append([
            model.label, _time(m), *[_bound(m)] * cuda, _to(m, latency, 'tsn'), _to(m, latency, 'tsm'),
            _number(_over(model.latency, tsm.latency)), _rate(n), _faster(n, throughput, 'tsn'),
            _faster(n, throughput, 'tsm'), _number(_over(model.throughput, tsm.throughput)),
            _number(model.accuracy, 1)])
    return table(head, rows)


def _rate(m: Measured | None) -> str:
    """Clips a second."""
    if m is None or not m.time:
        return _time(m)
    entry = timing.summary([m.setting.batch / value for value in m.pooled()])
    return timing.show(entry, 1, 2 if entry['median'] < 10 else 1)


def _faster(m: Measured | None, ms: Sequence[Measured], base: str) -> str:
    """Ratio of throughputs: that of the times, the other way round."""
    other = _like(m, ms, base) if m else None
    return _interval(ratio(other, m)) if other else ''


def modes(results: _Results) -> str:
    """What each mode makes of each network: time, and the ratio to the network's own eager time, and to TSM's."""
    rows = []
    for study, own in (('latency', 'eager'), ('throughput', 'fused'), ('modes', 'folded')):
        ms = measured(results, study)
        if len({m.mode for m in ms}) < 2:
            continue
        for m in ms:
            itself = ratio(m, _find(ms, m.model, own)) if m.mode != own else None
            rows.append([
                m.row.label, m.mode, str(m.setting.batch), _time(m), *[_bound(m)] * (results['device'] == 'cuda'),
                f'{_interval(itself)} of {own}' if itself else '',
                _to(m, ms, 'tsn'), _to(m, ms, 'tsm'), _memory(m), _error(m)])
    head = ['', 'mode', 'batch', 'ms', *[_BOUND] * (results['device'] == 'cuda'), 'to itself',
            'to ResNet-50, same mode', 'to TSM, same mode', 'peak MB', 'largest error']
    return table(head, rows)


def placement(results: _Results) -> str:
    """Tables 5 and 3: where CME and SME stand, and CME's reduction."""
    ms = measured(results, 'placement')
    tsm = TABLE_7['tsm'].latency
    labels = {'cmr': 'CME all, SME first; r1 = r2 = 8 (`cmr_resnet50`)'}
    rows = [
        [labels.get(m.model, m.row.label), m.mode, _time(m), _to(m, ms, 'tsn'), _to(m, ms, 'tsm'),
         _number(_over(m.row.latency, tsm)), _number(m.row.accuracy, 1)]
        for name in (*BASES, 'tim', *PLACEMENTS, 'cmr', *REDUCTIONS) for m in ms if m.model == name]
    return table(['', 'mode', 'ms', 'to ResNet-50', 'to TSM', "to TSM, paper's", "top-1, paper's"], rows)


def frames(results: _Results) -> str:
    """Longer clips, and torchvision's networks."""
    ms = measured(results, 'frames')
    cuda = results['device'] == 'cuda'
    rows = [[m.row.label, _time(m), *[_bound(m)] * cuda, _to(m, ms, 'tsn'), _to(m, ms, 'tsm'), _memory(m)] for m in ms]
    return table(['16 frames', 'ms', *[_BOUND] * cuda, 'to ResNet-50', 'to TSM', 'peak MB'], rows)


def training(results: _Results) -> str:
    """A training step."""
    ms = measured(results, 'training')
    cuda = results['device'] == 'cuda'

    def to_plain(m: Measured) -> str:
        plain = _like(m, ms, 'tsn')
        return _number(_over(m.memory, plain.memory if plain else None))
    rows = [
        [m.row.label, _time(m), *[_bound(m)] * cuda, _to(m, ms, 'tsn'), _to(m, ms, 'tsm'), _memory(m), to_plain(m)]
        for m in ms]
    head = ['training step', 'ms', *[_BOUND] * cuda, 'to ResNet-50', 'to TSM', 'peak MB', 'to ResNet-50']
    return table(head, rows)


def precision(results: _Results) -> str:
    """Data types and layouts."""
    ms = measured(results, 'precision')
    cuda = results['device'] == 'cuda'
    rows = [[m.row.label, m.setting.dtype, m.setting.layout, _time(m), *[_bound(m)] * cuda, _to(m, ms, 'tsn'),
             _to(m, ms, 'tsm'), _memory(m), _error(m)] for m in ms]
    head = ['', 'dtype', 'layout', 'ms', *[_BOUND] * cuda, 'to ResNet-50', 'to TSM', 'peak MB', 'largest error']
    return table(head, rows)


# Axis of each scaling study: what it is called, and where it stands
AXES: dict[str, tuple[str, Callable[[Measured], float]]] = {
    'scale-frames': ('frames', lambda m: m.setting.frames),
    'scale-layers': ('frames', lambda m: m.setting.frames),
    'scale-size': ('pixels a side', lambda m: m.setting.size),
    'scale-batch': ('clips', lambda m: m.setting.batch),
    'scale-width': ('width', lambda m: m.width),
}


def exponent(ms: Sequence[Measured], axis: Callable[[Measured], float]) -> dict[str, float] | None:
    """Slope of log time over log axis by least squares, one for each round, with its interval."""
    passes = sorted(set.intersection(*(set(m.time) for m in ms))) if ms else []
    if len(ms) < 2 or not passes:
        return None
    x = [math.log(axis(m)) for m in ms]
    mean = sum(x) / len(x)
    spread = sum((a - mean) ** 2 for a in x)

    def slope(times: Sequence[float]) -> float:
        return sum((a - mean) * math.log(t) for a, t in zip(x, times)) / spread
    return timing.bootstrap([[slope(times) for times in zip(*(m.time[i] for m in ms))] for i in passes])


def _point(m: Measured | None) -> str:
    entry = m.summary() if m else None
    return _number(entry['median'] * 1e3) if entry else _time(m)


def scaling(results: _Results, study: str) -> str:
    """Time along an axis, and the exponent fitted to it."""
    name, axis = AXES[study]
    cuda = results['device'] == 'cuda'
    ms = measured(results, study)
    lines: dict[tuple[str, str], list[Measured]] = {}
    for m in ms:
        lines.setdefault((m.model, m.mode), []).append(m)
    points = sorted({axis(m) for m in ms})
    rows = []
    for (_, mode), line in lines.items():
        line = sorted(line, key=axis)
        at = {axis(m): m for m in line}
        done = [m for m in line if m.time]
        rows.append([
            line[0].row.label, mode, *[_bound(done[-1] if done else None)] * cuda,
            *(_point(at.get(p)) for p in points),
            _interval(exponent(done, axis)), _interval(exponent(done[-2:], axis))])
    head = ['ms', 'mode', *['largest bound by (host, ms)'] * cuda, *(f'{p:g} {name}' for p in points), 'exponent',
            'of the last step']
    return table(head, rows)


# Section: the studies that it shows, and what renders it
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[_Results], str]]] = {
    'table-7': (('latency', 'throughput'), table_7),
    'placement': (('placement',), placement),
    'frames': (('frames',), frames),
    'training': (('training',), training),
    'modes': (('latency', 'throughput', 'modes'), modes),
    'precision': (('precision',), precision),
    **{study: ((study,), lambda results, study=study: scaling(results, study)) for study in AXES},  # type: ignore[misc]
}


def describe(results: _Results, names: Sequence[str]) -> str:
    """Where and how studies were measured, in a line."""
    units = [unit for unit in results['units'] if unit['study'] in names]
    setting = Setting(**results['base'])
    passes = {name: sum(unit['study'] == name for unit in units) for name in names}
    counts = ', '.join(f'{name} {count}' for name, count in passes.items() if count)
    return f'{timing.origin(results)}; base: {setting.label}; passes: {counts}'


def section(results: _Results, name: str) -> str:
    names, show = SECTIONS[name]
    if not any(unit['study'] in names for unit in results['units']):
        device = results['device']
        return f'not measured yet: `python -m benchmarks.runtime --device {device} --studies {" ".join(names)}`'
    return f'{show(results)}\n\n{describe(results, names)}'


def render(results: _Results) -> str:
    """All sections that have results."""
    done = {unit['study'] for unit in results['units']}
    return '\n\n'.join(
        f'**{", ".join(STUDIES[study] for study in names if study in done)}**\n\n{section(results, name)}'
        for name, (names, _) in SECTIONS.items() if done & set(names))


class Comparison(NamedTuple):
    text: str
    inside: int
    overlapping: int
    apart: int


def compare(new: _Results, old: _Results) -> Comparison:
    """Whether another run's ratios to ResNet-50 and to TSM came out again.

    Inside: the new ratio lies within the old interval. Overlapping: the two intervals do. Apart: not even that.
    """
    rows, counts = [], {'inside': 0, 'overlapping': 0, 'apart': 0}
    for study in STUDIES:
        olds, news = measured(old, study), measured(new, study)
        for m in news:
            before = _like(m, olds, m.model)
            for base in BASES:
                now, then = ratio(m, _like(m, news, base)), before and ratio(before, _like(before, olds, base))
                if m.model == base or not now or not then:
                    continue
                verdict = (
                    'inside' if then['low'] <= now['median'] <= then['high'] else
                    'overlapping' if now['low'] <= then['high'] and then['low'] <= now['high'] else 'apart')
                counts[verdict] += 1
                rows.append([study, m.row.label, m.mode, m.setting.label, MODELS[base].label, _interval(then, 3),
                             _interval(now, 3), verdict])
    head = ['study', 'model', 'mode', 'setting', 'to', 'before', 'now', '']
    summary = ', '.join(f'{count} {verdict}' for verdict, count in counts.items())
    return Comparison(f'{table(head, rows)}\n\n{len(rows)} ratios: {summary}', **counts)


