"""Save and load what :func:`retrofit`, :func:`insert` and :class:`ClipModel` made of an image network.

A folder of two files: ``model.safetensors`` has the weights, ``config.json`` says what network they belong to and which
layers stand where in it. timm's own ``save_for_hf`` writes the image network's name only, and its loader may drop the
temporal layers without a word; so it is given a name that it refuses.
"""
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type, Union

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor, nn

from .attach import (
    all_or_nothing,
    check_network,
    finish,
    image_network,
    is_adopted,
    is_known,
    no_image_network,
    put_in_block,
)
from .clip import ClipLayer, ClipModule, Consensus, Fold, set_num_frames
from .clip_model import ClipModel
from .cme import CME
from .drop import ClipDrop
from .hooks import Guard, LayerHook, Place, check_layers, layer_hooks
from .probe import like
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = ['load_model', 'save_model']

Config = Dict[str, Any]
_KINDS: Dict[str, Type[ClipLayer]] = {'CME': CME, 'SME': SME, 'TIM': TIM}
_PARTS = ('cme', 'tim', 'sme')
_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'
_KEYS = {
    'architecture', 'network', 'timm', 'modules', 'layers', 'blocks', 'hooks', 'guards', 'num_frames', 'clip_model',
    'sha256'}
# What timm.create_model() has arguments of its own for says how it builds (and what it reads), not what.
_NOT_ARGS = set(inspect.signature(timm.create_model).parameters) - {'kwargs'}
# These compute the same in eval mode; a network that trained on several devices has the first ones.
_SAME = {'SyncBatchNorm': 'BatchNorm2d', 'SyncBatchNormAct': 'BatchNormAct2d'}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def save_model(model: nn.Module, folder: Union[str, 'os.PathLike[str]']) -> None:
    """Save a network with its temporal layers, for :func:`load_model`.

    What it computes is saved, in any mode and on any device; not what training needs besides: which parameters are
    frozen, gradient checkpointing, the optimizer.

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
    if isinstance(model, _WRAPPERS):
        raise TypeError(f'model must be the network itself, got a {type(model).__name__} of it; pass model.module')
    check_layers(model)
    network, config = _describe(model)
    weights = _weights(network)
    if config['timm'] is not None:
        try:
            with torch.device('meta'):
                built = _build(config)
        except RuntimeError:  # some networks compute numbers while they are built
            built = _build(config)
        _check_modules(config, _modules(built))
        _check_keys(config['network'], built, weights)

    os.makedirs(folder, exist_ok=True)
    path = Path(folder)
    save_file(weights, path / f'{_WEIGHTS}.part', metadata={'format': 'pt'})
    config['sha256'] = _digest(path / f'{_WEIGHTS}.part', config)
    (path / f'{_CONFIG}.part').write_text(json.dumps(config, indent=1))
    for name in (_WEIGHTS, _CONFIG):  # an interrupted call leaves the old files, or two that load_model() refuses
        os.replace(path / f'{name}.part', path / name)


def load_model(folder: Union[str, 'os.PathLike[str]'], model: Optional[nn.Module] = None) -> nn.Module:
    """Load what :func:`save_model` saved, bit for bit.

    The folder is data: nothing in it is run, and no other file is read.

    Args:
        folder: The folder.
        model: The image network without temporal layers, built as the saved one was; it is changed in place. Needed
            only for a network that timm did not build, or built with arguments that JSON can't hold, such as classes.
            Its own weights do not matter.

    Returns:
        The network in eval mode, on the CPU, in the saved dtype; a :class:`ClipModel` if that was saved.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: They do not fit each other, or the network does not fit them, in its class, its modules, its keys or
            its shapes; the network is needed and not given. A model that was given is as it was, then.
        TypeError: model is no module or a compiled one.
    """
    path = Path(folder)
    config, weights = _read(path)
    if model is not None:
        check_network(model)
        if type(model).__name__ != config['network']:
            raise ValueError(f'model must be a {config["network"]}, as was saved, got a {type(model).__name__}')
        if any(is_adopted(module) or any(layer_hooks(module)) for module in model.modules()):
            raise ValueError(f'model ({type(model).__name__}) has temporal layers already; wanted one without')
        network = model
    elif config['timm'] is None:
        raise ValueError(
            f'model must be the {config["network"]} without its temporal layers: timm alone can not build it, so '
            f'load_model() cannot; got None')
    else:
        try:
            with torch.device('cpu'):
                network = _build(config, bare=True)
        except (TypeError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
            raise ValueError(
                f'timm can not build the {config["timm"]["name"]} of folder={os.fspath(folder)!r}: {error}') from error
    with all_or_nothing(network):
        _put_in(network, config)
        if model is not None:  # timm may give a part of its own another name some day
            _check_modules(config, _modules(network))
        _check_keys(config['network'], network, weights)
        _load(network, weights)
        video = network if config['clip_model'] is None else ClipModel(network, config['clip_model'])
    return video.cpu().eval()


def _read(path: Path) -> Tuple[Config, Dict[str, Tensor]]:
    """The two files, if they are whole and belong together."""
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f'folder={str(path)!r} has no {name}; wanted one that save_model() wrote')
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
        return config, load_file(path / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f'folder={str(path)!r} has a {_WEIGHTS} that save_model() did not write') from error


def _describe(model: nn.Module) -> Tuple[nn.Module, Config]:
    """The image network with its layers, and what is needed to build it again."""
    network: nn.Module = model
    guards: List[Config] = []
    if isinstance(model, ClipModel):
        others: Dict[str, Any] = {name: type(child) for name, child in model.named_children() if name != 'model'}
        if type(model) is not ClipModel or others != {'fold': Fold, 'consensus': Consensus}:
            raise ValueError(
                f'model must be a ClipModel as it was built, got a {type(model).__name__} with '
                f'{", ".join(f"{name}: {kind.__name__}" for name, kind in others.items())}')
        model._check_layers()
        network = model.model
        guards += _guards(model, '', 'model.')  # of layers that were inserted in the wrapper
    names = {module: name for name, module in network.named_modules()}
    layers: Dict[str, Config] = {}
    blocks: List[Config] = []
    hooks: List[Config] = []
    for name, module in network.named_modules():
        if 'forward' in vars(module):
            raise ValueError(f'{name or type(module).__name__} must have the forward of its class to be saved')
        if is_adopted(module) and not isinstance(module, ClipDrop):
            parts = {part: module.get_submodule(part) for part in _PARTS}
            found = {part: layer for part, layer in parts.items() if type(layer) is not nn.Identity}
            layers.update({f'{name}.{part}': _layer_config(f'{name}.{part}', layer) for part, layer in found.items()})
            blocks.append({'name': name, 'layers': list(found)})
        for hook in layer_hooks(module):
            if not all(layer in names for layer in hook.layers):
                raise ValueError(
                    f'model ({type(network).__name__}) is only a part: a layer at its {name!r} belongs to a module '
                    f'outside of it; pass one that holds both')
            hooks.append({'at': name, 'where': hook.where, 'layers': [names[layer] for layer in hook.layers]})
        guards += _guards(module, name, '')
    for name in (name for held in hooks for name in held['layers']):
        layers[name] = _layer_config(name, network.get_submodule(name))
    frames = {module.num_frames for module in model.modules() if isinstance(module, ClipModule)}
    if len(frames) > 1:
        raise ValueError(f'model ({type(model).__name__}) has layers of different num_frames: {sorted(frames)}')
    return network, {
        'architecture': no_image_network({'architecture': type(network).__name__})['architecture'],  # for timm's loader
        'cmr_layers': __version__, 'network': type(network).__name__, 'timm': _timm_config(network),
        'num_frames': frames.pop() if frames else None,
        'clip_model': model.num_frames if isinstance(model, ClipModel) else None,
        # in the order of the network's modules, which is that of its parameters
        'layers': {name: layers[name] for name in names.values() if name in layers},
        'blocks': blocks, 'hooks': hooks, 'guards': guards, 'modules': _modules(network)}


def _guards(module: nn.Module, root: str, prefix: str) -> Iterator[Config]:
    guard = Guard.of(module)
    if guard is not None:
        for name in (name for place in guard.places for name in (place.at, *place.names)):
            if not name.startswith(prefix):
                raise ValueError(f'{name} of the {type(module).__name__} is not in the network, so it can not be saved')
        yield {'root': root, 'places': [
            [place.at[len(prefix):], place.where, [name[len(prefix):] for name in place.names]]
            for place in guard.places]}


def _timm_config(network: nn.Module) -> Optional[Config]:
    """timm's name of a network that it can build again, and its arguments."""
    cfg = image_network(vars(network).get('pretrained_cfg'))
    args: Any = getattr(network, '_model_args', None)
    if args is None or not isinstance(cfg, dict) or not timm.is_model(cfg.get('architecture', '')):
        return None
    args = {**args, **get_model_args(network)}  # that leaves out drop rates
    try:
        config: Config = _plain({
            'name': cfg['architecture'], 'args': {key: value for key, value in args.items() if key not in _NOT_ARGS},
            'pretrained_cfg': {key: value for key, value in cfg.items() if key != 'state_dict'}})
    except TypeError:
        return None  # an argument that is a class, say; the caller of load_model() has to build the network
    return config


def _plain(value: Any) -> Any:
    """As it is read back from JSON; a TypeError if it can't be written."""
    return json.loads(json.dumps(value, default=_number))


def _number(value: Any) -> Any:
    """NumPy's and PyTorch's numbers."""
    if hasattr(value, 'item'):
        return value.item()
    raise TypeError(f'{value!r} is nothing that JSON knows')


def _layer_config(name: str, layer: Any) -> Config:
    if type(layer) not in _KINDS.values():
        raise ValueError(f'{name} must be a CME, SME or TIM to be saved, got a {type(layer).__name__}')
    kind: Config = {'kind': type(layer).__name__, 'channels': layer.channels}
    if isinstance(layer, CME):
        kind.update(reduction=layer.reduction, gate_init=None if layer.gate_init is None else float(layer.gate_init))
    elif isinstance(layer, TIM):
        kind.update(kernel_size=layer.kernel_size, init=layer.init, shift_div=layer.shift_div, gain=layer.gain)
    elif type(layer.bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        raise ValueError(
            f'{name} must have an nn.BatchNorm2d to be saved, got {layer.bn}; save a network before it is folded')
    else:
        kind.update(bias=layer.conv.bias is not None)
    config: Config = _plain(kind)
    return config


def _build(config: Config, bare: bool = False) -> nn.Module:
    """timm's network with the layers, or without."""
    made = config['timm']
    if not timm.is_model(made['name']):
        raise ValueError(f'timm knows no {made["name"]!r}; import the module that registers it first')
    if made['args'].keys() & _NOT_ARGS:
        raise ValueError(f'config.json must not have {sorted(made["args"].keys() & _NOT_ARGS)} as arguments of timm')
    network = timm.create_model(made['name'], pretrained=False, **_tuples(made['args']))
    network.pretrained_cfg = network.default_cfg = _tuples(made['pretrained_cfg'])
    if not bare:
        _put_in(network, config)
    return network


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and timm's arguments are hardly ever lists."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _put_in(network: nn.Module, config: Config) -> None:
    """Make the layers anew and put them where they were."""

    def make(name: str, near: nn.Module) -> ClipLayer:
        settings = dict(config['layers'][name])
        kind = _KINDS[settings.pop('kind')]
        return kind(num_frames=config['num_frames'], **settings, **like(near, network))

    for block in config['blocks']:
        name = block['name']
        module = _submodule(network, name)
        if not is_known(module):
            raise ValueError(f'{name} of the {type(network).__name__} must be a block of timm or torchvision, got a '
                             f'{type(module).__name__}')
        put_in_block(network, name, 'conv1', {part: make(f'{name}.{part}', module) for part in block['layers']})
    at = {name: hook['at'] for hook in config['hooks'] for name in hook['layers']}
    for name in config['layers']:
        if name in at:
            owner_name, _, own = name.rpartition('.')
            owner, target = _submodule(network, owner_name), _submodule(network, at[name])
            if hasattr(owner, own):
                raise ValueError(f'model ({type(network).__name__}) must have no {name!r} yet, as the saved one')
            owner.add_module(own, make(name, target).train(target.training))
    for hook in config['hooks']:
        LayerHook(tuple(map(network.get_submodule, hook['layers'])), hook['where']).register(
            _submodule(network, hook['at']))
    for root in config['guards']:
        module = _submodule(network, root['root'])
        guard = Guard.of(module)
        if guard is None:
            guard = Guard()
            guard.register(module)
        guard.places += [Place(at, where, tuple(names)) for at, where, names in root['places']]
    if config['blocks'] or config['hooks']:
        finish(network, config['num_frames'])
    if any(isinstance(module, ClipModule) for module in network.modules()):
        set_num_frames(network, config['num_frames'])
    check_layers(network)


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f'model ({type(network).__name__}) must have {name!r}, where the saved one has layers') from error


def _modules(network: nn.Module) -> Dict[str, Config]:
    """What a network is made of: the modules' classes, and of PyTorch's own and ours how they are set."""
    found = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        settings = {}
        if type(module).__module__.startswith(('torch.nn.', 'cmr_layers.')):
            settings = {key: value for key, value in vars(module).items() if _is_setting(key, value)}
        found[name] = {'class': _SAME.get(kind, kind), **_plain(settings)}
    return found


def _is_setting(key: str, value: Any) -> bool:
    if key.startswith('_') or key in ('training', 'inplace', 'num_frames', 'was_adopted', 'grad_checkpointing'):
        return False
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, tuple) and all(isinstance(v, (bool, int, float, str)) for v in value))


def _check_modules(config: Config, built: Dict[str, Config]) -> None:
    """Two networks can have the same keys and compute something else: another stride, another activation."""
    saved = config['modules']
    wrong = [f'{name or "itself"} is new' for name in saved if name not in built]
    wrong += [f'{name or "itself"} is gone' for name in built if name not in saved]
    for name in [name for name in saved if name in built]:
        wrong += [
            f'{name or "itself"} has {key}={saved[name][key]!r} for {built[name][key]!r}'
            for key in saved[name] if key in built[name] and saved[name][key] != built[name][key]]
    if wrong:
        raise ValueError(
            f'the saved {config["network"]} is not the {config["network"]} that it is built as: {_few(wrong)}')


def _weights(network: nn.Module) -> Dict[str, Tensor]:
    """The state dict and what it leaves out, buffers that are not persistent, as safetensors takes it."""
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
    """Give the network the weights, dtype and all. What was one parameter under several names stays one."""
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
        raise ValueError(f'the weights do not fit the {kind} that they are saved for: {_few(wrong)}')


def _few(wrong: List[str]) -> str:
    return '; '.join(wrong[:8]) + (f'; and {len(wrong) - 8} more' if len(wrong) > 8 else '')


def _digest(path: Path, config: Config) -> str:
    """Of the weights' file and the config, but for the digest in it."""
    rest = {key: value for key, value in config.items() if key != 'sha256'}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
