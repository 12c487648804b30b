"""TSN: ResNet-50 on every frame, the mean of the logits; and how the others get into it.

Source: `Temporal Segment Networks` (ECCV 2016).
"""
from collections.abc import Callable, Iterator
from typing import Any

import timm
from timm.models.resnet import Bottleneck
from torch import nn

from cmr_layers import ClipModel

__all__ = ['before_conv1', 'bottlenecks', 'check_options', 'tsn_resnet50']


class Clips(ClipModel):
    """A ClipModel that does not look through its layers again at every call: the peers alone would pay for it."""

    def _check_layers(self) -> None:
        pass  # a builder makes them with this T, and nothing changes it


def tsn_resnet50(num_frames: int = 8, num_classes: int = 174, name: str = 'resnet50', **kwargs: Any) -> ClipModel:
    """ResNet-50, or timm's network of another name, that averages the logits of a clip's frames."""
    return Clips(timm.create_model(name, num_classes=num_classes, **kwargs), num_frames)


def bottlenecks(model: nn.Module) -> Iterator[Bottleneck]:
    """All residual blocks, in order."""
    return (module for module in model.modules() if isinstance(module, Bottleneck))


def before_conv1(model: nn.Module, make: Callable[..., nn.Module]) -> None:
    """Open the residual branch of every block with what ``make(channels, device=, dtype=)`` returns.

    The shortcut takes the block's input as it is. The convolution's keys become ``conv1.1.weight``.
    """
    for block in bottlenecks(model):
        conv = block.conv1
        block.conv1 = nn.Sequential(  # type: ignore[assignment]
            make(conv.in_channels, device=conv.weight.device, dtype=conv.weight.dtype), conv)


def check_options(options: dict[str, Any]) -> None:
    """Refuse what timm's block can do and a block with a forward of its own does not.

    Raises:
        ValueError: One of these options of a block is set.
    """
    for name in ('aa_layer', 'attn_layer', 'drop_block', 'drop_path'):
        if options.get(name) is not None:
            raise ValueError(f'{name} must be None, since this block has none, got {options[name]!r}')
