"""What a run is: one dataclass, filled by a preset, then a YAML file, then flags."""
import argparse
import dataclasses
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union, get_args, get_origin, get_type_hints

import yaml

from cmr_layers.video.lists import LAYOUTS

__all__ = ['Config', 'add_flags', 'from_flags', 'read_config', 'write_config']

PRESETS = Path(__file__).parent / 'presets'


def _option(default: Any, text: str, choices: Optional[Sequence[str]] = None) -> Any:
    metadata = {'help': text, 'choices': choices}
    if isinstance(default, (dict, tuple)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """The options of a run. Each is a flag of ``train.py`` and a key of its YAML file.

    Raises:
        ValueError: A value is out of its range; the message names the option.

    Example:
        >>> Config(model='cmr_resnet18', epochs=5).num_frames
        8
    """
    # data
    layout: str = _option('list', "how the lists of videos are written; 'shards': each is a folder of shards", (
        *LAYOUTS, 'shards'))
    train_list: Optional[str] = _option(
        None, 'list of the training videos; for folders the folder of the classes, for shards their folder')
    val_list: Optional[str] = _option(None, 'list of the validation videos, likewise; none: no validation')
    root: Optional[str] = _option(None, 'folder that the paths of the lists are relative to')
    val_root: Optional[str] = _option(None, 'that of the validation list, if it is another one')
    classes: Optional[str] = _option(None, 'file of the names of the classes; none: from the training list')
    num_frames: int = _option(8, 'frames T of a clip')
    span: Optional[int] = _option(None, 'consecutive frames that a clip is taken from; none: the whole video')
    size: int = _option(224, 'height and width of a clip')
    short_side: int = _option(256, 'short side of the frames before a clip is cut out')
    scales: Tuple[float, ...] = _option((1., .875, .75, .66), 'sides of the random crops, as parts of short_side')
    flip: str = _option('none', "mirror half of the training clips: 'labels' also exchanges classes that differ by "
                        "left and right; 'same' is for classes without a side", ('none', 'same', 'labels'))
    workers: int = _option(4, 'processes that read videos, for each process that trains')
    # network
    model: str = _option('cmr_resnet50', 'any model of timm; the cmr_resnet family has the temporal layers already')
    model_args: Dict[str, Any] = _option({}, 'more arguments of timm.create_model, as key=value')  # noqa: RUF009
    temporal: str = _option('family', "'family': the model has temporal layers of its own; 'adapt', 'retrofit' or "
                            "'insert' put them into an image network; 'none': an image network of every frame", (
                                'family', 'adapt', 'retrofit', 'insert', 'none'))
    insert_at: Tuple[str, ...] = _option((), "modules that take a layer each, as 'CME,TIM@blocks.*.0'")
    temporal_args: Dict[str, Any] = _option(  # noqa: RUF009
        {}, 'more arguments of adapt or retrofit, as start=paper, or of the layers that are inserted, as reduction=4')
    pretrained: bool = _option(True, "begin with timm's weights of the image network")
    checkpoint: Optional[str] = _option(None, 'begin with the weights of this file, of a video or an image network')
    freeze: str = _option('none', "'backbone': only the temporal layers and the classifier learn", ('none', 'backbone'))
    dropout: float = _option(.5, 'dropout before the classifier')
    # optimisation
    epochs: int = _option(50, 'passes over the training videos')
    batch_size: int = _option(8, 'clips of a step, for each process')
    accumulate: int = _option(1, 'steps whose gradients are added up before an update')
    optimizer: str = _option('sgd', 'optimizer', ('sgd', 'adamw'))
    lr: float = _option(.01, 'learning rate of base_batch clips an update; scaled linearly with the real number')
    temporal_lr: float = _option(1., 'learning rate of the temporal layers, as a multiple of that of the rest')
    base_batch: int = _option(64, 'clips an update that lr is for; 0: lr is taken as it is')
    momentum: float = _option(.9, 'momentum of sgd')
    nesterov: bool = _option(False, 'Nesterov momentum')
    weight_decay: float = _option(1e-3, 'weight decay')
    decay_all: bool = _option(True, 'decay norms and biases, too: one group of parameters')
    schedule: str = _option('step', 'learning rate: tenths at milestones, or cosine to 0', ('step', 'cosine'))
    milestones: Tuple[int, ...] = _option((30, 40, 45), 'epochs that begin with a tenth of the learning rate')
    warmup_epochs: float = _option(0., 'epochs in which the learning rate rises from 0')
    clip_grad: Optional[float] = _option(20., 'largest norm of all gradients; none: no limit')
    label_smoothing: float = _option(0., 'share of the target that all classes have in common')
    partial_bn: bool = _option(False, 'freeze the statistics of all batch norms but the first')
    sync_bn: bool = _option(False, 'batch norms see the batches of all processes')
    ema: Optional[float] = _option(None, 'decay of a moving average of the weights, which is then what is evaluated')
    # how it is computed
    device: Optional[str] = _option(None, 'cpu, cuda, ...; none: cuda if there is one')
    amp: str = _option('none', 'mixed precision', ('none', 'bfloat16', 'float16'))
    channels_last: bool = _option(True, 'memory format of the network')
    compile: bool = _option(False, 'torch.compile')
    grad_checkpointing: bool = _option(False, 'compute activations again in the backward pass, to save memory')
    seed: int = _option(0, 'seed of all random numbers')
    # what is written
    output: str = _option('runs/run', 'folder of the run')
    save_every: int = _option(0, 'updates between two saves within an epoch; 0: at the end of an epoch only')
    log_every: int = _option(20, 'updates between two lines of progress')
    val_every: int = _option(1, 'epochs between two validations')
    tensorboard: bool = _option(False, 'write TensorBoard events, too')

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = _typed(option.name, getattr(self, option.name), hints[option.name])
            choices = option.metadata['choices']
            if choices is not None and value not in choices:
                raise ValueError(f'{option.name} must be one of {", ".join(map(repr, choices))}, got {value!r}')
            setattr(self, option.name, value)
        for name in (
                'num_frames', 'size', 'short_side', 'epochs', 'batch_size', 'accumulate', 'log_every', 'val_every'):
            _at_least(self, name, 1)
        for name in (
                'workers', 'lr', 'temporal_lr', 'base_batch', 'momentum', 'weight_decay', 'warmup_epochs', 'seed',
                'save_every'):
            _at_least(self, name, 0)
        for name in ('dropout', 'label_smoothing', 'ema'):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f'{name} must be in [0, 1), got {value!r}')
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f'clip_grad must be > 0 or none, got {self.clip_grad!r}')
        if self.nesterov and self.optimizer == 'sgd' and not self.momentum:
            raise ValueError(f'nesterov wants momentum > 0, got {self.momentum!r}')
        if self.size > self.short_side:
            raise ValueError(f'size must be at most short_side={self.short_side}, got {self.size}')
        if (self.temporal == 'insert') != bool(self.insert_at):
            raise ValueError(f"insert_at is for temporal='insert', and wanted there; got {self.insert_at!r} with "
                             f'temporal={self.temporal!r}')
        if self.temporal_args and self.temporal not in ('adapt', 'retrofit', 'insert'):
            raise ValueError(f"temporal_args is for temporal='adapt', 'retrofit' or 'insert', got "
                             f"{self.temporal_args!r} with temporal={self.temporal!r}; a cmr_* model takes its own in "
                             f"model_args")

    def to_dict(self) -> Dict[str, Any]:
        """What YAML and a checkpoint can hold."""
        return {key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> 'Config':
        """From :meth:`to_dict`. ``source`` names the values in errors."""
        return cls(**_known(values, source))


#: Options that may differ when a run goes on: they change no number that is trained.
FREE = ('workers', 'save_every', 'log_every', 'tensorboard', 'device', 'output')


def _known(values: Any, source: str) -> Dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f'{source} must hold options as "name: value", got {type(values).__name__}')
    names = [option.name for option in fields(Config)]
    for key in values:
        if key not in names:
            close = get_close_matches(str(key), names, 1)
            raise ValueError(f'{source} has the option {key!r}, which does not exist'
                             + (f'; did you mean {close[0]}?' if close else f'; wanted some of {", ".join(names)}'))
    return dict(values)


def _at_least(config: Config, name: str, least: int) -> None:
    if not getattr(config, name) >= least:
        raise ValueError(f'{name} must be at least {least}, got {getattr(config, name)!r}')


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the type of the option, or a ValueError that says what it should be."""
    if get_origin(hint) is Union:
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(name, item, get_args(hint)[0]) for item in value)
    plain = get_origin(hint) or hint
    if plain is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f'{name} must be {getattr(plain, "__name__", plain)}, got {value!r}')
    return value


def read_config(file: Union[str, Path]) -> Dict[str, Any]:
    """The options of a YAML file, checked for their names only."""
    try:
        values = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'{file} is no YAML: {error}') from error
    return _known({} if values is None else values, str(file))


def write_config(config: Config, file: Union[str, Path]) -> None:
    """Write all options as YAML."""
    Path(file).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def presets() -> List[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob('*.yaml'))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--preset``, ``--config`` and a flag for each option."""
    parser.add_argument('--preset', choices=presets(), help='options to begin with')
    parser.add_argument('--config', help='YAML file of options, which overrule the preset')
    hints = get_type_hints(Config)
    for option in fields(Config):
        flag, hint = '--' + option.name.replace('_', '-'), hints[option.name]
        text = f'{option.metadata["help"]} (default: {_shown(option)})'.replace('%', '%%')
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(hint) in (tuple, dict):
            parser.add_argument(flag, nargs='*', default=argparse.SUPPRESS, help=text, metavar='VALUE')
        else:
            parser.add_argument(
                flag, default=argparse.SUPPRESS, help=text, choices=option.metadata['choices'], metavar='VALUE')


def from_flags(args: argparse.Namespace) -> Config:
    """The configuration of parsed flags: the preset, overruled by the file, overruled by the flags."""
    values: Dict[str, Any] = {}
    if args.preset is not None:
        values.update(read_config(PRESETS / f'{args.preset}.yaml'))
    if args.config is not None:
        values.update(read_config(args.config))
    hints = get_type_hints(Config)
    for option in fields(Config):
        if hasattr(args, option.name):
            values[option.name] = _parsed(option.name, getattr(args, option.name), hints[option.name])
    return Config(**values)


def _parsed(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, bool):
        return value
    if get_origin(hint) is dict:
        pairs = [item.partition('=') for item in value]
        for key, equals, _ in pairs:
            if not key or not equals:
                raise ValueError(f'{name} must be given as key=value, got {key!r}')
        return {key: _value(item) for key, _, item in pairs}
    if get_origin(hint) is tuple:
        return tuple(_scalar(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is Union:
        return None if value.lower() == 'none' else _scalar(value, get_args(hint)[0])
    return _scalar(value, hint)


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value  # YAML reads 1e-3 as text
    except ValueError:
        return value


def _scalar(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        return text  # the dataclass refuses it, with the name of the option


def _shown(option: Any) -> Any:
    value = option.default if option.default is not dataclasses.MISSING else option.default_factory()
    return 'none' if value in (None, {}, ()) else value
