"""What the journal says, by family, and as tables."""
from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.coverage.others import PACKAGES
from benchmarks.markdown import table

__all__ = ['render', 'render_failures', 'render_groups', 'render_total', 'render_values', 'summary']

VERDICTS = ('all', 'some', 'none', 'broken', 'not built')
_GROUPS = {('NCHW',): 'maps (N, C, H, W)', ('NHWC',): 'maps (N, H, W, C)', ('NLC',): 'tokens (N, L, C)'}
_MIXED = 'several of these'
_NOTHING = 'no layer'

_Line = dict[str, Any]


def _reason(line: _Line) -> str:
    """Why a network has not all of its layers."""
    if line['verdict'] == 'some':
        return '; '.join(f'{blocks}: {reason}' for blocks, reason in line['left'].items())
    return line.get('reason') or '; '.join(line.get('broken', []))


def _count(lines: list[_Line]) -> dict[str, int]:
    counts = Counter(line['verdict'] for line in lines)
    return {'names': len(lines), **{verdict: counts[verdict] for verdict in VERDICTS}}


def _failures(lines: list[_Line]) -> list[dict[str, Any]]:
    """Names that failed, by the network that was measured for them."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line['verdict'] != 'all':
            entry = found.setdefault(line['as'] if 'as' in line else line['name'], {
                'verdict': line['verdict'], 'reason': _reason(line), 'names': []})
            entry['names'].append(line['name'])
    return list(found.values())


def summary(journal: list[_Line]) -> dict[str, Any]:
    """The result of all that a journal has."""
    meta = [line for line in journal if line['package'] == 'timm' and line['device'] == 'meta']
    measured = {line['name']: line for line in meta if 'as' not in line}
    # a name that has a representative takes its verdict
    lines = [{**measured[line['as']], **line, 'verdict': measured[line['as']]['verdict']} if 'as' in line else line
             for line in meta]
    families = sorted({line['family'] for line in lines})
    groups = [*_GROUPS.values(), _MIXED, _NOTHING]
    with_values = [line for line in journal if line['device'] == 'cpu']
    return {
        'timm': {
            'total': {**_count(lines), 'measured': len(measured)},
            'frames only': [line['name'] for line in lines if line.get('maps')],
            'unconfirmed': {name: line['unconfirmed'][:3] for name, line in measured.items()
                            if line.get('unconfirmed')},
            'groups': {group: _count(found) for group in groups
                       if (found := [line for line in lines if _group(line) == group])},
            'families': {family: {**_count(found), 'measured': sum('as' not in line for line in found)}
                         for family in families if (found := [line for line in lines if line['family'] == family])},
            'failures': _failures(lines),
            'representatives': {name: [line['name'] for line in lines if line.get('as') == name] for name in measured},
        },
        'with values': {
            package: {**_count(found), 'identity': sum(bool(line.get('identity')) for line in found),
                      'frames only': [line['name'] for line in found if line.get('maps')],
                      'ok': [line['name'] for line in found if line['verdict'] == 'all'],
                      'failures': _failures(found)}
            for package in ('timm', *PACKAGES)
            if (found := [line for line in with_values if line['package'] == package])},
        'not tried': [package for package in PACKAGES if package not in {line['package'] for line in with_values}],
    }


def _group(line: _Line) -> str:
    """What the layers of a network take."""
    if not line.get('formats'):
        return _NOTHING
    return _GROUPS.get(tuple(line['formats']), _MIXED)


def _share(counts: dict[str, int]) -> str:
    return f'{counts["all"] / counts["names"]:.1%}'


def render_groups(results: dict[str, Any]) -> str:
    """The table of the README."""
    timm = results['timm']
    rows = [[group, str(counts['names']), str(counts['all']), str(counts['some']),
             str(counts['none'] + counts['broken'] + counts['not built'])]
            for group, counts in timm['groups'].items()]
    total = timm['total']
    rows.append(['all of timm', str(total['names']), f'{total["all"]} ({_share(total)})', str(total['some']),
                 str(total['none'] + total['broken'] + total['not built'])])
    return table(['the blocks hand on', 'names', 'all blocks', 'some blocks', 'fail'], rows)


def render(results: dict[str, Any]) -> str:
    """Every family of timm."""
    rows = [[f'`{family}`', *(str(counts[key]) for key in ('names', 'measured', 'all', 'some')),
             str(counts['none'] + counts['broken'] + counts['not built'])]
            for family, counts in results['timm']['families'].items()]
    return table(['family', 'names', 'measured', 'all blocks', 'some blocks', 'fail'], rows)


def _listed(failures: list[dict[str, Any]]) -> str:
    rows = [[', '.join(f'`{name}`' for name in entry['names']), entry['verdict'], _escape(entry['reason'])]
            for entry in failures]
    return table(['names', 'layers', 'reason'], rows) if rows else 'none'


def render_total(results: dict[str, Any]) -> str:
    """The counts in a sentence."""
    total = results['timm']['total']
    version = results['versions']['timm']
    return (f'{total["all"]} of {total["names"]} names of timm {version} ({_share(total)}) take the layers in all of '
            f'their blocks, {total["some"]} in some. {total["measured"]} of them were measured; the others have the '
            f'same modules but for widths and depths, and take the verdict of the one that was.'
            f'{_aside("Encoders that return maps, so frames were run and no clips", results["timm"]["frames only"])}'
            f'{_aside("Channels that nothing in the network confirms, of an SME", results["timm"]["unconfirmed"])}')


def _aside(what: str, names: Iterable[str]) -> str:
    listed = ', '.join(f'`{name}`' for name in names)
    return f' {what}: {listed}.' if listed else ''


def _escape(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')


def render_failures(results: dict[str, Any]) -> str:
    """Every name of timm that has not all of its layers, with the reason."""
    return _listed(results['timm']['failures'])


def render_values(results: dict[str, Any]) -> str:
    """What ran with values: networks by package, and those that failed."""
    rows, failures = [], []
    for package, counts in results['with values'].items():
        rows.append([package, *(str(counts[key]) for key in ('names', 'all', 'some')),
                     str(counts['none'] + counts['broken'] + counts['not built'])])
        failures += [{**entry, 'names': [f'{package}: {name}' for name in entry['names']]}
                     for entry in counts['failures']]
    rows += [[package, 'not installed', '', '', ''] for package in results['not tried']]
    return f'{table(["package", "networks", "all blocks", "some blocks", "fail"], rows)}\n\n{_listed(failures)}'
