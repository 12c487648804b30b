"""One network: adapt it, run it, restore it. On the meta device there are sizes only, on a CPU there are values."""
import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.forms import bare_stages, watch, wrong_channels
from cmr_layers import ClipModel, adapt, restore
from cmr_layers.clip import ClipLayer

__all__ = ['FRAMES', 'check']

FRAMES = 3
_LONG = 240  # characters of a reason


def check(model: nn.Module, example: Tensor | None, size: tuple[int, int, int], values: bool = False) -> dict[str, Any]:
    """What became of a network that was adapted, ``size`` being that of its images.

    The result has a ``verdict``: 'all' blocks took their layers, 'some' did, 'none', or 'broken', where what
    ``broken`` says went wrong afterwards.
    """
    model.eval()
    frames = torch.randn(FRAMES, *size) if values else torch.zeros(FRAMES, *size, device='meta')
    with torch.no_grad():
        if values:
            _move(model)
        state = {key: copy.deepcopy(value) if values else value.shape for key, value in model.state_dict().items()}
        modules = [(name, type(module)) for name, module in model.named_modules()]
        before = _flat(model(frames)) if values else None
        try:
            report = adapt(model, num_frames=FRAMES, example_input=example)
        except Exception as error:
            return {'verdict': 'none', 'reason': _short(error)}
        kinds = Counter(layer.kind for layer in report)
        found: dict[str, Any] = {
            'verdict': 'some' if report.left else 'all', 'layers': dict(kinds), 'left': _reasons(report.left),
            'formats': sorted({model.get_submodule(layer.name).input_fmt for layer in report}),
            'bare': bare_stages(model, report)}
        try:
            with watch(model) as ran:
                after = _flat(model(frames))
            found['checked'], found['unconfirmed'] = wrong_channels(model, report, ran)
            broken = _clips(model, frames, after, found)
            if values and before is not None:
                broken += _values(model, report, frames, before, after, found)
            restore(model)
            broken += _restored(model, state, modules, frames, before)
        except Exception as error:
            broken = [_short(error)]
    if broken:
        found.update(verdict='broken', broken=broken)
    return found


def _clips(model: nn.Module, frames: Tensor, after: list[Tensor], found: dict[str, Any]) -> list[str]:
    """A clip has to become one vector, if the network makes vectors of images."""
    if len(after) == 1 and after[0].ndim != 2:
        found['maps'] = True  # an encoder; ClipModel averages vectors
        return []
    try:
        clip = ClipModel(model, FRAMES)(frames[None])
    except TypeError as error:
        if 'model must return a tensor of shape' not in str(error):
            raise
        found['maps'] = True
        return []
    classes = getattr(model, 'num_classes', None) or clip.shape[1]
    return [] if clip.shape == (1, classes) else [f'a clip became {list(clip.shape)}, wanted [1, {classes}]']


def _values(model: nn.Module, report: Any, frames: Tensor, before: list[Tensor],
            after: list[Tensor], found: dict[str, Any]) -> list[str]:
    """The start is the identity, and trained layers see the order of the frames."""
    gates = {(i.at, i.where) for i in report if i.kind == 'CME'}
    found['identity'] = gates <= {(i.at, i.where) for i in report if i.kind == 'TIM'}
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    broken = [] if same else ['the start is not the identity']
    layers = [module for module in model.modules() if isinstance(module, ClipLayer)]
    for layer in layers:
        for p in layer.parameters():
            p.add_(torch.randn_like(p).mul_(.3))
    there, back = _flat(model(frames)), _flat(model(frames.flip(0)))
    if all(x.shape == y.shape and torch.equal(x, y.flip(0)) for x, y in zip(there, back)):
        broken.append('frames in another order gave the same')
    return broken


def _restored(model: nn.Module, state: dict[str, Any], modules: list[Any], frames: Tensor,
              before: list[Tensor] | None) -> list[str]:
    now = model.state_dict()
    if list(now) != list(state) or modules != [(name, type(module)) for name, module in model.named_modules()]:
        return ['restore left other modules or keys']
    if before is None:
        return [] if all(now[key].shape == shape for key, shape in state.items()) else ['restore left other shapes']
    if not all(torch.equal(now[key], value) for key, value in state.items()):
        return ['restore left other values']
    return [] if all(map(torch.equal, before, _flat(model(frames)))) else ['restore left other outputs']


def _move(model: nn.Module) -> None:
    """Constants that a training starts from, such as gains of 0, would hide the blocks behind them."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype).mul_(.1))


def _flat(output: Any) -> list[Tensor]:
    """All tensors of an output; boxes and masks come in dicts and lists."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if hasattr(output, 'values') else output if isinstance(output, (list, tuple)) else []
    return [x for item in items for x in _flat(item)]


def _reasons(left: dict[str, str]) -> dict[str, str]:
    """A reason, and the blocks that were left for it. Names and numbers in a reason are those of the first one."""
    found: dict[str, str] = {}
    kinds: dict[str, list[str]] = {}
    for name, reason in left.items():
        kinds.setdefault(reason.split('; it is')[0].split(': it is')[0].replace(repr(name), ''), []).append(name)
    for names in kinds.values():
        found[names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'] = _short(left[names[0]])
    return found


def _short(error: Any) -> str:
    text = ' '.join(str(error).split())
    text = text if isinstance(error, str) else f'{type(error).__name__}: {text}'
    return text if len(text) <= _LONG else f'{text[:_LONG]} ...'
