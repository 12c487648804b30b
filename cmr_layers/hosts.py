"""Modules of somebody else's that run temporal layers before or after themselves, and the guard that watches them.

A host is the module that was there, with its parts, its parameters and their names; only its class is one of ours
besides, as PyTorch's own ``parametrize`` and ``fully_shard`` do it. A forward hook would do the same with less, but
``torch.compile`` does not look at hooks when it decides whether a graph that it compiled for another network of the
same classes may be used again; it then leaves the layers out without a word. A class it looks at.

What replaces, wraps, copies or fuses a host takes its layers along, drops them or doubles them, and no such tool says
so. So the network remembers its hosts, and refuses to run or to be saved when one of them is not at its place.
"""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from .cme_tim import run

__all__ = ['Guard', 'Host', 'Place', 'check_layers', 'host', 'unhost']

# What PyTorch wraps around a module without changing what it computes: torch.compile, activation checkpointing, FSDP,
# DDP. Anybody else's wrapper may do with what is in it what it likes.
_WRAPPERS = ('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module', 'module')


@dataclass(frozen=True, eq=False)  # no tuple: torch.export takes tuples apart, and puts others in their place
class Place:
    """What a host runs besides itself.

    Attributes:
        at: Name of the host in the network.
        before: Layers that its input goes through first.
        after: Layers that its output goes through.
        before_names: Their names in the network.
        after_names: Likewise.
    """
    at: str
    before: Tuple[nn.Module, ...] = ()
    after: Tuple[nn.Module, ...] = ()
    before_names: Tuple[str, ...] = ()
    after_names: Tuple[str, ...] = ()

    @property
    def layers(self) -> Dict[str, nn.Module]:
        return dict(zip((*self.before_names, *self.after_names), (*self.before, *self.after), strict=True))


class Host(nn.Module):
    """The class of a host besides its own; see :func:`host`."""
    # names that no module of somebody else's has
    _cmr_place = Place('')  # of an instance that somebody makes with the class of a host: it runs no layers
    _cmr_class: Type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, '_is_replica', False):
            raise RuntimeError('nn.DataParallel copies no inserted layers; use nn.parallel.DistributedDataParallel')
        place = self._cmr_place
        if place.before:
            if not args:
                raise TypeError(f'{place.at} must get its input as a positional argument, since layers run before it')
            args = (run(place.before, args[0]), *args[1:])
        try:
            y = super().forward(*args, **kwargs)
        except fx.proxy.TraceError as error:
            # torch.fx takes modules of torch.nn for one node each, but then it would not see the layers of this one
            raise TypeError(
                f'torch.fx must look into {place.at}, since {", ".join(place.layers)} runs there, and it cannot look '
                f'into a {type(self).__name__}: insert the layer at a convolution, an activation or a block instead, '
                f"or take features with timm's forward_intermediates()"
            ) from error
        return run(place.after, y) if place.after else y

    def __copy__(self) -> nn.Module:
        raise TypeError(
            f'{self._cmr_place.at} runs layers, and a shallow copy would run the same ones again: use deepcopy')

    def __reduce_ex__(self, protocol: Any) -> Any:
        get_state: Any = getattr(self, '__getstate__', lambda: vars(self))  # Python 3.10 has none
        return _bare, (type(self)._cmr_class,), get_state()

    def __prepare_scriptable__(self) -> nn.Module:
        place = self._cmr_place
        raise TypeError(
            f'TorchScript cannot compile {place.at}, where insert() put {", ".join(place.layers)}: use '
            f'torch.jit.trace, torch.export or torch.compile, or restore(model) first')


_CLASSES: Dict[Type[nn.Module], Type[Host]] = {}  # of each class of modules, its hosts'


def _host_class(kind: Type[nn.Module]) -> Type[Host]:
    if kind not in _CLASSES:  # setdefault, as another thread may be here, too
        _CLASSES.setdefault(kind, type(kind.__name__, (Host, kind), {'__module__': __name__, '_cmr_class': kind}))
    return _CLASSES[kind]


def _bare(kind: Type[nn.Module]) -> Host:
    """An empty host; its state is set by whoever copies or unpickles it."""
    made = _host_class(kind)
    return made.__new__(made)


def host(module: nn.Module, place: Place) -> None:
    """Make a host of a module, or give one another place."""
    if not isinstance(module, Host):
        if 'forward' in vars(module) or isinstance(module, fx.GraphModule):
            raise ValueError(
                f'at={place.at!r} must have the forward of its class to take a layer, got a {type(module).__name__} '
                f'whose forward was replaced or traced')
        if is_parametrized(module):
            raise ValueError(
                f'at={place.at!r} must not be parametrized to take a layer, as its class would change under it: insert '
                f'the layer at the block around it, or before the {type(module).__name__} is parametrized')
        module.__class__ = _host_class(type(module))
    module._cmr_place = place  # type: ignore[assignment]


def unhost(module: Host) -> None:
    """Make of a host what it was.

    Raises:
        ValueError: Its class was changed since, which can't be taken back for whoever did it.
    """
    kind = type(module)._cmr_class
    if type(module) is not _host_class(kind) or 'forward' in vars(module):
        place = module._cmr_place
        raise ValueError(
            f'{place.at} must be a {kind.__name__} that runs {", ".join(place.layers)} to be restored, got a '
            f'{type(module).__name__}: undo first what changed its class or its forward since (parametrize, '
            f'fully_shard, accelerate)')
    vars(module).pop('_cmr_place', None)  # what an adapter made of the class has none
    module.__class__ = kind  # type: ignore[assignment]


class Guard:
    """Hook of a network that runs with it, and when it is saved: are all hosts at their places?"""

    def __init__(self) -> None:
        self.places: List[Place] = []
        self.keys: List[int] = []  # of the hook, in the network's dictionaries of them

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

    def __setstate__(self, state: Dict[str, Any]) -> None:
        # A new process counts hooks from 0 again and would in time give this key to another one, which replaces it.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(key + 1 for key in self.keys))

    def __call__(self, model: nn.Module, *args: Any) -> None:
        self.check(model)

    def check(self, model: nn.Module) -> None:
        """Raise a RuntimeError if a layer is not run exactly once, at its place."""
        for place in self.places:
            found = _find(model, place.at)
            names, layers = place.before_names + place.after_names, place.before + place.after
            wrong = '' if _runs(found, place) else place.at
            for name, layer in zip(names, layers):  # a loop: generators can't be compiled
                if not wrong and _find(model, name) is not layer:
                    wrong, found = name, _find(model, name)
            if wrong:
                _fail(
                    ' and '.join(names), type(model).__name__, place.at, wrong,
                    'gone' if found is None else f'another {type(found).__name__}')


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # so it raises while it is compiled, too
def _fail(layers: str, model: str, at: str, wrong: str, now: str) -> None:
    raise RuntimeError(
        f'{layers} of the {model} must run once, at {at}, but {wrong} is {now} now. What replaces, wraps, fuses or '
        f'converts a module that runs layers, or a layer, drops or doubles it; do it first and insert the layers then. '
        f'restore(model) takes out what is left of them'
    )


def check_layers(model: nn.Module) -> None:
    """Raise a RuntimeError if a layer that was inserted anywhere in a model is not at its place any more."""
    for module in model.modules():
        guard = Guard.of(module)
        if guard is not None:
            guard.check(module)


def _content(module: nn.Module) -> Optional[nn.Module]:
    """What is in a module that only wraps another one; None if it is no wrapper."""
    if type(module).__module__.startswith('torch.'):
        for name in _WRAPPERS:
            if name in module._modules:
                return module._modules[name]
    return None


def _find(model: nn.Module, name: str) -> Optional[nn.Module]:
    """The module of a name, through wrappers; None if there is none."""
    found: Optional[nn.Module] = model
    for part in name.split('.'):
        while found is not None and part not in found._modules:
            found = _content(found)
        if found is not None:
            found = found._modules[part]
    return found


def _runs(module: Optional[nn.Module], place: Place) -> bool:
    """Whether a module, or what it wraps, is the host of a place."""
    while module is not None and not isinstance(module, Host):
        module = _content(module)
    # The same object: a copy of the host alone, as fusing makes one, is not that of the network.
    return module is not None and module._cmr_place is place


# Of a network that is compiled as a whole, the hooks run before the compiled code does; there the check is to run as it
# stands, each time. Within another network that is compiled it is compiled with it, and again when a class changes.
for _function in (Guard.__call__, Guard.check, _find, _runs, _content):
    skip_code(_function.__code__)
