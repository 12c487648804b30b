"""Hooks that send a tensor through temporal layers at a module somebody else built, and the guard that watches them.

A hook belongs to a module, not to a place: what replaces, wraps, copies or fuses the module takes the hook along, drops
it or doubles it, and none of these tools says so. So the network remembers where its layers belong, and refuses to run
or to be saved when one of them is not run exactly once, at its place.
"""
from collections import Counter
from itertools import chain
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .front import run

__all__ = ['Guard', 'LayerHook', 'Place', 'check_layers', 'layer_hooks']

# What tools wrap around a module without changing what it computes: torch.compile, activation checkpointing, FSDP, DDP.
_WRAPPERS = ('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module', 'module')


class _Hook:
    """A hook that survives pickling."""

    def __init__(self) -> None:
        self.keys: List[int] = []  # of the hook, in each of a module's dictionaries that it is in

    def __setstate__(self, state: Dict[str, Any]) -> None:
        # A new process counts hooks from 0 again and would in time give this key to another one, which replaces it.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(key + 1 for key in self.keys))

    @property
    def __name__(self) -> str:
        # the first thing that TorchScript asks a hook for; to everybody else it has no name, as any object
        raise AttributeError(
            'TorchScript knows no forward hooks, and insert() holds its layers by them: use torch.jit.trace, '
            'torch.export or torch.compile, or restore(model) first')


class LayerHook(_Hook):
    """Sends a module's input ('before') or output ('after') through layers that are children of a module near it."""

    def __init__(self, layers: Tuple[nn.Module, ...], where: str) -> None:
        super().__init__()
        self.layers, self.where = layers, where

    def register(self, module: nn.Module) -> None:
        register: Any = module.register_forward_pre_hook if self.where == 'before' else module.register_forward_hook
        self.keys = [register(self).id]
        if type(module).__module__.startswith('torch.nn'):
            # To torch.fx a module of torch.nn is a single node, whatever hangs on it, and the layers would be lost.
            # It asks the instance, so this one says that it is none of them, and is looked into.
            vars(module)['__module__'] = __name__

    def unregister(self, module: nn.Module) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
        if not any(layer_hooks(module)):
            vars(module).pop('__module__', None)

    def __call__(self, module: nn.Module, args: Tuple[Any, ...], *output: Any) -> Any:
        if getattr(module, '_is_replica', False):
            raise RuntimeError('nn.DataParallel copies no hooks; use nn.parallel.DistributedDataParallel')
        if self.where == 'after':
            return run(self.layers, output[0])
        return (run(self.layers, args[0]), *args[1:])


class Place(NamedTuple):
    """Where layers belong in a network.

    Attributes:
        at: Name of the module that they act before or after.
        where: 'before' or 'after'.
        names: Their own names, in the order in which they run.
    """
    at: str
    where: str
    names: Tuple[str, ...]


class Guard(_Hook):
    """Hook of a network that runs with it, and when it is saved: are all layers at their places?"""

    def __init__(self) -> None:
        super().__init__()
        self.places: List[Place] = []

    @classmethod
    def of(cls, model: nn.Module) -> Optional['Guard']:
        """The guard of a network, if it has one."""
        return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, cls)), None)

    def register(self, model: nn.Module) -> None:
        self.keys = [
            model.register_forward_pre_hook(self, prepend=True).id, model.register_state_dict_pre_hook(self).id]

    @staticmethod
    def unregister(model: nn.Module) -> None:
        for hooks in (model._forward_pre_hooks, model._state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Guard)]:
                del hooks[key]

    def extend(self, at: str, where: str, name: str) -> bool:
        """Add a layer to the last place, if it is the same; whether it is."""
        if not self.places or self.places[-1][:2] != (at, where):
            return False
        self.places[-1] = Place(at, where, (*self.places[-1].names, name))
        return True

    def __call__(self, model: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            self._check_while_compiling(model)
        else:
            self.check(model)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _check_while_compiling(self, model: nn.Module) -> bool:
        """The check as such is nothing to compile. A change of the modules compiles, and so checks, anew."""
        self.check(model)
        return True

    def check(self, model: nn.Module) -> None:
        """Raise a RuntimeError if a layer is not run exactly once, at its place."""
        runs = Counter(
            id(layer) for module in model.modules() for hook in layer_hooks(module) for layer in hook.layers)
        for place in self.places:
            layers = [_find(model, name) for name in place.names]
            module = _find(model, place.at)
            held = [hook for part in _unwrapped(module) for hook in layer_hooks(part)
                    if hook.where == place.where and set(map(id, hook.layers)) & set(map(id, layers))]
            if [list(hook.layers) for hook in held] == [layers] and all(runs[id(layer)] == 1 for layer in layers):
                continue
            raise RuntimeError(
                f'{" and ".join(place.names)} of the {type(model).__name__} must run once, {place.where} {place.at}, '
                f'and does not any more: that is {"gone" if module is None else f"a {type(module).__name__} now"}. '
                f'What replaces, wraps, fuses or converts a module that has layers drops or doubles them; do it first '
                f'and insert the layers then. restore(model) takes out what is left of them'
            )


def layer_hooks(module: nn.Module) -> Iterator[LayerHook]:
    """The hooks of a module that run temporal layers."""
    for hook in chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
        if isinstance(hook, LayerHook):
            yield hook


def check_layers(model: nn.Module) -> None:
    """Raise a RuntimeError if a layer that was inserted anywhere in a model is not at its place any more."""
    for module in model.modules():
        guard = Guard.of(module)
        if guard is not None:
            guard.check(module)


def _unwrapped(module: Optional[nn.Module]) -> Iterator[nn.Module]:
    """A module, and what is in it if it only wraps another one."""
    while module is not None:
        yield module
        module = next((module._modules[name] for name in _WRAPPERS if name in module._modules), None)


def _find(model: nn.Module, name: str) -> Optional[nn.Module]:
    """The module of a name, through wrappers; None if there is none."""
    found: Optional[nn.Module] = model
    for part in name.split('.'):
        found = next((m._modules[part] for m in _unwrapped(found) if part in m._modules), None)
    return found
