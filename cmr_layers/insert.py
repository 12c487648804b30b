"""Put a temporal layer at any module of a network that somebody else built."""
import inspect
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .attach import Insertion, Report, all_or_nothing, attach, check_network, finish
from .checks import check_choice, check_positive
from .clip import ClipLayer, check_num_frames
from .probe import like, probe
from .residual import CONTAINERS, is_match
from .sighting import Form
from .starts import start_of

__all__ = ['insert']

Names = Union[str, 're.Pattern[str]']
Layer = Callable[..., ClipLayer]


def insert(
        model: nn.Module,
        layer: Union[Layer, Sequence[Layer]],
        at: Union[Names, List[Names]],
        where: str = 'after',
        num_frames: int = 8,
        example_input: Optional[Tensor] = None,
        start: str = 'paper',
        input_fmt: Optional[str] = None,
        num_prefix_tokens: Optional[int] = None,
        **layer_kwargs: Any,
) -> Report:
    """Put CME, SME or TIM before or after modules of a network, in place.

    Two forward passes find the channels and the format at each module, maps (N, C, H, W), maps (N, H, W, C) or tokens
    (N, L, C), and how many tokens come before the patches. They are made in eval mode and without gradients, on two
    images, then on one of twice the width, if the network takes it. Where they leave a doubt there is an error, and
    ``input_fmt`` and ``num_prefix_tokens`` tell. Of a tuple that a module returns, the first element is taken.

    Afterwards the network takes frames (B*T, C, H, W) as before. Wrap it in :class:`ClipModel` to feed it clips.
    :func:`restore` takes the layers out again.

    The module runs the layer from now on. It is copied, saved, traced, compiled and exported with it, and its
    parameters keep their names. Stochastic depth and DropBlock are drawn once per clip from now on.

    A tool that replaces, wraps or fuses the module (an adapter, SyncBatchNorm's conversion, ``fuse_modules``) drops the
    layer or runs it twice. The network checks this when it is called and when it is saved, and raises a RuntimeError
    that names the layer. A call of ``forward_features``, or of a part of the network, skips the check. Use such tools
    first, then insert, then compile. Prefer a block, a convolution or an activation to a batch norm. TorchScript can't
    compile such a module; ``torch.jit.trace`` can.

    ``start`` decides what the network computes before it is trained:

    - ``'paper'``: the layers start as they do alone, SME as the identity, TIM as TSM's shift, CME with gates near 1/2.
      Such a CME halves the input that a trained network expects.
    - ``'identity'``: what it did, bit for bit for SME, for TIM, and for ``[CME, TIM]`` at one place, where gates of
      exactly 1/2 meet a tap of 2. A CME alone starts with its gates at 0.98, and the network computes nearly the same.
      In float16, where the reference computes ``[CME, TIM]``, numbers below 2 ** -13 lose up to their last digit.
    - ``'shift'``: likewise, but TIM starts as TSM's shift: 2/8 of the channels come from the neighbouring frames.

    Args:
        model: The network.
        layer: ``CME``, ``SME``, ``TIM`` or a function with the same call, ``layer(channels, num_frames=...)``, or
            several of these, which run one after the other. It gets ``input_fmt`` and ``num_prefix_tokens``, too, where
            they are not the defaults.
        at: Names from ``model.named_modules()``: one name, a pattern such as ``'blocks.*.0'`` whose wildcards match
            within a component, a compiled regular expression for whole names, or a list of these. An ``nn.Sequential``
            stands for its first ('before') or last ('after') module.
        where: 'before' or 'after' the module.
        num_frames: Frames T of a clip.
        example_input: Input (1, C, H, W) to find the channels with. None: a zero image of the network's own size.
        start: 'paper', 'identity' or 'shift', see above.
        input_fmt: Format at all these modules: 'NCHW', 'NHWC' or 'NLC'. None: it is found out.
        num_prefix_tokens: Tokens before the patches at all these modules. None: it is found out.
        **layer_kwargs: Arguments of the layers, such as ``reduction=4``. Of several layers, those that know it get it.

    Returns:
        The inserted layers and their places.

    Raises:
        ValueError: A name or pattern matches nothing. ``where`` is not 'before' or 'after'. A module does not run, has
            no frames there in a format that is known, or does not have the forward of its class. Several formats, or
            numbers of prefix tokens, are possible, or it may take windows of a larger image. The model has
            layers with another num_frames. A layer argument is out of its range, or one that ``start`` sets.
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
    kinds: List[Any] = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    for kind in kinds or [None]:
        if not callable(kind) or isinstance(kind, nn.Module):
            raise TypeError(f'layer must be a class such as CME (it is built once per place), got {kind!r}')
    if len(set(kinds)) < len(kinds):
        raise ValueError(f'layer must name each layer once, got {layer!r}')
    arguments = _arguments(kinds, start, layer_kwargs)
    check_network(model)
    check_choice('where', where, ('before', 'after'))
    check_positive('num_frames', num_frames)
    check_num_frames(model, num_frames)
    targets = dict(_resolve(model, name, where) for name in _match(model, at))
    with all_or_nothing(model):
        with _spies(model, targets) as spies:
            calls = probe(model, targets, example_input)
        for call in calls.values():
            call.check_alone(where)
        forms = {name: calls[name].form(where, input_fmt, num_prefix_tokens) for name in targets}
        insertions = _put(model, kinds, arguments, forms, where, num_frames, spies)
        finish(model, num_frames)
    return Report(type(model).__name__, num_frames, insertions)


class Survey:
    """What flows at many modules of a network, for :func:`adapt`, which chooses some of them afterwards."""

    def __init__(self, model: nn.Module, targets: Dict[str, nn.Module], example_input: Optional[Tensor]) -> None:
        self.model = model
        ends = {_resolve(model, name, where)[0] for name in targets for where in ('before', 'after')}
        with _spies(model, ends) as self.spies:
            self.calls = probe(model, targets, example_input)

    def insert(
            self, kinds: List[Any], at: List[str], where: str, num_frames: int, start: str, **layer_kwargs: Any,
    ) -> List[Insertion]:
        """Put layers at some of the modules; as :func:`insert`, without another look, and without its end."""
        forms = {_resolve(self.model, name, where)[0]: self.calls[name].form(where) for name in at}
        arguments = _arguments(kinds, start, layer_kwargs)
        return _put(self.model, kinds, arguments, forms, where, num_frames, self.spies)


def _put(
        model: nn.Module, kinds: List[Any], arguments: List[Dict[str, Any]], forms: Dict[str, Form], where: str,
        num_frames: int, spies: 'Dict[str, _Spy]',
) -> List[Insertion]:
    made = []
    for name, form in forms.items():
        target = model.get_submodule(name)
        for kind, kwargs in zip(kinds, arguments):
            one = kind(form.channels, num_frames=num_frames, **form.kwargs(), **like(target, model), **kwargs)
            if not isinstance(one, ClipLayer):
                raise TypeError(f'layer must make a CME, SME or TIM, got {type(one).__name__}')
            made.append((name, one))
    return [attach(model, one, name, where, _owner(model, name, spies)) for name, one in made]


def _arguments(
        kinds: List[Layer], start: str, layer_kwargs: Dict[str, Any],
) -> List[Dict[str, Any]]:
    """The arguments of each layer: those of its start, and those of the user's that it knows."""
    starts = start_of(start, kinds)
    set_twice = [key for kwargs in starts.values() for key in kwargs if key in layer_kwargs]
    if set_twice:
        raise ValueError(f'{set_twice[0]} is set by start={start!r}, got {layer_kwargs[set_twice[0]]!r} besides')
    if len(kinds) == 1:
        return [{**starts.get(kinds[0], {}), **layer_kwargs}]
    known = [inspect.signature(kind).parameters for kind in kinds]
    for key in layer_kwargs:
        if not any(key in parameters for parameters in known):
            raise TypeError(f'none of the layers {kinds!r} has an argument {key!r}')
    return [
        {**starts.get(kind, {}), **{key: value for key, value in layer_kwargs.items() if key in parameters}}
        for kind, parameters in zip(kinds, known)]


def _match(model: nn.Module, at: Union[Names, List[Names]]) -> List[str]:
    """Names of the modules that match the patterns, in the order of the model."""
    names = [name for name, _ in model.named_modules() if name]
    selected = set()
    for pattern in at if isinstance(at, (list, tuple)) else [at]:
        if isinstance(pattern, re.Pattern):
            matched = [name for name in names if pattern.fullmatch(name)]
        elif isinstance(pattern, str):
            matched = [name for name in names if is_match(name, pattern)]
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

    def __init__(self) -> None:
        super().__init__()
        self.runs: List[int] = []  # of numbers of arguments; a list, as attributes that a pass sets are put back

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.runs.append(len(args))
        return x


@contextmanager
def _spies(model: nn.Module, names: Iterable[str]) -> Iterator[Dict[str, _Spy]]:
    """Put a spy in each module and in all modules above it. Containers get none: they run all their children."""
    paths = {name: None for path in names for name in _upwards(path)}
    spies = {name: _Spy() for name in paths if not isinstance(model.get_submodule(name), CONTAINERS)}
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
        if name in spies and not spies[name].runs:
            return name
    raise ValueError(
        f'model ({type(model).__name__}) runs all its children one by one and has no module to hold the layer at '
        f'{at!r}; wrap it in an nn.Module that calls it'
    )
