"""Figure 5 with a number: how well do SME's map and CME's channels find the thing that moves?

The map is the share of a place that SME's convolution gets, whatever is there: where features are small, a little noise
turns them far. So the strength of what the convolution gets, the norm of x (1 - s), is looked at beside it, and
that of x alone, which knows of no other frame.

The number is the area under the ROC curve: the probability that a pixel of the thing is brighter on the map than
another pixel of the clip. 1/2 is chance.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.motion.fit import normalise
from benchmarks.motion.scene import Batch, Difficulty, Range, clips
from benchmarks.motion.size import Size
from cmr_layers import SME
from cmr_layers.clip import ClipLayer
from cmr_layers.visualize import motion_maps

__all__ = ['area', 'localisation', 'moving']

STREAM = 5  # of random numbers; see movers.py
GOES_ON = 8  # the first classes move in every frame, the others rest in half of them


def area(values: Tensor, inside: Tensor) -> float:
    """Area under the ROC curve of values, to tell where ``inside`` is true; ties count half. nan if all are alike."""
    values, inside = values.flatten().double(), inside.flatten()
    ordered, place = values.unique(return_inverse=True)
    count = torch.bincount(place, minlength=len(ordered)).double()
    rank = (count.cumsum(0) - (count - 1) / 2)[place]  # the mean one of equal values
    n = int(inside.sum())
    rest = len(values) - n
    return float((rank[inside].sum() - n * (n + 1) / 2) / (n * rest)) if n and rest else float('nan')


def moving(count: int, side: int, seed: int = 0) -> Batch:
    """Clips whose actor moves and is visible in all frames, among distractors that are nearly as bright."""
    difficulty = Difficulty(step=Range(2., 3.), clutter=Range(.8, .8), share=Range(1., 1.))
    made = clips(2 * count + 20, (STREAM, seed), 'val', side=side, difficulty=difficulty)
    chosen = (made.labels < GOES_ON).nonzero()[:count, 0]  # two thirds of all
    return Batch(*(part[chosen] for part in made))


@contextmanager
def inputs_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[list[Tensor]]:
    """Within it, what the layers of a kind get is kept, in the order in which they run."""
    kept: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().clone()))
               for module in model.modules() if isinstance(module, kind)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def localisation(model: nn.Module, seed: int, size: Size) -> dict[str, list[float]]:
    """Areas of each map, mean over clips: to find the actor, and to find all things. Empty without CME and SME."""
    if not any(isinstance(m, ClipLayer) and (hasattr(m, 'gate') or hasattr(m, 'similarity')) for m in model.modules()):
        return {}
    made = moving(size.maps, size.side, seed)
    found: dict[str, list[tuple[float, float]]] = {}
    for i in range(len(made.labels)):
        clip = made.clips[i:i + 1]
        with inputs_of(model, SME) as inputs:
            seen = motion_maps(model, normalise(clip).unflatten(0, (1, -1)).to(size.device))
        pixels = clip[0].float().mean(1)
        change = F.pad((pixels[1:] - pixels[:-1]).abs(), (0, 0, 0, 0, 0, 1))
        grid = next(values.shape[1:] for values in (seen.motion, seen.top) if values is not None)
        strength = inputs[0].norm(dim=1) if inputs else None
        maps: dict[str, Any] = {  # all of the same resolution
            'sme': seen.motion, 'sme_input': strength,
            'sme_term': strength * seen.motion if strength is not None and seen.motion is not None else None,
            'cme_top': seen.top, 'cme_bottom': seen.bottom,
            'difference': F.adaptive_avg_pool2d(change, (grid[0], grid[1]))}
        for name, values in maps.items():
            if values is not None:
                # the last frame has no next one
                large = F.interpolate(values[None, :-1].float().cpu(), (size.side, size.side), mode='bilinear')[0]
                masks = made.actor[i, :-1] > .5, made.things[i, :-1] > .5
                found.setdefault(name, []).append((area(large, masks[0]), area(large, masks[1])))
    return {name: [round(value, 4) for value in torch.tensor(pairs).double().nanmean(0).tolist()]
            for name, pairs in found.items()}
