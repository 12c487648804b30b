"""What happens in a video, says a trained network: of a file, of all videos in a folder, or of what a camera sees.

    python -m examples.action_recognition.classify runs/mine video.mp4
    python -m examples.action_recognition.classify runs/mine folder --json > answers.json
    python -m examples.action_recognition.classify runs/mine video.mp4 --video labelled.mp4 --sheet sheet.png
    python -m examples.action_recognition.classify runs/mine --camera /dev/video0 --video seen.mp4 --seconds 60

It prints the five best classes. --video writes the frames with a label over them: if the video is longer than a window,
the label of the nearest of the windows that slide over it. --sheet draws the frames of a clip and under each one where
SME sees motion.
"""
import argparse
import json
import os
import sys
import warnings
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from cmr_layers.video.index import Index, index_videos
from cmr_layers.video.lists import VIDEOS
from cmr_layers.video.source import PICTURES

from .annotate import all_frames, writing
from .camera import open_camera, watch
from .checkpoint import load_network
from .figures import has_sme, motion_sheet
from .predict import Classifier, nearest, slide
from .staging import staged

__all__ = ['find_videos', 'main']


def find_videos(path: str) -> List[str]:
    """The videos that a path names: a file, all video files in a folder and those below, or folders of pictures.

    Pictures count as a video if there is no video file: those of each folder are one.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no video in the folder.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f'{path!r} does not exist; wanted a video file, or a folder with videos or pictures')
    if not os.path.isdir(path):
        return [path]
    films, folders = [], []
    for folder, _, names in os.walk(path):
        films += [os.path.join(folder, name) for name in names if name.lower().endswith(VIDEOS)]
        if any(name.lower().endswith(PICTURES) for name in names):
            folders.append(folder)
    if not films and not folders:
        raise ValueError(f'{path!r} holds no video; wanted files that end in {", ".join(VIDEOS)}, or pictures')
    return sorted(films or folders)


def best(scores: Tensor, classes: Sequence[str], count: int = 5) -> List[Dict[str, Any]]:
    """The best classes and their scores, the best first."""
    values, places = scores.sort(descending=True, stable=True)
    return [{'class': classes[int(i)], 'score': round(float(v), 6)} for v, i in zip(values[:count], places[:count])]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command. Returns 1 if a video could not be read."""
    args = _parse(arguments)
    try:
        classifier = Classifier(
            load_network(args.checkpoint, use_ema=not args.no_ema), args.device, args.clips, args.crops, args.average)
        if args.sheet is not None and not has_sme(classifier.model):
            raise ValueError(f'--sheet draws the map of an SME, but the network of {args.checkpoint} has none')
        return _files(classifier, args) if args.camera is None else _camera(classifier, args)
    except (ValueError, OSError, ImportError) as error:
        print(f'classify: {error}', file=sys.stderr)
        return 1


def _files(classifier: Classifier, args: argparse.Namespace) -> int:
    paths = find_videos(args.source)
    if len(paths) > 1 and (args.video or args.sheet):
        raise ValueError(f'--video and --sheet take one video, but {args.source!r} holds {len(paths)}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # what cannot be read is said below, file by file
        index = index_videos(paths, progress=len(paths) > 1)
    answers = [_answer(classifier, index, path, args) for path in paths]
    if args.json:
        json.dump(answers, sys.stdout, indent=1, ensure_ascii=False)
        print()
    broken = sum('error' in answer for answer in answers)
    if broken:
        print(f'{broken} of {len(paths)} videos cannot be read', file=sys.stderr)
    return 1 if broken else 0


def _answer(classifier: Classifier, index: Index, path: str, args: argparse.Namespace) -> Dict[str, Any]:
    answer: Dict[str, Any] = {'path': path}
    try:
        scores = next(classifier.scores(index, path))
    except ValueError as error:
        answer['error'] = str(error)
        print(error, file=sys.stderr)
        return answer
    answer['best'] = best(scores, classifier.classes)
    if not args.json:
        print(f'{path}\n' + _lines(answer['best']))
    if args.sheet is not None:
        _write_sheet(classifier, index, path, answer['best'][0], args)
    if args.video is not None:
        answer['windows'] = _write_video(classifier, index, path, args)
    return answer


def _lines(rows: Sequence[Dict[str, Any]]) -> str:
    return '\n'.join(f'  {row["score"]:7.2%}  {row["class"]}' for row in rows)


def _write_sheet(classifier: Classifier, index: Index, path: str, first: Dict[str, Any], args: argparse.Namespace,
                 ) -> None:
    clip, frames, times = classifier.centre(index, path)
    title = f'{os.path.basename(path)}: {first["class"]} ({first["score"]:.0%})'
    figure, _ = motion_sheet(classifier.model, clip, frames, times, title)
    with staged([args.sheet], args.force) as folder:
        figure.savefig(folder / args.sheet.name)


def _write_video(classifier: Classifier, index: Index, path: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    info = index[path]
    windows = slide(info, args.window, args.step)
    rows = [best(scores, classifier.classes) for scores in classifier.scores(index, path, windows)]
    times = info.times
    with staged([args.video], args.force) as folder, writing(
            folder / args.video.name, Fraction(info.rate), info.unit) as writer:
        for image, time, at in zip(all_frames(path), times, nearest(windows, times, info.duration)):
            writer.write(image, time, rows[at][0]['class'], rows[at][0]['score'])
        if writer.count != info.num_frames:
            raise ValueError(f'{path} decodes to {writer.count} frames; it was {info.num_frames} at the look at it')
    return [
        {'start': window.start or 0., 'end': info.duration if window.end is None else window.end, 'best': row}
        for window, row in zip(windows, rows)]


def _camera(classifier: Classifier, args: argparse.Namespace) -> int:
    """Print what a camera sees until --seconds are over, it ends, or Ctrl-C is pressed."""
    row = None
    with ExitStack() as stack:
        container = stack.enter_context(open_camera(args.camera, args.camera_format))
        writer = None
        if args.video is not None:
            folder = stack.enter_context(staged([args.video], args.force))
            rate = container.streams.video[0].average_rate or 25
            writer = stack.enter_context(writing(folder / args.video.name, Fraction(rate)))
        try:
            for moment in watch(container, args.window, args.step, classifier.config.short_side):
                if args.seconds is not None and moment.time >= args.seconds:
                    break
                if moment.window is not None:
                    rows = best(classifier.scores_of_frames(moment.window), classifier.classes)
                    row = rows[0]
                    if args.json:
                        print(json.dumps({'time': round(float(moment.time), 3), 'best': rows}, ensure_ascii=False),
                              flush=True)
                    else:
                        print(f'{float(moment.time):.2f} s\n' + _lines(rows), flush=True)
                if writer is not None:
                    # nothing is known before the first window is full
                    name, score = ('…', 0.) if row is None else (row['class'], row['score'])
                    writer.write(moment.image, moment.time, name, score)
        except KeyboardInterrupt:
            print('stopped', file=sys.stderr)
    return 0


def _parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m examples.action_recognition.classify', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='folder of a run, whose best.pt is taken, or a .pt file')
    parser.add_argument('source', nargs='?', help='a video file, or a folder of videos or of pictures')
    parser.add_argument('--camera', metavar='DEVICE', help='such as /dev/video0 (Linux), 0 (macOS), "video=NAME"')
    parser.add_argument('--camera-format', metavar='NAME', help="FFmpeg's kind of device, if not this system's cameras")
    parser.add_argument('--seconds', type=_seconds, help='how long to watch the camera; else until Ctrl-C')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--video', type=Path, metavar='OUT.mp4', help='write the frames with a label over them')
    parser.add_argument('--sheet', type=Path, metavar='OUT.png', help="draw a clip's frames, and where SME sees motion")
    parser.add_argument('--force', action='store_true', help='replace the files of --video and --sheet')
    parser.add_argument('--window', type=_seconds, default=4., help='seconds of a window of --video and --camera (4)')
    parser.add_argument('--step', type=_seconds, default=1., help='seconds from a window to the next (1)')
    parser.add_argument('--clips', type=int, default=1, help='clips over a video or window (1)')
    parser.add_argument('--crops', type=int, default=1, choices=(1, 3), help='crops of each clip (1)')
    parser.add_argument('--average', default='scores', choices=('scores', 'logits'), help='of the views (scores)')
    parser.add_argument('--no-ema', action='store_true', help='take the weights themselves, not their moving average')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(arguments)
    if (args.source is None) == (args.camera is None):
        parser.error('wanted a video file, a folder, or --camera; and one of them')
    if args.clips < 1:
        parser.error(f'--clips must be at least 1, got {args.clips}')
    if args.video is not None and args.video.suffix.lower() != '.mp4':
        parser.error(f'--video must end in .mp4, got {str(args.video)!r}')
    if args.sheet is not None:
        if args.camera is not None:
            parser.error('--sheet needs a file; wanted none with --camera')
        if args.sheet.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.pdf', '.svg'):
            parser.error(f'--sheet must end in .png, .jpg, .pdf or .svg, got {str(args.sheet)!r}')
    for name in ('video', 'sheet'):
        path = getattr(args, name)
        if path is not None and path.exists() and not args.force:
            parser.error(f'--{name}: {str(path)!r} exists; --force replaces it')
    return args


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be a number of seconds > 0, got {text!r}')
    return value


if __name__ == '__main__':
    sys.exit(main())
