"""Begin with the weights of a file: a run's, or an image network's."""
from typing import Any, Dict, Tuple

import torch
from timm.models import load_state_dict
from torch import nn

from cmr_layers import ClipModel, temporal_keys

from .checkpoint import misfit
from .config import Config

__all__ = ['start_from']


def start_from(model: nn.Module, file: str, config: Config) -> str:
    """Load the weights of a file into a network that will be trained, and say what was loaded.

    The file may lack the temporal layers, all of them, if it is an image network's: they keep their start. A classifier
    of other classes is left out. Any other difference is an error. Averaged weights are preferred.

    Raises:
        ValueError: The file is of another network, or of a run with another ``num_frames``.
    """
    try:
        _check_frames(file, config)
        state: Dict[str, Any] = load_state_dict(file, weights_only=True)
    except (FileNotFoundError, _OtherFrames):
        raise
    except Exception as error:  # pickle, zip, safetensors and torch have a dozen kinds
        raise ValueError(f'checkpoint={file!r} can not be read safely: {error}') from error
    own, temporal = model.state_dict(), temporal_keys(model)
    if isinstance(model, ClipModel) and not any(key in own for key in state):
        state = {f'model.{key}': value for key, value in state.items()}
    head = [key for key in _classifier(model) if key in state and state[key].shape != own[key].shape]
    for key in head:
        del state[key]
    image = bool(temporal) and own.keys() - state.keys() - set(head) == temporal
    if wrong := misfit(own, state, {*head, *(temporal if image else ())}):
        raise ValueError(f'checkpoint={file!r} is of another network than model={config.model!r}: {wrong}')
    model.load_state_dict({**own, **state})
    return f'{file}: weights of {"an image" if image else "this"} network' + (
        f'; {len(temporal)} tensors of the temporal layers keep their start' if image else '') + (
        '; the classifier, of other classes there, starts anew' if head else '')


class _OtherFrames(ValueError):
    """The file is of a run with another number of frames."""


def _classifier(model: nn.Module) -> Tuple[str, ...]:
    classifier = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    return tuple(name for name, p in model.named_parameters() if id(p) in classifier)


def _check_frames(file: str, config: Config) -> None:
    if file.endswith('.safetensors'):
        return
    content = torch.load(file, map_location='cpu', weights_only=True)
    trained = content.get('config', {}) if isinstance(content, dict) else {}
    # an image network has seen frames, not clips: their number is not a part of it
    frames = None if trained.get('temporal') == 'none' else trained.get('num_frames')
    if frames is not None and frames != config.num_frames:
        raise _OtherFrames(
            f'checkpoint={file!r} was trained with num_frames={frames}, got num_frames={config.num_frames}')
