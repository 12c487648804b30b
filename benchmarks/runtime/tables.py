"""The tables of a result file as Markdown."""
import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.markdown import table
from benchmarks.runtime import goals, interval
from benchmarks.runtime.candidate import Setting
from benchmarks.runtime.models import OFF_THE_SHELF, PLACEMENTS, REDUCTIONS, TABLE_7
from benchmarks.runtime.operators import CASES, RATES, floor_bytes, floor_flops
from benchmarks.runtime.plan import AXES, BASES, STUDIES, scaled
from benchmarks.runtime.results import Measured, Results, find, measured, origin, ratio

__all__ = ['SECTIONS', 'best_mode', 'render', 'section']

_BOUND = 'bound by (host, ms)'
_TO_BASELINE, _TO_TSM = 'to the baseline', 'to TSM'


# Cells

def _time(m: Measured | None) -> str:
    entry = m.summary() if m else None
    if entry is None:
        return f'({m.missing})' if m else ''
    return interval.show(entry, 1e3, 1 if entry['median'] > .1 else 2)


def _memory(value: int | None) -> str:
    return '' if value is None else f'{value / 1e6:.0f}'


def _error(m: Measured | None) -> str:
    return '' if m is None or m.error is None else f'{m.error:.0e}'


def _bound(m: Measured | None, results: Results) -> list[str]:
    """Who is waited for: a column of its own, on CUDA."""
    host = m.host_time() if m else None
    if results['device'] != 'cuda':
        return []
    return [f'{"host" if m.host_bound() else "device"} ({host * 1e3:.2f})' if m and host is not None else '']


def _bound_head(results: Results) -> list[str]:
    return [_BOUND] * (results['device'] == 'cuda')


def _number(value: float | None, digits: int = 2) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _over(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


def _to_bases(m: Measured, ms: Iterable[Measured]) -> list[str]:
    """Ratios to the baseline and to TSM, in the same mode and setting."""
    ms = list(ms)
    return [interval.show(ratio(m, find(ms, m, model=base))) for base in BASES]


# Sections

def best_mode(ms: Iterable[Measured]) -> str | None:
    """The mode that a plot shows: without compiling, the one that hides least behind launches."""
    there = {m.mode for m in ms if m.time}
    return next((mode for mode in ('graph', 'unfolded', 'folded', 'reference') if mode in there), None)


def table_7(results: Results) -> str:
    """Latency and throughput of the paper's rows and ours, the paper's figures beside them; by mode, if several."""
    found = {m.mode for study in ('latency', 'throughput') for m in measured(results, study)}
    shown: list[str] = [mode for mode in ('graph', 'unfolded') if mode in found] or sorted(found)
    return '\n\n'.join(_table_7(results, mode) for mode in shown)


def _table_7(results: Results, mode: str) -> str:
    latency, throughput = measured(results, 'latency'), measured(results, 'throughput')
    tsm = TABLE_7['tsm']
    head = [f'{mode} mode', 'latency, ms', *_bound_head(results), _TO_BASELINE, _TO_TSM, "to TSM, paper's",
            'throughput, clips/s', _TO_BASELINE, _TO_TSM, "to TSM, paper's", "top-1, paper's"]
    rows = []
    for name, model in {**TABLE_7, **OFF_THE_SHELF}.items():
        m, n = find(latency, model=name, mode=mode), find(throughput, model=name, mode=mode)
        if m or n:
            rows.append([
                model.label, _time(m), *_bound(m, results), *(_to_bases(m, latency) if m else ['', '']),
                _number(_over(model.latency, tsm.latency)), _rate(n), *(_faster(n, throughput) if n else ['', '']),
                _number(_over(model.throughput, tsm.throughput)), _number(model.accuracy, 1)])
    return table(head, rows)


def _rate(m: Measured | None) -> str:
    """Clips a second."""
    if m is None or not m.time:
        return _time(m)
    entry = interval.bootstrap([[m.setting.batch / value for value in rounds] for rounds in m.time.values()])
    return interval.show(entry, 1, 2 if entry['median'] < 10 else 1)


def _faster(m: Measured, ms: Iterable[Measured]) -> list[str]:
    """Ratios of throughputs: those of the times, the other way round."""
    ms = list(ms)
    return [interval.show(ratio(find(ms, m, model=base), m)) for base in BASES]


def modes(results: Results) -> str:
    """What each mode makes of each network: beside itself unfolded, TSM, and the baseline in the same and its best."""
    rows = []
    for study in ('latency', 'throughput'):
        ms = [m for m in measured(results, study) if m.model in TABLE_7]
        if len({m.mode for m in ms}) < 2:
            continue
        for m in sorted(ms, key=lambda m: list(TABLE_7).index(m.model)):
            itself = '' if m.mode == 'unfolded' else interval.show(ratio(m, find(ms, m, mode='unfolded')))
            baseline = goals.best_baseline(ms, m)
            rows.append([
                m.row.label, m.mode, str(m.setting.batch), _time(m), *_bound(m, results), itself, *_to_bases(m, ms),
                f'{interval.show(ratio(m, baseline))} ({baseline.mode})' if baseline and m.time else '',
                _memory(m.memory), _error(m)])
    head = ['', 'mode', 'batch', 'ms', *_bound_head(results), 'to itself, unfolded', f'{_TO_BASELINE}, same mode',
            f'{_TO_TSM}, same mode', f'{_TO_BASELINE} in its best mode', 'peak MB', 'largest error']
    return table(head, rows)


def placement(results: Results) -> str:
    """Tables 5 and 3: where CME and SME stand, and CME's reduction. ResNet-50 and TSM are in the table before."""
    ms = measured(results, 'latency')
    tsm = TABLE_7['tsm'].latency
    mode = best_mode(m for m in ms if m.model in PLACEMENTS)
    labels = {'cmr': 'CME all, SME first; r1 = r2 = 8 (`cmr_resnet50`)'}
    rows = [
        [labels.get(m.model, m.row.label), m.mode, _time(m), *_to_bases(m, ms), _number(_over(m.row.latency, tsm)),
         _number(m.row.accuracy, 1)]
        for name in (*PLACEMENTS, 'cmr', *REDUCTIONS) for m in ms if (m.model, m.mode) == (name, mode)]
    return table(['', 'mode', 'ms', _TO_BASELINE, _TO_TSM, "to TSM, paper's", "top-1, paper's"], rows)


def frames(results: Results) -> str:
    """Longer clips, and torchvision's networks."""
    ms = measured(results, 'frames')
    rows = [[m.row.label, _time(m), *_bound(m, results), *_to_bases(m, ms), _memory(m.memory)] for m in ms]
    return table(['16 frames', 'ms', *_bound_head(results), _TO_BASELINE, _TO_TSM, 'peak MB'], rows)


def backbones(results: Results) -> str:
    """Backbones of other kinds, with temporal layers and without."""
    ms = measured(results, 'backbones')
    rows = []
    for m in ms:
        plain = find(ms, m, model=m.model.removesuffix(' adapted'), mode='graph' if m.mode == 'graph' else 'unfolded')
        rows.append([m.row.label, m.mode, _time(m), *_bound(m, results), interval.show(ratio(m, plain)),
                     _memory(m.memory), _error(m)])
    return table(
        ['', 'mode', 'ms', *_bound_head(results), 'to itself without layers', 'peak MB', 'largest error'], rows)


def training(results: Results) -> str:
    """A training step."""
    ms = measured(results, 'training')
    rows = []
    for m in ms:
        baseline = find(ms, m, model='tsn')
        held = None if m.memory is None or m.held is None else m.memory + m.held
        rows.append([
            m.row.label, m.mode, _time(m), *_bound(m, results), *_to_bases(m, ms), _memory(m.memory),
            _number(_over(m.memory, baseline.memory if baseline else None)), _memory(held)])
    head = ['training step', 'mode', 'ms', *_bound_head(results), _TO_BASELINE, _TO_TSM, 'peak MB',
            'peak MB over the baseline', 'peak MB with weights and optimizer']
    return table(head, rows)


def precision(results: Results) -> str:
    """Data types and layouts that are not those of the other tables."""
    ms = measured(results, 'precision')
    rows = [[m.row.label, m.setting.dtype, m.setting.layout, _time(m), *_bound(m, results), *_to_bases(m, ms),
             _memory(m.memory), _error(m)] for m in ms]
    head = ['', 'dtype', 'layout', 'ms', *_bound_head(results), _TO_BASELINE, _TO_TSM, 'peak MB', 'largest error']
    return table(head, rows)


def operators(results: Results) -> str:
    """Each operator in three forms, and how far the fused one is from its floor."""
    ms = measured(results, 'operators')
    rates = {name: _work_rate(find(ms, model=name)) for name in RATES}
    copy, product = (rates[name] or {'median': math.nan, 'low': math.nan, 'high': math.nan} for name in RATES)
    head = ['operator', 'frames of', 'clips', 'fused, ms', *_bound_head(results), 'reference, ms',
            'compiled reference, ms', 'fused to reference', 'to compiled', 'to its floor', 'floor, ms', 'bound by',
            'peak MB: fused, reference, compiled', 'largest error of fused']
    rows = []
    for m in ms:
        if m.model in RATES or m.mode != 'unfolded':
            continue
        case, numbers = CASES[m.model], m.setting.batch * m.setting.frames * m.setting.size ** 2
        reference, compiled = (find(ms, m, mode=mode) for mode in ('reference', 'compiled-reference'))
        floors = {
            'bytes': floor_bytes(case, numbers, m.setting.torch_dtype.itemsize, m.training) / copy['median'],
            'operations': floor_flops(case, numbers, m.training) / product['median']}
        bound = max(floors, key=lambda kind: floors[kind])
        times = [[time / floors[bound] for time in rounds] for rounds in m.time.values()]
        over = interval.bootstrap(times) if times else None
        to = f' to {case.outputs}' if case.op == 'cme_tim_conv' else ''
        rows.append([
            f'{m.row.label}, forward{" + backward" * m.training}',
            f'{case.channels}x{m.setting.size}x{m.setting.size}{to}', str(m.setting.batch), _time(m),
            *_bound(m, results), _time(reference), _time(compiled), interval.show(ratio(m, reference)),
            interval.show(ratio(m, compiled)), interval.show(over), _number(floors[bound] * 1e3), bound,
            ', '.join(_memory(other.memory) or '-' if other else '-' for other in (m, reference, compiled)), _error(m)])
    return (f'Floors: a copy moves {interval.show(copy, 1e-9, 1)} GB/s, a matrix product makes '
            f'{interval.show(product, 1e-12)} TFLOP/s.\n\n{table(head, rows)}')


def _work_rate(m: Measured | None) -> dict[str, float] | None:
    """Bytes or operations a second."""
    if m is None or not m.time:
        return None
    numbers = m.setting.batch * m.setting.frames * m.setting.size ** 2
    work = RATES[m.model].work(numbers, m.setting.torch_dtype.itemsize)
    return interval.bootstrap([[work / time for time in rounds] for rounds in m.time.values()])


# Scaling: how a study's axes are called, and where a candidate stands on them
_AXES: dict[str, tuple[str, Callable[[Measured], float]]] = {
    'frames': ('frames', lambda m: m.setting.frames), 'size': ('pixels a side', lambda m: m.setting.size),
    'batch': ('clips', lambda m: m.setting.batch), 'width': ('width', lambda m: m.width)}


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
    return interval.bootstrap([[slope(times) for times in zip(*(m.time[i] for m in ms))] for i in passes])


def scaling(results: Results, study: str, axis: str) -> str:
    """Time along an axis, and the exponent fitted to it."""
    name, where = _AXES[axis]
    ms = measured(results, study)
    if study == 'scaling':
        points = scaled(Setting(**results['base']), axis)
        ms = [m for m in ms if (m.setting, m.width) in points]
    lines: dict[tuple[str, str], list[Measured]] = {}
    for m in ms:
        lines.setdefault((m.model, m.mode), []).append(m)
    places = sorted({where(m) for m in ms})
    rows = []
    for (_, mode), line in lines.items():
        line = sorted(line, key=where)
        at = {where(m): m for m in line}
        done = [m for m in line if m.time]
        rows.append([
            line[0].row.label, mode, *_bound(done[-1] if done else None, results), *(_point(at.get(p)) for p in places),
            interval.show(exponent(done, where)), interval.show(exponent(done[-2:], where))])
    head = ['ms', 'mode', *['largest bound by (host, ms)'] * (results['device'] == 'cuda'),
            *(f'{p:g} {name}' for p in places), 'exponent', 'of the last step']
    return table(head, rows)


def _point(m: Measured | None) -> str:
    median = m.median() if m else None
    return _time(m) if median is None else _number(median * 1e3)


# Section: the studies that it shows, and what renders it
SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Results], str]]] = {
    'table-7': (('latency', 'throughput'), table_7),
    'placement': (('latency',), placement),
    'modes': (('latency', 'throughput'), modes),
    'operators': (('operators',), operators),
    'training': (('training',), training),
    'frames': (('frames',), frames),
    'precision': (('precision',), precision),
    'backbones': (('backbones',), backbones),
    **{f'scale-{axis}': (('scaling',), lambda results, axis=axis: scaling(results, 'scaling', axis))  # type: ignore[misc]
       for axis in AXES},
    'layers': (('layers',), lambda results: scaling(results, 'layers', 'frames')),
}


def describe(results: Results, names: Sequence[str]) -> str:
    """Where and how studies were measured, in a line."""
    units = [unit for unit in results['units'] if unit['study'] in names]
    setting = Setting(**results['base'])
    passes = {name: sum(unit['study'] == name for unit in units) for name in names}
    counts = ', '.join(f'{name} {count}' for name, count in passes.items() if count)
    return f'{origin(results)}; base: {setting.label}; passes: {counts}'


def section(results: Results, name: str) -> str:
    """A section of a page; it says so if nothing of it has been measured."""
    names, show = SECTIONS[name]
    if not any(unit['study'] in names for unit in results['units']):
        return (f'not measured yet: `python -m benchmarks.runtime --device {results["device"]} '
                f'--studies {" ".join(names)}`')
    return f'{show(results)}\n\n{describe(results, names)}'


def render(results: Results) -> str:
    """The goals, and all sections that have results."""
    done = {unit['study'] for unit in results['units']}
    parts = [f'**{", ".join(STUDIES[study] for study in names if study in done)}**\n\n{section(results, name)}'
             for name, (names, _) in SECTIONS.items() if done & set(names)]
    return '\n\n'.join([*parts, f'**goals**\n\n{goals.render([results])}'])
