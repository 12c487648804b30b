"""Result files of benchmarks.runtime, made up, and tables taken apart: what its tests share."""
from benchmarks.runtime.candidate import Setting

BASE = Setting('cpu', 'fp32', 1, 64, 'channels_last')
ORIGIN = {
    'date': '2001-02-03T04:05:06+00:00', 'command': 'python -m something', 'machine': 'M', 'gpu': 'G', 'threads': 2,
    'versions': {'torch': '1.2', 'triton': '3.4'}}


def entry(model, mode='unfolded', samples=(1., 1.), setting=BASE, width=1, training=False, **more):
    return {**setting._asdict(), 'model': model, 'mode': mode, 'width': width, 'training': training,
            'samples': list(samples), **more}


def missing(model, mode='unfolded', reason='OutOfMemoryError: much', **more):
    found = entry(model, mode, **more)
    del found['samples']
    return {**found, 'missing': reason}


def results(*passes, study='latency', device='cpu', base=BASE, **more):
    units = [{'study': study, 'pass': i, 'date': '', 'entries': list(entries)} for i, entries in enumerate(passes)]
    return {
        **ORIGIN, 'device': device, 'base': base._replace(device=device)._asdict(), 'passes': len(passes), 'rounds': 2,
        'quick': False, **more, 'units': units}


def cells(text):
    """Rows and head of a table."""
    head, _, *rows = [
        [cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line.startswith('|')]
    assert all(len(row) == len(head) for row in rows)
    return rows, head
