"""timm's names: their families, and which of them are one network but for widths and depths."""
import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

__all__ = ['build', 'families', 'no_values', 'sizes', 'structure']

# A network of few and narrow blocks stands for those like it
_SMALL = ('zepto', 'atto', 'femto', 'pico', 'nano', 'xxs', 'xxtiny', 'xs', 'xtiny', 'tiny', 'mini', 'small', 'little',
          'medium', 'base', 'large', 'xlarge', 'huge', 'giant')


def families() -> dict[str, list[str]]:
    """timm's names by the file that has their architecture, small ones first. Our own are none of timm's."""
    found = {}
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if not name.startswith(('cmr_', 'released_'))]
        if names:
            found[module] = sorted(names, key=_size)
    return found


def _size(name: str) -> tuple[int, list[int], str]:
    words = re.split(r'[_.]', name)
    rank = next((n for n, word in enumerate(_SMALL) if word in words), _SMALL.index('small'))
    return rank, [int(number) for number in re.findall(r'\d+', name)], name


@contextmanager
def no_values() -> Iterator[None]:
    """Networks that are built inside have no values, so none are drawn: on the meta device that takes most time."""
    names = [name for name in vars(nn.init) if re.fullmatch(r'[a-z]\w*_', name)]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(nn.init, name, _same))
        yield


def _same(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def build(name: str, device: str = 'meta', **kwargs: Any) -> nn.Module:
    """A network without weights, or with random ones."""
    if device == 'cpu':
        torch.manual_seed(0)
        return timm.create_model(name, **kwargs)
    with no_values():
        return timm.create_model(name, device='meta', **kwargs)


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a network of timm declares."""
    channels, height, width = model.pretrained_cfg['input_size']  # type: ignore[index]
    return channels, height, width


def structure(model: nn.Module) -> str:
    """A name for all networks that have the same modules and parameters, whatever their widths and depths.

    Numbers in names are left out, so blocks that repeat count once. The prefix tokens count, and whether images are
    square.
    """
    parts = {f'{re.sub("[0-9]+", "#", name)} {type(module).__name__}' for name, module in model.named_modules()}
    parts |= {re.sub('[0-9]+', '#', name) for name, _ in model.named_parameters()}
    _, height, width = sizes(model)
    parts |= {str(getattr(model, 'num_prefix_tokens', None)), str(height == width)}
    return hashlib.sha256('\n'.join(sorted(parts)).encode()).hexdigest()[:12]
