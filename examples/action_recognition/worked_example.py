"""From video files to a network that tells apart what only motion tells apart, in some minutes on two cores.

    python -m examples.action_recognition.worked_example

It runs the commands of this folder, one after the other, and prints each before it starts:

1. make videos of six actions, which are pairs of the same frames in reverse;
2. train a small image network to tell the shape of the thing in a single frame;
3. go on from there with temporal layers in it, to tell the actions;
4. go on from there without, alike in everything else: the network sees each frame by itself;
5. evaluate both on videos of other photographs;
6. classify one of them: an annotated video, and a sheet with the motion that SME sees.

The same command goes on where it was interrupted. ``results.json`` in the folder has the figures.
"""
import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from benchmarks.machine import describe, positive, read_json, write

from .motion_videos import CLASSES

__all__ = ['direction', 'interval', 'main', 'said', 'stages']

SHOWN = 'moving something to the left'
RESULTS = 'results.json'
BATCH = 64  # frames of an update of the image network
LEAST = -(-BATCH // len(CLASSES))


def stages(folder: Path, train: int, val: int, epochs: int) -> Dict[str, List[str]]:
    """The commands: the name of a module of this folder, and its arguments.

    Args:
        folder: Where everything is written.
        train: Training videos of each class.
        val: Validation videos of each class.
        epochs: Passes over the training videos for each of the two networks.
    """
    videos, things = folder / 'videos', folder / 'things'
    motion = ['train', '--preset', 'motion', '--epochs', str(epochs), '--train-list', f'{videos}/train',
              '--val-list', f'{videos}/val', '--checkpoint', f'{things}/last.pt', '--flip', 'labels']
    shown = f'{videos}/val/{SHOWN}/0000.mp4'
    return {
        'videos': ['motion_videos', str(videos), '--train', str(train), '--val', str(val)],
        'things': [
            'train', '--preset', 'motion', '--layout', 'list', '--train-list', f'{videos}/train-things.csv',
            '--val-list', f'{videos}/val-things.csv', '--num-frames', '1', '--batch-size', str(BATCH), '--epochs', '10',
            '--output', str(things)],
        'temporal': [
            *motion, '--temporal', 'retrofit', '--temporal-args', 'start=paper', '--output', f'{folder}/temporal'],
        'plain': [*motion, '--temporal', 'none', '--output', f'{folder}/plain'],
        'evaluate temporal': [
            'evaluate', f'{folder}/temporal/last.pt', '--out', f'{folder}/temporal/evaluation', '--force'],
        'evaluate plain': ['evaluate', f'{folder}/plain/last.pt', '--out', f'{folder}/plain/evaluation', '--force'],
        'classify': [
            'classify', f'{folder}/temporal/last.pt', shown, '--video', f'{folder}/classified.mp4',
            '--sheet', f'{folder}/sheet.png', '--force'],
    }


def run(folder: Path, train: int, val: int, epochs: int) -> Dict[str, Any]:
    """Run the stages. Returns the results, with machine, versions and date of the begin and the seconds of each stage.

    Raises:
        subprocess.CalledProcessError: A command failed.
        OSError: The folder cannot be made.
        ValueError: It holds another number of videos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'begun.json'
    about = read_json(file) or {**describe('av', 'numpy', 'scikit-image'), 'seconds': {}}
    seconds = about['seconds']  # of all calls until the work was done
    finished = (folder / RESULTS).exists()
    for name, (module, *arguments) in stages(folder, train, val, epochs).items():
        command = [f'{__package__}.{module}', *arguments]
        print('\n$ python -m ' + shlex.join(command), flush=True)
        begin = time.perf_counter()
        try:
            subprocess.run([sys.executable, '-m', *command], check=True)
        finally:
            if not finished:
                seconds[name] = round(seconds.get(name, 0.) + time.perf_counter() - begin, 1)
                write(file, about)
    return {
        **about,
        'train_videos': train * len(CLASSES), 'epochs': epochs, 'chance': round(1 / len(CLASSES), 4),
        **{name: {key: result[key] for key in ('videos', 'unreadable', 'top1', 'loss', 'per_class', 'confusion')}
           for name, result in checked(folder, val).items()}}


def checked(folder: Path, val: int) -> Dict[str, Any]:
    """What the two evaluations wrote. They are of all validation videos in the folder, which may be too many."""
    found = {name: json.loads((folder / name / 'evaluation' / 'results.json').read_text())
             for name in ('temporal', 'plain')}
    for result in found.values():
        if result['videos'] != val * len(CLASSES):
            raise ValueError(f'val must be {result["videos"] // len(CLASSES)}, as many as {folder} has of each class, '
                             f'got {val}; or take another folder')
    return found


def direction(names: List[str], confusion: List[List[int]]) -> Tuple[int, int]:
    """Videos taken for their own class, and those taken for it or for the opposite one, which lies on the same line.

    Of the second number a network that does not see the order of frames gets half right: opposite classes have the same
    frames.
    """
    lines = [CLASSES[name][0] for name in names]
    along = sum(confusion[i][j] for i, a in enumerate(lines) for j, b in enumerate(lines) if a == b)
    return sum(confusion[i][i] for i in range(len(names))), along


def said(results: Dict[str, Any]) -> str:
    """The accuracies, with their 95% intervals."""
    lines = []
    for name, what in (('temporal', 'with temporal layers'), ('plain', 'without')):
        result = results[name]
        whose = ' taken for a class on their line'
        right, along = direction([row['name'] for row in result['per_class']], result['confusion'])
        lines += [
            f'{what:<21} {_share(right, result["videos"])}', f'  direction           {_share(right, along, whose)}']
    return '\n'.join([*lines, f'{"chance":<21} {results["chance"]:6.1%}', f'  direction           {.5:6.1%}'])


def _share(right: int, count: int, which: str = '') -> str:
    low, high = interval(right, count)
    return f'{right / max(count, 1):6.1%} of {count} videos{which} (95% interval {low:.1%} to {high:.1%})'


def interval(right: int, count: int) -> Tuple[float, float]:
    """Wilson's 95% interval of a share, which is one at 0 and 1, too."""
    if not count:
        return 0., 1.
    z, share = 1.96, right / count
    middle, half = share + z * z / 2 / count, z * math.sqrt(share * (1 - share) / count + (z / 2 / count) ** 2)
    return max(0., (middle - half) / (1 + z * z / count)), min(1., (middle + half) / (1 + z * z / count))


def main(arguments: Optional[List[str]] = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog='worked_example', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, nargs='?', default=Path('worked-example'),
                        help='where everything is written (worked-example)')
    parser.add_argument('--train', type=positive, default=200, help='training videos of each class (200)')
    parser.add_argument('--val', type=positive, default=50, help='validation videos of each class (50)')
    parser.add_argument('--epochs', type=positive, default=4, help='passes over them for each network (4)')
    parser.add_argument('--out', type=Path, help='a second file of the results')
    args = parser.parse_args(arguments)
    if args.train < LEAST:
        parser.error(f'--train must be at least {LEAST}, as an update takes {BATCH} videos of {len(CLASSES)} classes, '
                     f'got {args.train}')
    try:
        results = run(args.folder, args.train, args.val, args.epochs)
    except subprocess.CalledProcessError as error:
        print(f'worked_example: the last command failed ({error.returncode}), see above; other options than those '
              f'{args.folder} was begun with want another folder', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('worked_example: interrupted; the same command goes on', file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f'worked_example: {error}', file=sys.stderr)
        return 1
    write(args.folder / RESULTS, results)
    if args.out is not None:
        write(args.out, results)
    print(f'\n{said(results)}\n\n{args.folder / RESULTS}, {args.folder}/temporal/evaluation/confusion.png, '
          f'{args.folder}/classified.mp4 and {args.folder}/sheet.png are written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
