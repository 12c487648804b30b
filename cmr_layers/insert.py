"""Put a temporal layer at any module of a network that somebody else built, and take it out again.

Nothing of the network is replaced or renamed. A layer becomes a child of the module it stands at, so that its
parameters train, move and save with the network, and a forward hook sends the tensor through it.
"""
import fnmatch
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .clip import ClipLayer, check_choice, check_module, check_positive
from .front import run
from .probe import like, probe

__all__ = ['Insertion', 'Report', 'insert', 'restore']

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Names = Union[str, 're.Pattern[str]']


@dataclass(frozen=True)
class Insertion:
    """One layer that was put in.

    Attributes:
        kind: Class of the layer, 'CME', 'SME' or 'TIM'.
        name: Where it lives in the network, as in ``named_modules()`` and the state dict.
        where: 'before' or 'after'.
        at: Name of the module that it acts before or after.
        channels: Channels C that it found there.
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
    """What :func:`insert` or :func:`retrofit` did; print it."""
    model: str
    num_frames: int
    insertions: List[Insertion] = field(default_factory=list)

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
        return '\n'.join(lines)


class _Hook:
    """Sends a tensor through layers that are children of owner, or of the hooked module itself.

    The layers are looked up at each call, so whatever takes their place (a folded form, say) is used.
    """

    def __init__(self, names: Tuple[str, ...], owner: Optional[nn.Module]) -> None:
        self.names, self.owner = names, owner
        self.key = -1  # of the hook in the hooked module

    def register(self, where: str, module: nn.Module) -> None:
        register: Any = module.register_forward_pre_hook if where == 'before' else module.register_forward_hook
        self.key = register(self).id

    def __setstate__(self, state: Dict[str, Any]) -> None:
        # A new process counts hooks from 0 again and would in time give this key to another one, which replaces it.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.key + 1)

    def holder(self, module: nn.Module) -> nn.Module:
        return module if self.owner is None else self.owner

    def run(self, module: nn.Module, x: Any) -> Any:
        if self.owner is not None and getattr(module, '_is_replica', False):
            raise RuntimeError('nn.DataParallel copies no hooks; use nn.parallel.DistributedDataParallel')
        holder = self.holder(module)
        return run([getattr(holder, name) for name in self.names], x)

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_Hook':
        # Of a network: the copy of the owner. Of the hooked module alone: the owner itself, not a hidden copy of it.
        copied = type(self)(self.names, memo.get(id(self.owner), self.owner))
        copied.key = self.key
        return copied


class _Before(_Hook):
    """Forward pre-hook: the module's input goes through the layer first."""

    def __call__(self, module: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        return (self.run(module, args[0]), *args[1:])


class _After(_Hook):
    """Forward hook: the module's output goes through the layer."""

    def __call__(self, module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
        return self.run(module, output)


def insert(
        model: nn.Module,
        layer: Callable[..., ClipLayer],
        at: Union[Names, List[Names]],
        where: str = 'after',
        num_frames: int = 8,
        example_input: Optional[Tensor] = None,
        **layer_kwargs: Any,
) -> Report:
    """Put CME, SME or TIM before or after modules of a network, in place.

    The channels are found by one forward pass of a zero image in eval mode, without gradients. Afterwards the
    network takes frames (B*T, C, H, W) as before; wrap it in :class:`ClipModel` to feed it clips. :func:`restore`
    takes the layers out again.

    The layer hangs on the module by a forward hook: it is copied, saved, compiled and exported with it, but TorchScript
    knows no such hooks, and what replaces the module (SyncBatchNorm's conversion, freezing, fusing) drops it. Do that
    first, then insert, then compile; prefer a block, a convolution or an activation to a batch norm.

    The layers start as they do alone: SME as the identity, TIM as TSM's shift, CME with gates near 1/2, which halves
    what a trained network sees there. Pass ``gate_init=0.98`` to start a CME with open gates.

    Args:
        model: The network.
        layer: ``CME``, ``SME``, ``TIM`` or anything that is called alike, ``layer(channels, num_frames=...)``.
        at: Names as ``model.named_modules()`` gives them: one name, a pattern such as ``'blocks.*.0'`` whose
            wildcards match within a component, a compiled regular expression for whole names, or a list of these.
            A plain ``nn.Sequential`` stands for its first ('before') or last ('after') module.
        where: 'before' or 'after' the module.
        num_frames: Frames T of a clip.
        example_input: Input to find the channels with, if not a zero image of the network's own size, (1, C, H, W).
        **layer_kwargs: Arguments of the layer, such as ``reduction=4``.

    Returns:
        What was inserted where.

    Raises:
        ValueError: A name or pattern matches nothing; where is neither of the two; a module does not run, or has no
            tensor (N, C, H, W) there; a layer argument is out of its range.
        TypeError: model is no module or a compiled one, layer is no class of a layer, or example_input is no tensor.

    Example:
        >>> import timm, torch
        >>> from cmr_layers import CME, ClipModel
        >>> model = timm.create_model('mobilenetv3_small_050')
        >>> print(insert(model, CME, at='blocks.*.0', where='before', gate_init=0.98, num_frames=4))
        MobileNetV3: 6 CME for clips of 4 frames, 1,648 parameters added
          blocks.0.0.cme    16 channels, before blocks.0.0
          blocks.1.0.cme     8 channels, before blocks.1.0
          blocks.2.0.cme    16 channels, before blocks.2.0
          blocks.3.0.cme    24 channels, before blocks.3.0
          blocks.4.0.cme    24 channels, before blocks.4.0
          blocks.5.0.cme    48 channels, before blocks.5.0
        >>> ClipModel(model.eval(), num_frames=4)(torch.randn(2, 4, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    if not callable(layer) or isinstance(layer, nn.Module):
        raise TypeError(f'layer must be a class such as CME (it is built once per place), got {layer!r}')
    check_network(model)
    check_choice('where', where, ('before', 'after'))
    check_positive('num_frames', num_frames)
    targets = dict(_resolve(model, name, where) for name in _match(model, at))
    with _spies(model, targets) as spies:
        calls = probe(model, targets, example_input)
    built = []
    for name, target in targets.items():
        channels = calls[name].channels(where)
        owner_name = _owner(model, name, spies)
        owner = model.get_submodule(owner_name)
        made = layer(channels, num_frames=num_frames, **like(target, model), **layer_kwargs)
        if not isinstance(made, ClipLayer):
            raise TypeError(f'layer must make a CME, SME or TIM, got {type(made).__name__}')
        built.append((name, target, owner_name, owner, made))
    # nothing is touched before all layers could be made
    return Report(type(model).__name__, num_frames, [
        attach(made, name, target, where, owner_name, owner) for name, target, owner_name, owner, made in built])


def restore(model: nn.Module) -> nn.Module:
    """Take out all that :func:`insert` and :func:`retrofit` put in: the original network, bit for bit.

    Args:
        model: The network that was passed to them, a copy of it, or any module with such layers in it.

    Returns:
        The same module.

    Raises:
        ValueError: Nothing was inserted in it, or a layer is held by a module outside of it.
        TypeError: model is no module.

    Example:
        >>> from cmr_layers import SME
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        >>> _ = insert(model, SME, at='1')
        >>> [name for name, _ in restore(model).named_parameters()]
        ['0.weight', '0.bias']
    """
    check_module('model', model)
    hooks: List[Tuple[Any, int, Any, nn.Module]] = [
        (registered, key, hook, module) for module in model.modules()
        for registered in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in registered.items() if isinstance(hook, _Hook)]
    if not hooks:
        raise ValueError(f'model ({type(model).__name__}) holds nothing that insert() or retrofit() put in')
    inside = set(model.modules())
    for _, _, hook, module in hooks:
        if hook.holder(module) not in inside:
            raise ValueError(
                f'model ({type(model).__name__}) is only a part: its {hook.names[0]!r} belongs to a '
                f'{type(hook.owner).__name__} outside of it; pass a module that holds both'
            )
    for registered, key, hook, module in hooks:
        del registered[key]
        for name in hook.names:
            delattr(hook.holder(module), name)
    return model


def attach(layer: ClipLayer, at: str, target: nn.Module, where: str, owner_name: str, owner: nn.Module) -> Insertion:
    """Make layer a child of owner and send target's input or output through it."""
    kind = type(layer).__name__
    name, n = kind.lower(), 1
    while hasattr(owner, name):
        n += 1
        name = f'{kind.lower()}{n}'
    layer.train(target.training)
    owner.add_module(name, layer)
    holder = None if owner is target else owner
    last = next(reversed(target._forward_pre_hooks.values()), None)
    if where == 'before' and isinstance(last, _Before) and last.owner is holder:
        last.names += (name,)  # one hook for both, since a CME and a TIM together take one pass over the frames
    else:
        (_Before if where == 'before' else _After)((name,), holder).register(where, target)
    return Insertion(
        kind, f'{owner_name}.{name}' if owner_name else name, where, at, layer.channels,
        sum(p.numel() for p in layer.parameters()))


def check_network(model: Any) -> None:
    """Raise a TypeError if layers can't be put in model: a compiled graph would not know of them."""
    check_module('model', model)
    if any(hasattr(m, '_orig_mod') or m._compiled_call_impl is not None for m in model.modules()):
        raise TypeError('model must be the network itself, got what torch.compile made of it; compile it afterwards')


def _match(model: nn.Module, at: Union[Names, List[Names]]) -> List[str]:
    """Names of the modules that the patterns select, in the order of the model."""
    names = [name for name, _ in model.named_modules() if name]
    selected = set()
    for pattern in at if isinstance(at, (list, tuple)) else [at]:
        if isinstance(pattern, re.Pattern):
            matched = [name for name in names if pattern.fullmatch(name)]
        elif isinstance(pattern, str):
            matched = [name for name in names if _glob(name, pattern)]
        else:
            raise TypeError(
                f'at must be a name, a pattern, a compiled regular expression or a list of these, got {pattern!r}')
        if not matched:
            close = [name for name in names if name.count('.') == str(getattr(pattern, 'pattern', pattern)).count('.')]
            raise ValueError(
                f'at={getattr(pattern, "pattern", pattern)!r} matches no module of {type(model).__name__}; it has '
                f'{", ".join(close[:8] or names[:8])}, ...'
            )
        selected.update(matched)
    if not selected:
        raise ValueError(f'at must name at least one module, got {at!r}')
    return [name for name in names if name in selected]


def _glob(name: str, pattern: str) -> bool:
    parts, wanted = name.split('.'), pattern.split('.')
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _resolve(model: nn.Module, name: str, where: str) -> Tuple[str, nn.Module]:
    """Follow plain Sequentials down to the module that takes their input or gives their output.

    A Sequential can't own a layer (it would run it as one more of its modules), and gradient checkpointing calls its
    modules without it.
    """
    module = model.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        child = next(iter(module._modules) if where == 'before' else reversed(module._modules))
        name, module = f'{name}.{child}', module.get_submodule(child)
    return name, module


class _Spy(nn.Module):
    """A child that nobody calls by name: if it runs, its parent runs all its children and can't hold a layer."""
    ran = False

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.ran = True
        return x


@contextmanager
def _spies(model: nn.Module, names: Iterable[str]) -> Iterator[Dict[str, _Spy]]:
    """A spy in each of the modules and all above them, for the time of a forward pass; containers run all anyway."""
    paths = {name: None for path in names for name in _upwards(path)}
    spies = {name: _Spy() for name in paths if not isinstance(model.get_submodule(name), _CONTAINERS)}
    try:
        for name, spy in spies.items():
            model.get_submodule(name).add_module('_cmr_spy', spy)
        yield spies
    finally:
        for name in spies:
            del model.get_submodule(name)._modules['_cmr_spy']


def _upwards(name: str) -> List[str]:
    """The names of a module and of all above it, up to the model, ''."""
    parts = name.split('.')
    return ['.'.join(parts[:n]) for n in range(len(parts), -1, -1)]


def _owner(model: nn.Module, at: str, spies: Dict[str, _Spy]) -> str:
    """Name of the module that holds the layer: the target, or the nearest above that does not run all its children."""
    for name in _upwards(at):
        if name in spies and not spies[name].ran:
            return name
    raise ValueError(
        f'model ({type(model).__name__}) runs all its children one by one and has no module to hold the layer at '
        f'{at!r}; wrap it in an nn.Module that calls it'
    )
