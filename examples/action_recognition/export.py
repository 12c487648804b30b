"""Turn a trained network into a file that runs without this package, or into a folder with a model card.

    python -m examples.action_recognition.export runs/mine --format onnx --out mine.onnx

The graph takes what a decoder gives: uint8 clips (batch, T, 3, H, W), RGB, resized and cropped. It normalizes them
itself, takes batches of any size, and returns float32 logits (batch, classes). Before a file is put in its place, it is
run with two batch sizes and compared with the network.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

from torch import Tensor

from cmr_layers.video.lists import VideoList

from .checkpoint import Loaded, load_network
from .data import build_lists, read_any
from .graphs import FORMATS, ExportError, Spec
from .labelled_clips import labelled_clips, readable, spread
from .metrics import mean_std
from .model_card import FILES, write_folder
from .quantize import measure
from .staging import staged
from .write_graph import TOLERANCE, network, write_graph

__all__ = ['main']


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command; see the text of this file, and ``--help``."""
    args = _parse(arguments)
    try:
        _export(args)
    except (ExportError, ImportError, OSError, ValueError) as error:
        print(f'export: {error}', file=sys.stderr)
        return 1
    return 0


def _export(args: argparse.Namespace) -> None:
    if args.format == 'folder':
        targets = [args.out / name for name in FILES]
    else:
        targets = [args.out.with_suffix(suffix) for suffix in FORMATS[args.format].suffixes]
    with staged(targets, args.force) as folder:  # first, as it finds out whether one may write there
        loaded = load_network(args.checkpoint, use_ema=not args.no_ema)
        spec = _spec(loaded)
        if args.frames not in (None, spec.num_frames):
            raise ValueError(
                f'--frames {args.frames}: {loaded.path} was trained with clips of {spec.num_frames} frames, and the '
                f'file takes those')
        model = loaded.model.cpu().eval()
        if args.format == 'folder':
            write_folder(model, spec, folder, args.out.resolve().name, _evaluations(loaded, not args.no_ema))
        else:
            _write(args, loaded, spec, folder / args.out.name)
    size = sum(target.stat().st_size for target in targets) / 2 ** 20
    print(f'{args.out}: {args.format}, {args.precision}, {size:.1f} MiB')


def _spec(loaded: Loaded) -> Spec:
    config = loaded.config
    mean, std = mean_std(loaded.model)
    return Spec(loaded.classes, config.num_frames, config.short_side, config.size, tuple(mean), tuple(std))


def _write(args: argparse.Namespace, loaded: Loaded, spec: Spec, file: Path) -> None:
    """Write a graph, and say how far it is from the network."""
    calibration: Iterable[Tensor] = ()
    videos = None
    if args.int8:
        calibration = readable(labelled_clips(spread(_videos(args, loaded, args.list), args.clips), loaded.config))
    if args.int8 or args.evaluation_list:
        videos = _videos(args, loaded, args.evaluation_list)  # a list that is missing is missed before the work
    found = write_graph(loaded.model, spec, args.format, file, args.precision, calibration)
    print('largest difference from the network, for the largest logit: '
          + ', '.join(f'{value:.2g} (batch of {batch})' for batch, value in found.items())
          + f'; allowed are {TOLERANCE[args.precision]:g}')
    if videos is not None:
        run = FORMATS[args.format].open(file)
        loss = measure(network(loaded.model, spec), run, labelled_clips(videos, loaded.config))
        print(f'{videos.file}: {loss}')


def _videos(args: argparse.Namespace, loaded: Loaded, file: Optional[str]) -> VideoList:
    """A list, or that of the run's validation."""
    if file is None:
        videos = build_lists(loaded.config, loaded.classes)[1]
        if videos is None:
            raise ValueError(f'--evaluation-list: {loaded.path} has no validation list; wanted a list of videos')
        return videos
    return read_any(args.layout or loaded.config.layout, file, args.root, loaded.classes)


def _evaluations(loaded: Loaded, ema: bool) -> List[Dict[str, Any]]:
    """What ``evaluate`` found out about this very checkpoint, and left beside it."""
    checkpoint = Path(loaded.path).resolve()
    found = []
    for path in sorted(checkpoint.parent.glob('evaluation*/results.json')):
        results = json.loads(path.read_text(encoding='utf-8'))
        newer = path.stat().st_mtime >= checkpoint.stat().st_mtime
        if newer and Path(results['checkpoint']).resolve() == checkpoint and results['ema'] == ema:
            found.append(results)
    return found


def _parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m examples.action_recognition.export', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('checkpoint', help='folder of a run, whose best.pt is taken, or a .pt file')
    add('--format', required=True, choices=(*FORMATS, 'folder'),
        help='pt2 is torch.export; folder is safetensors with a model card, for load_model()')
    add('--out', required=True, type=Path, help='the file, or the folder')
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument('--fp16', action='store_true', help='half precision')
    precision.add_argument('--int8', action='store_true', help='eight bits, calibrated on --list (onnx, openvino)')
    add('--list', help='calibration videos')
    add('--clips', type=int, default=128, help='most calibration videos, taken evenly from the list (%(default)s)')
    add('--evaluation-list', help="videos that the loss of accuracy is measured on; else the run's validation list")
    add('--layout', help="of the lists: list, folders, sthv1, sthv2, kinetics or shards; else the run's")
    add('--root', help='folder that the paths of the lists are relative to')
    add('--frames', type=int, help='frames of a clip; an error if the run has others')
    add('--no-ema', action='store_true', help='take the weights themselves, not their moving average')
    add('--force', action='store_true', help='replace what is there')
    args = parser.parse_args(arguments)
    args.precision = 'fp16' if args.fp16 else 'int8' if args.int8 else 'fp32'
    if args.format == 'folder' and args.precision != 'fp32':
        parser.error(f'--{args.precision}: a folder holds the network as it was trained')
    if args.format == 'pt2' and args.int8:
        parser.error('--int8 needs --format onnx or openvino, got pt2')
    if args.int8 != (args.list is not None):
        parser.error('--int8 and --list, the calibration videos, need each other')
    if args.clips < 1:
        parser.error(f'--clips must be at least 1, got {args.clips}')
    suffix = '' if args.format == 'folder' else FORMATS[args.format].suffixes[0]
    if suffix and args.out.suffix != suffix:
        parser.error(f'--out must end in {suffix} for --format {args.format}, got {str(args.out)!r}')
    return args


if __name__ == '__main__':
    sys.exit(main())
