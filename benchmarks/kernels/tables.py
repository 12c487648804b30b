"""The kernels in docs/performance.md: what the compiler made of them, and their predicted times, before and after."""
from typing import Any

from benchmarks.markdown import table

__all__ = ['render_kernels', 'render_prediction']

_Results = dict[str, Any]


def _origin(results: _Results) -> str:
    versions = results['versions']
    return f'{results["date"][:10]}, torch {versions["torch"]}, triton {versions["triton"]}: `{results["command"]}`'


def render_kernels(results: _Results) -> str:
    """What the compiler made of the kernels, the worst of each kernel's variants."""
    groups: dict[str, list[_Results]] = {}
    for row in results['kernels']:
        groups.setdefault(row['kernel'], []).append(row)
    rows = []
    for name, variants in sorted(groups.items()):
        run = [row for row in variants if 'conflicts' in row]  # on sm_90
        units = sorted({unit for row in variants for unit in row['tensor_cores']})
        failed = sum(bool(row['failures']) for row in variants)
        rows.append([
            f'`{name}`', str(len(variants)), *(
                str(max(row[key] for row in variants))
                for key in ('reg', 'shared', 'stack', 'barriers', 'barriers_in_loop')),
            str(max((row['conflicts'] for row in run), default='')),
            str(min((row['resident'] for row in run), default='')),
            ', '.join(units), f'{failed} fail' if failed else 'ok'])
    head = ['kernel', 'variants', 'registers', 'bytes of shared memory', 'bytes of stack', 'barriers', 'in a loop',
            'bank conflicts', 'programs at once', 'tensor cores', 'checks']
    return f'{_origin(results)}\n\n{table(head, rows)}'


def render_prediction(results: _Results, before: _Results | None = None, fused: _Results | None = None) -> str:
    """Sums of one inference by kernel, and the ratio to the plain network, beside those of other predictions."""
    columns = {'before': before, 'now': results, 'fused': fused}
    parts = [f'Predicted, not measured. {_origin(results)}']
    for batch in results['sums']:
        sums = {name: column['sums'][batch] for name, column in columns.items() if column and batch in column['sums']}
        kernels = list(dict.fromkeys(kernel for column in sums.values() for kernel in column['kernels']))
        rows = [
            [f'`{kernel}`', *_cells([column['kernels'].get(kernel) for column in sums.values()])] for kernel in kernels]
        rows.append(['all', *_cells(list(sums.values()))])
        rows.append(['CMR over plain', *(v for column in sums.values() for v in ('', _range(column))), ''])
        head = [f'batch {batch}', *(f'{what} {name}' for name in sums for what in ('launches', 'us')), 'floor, us']
        parts.append(table(head, rows))
    return '\n\n'.join(parts)


def _cells(parts: list[_Results | None]) -> list[str]:
    """Launches and microseconds of each column, and the floor of the last one that has any."""
    numbers = [f'{part[key]:.0f}' if part else '' for part in parts for key in ('launches', 'time')]
    return [*numbers, next((f'{part["floor"]:.0f}' for part in reversed(parts) if part), '')]


def _range(sums: _Results) -> str:
    return ' to '.join(f'{ratio:.2f}' for ratio in sums.get('ratio', []))
