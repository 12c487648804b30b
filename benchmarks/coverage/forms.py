"""Are the channels of the layers those of the network? Its own modules say so, and nothing of the package is asked."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cmr_layers.clip import ClipLayer

__all__ = ['Ran', 'bare_stages', 'watch', 'wrong_channels']

_INPUT = ('in_channels', 'in_features', 'normalized_shape', 'num_features', 'num_channels')
_OUTPUT = ('out_channels', 'out_features', 'normalized_shape', 'num_features', 'num_channels')

Ran = list[tuple[str, nn.Module]]


def _width(module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if isinstance(value, (tuple, list)) and value:
            value = value[-1]
        if isinstance(value, int):
            return value
    return None


@contextmanager
def watch(model: nn.Module) -> Iterator[Ran]:
    """The modules with parameters and widths of their own that ran, in their order. Temporal layers are none."""
    ran: Ran = []
    layers = {part for module in model.modules() if isinstance(module, ClipLayer) for part in module.modules()}
    handles = [
        module.register_forward_pre_hook(lambda module, _, name=name: ran.append((name, module)))
        for name, module in model.named_modules()
        if name and module not in layers and any(p is not None for p in module._parameters.values())
        and _width(module, _INPUT) is not None]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def wrong_channels(model: nn.Module, report: Any, ran: Ran) -> tuple[int, list[str]]:
    """How many layers have a witness of their channels, and those that none of their witnesses confirms.

    Witnesses are the widths of the modules that ran inside the one at the place, of the one that ran before it and of
    the one that ran after it. Besides what ``feature_info`` says of a stage, and ``embed_dim`` of all.
    """
    infos = [info for info in getattr(model, 'feature_info', None) or [] if isinstance(info, dict)]
    embed_dim = getattr(model, 'embed_dim', None)
    checked, wrong = 0, []
    for layer in report:
        inside = [number for number, (name, _) in enumerate(ran)
                  if name == layer.at or name.startswith(f'{layer.at}.')]
        near = ran[max(inside[0] - 1, 0):inside[-1] + 2] if inside else []
        found = {_width(module, attributes) for _, module in near for attributes in (_INPUT, _OUTPUT)}
        found |= {info['num_chs'] for info in infos if layer.where == 'after'
                  and info.get('module') and f'{layer.at}.'.startswith(f'{info["module"]}.')}
        found |= {embed_dim if isinstance(embed_dim, int) else None}
        found -= {None}
        checked += bool(found)
        if found and layer.channels not in found:
            wrong.append(f'{layer.name} has {layer.channels} channels')
    return checked, wrong


def bare_stages(model: nn.Module, report: Any) -> list[str]:
    """Stages by ``feature_info``, but for stems, that got no layer: blocks that were not found."""
    infos = [info for info in getattr(model, 'feature_info', None) or [] if isinstance(info, dict)]
    names = dict.fromkeys(info['module'] for info in infos if info.get('module'))
    modules = dict(model.named_modules())
    return [name for name in names
            if len(list(modules[name].modules()) if name in modules else []) > 4
            and not any(f'{layer.at}.'.startswith(f'{name}.') for layer in report)]
