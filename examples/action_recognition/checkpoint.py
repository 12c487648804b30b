"""The files of a run: written as a whole or not at all, and read without running anything in them."""
import os
from pathlib import Path
from typing import Any, Collection, Dict, Mapping, NamedTuple, Tuple, Union

import torch
from torch import nn

from .config import Config
from .model import build_model

__all__ = ['BEST', 'LAST', 'Loaded', 'load', 'load_network', 'load_weights', 'misfit', 'save']

LAST, BEST = 'last.pt', 'best.pt'
_KEYS = ('state_dict', 'config', 'classes')
_Path = Union[str, 'os.PathLike[str]']


class Loaded(NamedTuple):
    """A network that was trained.

    Attributes:
        model: The network, from (B, T, 3, H, W) to (B, K), in eval mode on the CPU.
        classes: Names of its classes, by index.
        config: The configuration that it was trained with.
        path: The file.
    """
    model: nn.Module
    classes: Tuple[str, ...]
    config: Config
    path: str


def save(path: _Path, content: Mapping[str, Any]) -> None:
    """Write a file that is whole at any moment: the old one until the new one is on the disk.

    Raises:
        OSError: It can't be written, for example as the disk is full. The old file is as it was.
    """
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    try:
        with open(part, 'wb') as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if 'DataLoader worker' in str(error):  # PyTorch raises this in whatever runs when a worker is killed
            raise
        left = '; the file of before is whole' if path.exists() else ''
        raise OSError(f'{path} cannot be written: {error}{left}') from error


def load(path: _Path) -> Dict[str, Any]:
    """Read a file that :func:`save` wrote in a run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no checkpoint of a run.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{os.fspath(path)!r} does not exist; wanted a run folder or a checkpoint of train.py')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # pickle, zip and torch have a dozen kinds
        raise ValueError(f'{os.fspath(path)!r} is no checkpoint that can be read safely: {error}') from error
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f'{os.fspath(path)!r} is no checkpoint of train.py: it lacks {", ".join(missing)}')
    return dict(content)


def load_network(path: _Path, use_ema: bool = True) -> Loaded:
    """Build the network of a run and load its weights.

    Args:
        path: Folder of a run, whose best checkpoint is taken, or the last one if there is no best; or a checkpoint.
        use_ema: Whether to take the averaged weights, if there are any.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a run, or its weights do not fit its configuration.
    """
    file = Path(path)
    if file.is_dir():
        file = file / BEST if (file / BEST).exists() else file / LAST
    content = load(file)
    config = Config.from_dict(content['config'], str(file))
    classes = tuple(content['classes'])
    model = build_model(config, len(classes))
    state = content['state_dict_ema' if use_ema and 'state_dict_ema' in content else 'state_dict']
    load_weights(model, state, str(file))
    return Loaded(model.eval(), classes, config, str(file))


def load_weights(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load weights that have to fit in every key and shape."""
    if wrong := misfit(model.state_dict(), state):
        raise ValueError(f'{source} is of another network: {wrong}')
    model.load_state_dict(state)


def misfit(own: Mapping[str, Any], state: Mapping[str, Any], may_lack: Collection[str] = ()) -> str:
    """Where a state dict does not fit a network's own, in words; empty if it does."""
    wrong = [f'{key} is missing' for key in own if key not in state and key not in may_lack]
    wrong += [f'{key} is unexpected' for key in state if key not in own]
    wrong += [f'{key} is {list(state[key].shape)} for {list(own[key].shape)}'
              for key in own if key in state and own[key].shape != state[key].shape]
    return '; '.join(wrong[:3]) + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
