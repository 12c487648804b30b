"""Put temporal layers into a network that somebody else built, and take them out again.

A layer is a child of a module of the network. Its parameters train, move and save with the network, and no module is
renamed. One of two things runs the layer:

- **The forward of the block**, if we know the block line by line (timm's and torchvision's ResNets). The block becomes
  one of ours and keeps its parts. The layers belong to the block. They still run after a part was replaced (by an
  adapter, a fused or a quantized convolution), and TorchScript, FX and exporters see them.
- **The module they stand at**, everywhere else. It becomes a host (:mod:`.hosts`), and a guard notices when a tool
  takes it away. More tools would see a wrapper module, but a wrapper renames parameters. Renaming them back in the
  state dict alone would give one parameter two names, and functions that mix the two up
  (``torch.func.functional_call``) then ignore weights without a word.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from . import torchvision_block
from .block import CMRBasicBlock, CMRBlock
from .checks import check_module
from .clip import ClipLayer
from .drop import ClipDrop, share_drops
from .hosts import Guard, Host, Place, host, unhost
from .snapshot import Snapshot

__all__ = [
    'Insertion', 'Report', 'all_or_nothing', 'attach', 'check_network', 'finish', 'image_network', 'is_adopted',
    'is_known', 'no_image_network', 'put', 'put_in_block', 'restore',
]

# Blocks whose forward we know, and the classes that they become.
_BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {
    BasicBlock: CMRBasicBlock,
    Bottleneck: CMRBlock,
    torchvision_resnet.BasicBlock: torchvision_block.CMRBasicBlock,
    torchvision_resnet.Bottleneck: torchvision_block.CMRBottleneck,
}
_ADOPTED = 'was_adopted'  # marks blocks and drops that are ours only as long as the layers stay

# timm's savers write this name for a changed network, not the name of the image network. Its loaders refuse it.
_CHANGED = ' made a video network; save it with cmr_layers.save_model() and load it with load_model()'


@dataclass(frozen=True)
class Insertion:
    """One layer that was inserted.

    Attributes:
        kind: Class of the layer, 'CME', 'SME' or 'TIM'.
        name: Its name in the network, as in ``named_modules()`` and the state dict.
        where: 'before' or 'after'.
        at: Name of the module that it acts before or after.
        channels: Channels C at that place.
        num_parameters: Parameters that it adds.
    """
    kind: str
    name: str
    where: str
    at: str
    channels: int
    num_parameters: int


@dataclass(frozen=True)
class Report:
    """The layers that ``insert``, ``retrofit`` or ``adapt`` put in. Print it to read them.

    Attributes:
        model: Class of the network.
        num_frames: Frames T of a clip.
        insertions: The layers and their places.
        left: Blocks that took no layer, or not all, and why; only ``adapt`` leaves any.
        trainable: Parameters that train, and all of them, if the rest was frozen.
    """
    model: str
    num_frames: int
    insertions: List[Insertion] = field(default_factory=list)
    left: Dict[str, str] = field(default_factory=dict)
    trainable: Optional[Tuple[int, int]] = None

    def __iter__(self) -> Iterator[Insertion]:
        return iter(self.insertions)

    def __len__(self) -> int:
        return len(self.insertions)

    def __str__(self) -> str:
        kinds = [insertion.kind for insertion in self]
        counts = ', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))
        added = sum(insertion.num_parameters for insertion in self)
        lines = [f'{self.model}: {counts} for clips of {self.num_frames} frames, {added:,} parameters added']
        width = max(len(insertion.name) for insertion in self)
        lines += [f'  {i.name:<{width}}  {i.channels:>4} channels, {i.where} {i.at}' for i in self]
        lines += [f'  {name} is left as it is: {reason}' for name, reason in self.left.items()]
        if self.trainable is not None:
            count, total = self.trainable
            lines.append(f'{count:,} of {total:,} parameters train ({count / total:.2%})')
        return '\n'.join(lines)


def check_network(model: Any) -> None:
    """Raise a TypeError if model can't take layers: a compiled graph would not run them."""
    check_module('model', model)
    if any(hasattr(m, '_orig_mod') or m._compiled_call_impl is not None for m in model.modules()):
        raise TypeError('model must be the network itself, got what torch.compile made of it; compile it afterwards')


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo every change of the module tree if the block ends by an error or by Ctrl-C.

    Parameters that are made in the block can be trained, even if PyTorch's inference mode is on around it.
    """
    before = Snapshot(model)
    guards = [(guard, guard.places) for module in model.modules() if (guard := Guard.of(module)) is not None]
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        for guard, places in guards:
            guard.places = places
        before.undo()
        raise


def is_known(block: nn.Module) -> bool:
    """Whether we know the forward of a block, and nobody replaced it."""
    return type(block) in _BLOCKS and 'forward' not in vars(block)


def is_adopted(block: nn.Module) -> bool:
    """Whether a block, or a drop, of another package became one of ours."""
    return _ADOPTED in vars(block)


def put_in_block(model: nn.Module, name: str, entry: str, layers: Dict[str, ClipLayer]) -> List[Insertion]:
    """Give a residual block some of 'cme', 'tim' and 'sme'. The first two go before its child ``entry``."""
    block = model.get_submodule(name)
    places = {'cme': (f'{name}.{entry}', 'before'), 'tim': (f'{name}.{entry}', 'before'), 'sme': (name, 'after')}
    if not is_known(block):
        return [attach(model, layer, *places[part], owner_name=name) for part, layer in layers.items()]
    for part in places:
        block.add_module(part, layers.get(part, nn.Identity()).train(block.training))
    block.__class__ = _BLOCKS[type(block)]
    setattr(block, _ADOPTED, True)
    return [_insertion(layer, f'{name}.{part}', *places[part]) for part, layer in layers.items()]


def attach(model: nn.Module, layer: ClipLayer, at: str, where: str, owner_name: str) -> Insertion:
    """Make layer a child of the module ``owner_name``, and let the module ``at`` run it before or after itself."""
    target, owner = model.get_submodule(at), model.get_submodule(owner_name)
    kind = type(layer).__name__.lower()
    own, n = kind, 1
    while hasattr(owner, own):
        n += 1
        own = f'{kind}{n}'
    layer.train(target.training)
    owner.add_module(own, layer)
    name = f'{owner_name}.{own}' if owner_name else own

    guard = Guard.of(model)
    place = target._cmr_place if isinstance(target, Host) else Place(at)
    if isinstance(target, Host) and (guard is None or place not in guard.places):
        raise ValueError(
            f'at={at!r} has layers that were put there through another module than this {type(model).__name__}; pass '
            f'that one, or restore() it first')
    if where == 'before':
        place = replace(place, before=(*place.before, layer), before_names=(*place.before_names, name))
    else:
        place = replace(place, after=(*place.after, layer), after_names=(*place.after_names, name))
    put(model, place)
    return _insertion(layer, name, at, where)


def put(model: nn.Module, place: Place) -> None:
    """Make the module at a place a host, or give the host this place, and tell the guard of the network."""
    guard = Guard.of(model)
    if guard is None:
        guard = Guard()
        guard.register(model)
    host(model.get_submodule(place.at), place)
    guard.places = [*(other for other in guard.places if other.at != place.at), place]


def _insertion(layer: ClipLayer, name: str, at: str, where: str) -> Insertion:
    return Insertion(
        type(layer).__name__, name, where, at, layer.channels, sum(p.numel() for p in layer.parameters()))


def finish(model: nn.Module, num_frames: int) -> None:
    """Finish a network that got layers: drops once per clip, and a name that timm does not take for the image network.
    """
    for drop in share_drops(model, num_frames):
        setattr(drop, _ADOPTED, True)
    for module in model.modules():
        if 'pretrained_cfg' in vars(module):
            _describe(module, no_image_network(module.pretrained_cfg))


def no_image_network(cfg: Any) -> Any:
    """timm's description of a network, with a name that timm can't build. It is refused, not loaded without layers."""
    name = cfg.get('architecture') if isinstance(cfg, dict) else None
    return cfg if name is None or name.endswith(_CHANGED) else {**cfg, 'architecture': name + _CHANGED}


def image_network(cfg: Any) -> Any:
    """The description of the image network: undoes :func:`no_image_network`."""
    name = cfg.get('architecture') if isinstance(cfg, dict) else None
    return cfg if name is None else {**cfg, 'architecture': name.removesuffix(_CHANGED)}


def _describe(module: Any, cfg: Any) -> None:
    module.pretrained_cfg = cfg
    if 'default_cfg' in vars(module):
        module.default_cfg = cfg  # timm's older name for the same


def restore(model: nn.Module) -> nn.Module:
    """Take out all layers that :func:`insert` and :func:`retrofit` put in. The original network is left, bit for bit.

    Changes by others stay: a fused or quantized module, an adapter, and what is frozen. An interrupted call leaves the
    network as it was.

    Args:
        model: The network that was passed to them, a copy of it, or any module that holds such layers. After you
            restored a part of a network, pass the whole network too: its guard misses the layers that are gone.

    Returns:
        The same module.

    Raises:
        ValueError: Nothing was inserted, a module outside of model holds a layer, or the class or the forward of a
            module has changed since.
        TypeError: model is no module.

    Example:
        >>> from cmr_layers import SME, insert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        >>> _ = insert(model, SME, at='1')
        >>> [name for name, _ in restore(model).named_parameters()]
        ['0.weight', '0.bias']
    """
    check_module('model', model)
    modules = list(model.modules())
    blocks = [module for module in modules if is_adopted(module) and not isinstance(module, ClipDrop)]
    hosts = [module for module in modules if isinstance(module, Host)]
    guards = [(module, guard) for module in modules if (guard := Guard.of(module)) is not None]
    if not (blocks or hosts or guards):
        raise ValueError(f'model ({type(model).__name__}) holds nothing that insert() or retrofit() put in')
    for block in blocks:
        if type(block) not in _BLOCKS.values() or 'forward' in vars(block):
            raise ValueError(
                f'{type(block).__name__} must be the block that retrofit() made of it to be restored: undo first what '
                f'changed its class or its forward since (fully_shard, accelerate)')
    # layers that run, and layers that only a guard remembers
    running = [item for host_ in hosts for item in host_._cmr_place.layers.items()]
    outside = [name for name, layer in running if layer not in modules]
    if outside and not guards:
        raise ValueError(
            f'model ({type(model).__name__}) is only a part: {outside[0]} belongs to a module outside of it; pass one '
            f'that holds both')
    guests = {layer for _, layer in running}
    for module, guard in guards:
        names = dict(module.named_modules())
        guests |= {names[name] for place in guard.places for name in place.layers
                   if isinstance(names.get(name), ClipLayer)}
    with all_or_nothing(model):
        for host_ in hosts:
            unhost(host_)
        for block in blocks:
            block.__class__ = next(known for known, ours in _BLOCKS.items() if ours is type(block))
            delattr(block, _ADOPTED)
            for part in ('cme', 'tim', 'sme'):
                delattr(block, part)
        for module in modules:
            for name in [name for name, child in module._modules.items() if child in guests]:
                delattr(module, name)
        for module, guard in guards:
            guard.unregister(module)
        for module in modules:
            for name, child in module._modules.items():
                if isinstance(child, ClipDrop) and is_adopted(child):
                    module._modules[name] = child.drop
        for module in modules:
            if 'pretrained_cfg' in vars(module):
                _describe(module, image_network(module.pretrained_cfg))
    return model
