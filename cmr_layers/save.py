"""Save and load a network that :func:`retrofit`, :func:`insert` or :class:`ClipModel` made of an image network.

A saved network is a folder of two files. ``model.safetensors`` has the weights. ``config.json`` names the network, its
layers and their places. timm's own ``save_for_hf`` would write the name of the image network only, and its loader could
drop the temporal layers without a word. A changed network therefore has a name that timm's loader refuses.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .attach import all_or_nothing, check_network, is_adopted
from .clip_model import ClipModel
from .hosts import Host, check_layers
from .recipe import Config, build, check_modules, describe, few, modules, put_in

__all__ = ['load_model', 'save_model']

_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'
_KEYS = {
    'architecture', 'network', 'timm', 'modules', 'layers', 'blocks', 'hosts', 'num_frames', 'clip_model', 'sha256'}
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def save_model(model: nn.Module, folder: Union[str, 'os.PathLike[str]']) -> None:
    """Save a network with its temporal layers, for :func:`load_model`.

    It saves what the network computes, in any mode and on any device. It does not save the state of training: frozen
    parameters, gradient checkpointing, the optimizer.

    Args:
        model: A network that :func:`retrofit` or :func:`insert` changed, a :class:`ClipModel` around it or around any
            image network, or a network of the ``cmr_resnet`` family. If it is wrapped for training (DDP,
            ``torch.compile``), pass the network inside.
        folder: Folder for ``config.json`` and ``model.safetensors``. It is created if needed. The two files are
            overwritten.

    Raises:
        ValueError: timm and these layers can't build the network: it has a layer of another class than CME, SME and
            TIM, folded batch norms, adapters, or parts that were replaced.
        RuntimeError: A layer is not at its place any more (see :func:`insert`).
        TypeError: model is no module, or a compiled or otherwise wrapped one.

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
    if isinstance(model, _PARALLEL):
        raise TypeError(f'model must be the network itself, got a {type(model).__name__} of it; pass model.module')
    check_layers(model)
    network, config = describe(model)
    weights = _weights(network)
    if config['timm'] is not None:
        try:
            with torch.device('meta'):
                built = build(config)
        except RuntimeError:  # some networks compute numbers while they are built
            built = build(config)
        check_modules(config, modules(built), 'timm', 'save it before, or keep its state dict yourself')
        _check_keys(config['network'], built, weights)

    os.makedirs(folder, exist_ok=True)
    path = Path(folder)
    save_file(weights, path / f'{_WEIGHTS}.part', metadata={'format': 'pt'})
    config['sha256'] = _digest(path / f'{_WEIGHTS}.part', config)
    (path / f'{_CONFIG}.part').write_text(json.dumps(config, indent=1))
    for name in (_WEIGHTS, _CONFIG):  # an interrupted call leaves the old files, or a pair that load_model() refuses
        os.replace(path / f'{name}.part', path / name)


def load_model(folder: Union[str, 'os.PathLike[str]'], model: Optional[nn.Module] = None) -> nn.Module:
    """Load a network that :func:`save_model` saved, bit for bit.

    Nothing in the folder is run, and no other file is read.

    Args:
        folder: The folder.
        model: The image network without temporal layers, built like the saved one. It is changed in place, and its own
            weights do not matter. It is needed only if timm did not build the network, or built it with arguments that
            JSON can't hold, such as classes.

    Returns:
        The network in eval mode, on the CPU, in the saved dtype; a :class:`ClipModel` if one was saved.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The files do not fit each other, or the network does not fit them in its class, modules, keys or
            shapes, or model is needed and not given. A given model stays as it was.
        TypeError: model is no module or a compiled one.
    """
    path = Path(folder)
    config, weights = _read(path)
    if model is not None:
        check_network(model)
        if type(model).__name__ != config['network']:
            raise ValueError(f'model must be a {config["network"]}, as was saved, got a {type(model).__name__}')
        if any(is_adopted(module) or isinstance(module, Host) for module in model.modules()):
            raise ValueError(f'model ({type(model).__name__}) has temporal layers already; wanted one without')
        network = model
    elif config['timm'] is None:
        raise ValueError(
            f'model must be a {config["network"]} without temporal layers, built as the saved one was, since timm '
            f'alone can not build it: load_model(folder, model=...); got None')
    else:
        try:
            with torch.device('cpu'):
                network = build(config, bare=True)
        except (TypeError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
            raise ValueError(
                f'timm can not build the {config["timm"]["name"]} of folder={os.fspath(folder)!r}: {error}') from error
    with all_or_nothing(network):
        put_in(network, config)
        if model is not None:  # not for timm's own networks, as timm may rename a part some day
            check_modules(config, modules(network), 'model=', 'pass model= built as the saved network was')
        _check_keys(config['network'], network, weights)
        _load(network, weights)
        video = network if config['clip_model'] is None else ClipModel(network, config['clip_model'])
    return video.cpu().eval()


def _read(path: Path) -> Tuple[Config, Dict[str, Tensor]]:
    """Read the two files, which must be whole and belong together."""
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f'folder={str(path)!r} has no {name}; wanted one that save_model() wrote. What timm wrote of the '
                f"cmr_resnet family it also loads: timm.create_model('local-dir:...', pretrained=True)")
    try:
        config = json.loads((path / _CONFIG).read_text())
        known = isinstance(config, dict) and config.keys() >= _KEYS
    except ValueError:
        known = False
    if not known:
        raise ValueError(f'folder={str(path)!r} has a {_CONFIG} that save_model() did not write')
    if _digest(path / _WEIGHTS, config) != config['sha256']:
        raise ValueError(f'folder={str(path)!r}: {_WEIGHTS} and {_CONFIG} were not written together, or changed since')
    try:
        # Copies: what is read lies in the mapped file, at addresses for which a product of PyTorch may round otherwise.
        return config, {key: value.clone() for key, value in load_file(path / _WEIGHTS).items()}
    except SafetensorError as error:
        raise ValueError(f'folder={str(path)!r} has a {_WEIGHTS} that save_model() did not write') from error


def _weights(network: nn.Module) -> Dict[str, Tensor]:
    """The state dict and the buffers that are not persistent, as safetensors takes them."""
    weights: Dict[str, Tensor] = {}
    seen = set()
    for key, value in {**dict(network.named_buffers()), **network.state_dict()}.items():
        if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise ValueError(f'{key} must be a plain tensor with values to be saved, got {type(value).__name__}')
        value = value.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        weights[key] = value.clone() if memory in seen else value
        seen.add(memory)
    return weights


def _load(network: nn.Module, weights: Dict[str, Tensor]) -> None:
    """Give the network the weights with their dtypes. A parameter with several names stays one parameter."""
    first: Dict[int, str] = {}
    tied = {name: first.setdefault(id(p), name) for name, p in network.named_parameters(remove_duplicate=False)}
    state = network.state_dict().keys()
    network.load_state_dict({key: weights[key] for key in state}, strict=True, assign=True)
    for name, other in tied.items():
        if name != other:
            owner, _, own = name.rpartition('.')
            network.get_submodule(owner)._parameters[own] = network.get_parameter(other)
    for name, buffer in dict(network.named_buffers()).items():
        if name not in state and name in weights and weights[name].shape == buffer.shape:
            owner, _, own = name.rpartition('.')
            network.get_submodule(owner)._buffers[own] = weights[name]


def _check_keys(kind: str, network: nn.Module, weights: Dict[str, Tensor]) -> None:
    state = network.state_dict()
    loose = {name for name, _ in network.named_buffers()} - state.keys()  # buffers that are not persistent
    wrong = [f'{key} is missing' for key in state if key not in weights]
    wrong += [f'{key} is unexpected' for key in weights if key not in state and key not in loose]
    wrong += [
        f'{key} is {list(weights[key].shape)} for {list(value.shape)}' for key, value in state.items()
        if key in weights and weights[key].shape != value.shape]
    if wrong:
        raise ValueError(f'the weights do not fit the {kind} that they are saved for: {few(wrong)}')


def _digest(path: Path, config: Config) -> str:
    """The digest of the file of weights and of the config without its digest."""
    rest = {key: value for key, value in config.items() if key != 'sha256'}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
