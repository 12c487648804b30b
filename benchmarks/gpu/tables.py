"""What the steps found, as Markdown for the pages."""
from pathlib import Path
from typing import Any

from benchmarks.machine import read_json
from benchmarks.markdown import table
from benchmarks.runtime import tables

__all__ = ['render_bf16', 'render_checks', 'render_kernels']

PREDICTION = Path(__file__).parents[1] / 'results/kernels-prediction.json'
_SHOWN = 10  # failures of tests

_Results = dict[str, Any]


def predictions(path: Path = PREDICTION) -> dict[tuple[str, str, int, int | None], float]:
    """Microseconds that ``python -m benchmarks.kernels --predict`` expects of a launch in fp16, on an H100 or H200.

    The one place that knows that file.

    Returns:
        By kernel, frames such as '256x56', clips in a batch, and outputs of its matrix product, None without one. It is
        empty if there is no such file.
    """
    found = read_json(path) or {}
    return {(row['kernel'], row['frames'], row['batch'], row.get('outputs')): row['time']
            for row in found.get('rows', ())}


def render_kernels(results: _Results, path: Path = PREDICTION) -> str:
    """Each launch beside its floor and its prediction, which is of frames from the cache at one clip only."""
    expected = predictions(path)
    head = ['kernel', 'of', 'frames', 'clips', 'dtype', 'cached, us', 'from memory, us', 'floor, us',
            'from memory to floor', 'predicted, us', 'measured to predicted']
    rows = []
    for row in results['kernels']:
        key = row['kernel'], row['frames'], row['batch']
        predicted = None if row['dtype'] != 'fp16' or row['backward'] else expected.get(
            (*key, row['outputs']), expected.get((*key, None)))
        like = row['cached_us' if row['batch'] == 1 else 'from_memory_us']
        rows.append([
            f'`{row["kernel"]}`', f'{row["operator"]}{", backward" * row["backward"]}', row['frames'],
            str(row['batch']), row['dtype'], f'{row["cached_us"]:.1f}', f'{row["from_memory_us"]:.1f}',
            f'{row["floor_us"]:.1f}', f'{row["from_memory_us"] / row["floor_us"]:.2f}',
            *(['', ''] if predicted is None else [f'{predicted:.1f}', f'{like / predicted:.2f}'])])
    notes = [f'A copy moves {results["copy_bytes_per_second"] / 1e9:.0f} GB/s.']
    if not expected:
        notes.append('There is no prediction to compare with: `python -m benchmarks.kernels --predict` makes one.')
    if not results['complete']:
        notes.append('Unfinished: run the command again.')
    notes += [f'{name} failed: {reason}.' for name, reason in results['failed'].items()]
    return f'{" ".join(notes)}\n\n{table(head, rows)}\n\n{origin(results)}'


def render_checks(results: _Results) -> str:
    """How the tests ended."""
    total = ', '.join(f'{results[key]} {key}' for key in ('passed', 'failed', 'skipped'))
    lines = [f'`pytest {" ".join(results["tests"])}`: {total}{"" if results["complete"] else ", others not yet run"}']
    lines += [f'- `{failure["test"]}`: {failure["reason"]}' for failure in results['failures'][:_SHOWN]]
    if len(results['failures']) > _SHOWN:
        lines.append(f'- and {len(results["failures"]) - _SHOWN} more')
    return '\n'.join([*lines, f'\n{origin(results)}'])


def render_bf16(results: _Results) -> str:
    """Table 7 once more, in the other data type of half precision."""
    return tables.section(results, 'table-7')


def origin(results: _Results) -> str:
    """Where and when, in a line."""
    versions = results['versions']
    names = [name for name in ('torch', 'triton', 'cuda', 'cudnn') if name in versions]
    packages = ', '.join(f'{name} {versions[name]}' for name in names)
    return f'{results["date"][:10]}, {results["gpu"]}, {packages}: `{results["command"]}`'
