"""Put a temporal layer at any module of a network that somebody else built."""
import fnmatch
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .attach import Report, all_or_nothing, attach, check_network, finish
from .checks import check_choice, check_positive
from .clip import ClipLayer, check_num_frames
from .probe import like, probe

__all__ = ['insert']

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Names = Union[str, 're.Pattern[str]']


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

    One forward pass of a zero image finds the channels, in eval mode and without gradients. Afterwards the network
    takes frames (B*T, C, H, W) as before. Wrap it in :class:`ClipModel` to feed it clips. :func:`restore` takes the
    layers out again.

    The module runs the layer from now on. It is copied, saved, traced, compiled and exported with it, and its
    parameters keep their names. Stochastic depth and DropBlock are drawn once per clip from now on.

    A tool that replaces, wraps or fuses the module (an adapter, SyncBatchNorm's conversion, ``fuse_modules``) drops the
    layer or runs it twice. The network checks this when it is called and when it is saved, and raises a RuntimeError
    that names the layer. A call of ``forward_features``, or of a part of the network, skips the check. Use such tools
    first, then insert, then compile. Prefer a block, a convolution or an activation to a batch norm. TorchScript can't
    compile such a module; ``torch.jit.trace`` can.

    The layers start as they do alone: SME as the identity, TIM as TSM's shift, CME with gates near 1/2. Such a CME
    halves the input that a trained network expects. Pass ``gate_init=0.98`` to start it with open gates.

    Args:
        model: The network.
        layer: ``CME``, ``SME``, ``TIM`` or a function with the same call, ``layer(channels, num_frames=...)``.
        at: Names from ``model.named_modules()``: one name, a pattern such as ``'blocks.*.0'`` whose wildcards match
            within a component, a compiled regular expression for whole names, or a list of these. An ``nn.Sequential``
            stands for its first ('before') or last ('after') module.
        where: 'before' or 'after' the module.
        num_frames: Frames T of a clip.
        example_input: Input (1, C, H, W) to find the channels with. None: a zero image of the network's own size.
        **layer_kwargs: Arguments of the layer, such as ``reduction=4``.

    Returns:
        The inserted layers and their places.

    Raises:
        ValueError: A name or pattern matches nothing. ``where`` is not 'before' or 'after'. A module does not run, has
            no tensor (N, C, H, W) there, or does not have the forward of its class. The model has layers with another
            num_frames. A layer argument is out of its range.
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
    check_num_frames(model, num_frames)
    targets = dict(_resolve(model, name, where) for name in _match(model, at))
    with all_or_nothing(model):
        with _spies(model, targets) as spies:
            calls = probe(model, targets, example_input)
        made = []
        for name, target in targets.items():
            channels = calls[name].channels(where)
            made.append(layer(channels, num_frames=num_frames, **like(target, model), **layer_kwargs))
            if not isinstance(made[-1], ClipLayer):
                raise TypeError(f'layer must make a CME, SME or TIM, got {type(made[-1]).__name__}')
        insertions = [
            attach(model, one, name, where, _owner(model, name, spies)) for one, name in zip(made, targets)]
        finish(model, num_frames)
    return Report(type(model).__name__, num_frames, insertions)


def _match(model: nn.Module, at: Union[Names, List[Names]]) -> List[str]:
    """Names of the modules that match the patterns, in the order of the model."""
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
    """Follow an ``nn.Sequential`` down to the module that takes its input or gives its output.

    An ``nn.Sequential`` can't own a layer, as it would run it as one more of its modules. Gradient checkpointing also
    calls these modules without calling the ``nn.Sequential``.
    """
    module = model.get_submodule(name)
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f'at={name!r} must have the forward of its class to take a layer, got a ScriptModule')
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        child = next(iter(module._modules) if where == 'before' else reversed(module._modules))
        name, module = f'{name}.{child}', module.get_submodule(child)
    return name, module


class _Spy(nn.Module):
    """A child that nobody calls by name. If it runs, its parent runs all its children and can't hold a layer."""
    ran = False

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.ran = True
        return x


@contextmanager
def _spies(model: nn.Module, names: Iterable[str]) -> Iterator[Dict[str, _Spy]]:
    """Put a spy in each module and in all modules above it. Containers get none: they run all their children."""
    paths = {name: None for path in names for name in _upwards(path)}
    spies = {name: _Spy() for name in paths if not isinstance(model.get_submodule(name), _CONTAINERS)}
    try:
        for name, spy in spies.items():
            model.get_submodule(name).add_module('_cmr_spy', spy)
        yield spies
    finally:
        for name in spies:
            model.get_submodule(name)._modules.pop('_cmr_spy', None)


def _upwards(name: str) -> List[str]:
    """Names of a module and of all modules above it, up to the model, ''."""
    parts = name.split('.')
    return ['.'.join(parts[:n]) for n in range(len(parts), -1, -1)]


def _owner(model: nn.Module, at: str, spies: Dict[str, _Spy]) -> str:
    """Name of the module to hold the layer: the target, or the nearest one above that does not run all its children."""
    for name in _upwards(at):
        if name in spies and not spies[name].ran:
            return name
    raise ValueError(
        f'model ({type(model).__name__}) runs all its children one by one and has no module to hold the layer at '
        f'{at!r}; wrap it in an nn.Module that calls it'
    )
