"""Save and load what :func:`retrofit`, :func:`insert` and :class:`ClipModel` made of an image network.

A folder of two files: ``model.safetensors`` has the weights, ``config.json`` says what network they belong to and which
layers stand where in it. timm's own ``save_for_hf`` writes the image network's name only, and its loader may drop the
temporal layers without a word; so it is given a name that it refuses.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import nn

from .attach import (
    all_or_nothing,
    attach,
    check_network,
    finish,
    image_network,
    is_adopted,
    no_image_network,
    put_in_block,
)
from .clip import ClipLayer, ClipModule
from .clip_model import ClipModel
from .cme import CME
from .drop import ClipDrop
from .hosts import Guard, check_layers
from .probe import like
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = ['load_model', 'save_model']

Config = Dict[str, Any]
_KINDS = {'CME': CME, 'SME': SME, 'TIM': TIM}
_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'


def save_model(model: nn.Module, folder: Union[str, 'os.PathLike[str]']) -> None:
    """Save a network with its temporal layers, for :func:`load_model`.

    Args:
        model: What :func:`retrofit` or :func:`insert` changed, a :class:`ClipModel` around it or around any image
            network, or a network of the ``cmr_resnet`` family. Of a training loop's wrappers (DDP, ``torch.compile``)
            pass what is in them.
        folder: Where ``config.json`` and ``model.safetensors`` go. It is made if it is not there; these two files are
            overwritten.

    Raises:
        ValueError: The network is not what timm and these layers build: a layer of another class than CME, SME and TIM,
            folded batch norms, adapters, parts that were replaced.
        RuntimeError: A layer is not at its place any more (see :func:`insert`).
        TypeError: model is no module or a compiled one.

    Example:
        >>> import tempfile, timm, torch
        >>> from cmr_layers import ClipModel, retrofit
        >>> resnet = timm.create_model('resnet18', num_classes=5).eval()
        >>> _ = retrofit(resnet, num_frames=4)
        >>> model, clip = ClipModel(resnet, num_frames=4), torch.randn(1, 4, 3, 64, 64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, folder)
        ...     same = load_model(folder)
        >>> torch.equal(same(clip), model(clip))
        True
    """
    check_network(model)
    check_layers(model)
    network = model.model if isinstance(model, ClipModel) else model
    config = _describe(network)
    config['clip_model'] = model.num_frames if isinstance(model, ClipModel) else None
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    if config['timm'] is not None:
        with torch.device('meta'):
            built = _build(config).state_dict()
        _check_keys(type(network).__name__, built, weights)

    os.makedirs(folder, exist_ok=True)
    path = Path(folder)
    save_file(weights, path / f'{_WEIGHTS}.part', metadata={'format': 'pt'})
    config['sha256'] = _digest(path / f'{_WEIGHTS}.part')
    (path / f'{_CONFIG}.part').write_text(json.dumps(config, indent=2))
    for name in (_WEIGHTS, _CONFIG):  # an interrupted call leaves the old files, or two that load_model() refuses
        os.replace(path / f'{name}.part', path / name)


def load_model(folder: Union[str, 'os.PathLike[str]'], model: Optional[nn.Module] = None) -> nn.Module:
    """Load what :func:`save_model` saved, bit for bit.

    Args:
        folder: The folder.
        model: The image network without temporal layers, built as the saved one was; it is changed in place. Needed
            only for a network that timm did not build. Its own weights do not matter.

    Returns:
        The network in eval mode, on the CPU, in the saved dtype; a :class:`ClipModel` if that was saved.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: They do not fit each other, or the network does not fit them, in its class, its keys or its shapes;
            the network is needed and not given.
        TypeError: model is no module.
    """
    path = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f'folder={os.fspath(folder)!r} has no {name}; wanted one that save_model() wrote')
    try:
        config = json.loads((path / _CONFIG).read_text())
        digest = config['sha256']
        assert {'network', 'timm', 'blocks', 'hosts', 'num_frames', 'clip_model'} <= config.keys()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f'folder={os.fspath(folder)!r} has a {_CONFIG} that save_model() did not write') from error
    if _digest(path / _WEIGHTS) != digest:
        raise ValueError(f'folder={os.fspath(folder)!r}: {_WEIGHTS} is not the file that {_CONFIG} was written for')
    weights = load_file(path / _WEIGHTS)

    if model is not None:
        check_network(model)
        if type(model).__name__ != config['network']:
            raise ValueError(f'model must be a {config["network"]}, as was saved, got a {type(model).__name__}')
        if any(isinstance(module, ClipModule) for module in model.modules()) and (config['blocks'] or config['hosts']):
            raise ValueError(f'model ({type(model).__name__}) has temporal layers already; wanted one without')
        network = model
        with all_or_nothing(network):
            _put_in(network, config)
            _check_keys(type(network).__name__, network.state_dict(), weights)
    elif config['timm'] is None:
        raise ValueError(
            f'model must be the {config["network"]} without its temporal layers: timm did not build it, so '
            f'load_model() cannot; got None')
    else:
        network = _build(config)
        _check_keys(type(network).__name__, network.state_dict(), weights)
    network.load_state_dict(weights, strict=True, assign=True)
    if config['clip_model'] is not None:
        network = ClipModel(network, config['clip_model'])
    return network.eval()


def _describe(network: nn.Module) -> Config:
    """What is needed to build the network again."""
    names = {module: name for name, module in network.named_modules()}
    blocks = [
        {'name': names[module], 'entry': 'conv1', 'layers': {
            part: _layer_config(f'{names[module]}.{part}', layer) for part in ('cme', 'tim', 'sme')
            if isinstance(layer := getattr(module, part), ClipLayer)}}
        for module in network.modules() if is_adopted(module) and not isinstance(module, ClipDrop)]
    hosts = [
        {'root': names[module], 'at': place.at, 'where': where, 'name': name, 'layer': _layer_config(name, layer)}
        for module in network.modules() if (guard := Guard.of(module)) is not None for place in guard.places
        for where, guests in (('before', zip(place.before_names, place.before)),
                              ('after', zip(place.after_names, place.after)))
        for name, layer in guests]
    frames = {module.num_frames for module in network.modules() if isinstance(module, ClipModule)}
    if len(frames) > 1:
        raise ValueError(f'model ({type(network).__name__}) has layers of different num_frames: {sorted(frames)}')
    return {
        'architecture': no_image_network({'architecture': type(network).__name__})['architecture'],  # for timm's loader
        'cmr_layers': __version__, 'network': type(network).__name__, 'timm': _timm_config(network),
        'blocks': blocks, 'hosts': hosts, 'num_frames': frames.pop() if frames else None}


def _timm_config(network: nn.Module) -> Optional[Config]:
    """timm's name of a network that it can build again, and its arguments."""
    cfg = image_network(vars(network).get('pretrained_cfg'))
    args: Any = getattr(network, '_model_args', None)
    if args is None or not isinstance(cfg, dict) or not timm.is_model(cfg.get('architecture', '')):
        return None
    args = {**args, **get_model_args(network)}
    try:
        config: Config = json.loads(json.dumps({'name': cfg['architecture'], 'args': args, 'pretrained_cfg': {
            key: value for key, value in cfg.items() if key != 'state_dict'}}))
    except TypeError:
        return None  # an argument that is a class, say; the caller of load_model() has to build the network
    return config


def _layer_config(name: str, layer: Any) -> Config:
    if type(layer) not in _KINDS.values():
        raise ValueError(f'{name} must be a CME, SME or TIM to be saved, got a {type(layer).__name__}')
    kind: Config = {'kind': type(layer).__name__, 'channels': layer.channels}
    if isinstance(layer, CME):
        return {**kind, 'reduction': list(layer.reduction), 'gate_init': layer.gate_init}
    if isinstance(layer, TIM):
        return {**kind, 'kernel_size': layer.kernel_size, 'init': layer.init, 'shift_div': layer.shift_div,
                'gain': layer.gain}
    if type(layer.bn) is not nn.BatchNorm2d:
        raise ValueError(f'{name} must have an nn.BatchNorm2d to be saved, got {layer.bn}; save it before it is folded')
    return {**kind, 'bias': layer.conv.bias is not None}


def _build(config: Config) -> nn.Module:
    made = config['timm']
    if not timm.is_model(made['name']):
        raise ValueError(f'timm knows no {made["name"]!r}; import the module that registers it first')
    args: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in made['args'].items()}
    network = timm.create_model(made['name'], pretrained=False, **args)
    network.pretrained_cfg = network.default_cfg = made['pretrained_cfg']
    _put_in(network, config)
    return network


def _put_in(network: nn.Module, config: Config) -> None:
    """Make the layers anew and put them where they were."""

    def make(settings: Config, near: nn.Module) -> ClipLayer:
        settings = dict(settings)
        kind = _KINDS[settings.pop('kind')]
        layer: ClipLayer = kind(num_frames=config['num_frames'], **settings, **like(near, network))
        return layer

    for block in config['blocks']:
        module = _submodule(network, block['name'])
        put_in_block(network, block['name'], block['entry'], {
            part: make(settings, module) for part, settings in block['layers'].items()})
    for row in config['hosts']:
        root, owner = _submodule(network, row['root']), row['name'].rpartition('.')[0]
        layer = make(row['layer'], _submodule(root, row['at']))
        _submodule(root, owner)
        made = attach(root, layer, row['at'], row['where'], owner)
        if made.name != row['name']:
            raise ValueError(f'model ({type(network).__name__}) must have no {row["name"]!r} yet, as the saved one')
    if config['blocks'] or config['hosts']:
        finish(network, config['num_frames'])


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f'model ({type(network).__name__}) must have {name!r}, where the saved one has layers') from error


def _check_keys(kind: str, network: Dict[str, Any], weights: Dict[str, Any]) -> None:
    wrong: List[str] = [f'{key} is missing' for key in network if key not in weights]
    wrong += [f'{key} is unexpected' for key in weights if key not in network]
    wrong += [
        f'{key} is {list(weights[key].shape)} for {list(value.shape)}' for key, value in network.items()
        if key in weights and weights[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f'the weights do not fit the {kind} that they were saved for: {"; ".join(wrong[:8])}'
            f'{f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""}')


def _digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else \
            hashlib.sha256(file.read()).hexdigest()
