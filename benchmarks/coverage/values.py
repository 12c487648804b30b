"""A network of timm with values, on the smallest image that it takes."""
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.check import check
from benchmarks.coverage.timm_names import build, sizes

__all__ = ['check_values']

_SIDES = (64, 128)


def _takes(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether a network, without values, runs on such images, and on wider ones, so that its places can be found."""
    try:
        with torch.no_grad():
            for shape in ((2, *size), (1, size[0], size[1], 2 * size[2])):
                model(torch.zeros(shape, device='meta'))
    except Exception:
        return False
    return True


def _smallest(name: str) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The size of the images, and the arguments that make the network take them."""
    model = build(name).eval()
    size = sizes(model)
    for side in _SIDES:
        small = (size[0], side, side)
        if side < size[1] == size[2] and _takes(model, small):
            return small, {}
    for side in _SIDES:  # a network that is built for one size
        if side < size[1] == size[2]:
            try:
                fixed = build(name, img_size=side).eval()
                with torch.no_grad():
                    fixed(torch.zeros(2, size[0], side, side, device='meta'))
            except Exception:
                continue
            return (size[0], side, side), {'img_size': side}
    return size, {}


def check_values(name: str) -> dict[str, Any]:
    """What became of a network of timm with random weights."""
    declared: tuple[tuple[int, int, int], dict[str, Any]] = (sizes(build(name)), {})
    tries = [_smallest(name), declared]
    for size, kwargs in tries:
        found = check(build(name, 'cpu', **kwargs), torch.zeros(1, *size), size, values=True)
        if found['verdict'] == 'all' or (size, kwargs) == declared:
            break  # a small image may be resized, or lose its edges in the stem
    return {'size': list(size), **found}
