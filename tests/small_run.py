"""A training that takes a second, for the tests of the example of action recognition."""
import csv
import os
import sys

from layouts import write_layout

SMALL = (
    '--model', 'cmr_resnet18', '--no-pretrained', '--model-args', 'layers=[1,1,1,1]', 'channels=[8,16,16,16]',
    '--size', '32', '--short-side', '36', '--num-frames', '4', '--batch-size', '4', '--dropout', '0', '--workers', '0',
    '--device', 'cpu', '--log-every', '1', '--lr', '.05', '--base-batch', '0', '--epochs', '2', '--milestones', '1')


def flags(folder, *more, layout='folders', per_class=6, output='run'):
    """Flags of a small training, whose videos and lists are written to a folder if they are not there yet."""
    found = [*SMALL, '--layout', layout, '--output', str(folder / output)]
    for name, count in (('train', per_class), ('val', 2)):
        saved = folder / f'{name}.flags'
        if not saved.exists():
            _, file, root, classes = write_layout(layout, folder / name, per_class=count)
            part = [f'--{name}-list', str(file or root)]
            if file is not None:
                part += ['--root' if name == 'train' else '--val-root', str(root)]
            if classes is not None and name == 'train':
                part += ['--classes', str(classes)]
            saved.write_text('\n'.join(part))
        found += saved.read_text().split('\n')
    return [*found, *more]


def command(*arguments):
    return [sys.executable, '-m', 'examples.action_recognition.train', *arguments]


def torchrun(*arguments):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
            'examples.action_recognition.train', *arguments]


def environment():
    """One thread each, as the tests have; the package from this checkout."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}


def table(file):
    with open(file, newline='') as rows:
        return list(csv.DictReader(rows))
