"""Accuracy of a trained network on a list of videos: one view of each, or N clips and 3 crops as the paper has it.

    python -m examples.action_recognition.evaluate runs/mine
    python -m examples.action_recognition.evaluate runs/mine --clips 10 --crops 3
    python -m examples.action_recognition.evaluate runs/mine --list test.csv --root videos
    torchrun --nproc-per-node 2 -m examples.action_recognition.evaluate runs/mine

It prints top-1 and top-5 with the number of videos that they are shares of, and writes results.json, confusion.png and
the scores of each video into a folder. A video that cannot be read is wrong, and counts.
"""
import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

from cmr_layers.video.index import Index
from cmr_layers.video.lists import LAYOUTS, VideoList

from .checkpoint import Loaded, load_network
from .data import build_index, build_lists, eval_dataset, make_loader, read_any
from .figures import confusion_figure
from .metrics import Result, evaluate
from .processes import Processes
from .results import as_text, check_predictions, class_totals, write_json, write_predictions
from .staging import staged

__all__ = ['evaluate_list', 'main']

AMP = {'none': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def evaluate_list(
        loaded: Loaded,
        videos: VideoList,
        index: Index,
        processes: Processes,
        num_clips: int = 1,
        crops: int = 1,
        average: str = 'scores',
        amp: Optional[torch.dtype] = None,
        size: Optional[int] = None,
        batch_size: Optional[int] = None,
        workers: int = 0,
        clips_per_pass: int = 16,
        progress: Optional[str] = None,
) -> Result:
    """Evaluate a network on a list, with the clip length and sampling that it was trained with.

    Args:
        loaded: The network, with the names of its classes and its configuration. It is moved to the device.
        videos: The list. Its classes are the network's.
        index: What is known of its videos.
        processes: The processes that call this together, and the device.
        num_clips: Clips over each video.
        crops: 1, the centre, or 3 of each clip: left, middle, right.
        average: See :func:`metrics.evaluate`, as for amp, clips_per_pass and progress.
        size: Height and width of the crops. None takes that of training.
        batch_size: Videos of a batch. None takes as many as have 32 views or fewer.
        workers: Processes that decode.

    Raises:
        ValueError: The classes of the list are not those of the network, or an argument is out of its range.
    """
    if videos.classes != loaded.classes:
        raise ValueError(
            f'the list has {len(videos.classes)} classes ({_few(videos.classes)}), but {loaded.path} tells apart '
            f'{len(loaded.classes)} ({_few(loaded.classes)}); wanted the same names in the same order')
    dataset = eval_dataset(loaded.config, videos, index, num_clips, crops, size)
    loader, _ = make_loader(
        dataset, batch_size or max(1, 32 // (num_clips * crops)), workers, processes,
        pin=processes.device.type == 'cuda')
    result = evaluate(
        loaded.model.to(processes.device), loader, processes.device, len(loaded.classes), average, amp, progress,
        clips_per_pass)
    if result.count != len(videos):
        raise RuntimeError(f'{result.count} videos were evaluated; wanted all {len(videos)} of the list')
    return result


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command."""
    args = _parse(arguments)
    try:
        processes = Processes(args.device)
        _run(args, processes)
    except (ValueError, OSError, ImportError) as error:
        print(f'evaluate: {error}', file=sys.stderr)
        return 1
    processes.close()
    return 0


def _run(args: argparse.Namespace, processes: Processes) -> None:
    check_predictions(Path(f'predictions{args.predictions}'))
    loaded = load_network(args.checkpoint, use_ema=not args.no_ema)
    _check_frames(loaded, args.frames)
    videos = _videos(loaded, args)
    how = _how(loaded, videos, args)
    with ExitStack() as stack:
        if processes.is_first:
            out = args.out or _default_folder(loaded, videos, args)
            names = ('results.json', 'confusion.png', f'predictions{args.predictions}')
            # opened before the work, so that hours are not lost on a folder that cannot be written
            folder = stack.enter_context(staged([out / name for name in names], args.force))
            print('\n'.join(f'{key}: {value}' for key, value in how.items()), flush=True)
        result = evaluate_list(
            loaded, videos, build_index(videos, processes), processes, args.clips, args.crops, args.average,
            AMP[args.amp], args.size, args.batch_size, args.workers, args.clips_per_pass, 'evaluation')
        if processes.is_first:
            print(as_text(result, loaded.classes))
            write_json(folder / names[0], result, loaded.classes, how)
            figure = confusion_figure(
                result.confusion, loaded.classes, class_totals(result),
                f'top-1 {result.top1:.1%} of {result.count} videos')
            figure.savefig(folder / names[1], bbox_inches='tight')
            write_predictions(folder / names[2], result, videos)
    if processes.is_first:
        print(f'written: {", ".join(names)} in {out}')


def _few(names: Sequence[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _check_frames(loaded: Loaded, frames: Optional[int]) -> None:
    if frames is not None and frames != loaded.config.num_frames:
        raise ValueError(
            f'--frames {frames}: {loaded.path} was trained with clips of {loaded.config.num_frames} frames, and is '
            f'evaluated with them; leave --frames out, or train with --num-frames {frames}')


def _videos(loaded: Loaded, args: argparse.Namespace) -> VideoList:
    """The list that was asked for, or the one that the run was validated with."""
    if args.list is not None:
        return read_any(args.layout or loaded.config.layout, args.list, args.root, loaded.classes)
    _, videos = build_lists(loaded.config, loaded.classes)
    if videos is None:
        raise ValueError(f'{loaded.path} was trained without a validation list; wanted --list')
    return videos


def _how(loaded: Loaded, videos: VideoList, args: argparse.Namespace) -> Dict[str, Any]:
    """How the figures come to be, for people and for results.json."""
    return {
        'checkpoint': str(loaded.path), 'ema': not args.no_ema, 'list': videos.file, 'frames': loaded.config.num_frames,
        'span': loaded.config.span, 'size': args.size or loaded.config.size,
        'short_side': loaded.config.short_side,
        'clips': args.clips, 'crops': args.crops, 'average': args.average, 'amp': args.amp,
    }


def _default_folder(loaded: Loaded, videos: VideoList, args: argparse.Namespace) -> Path:
    path = Path(loaded.path)
    name = '-'.join([
        'evaluation', *([] if videos.file is None else [Path(videos.file).stem]), f'{args.clips}x{args.crops}',
        *(['logits'] if args.average == 'logits' else [])])
    return (path if path.is_dir() else path.parent) / name


def _parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m examples.action_recognition.evaluate', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='folder of a run, whose best.pt is taken, or a .pt file')
    parser.add_argument('--list', help="videos; else the run's validation list")
    parser.add_argument('--layout', choices=(*LAYOUTS, 'shards'), help="how --list is written; else as the run's lists")
    parser.add_argument('--root', help='folder that the paths of --list are relative to')
    parser.add_argument('--frames', type=int, help='frames of a clip; an error if the run has others')
    parser.add_argument('--clips', type=_positive, default=1, help='clips over each video (1)')
    parser.add_argument('--crops', type=int, default=1, choices=(1, 3), help='crops of each clip (1)')
    parser.add_argument('--size', type=_positive, help='height and width of the crops; else as in training')
    parser.add_argument('--average', default='scores', choices=('scores', 'logits'),
                        help='of the views: of their probabilities, as the paper says, or of their logits (scores)')
    parser.add_argument('--no-ema', action='store_true', help='take the weights themselves, not their moving average')
    parser.add_argument('--batch-size', type=_positive, help='videos of a batch; else as many as have 32 views')
    parser.add_argument('--clips-per-pass', type=_positive, default=16, help='most views in the network at once (16)')
    parser.add_argument('--workers', type=int, default=2, help='processes that decode (2)')
    parser.add_argument('--amp', default='none', choices=tuple(AMP), help='mixed precision (none)')
    parser.add_argument('--device', help='such as cuda:1 or cpu; else a GPU if there is one')
    parser.add_argument('--out', type=Path, help='folder for what is written; else one in the folder of the run')
    parser.add_argument('--predictions', default='.npz', choices=('.npz', '.parquet'), help='file of the scores (.npz)')
    parser.add_argument('--force', action='store_true', help='replace what an earlier evaluation wrote there')
    args = parser.parse_args(arguments)
    if args.list is None and (args.layout or args.root):
        parser.error('--layout and --root are of --list, which is not given')
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text!r}')
    return value


if __name__ == '__main__':
    sys.exit(main())
