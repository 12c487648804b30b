"""Describe a network with temporal layers as data, and build it again from that; used by :mod:`.save`."""
import inspect
import json
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import timm
from timm.models import get_model_args
from torch import nn

from .attach import finish, image_network, is_adopted, is_known, no_image_network, put, put_in_block
from .clip import ClipLayer, ClipModule, Consensus, Fold, set_num_frames
from .clip_model import ClipModel
from .cme import CME
from .drop import ClipDrop
from .hosts import Guard, Host, Place, check_layers
from .probe import like
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = ['Config', 'build', 'check_modules', 'describe', 'few', 'modules', 'put_in']

Config = Dict[str, Any]
_KINDS: Dict[str, Type[ClipLayer]] = {'CME': CME, 'SME': SME, 'TIM': TIM}
_PARTS = ('cme', 'tim', 'sme')
# timm.create_model()'s own arguments say how it builds and what it reads, and are no arguments of the network.
_NOT_ARGS = set(inspect.signature(timm.create_model).parameters) - {'kwargs'}
# Each pair computes the same in eval mode. A network that trained on several devices has the first of each pair.
_SAME = {'SyncBatchNorm': 'BatchNorm2d', 'SyncBatchNormAct': 'BatchNormAct2d'}


def describe(model: nn.Module) -> Tuple[nn.Module, Config]:
    """The image network with its layers, and the data to build it again."""
    network: nn.Module = model
    hosts: List[Config] = []
    if isinstance(model, ClipModel):
        others: Dict[str, Any] = {name: type(child) for name, child in model.named_children() if name != 'model'}
        if type(model) is not ClipModel or others != {'fold': Fold, 'consensus': Consensus}:
            raise ValueError(
                f'model must be a ClipModel as it was built, got a {type(model).__name__} with '
                f'{", ".join(f"{name}: {kind.__name__}" for name, kind in others.items())}')
        model._check_layers()
        network = model.model
        hosts += _hosts(model, '', 'model.')  # for layers that were inserted through the wrapper
    names = {module: name for name, module in network.named_modules()}
    layers: Dict[str, Config] = {}
    blocks: List[Config] = []
    for name, module in network.named_modules():
        if 'forward' in vars(module):
            raise ValueError(f'{name or type(module).__name__} must have the forward of its class to be saved')
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        if not all(isinstance(hook, Guard) for hook in hooks):
            raise ValueError(
                f'{name or type(module).__name__} must have no forward hooks to be saved, since they may change what '
                f'it computes and can not be saved; remove them first')
        if is_adopted(module) and not isinstance(module, ClipDrop):
            parts = {part: module.get_submodule(part) for part in _PARTS}
            found = {part: layer for part, layer in parts.items() if type(layer) is not nn.Identity}
            layers.update({f'{name}.{part}': _layer_config(f'{name}.{part}', layer) for part, layer in found.items()})
            blocks.append({'name': name, 'layers': list(found)})
        hosts += _hosts(module, name, '')
    guards = [guard for module in model.modules() if (guard := Guard.of(module)) is not None]
    places = {place for guard in guards for place in guard.places}
    for name, module in network.named_modules():
        if isinstance(module, Host) and module._cmr_place not in places:
            raise ValueError(
                f'model ({type(network).__name__}) holds a part or a copy: {name or "it"} runs layers that were put '
                f'there through a module outside of it; pass that one')
    for host in hosts:
        for name in (*host['before'], *host['after']):
            whole = f'{host["root"]}.{name}' if host['root'] else name
            layers[whole] = _layer_config(whole, network.get_submodule(whole))
    frames = {module.num_frames for module in model.modules() if isinstance(module, ClipModule)}
    if len(frames) > 1:
        raise ValueError(f'model ({type(model).__name__}) has layers of different num_frames: {sorted(frames)}')
    return network, {
        'architecture': no_image_network({'architecture': type(network).__name__})['architecture'],  # for timm's loader
        'cmr_layers': __version__, 'network': type(network).__name__, 'timm': _timm_config(network),
        'num_frames': frames.pop() if frames else None,
        'clip_model': model.num_frames if isinstance(model, ClipModel) else None,
        # in the order of the network's modules, as the order of its parameters follows
        'layers': {name: layers[name] for name in names.values() if name in layers},
        'blocks': blocks, 'hosts': hosts, 'modules': modules(network)}


def _hosts(module: nn.Module, root: str, prefix: str) -> Iterator[Config]:
    """The places that the guard of a module knows, their names without the prefix."""
    guard = Guard.of(module)
    for place in [] if guard is None else guard.places:
        names = place.at, *place.before_names, *place.after_names
        if not all(name.startswith(prefix) for name in names):
            raise ValueError(f'{place.at} of the {type(module).__name__} is not in the network, so it can not be saved')
        at, *layers = (name[len(prefix):] for name in names)
        yield {'root': root, 'at': at, 'before': layers[:len(place.before)], 'after': layers[len(place.before):]}


def _timm_config(network: nn.Module) -> Optional[Config]:
    """The name and the arguments by which timm builds the network again; None if it can't."""
    cfg = image_network(vars(network).get('pretrained_cfg'))
    args: Any = getattr(network, '_model_args', None)
    if args is None or not isinstance(cfg, dict) or not timm.is_model(cfg.get('architecture', '')):
        return None
    args = {**args, **get_model_args(network)}  # get_model_args leaves out drop rates
    get_classifier: Any = getattr(network, 'get_classifier', lambda: None)
    classifier = get_classifier()
    if type(classifier) is nn.Linear:
        args['num_classes'] = classifier.out_features  # somebody may have replaced timm's classifier
    try:
        config: Config = _plain({
            'name': cfg['architecture'], 'args': {key: value for key, value in args.items() if key not in _NOT_ARGS},
            'pretrained_cfg': {key: value for key, value in cfg.items() if key != 'state_dict'}})
    except TypeError:
        return None  # an argument may be a class: then the caller of load_model() has to build the network
    return config


def _plain(value: Any) -> Any:
    """The value as JSON returns it. A TypeError if JSON can't hold it."""
    return json.loads(json.dumps(value, default=_number))


def _number(value: Any) -> Any:
    """A number of NumPy or PyTorch as Python's."""
    if hasattr(value, 'item'):
        return value.item()
    raise TypeError(f'{value!r} is nothing that JSON knows')


def _layer_config(name: str, layer: Any) -> Config:
    if type(layer) not in _KINDS.values():
        raise ValueError(f'{name} must be a CME, SME or TIM to be saved, got a {type(layer).__name__}')
    kind: Config = {
        'kind': type(layer).__name__, 'channels': layer.channels, 'input_fmt': layer.input_fmt,
        'num_prefix_tokens': layer.num_prefix_tokens}
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


def build(config: Config, bare: bool = False) -> nn.Module:
    """Build timm's network, with the layers unless ``bare``."""
    made = config['timm']
    if not timm.is_model(made['name']):
        raise ValueError(f'timm knows no {made["name"]!r}; import the module that registers it first')
    if made['args'].keys() & _NOT_ARGS:
        raise ValueError(f'config.json must not have {sorted(made["args"].keys() & _NOT_ARGS)} as arguments of timm')
    network = timm.create_model(made['name'], pretrained=False, **_tuples(made['args']))
    network.pretrained_cfg = network.default_cfg = _tuples(made['pretrained_cfg'])
    if not bare:
        put_in(network, config)
    return network


def _tuples(value: Any) -> Any:
    """Turn lists into tuples: JSON has no tuples, and timm's arguments are hardly ever lists."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def put_in(network: nn.Module, config: Config) -> None:
    """Build the layers again and put them at their places."""

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
    near = {}  # maps each layer to the module that runs it
    for host in config['hosts']:
        prefix = f'{host["root"]}.' if host['root'] else ''
        near.update({prefix + name: prefix + host['at'] for name in (*host['before'], *host['after'])})
    for name in config['layers']:
        if name in near:
            owner_name, _, own = name.rpartition('.')
            owner, target = _submodule(network, owner_name), _submodule(network, near[name])
            if hasattr(owner, own):
                raise ValueError(f'model ({type(network).__name__}) must have no {name!r} yet, as the saved one')
            owner.add_module(own, make(name, target).train(target.training))
    for host in config['hosts']:
        root = _submodule(network, host['root'])
        before, after = (tuple(map(root.get_submodule, host[where])) for where in ('before', 'after'))
        put(root, Place(host['at'], before, after, tuple(host['before']), tuple(host['after'])))
    if config['blocks'] or config['hosts']:
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


def modules(network: nn.Module) -> Dict[str, Config]:
    """The classes of a network's modules, and the settings of those that PyTorch, timm or this package define."""
    found = {}
    for name, module in network.named_modules():
        kind = type(module).__name__
        settings = {}
        if type(module).__module__.startswith(('torch.nn.', 'timm.', 'cmr_layers.')):
            settings = {key: value for key, value in vars(module).items() if _is_setting(key, value)}
        found[name] = {'class': _SAME.get(kind, kind), **_plain(settings)}
    return found


def _is_setting(key: str, value: Any) -> bool:
    # num_classes is left out, as the classifier's settings hold it
    if key.startswith('_') or key in (
            'training', 'inplace', 'num_frames', 'num_classes', 'was_adopted', 'grad_checkpointing'):
        return False
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, tuple) and all(isinstance(v, (bool, int, float, str)) for v in value))


def check_modules(config: Config, built: Dict[str, Config], built_by: str, advice: str) -> None:
    """Raise a ValueError if two networks differ. Equal keys are not enough: a stride or an activation may differ."""
    saved = config['modules']
    wrong = [f'{name or "itself"} is new' for name in saved if name not in built]
    wrong += [f'{name or "itself"} is gone' for name in built if name not in saved]
    for name in [name for name in saved if name in built]:
        wrong += [
            f'{name or "itself"} has {key}={saved[name][key]!r} for {built[name][key]!r}'
            for key in saved[name] if key in built[name] and saved[name][key] != built[name][key]]
    if wrong:
        raise ValueError(
            f'the {config["network"]} with temporal layers is not the one that {built_by} builds: {few(wrong)}. What '
            f'is changed afterwards (parts replaced, folded, adapted, quantized) can not be rebuilt; {advice}')


def few(wrong: List[str]) -> str:
    return '; '.join(wrong[:8]) + (f'; and {len(wrong) - 8} more' if len(wrong) > 8 else '')
