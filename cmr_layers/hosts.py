"""Modules of another network that run temporal layers before or after themselves, and the guard that watches them.

A host is the module that was there, with its parts, its parameters and their names. Only its class changes: it inherits
from :class:`Host` and from the class that it had. PyTorch's ``parametrize`` and ``fully_shard`` do the same. A forward
hook would be simpler, but ``torch.compile`` ignores hooks when it decides whether it can reuse a graph compiled for
another network of the same classes. It would leave the layers out without a word. It does check classes.

A tool that replaces, wraps, copies or fuses a host keeps, drops or doubles its layers, and says nothing. The network
therefore remembers its hosts. It refuses to run or to be saved if a host is not at its place.
"""
import inspect
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from .cme_tim import run

__all__ = ['Guard', 'Host', 'Place', 'check_layers', 'host', 'unhost']

# Children of PyTorch's wrappers that do not change what a module computes: torch.compile, activation checkpointing,
# FSDP, DDP. Wrappers of other packages may compute anything.
_WRAPPERS = ('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module', 'module')


@dataclass(frozen=True, eq=False)  # no tuple: torch.export rebuilds tuples, and the place must stay the same object
class Place:
    """The layers that a host runs.

    Attributes:
        at: Name of the host in the network.
        before: Layers that run on its input.
        after: Layers that run on its output.
        before_names: Names of the layers in ``before``, in the network.
        after_names: Names of the layers in ``after``.
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
    """Base class of every host, beside the class that it had; see :func:`host`."""
    # the names are unlikely in a module of another package
    _cmr_place = Place('')  # an instance that somebody makes with the class of a host runs no layers
    _cmr_class: Type[nn.Module]
    _cmr_names: Tuple[str, ...] = ()  # of the arguments of its forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, '_is_replica', False):
            raise RuntimeError('nn.DataParallel copies no inserted layers; use nn.parallel.DistributedDataParallel')
        place = self._cmr_place
        _check_masks(place, {**dict(zip(self._cmr_names, args)), **kwargs})
        if place.before:
            if not args:
                raise TypeError(f'{place.at} must get its input as a positional argument, since layers run before it')
            args = (run(place.before, args[0]), *args[1:])
        try:
            y = super().forward(*args, **kwargs)
        except fx.proxy.TraceError as error:
            # torch.fx records a module of torch.nn as one node, but then it would not see the layers of this one
            raise TypeError(
                f'torch.fx must look into {place.at}, since {", ".join(place.layers)} runs there, and it cannot look '
                f'into a {type(self).__name__}: insert the layer at a convolution, an activation or a block instead, '
                f"or take features with timm's forward_intermediates()"
            ) from error
        if not place.after:
            return y
        return (run(place.after, y[0]), *y[1:]) if type(y) is tuple else run(place.after, y)

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


def _check_masks(place: Place, kwargs: Dict[str, Any]) -> None:
    """Refuse masks that hide tokens: CME would pool what is padding, and TIM mix it in.

    transformers makes masks that hide nothing when it is traced. In an exported graph no mask is looked at.
    """
    for name, mask in kwargs.items():
        if isinstance(mask, dict):
            _check_masks(place, {f'{name}[{key!r}]': value for key, value in mask.items()})
        if 'mask' not in name or not isinstance(mask, torch.Tensor) or torch.compiler.is_exporting():
            continue
        said = (f'{place.at} runs {", ".join(place.layers)} and must get no {name} that hides tokens: the layers know '
                f'none that are padding. Give the network images of one size')
        # Of numbers that are added to attention's, what is below 0 hides; of 0 and 1, as integers or not, 0 does.
        same = mask == mask.flatten()[:1] if mask.is_floating_point() else mask != 0
        shown = (mask == 0 if 'padding' in name else same & (mask >= 0)).all()
        if torch.compiler.is_compiling():
            torch._assert_async(shown, said)
        elif not mask.is_meta and not shown:
            raise ValueError(said)


_CLASSES: Dict[Type[nn.Module], Type[Host]] = {}  # the host class of each class of modules


def _host_class(kind: Type[nn.Module]) -> Type[Host]:
    if kind not in _CLASSES:  # setdefault below: another thread may be here as well
        names = tuple(inspect.signature(kind.forward).parameters)[1:]
        _CLASSES.setdefault(kind, type(kind.__name__, (Host, kind), {
            '__module__': __name__, '_cmr_class': kind, '_cmr_names': names}))
    return _CLASSES[kind]


def _bare(kind: Type[nn.Module]) -> Host:
    """An empty host. copy and pickle set its state afterwards."""
    made = _host_class(kind)
    return made.__new__(made)


def host(module: nn.Module, place: Place) -> None:
    """Make a module a host, or give a host another place."""
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
    """Make a host the module that it was.

    Raises:
        ValueError: Its class or its forward has changed since. Only the one who changed it can undo that.
    """
    kind = type(module)._cmr_class
    if type(module) is not _host_class(kind) or 'forward' in vars(module):
        place = module._cmr_place
        raise ValueError(
            f'{place.at} must be a {kind.__name__} that runs {", ".join(place.layers)} to be restored, got a '
            f'{type(module).__name__}: undo first what changed its class or its forward since (parametrize, '
            f'fully_shard, accelerate)')
    vars(module).pop('_cmr_place', None)  # a module that an adapter made from the class has none
    module.__class__ = kind  # type: ignore[assignment]


class Guard:
    """Hook that checks whether all hosts are at their places. It runs with the network, and when that is saved."""

    def __init__(self) -> None:
        self.places: List[Place] = []
        self.keys: List[int] = []  # keys of the hook in the network's dictionaries of hooks

    @classmethod
    def of(cls, model: nn.Module) -> Optional['Guard']:
        """The guard of a network, or None."""
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
        # A new process counts hooks from 0 again. In time it would give this key to a hook that replaces the guard.
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(key + 1 for key in self.keys))

    def __call__(self, model: nn.Module, *args: Any) -> None:
        self.check(model)

    def check(self, model: nn.Module) -> None:
        """Raise a RuntimeError if a layer does not run exactly once, at its place."""
        for place in self.places:
            found = _find(model, place.at)
            names, layers = place.before_names + place.after_names, place.before + place.after
            wrong = '' if _runs(found, place) else place.at
            for name, layer in zip(names, layers):  # a loop, as torch.compile can't compile a generator
                if not wrong and _find(model, name) is not layer:
                    wrong, found = name, _find(model, name)
            if wrong:
                _fail(
                    ' and '.join(names), type(model).__name__, place.at, wrong,
                    'gone' if found is None else f'another {type(found).__name__}')


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it raises during compilation, too
def _fail(layers: str, model: str, at: str, wrong: str, now: str) -> None:
    raise RuntimeError(
        f'{layers} of the {model} must run once, at {at}, but {wrong} is {now} now. A tool that replaces, wraps, fuses '
        f'or converts a layer, or a module that runs layers, drops or doubles them: use it first, then insert the '
        f'layers. restore(model) takes out the layers that are left'
    )


def check_layers(model: nn.Module) -> None:
    """Raise a RuntimeError if any inserted layer of a model is not at its place any more."""
    for module in model.modules():
        guard = Guard.of(module)
        if guard is not None:
            guard.check(module)


def _content(module: nn.Module) -> Optional[nn.Module]:
    """The module inside a wrapper; None if the module is no wrapper."""
    if type(module).__module__.startswith('torch.'):
        for name in _WRAPPERS:
            if name in module._modules:
                return module._modules[name]
    return None


def _find(model: nn.Module, name: str) -> Optional[nn.Module]:
    """The module with a name, looking through wrappers; None if there is none."""
    found: Optional[nn.Module] = model
    for part in name.split('.'):
        while found is not None and part not in found._modules:
            found = _content(found)
        if found is not None:
            found = found._modules[part]
    return found


def _runs(module: Optional[nn.Module], place: Place) -> bool:
    """Whether a module, or the one that it wraps, is the host of a place."""
    while module is not None and not isinstance(module, Host):
        module = _content(module)
    # It must be the same object: fusing copies a host alone, and the copy is not the host of the network.
    return module is not None and module._cmr_place is place


# If the network is compiled as a whole, its hooks run before the compiled code, and the check must run uncompiled each
# time. Inside a larger compiled network the check is compiled with it, and compiled again when a class changes.
for _function in (Guard.__call__, Guard.check, _find, _runs, _content):
    skip_code(_function.__code__)
