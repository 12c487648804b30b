"""Stochastic depth and DropBlock, drawn once per clip.

Both drop parts of single samples while a network trains. An image network takes each frame as a sample. A frame could
lose a branch that its neighbours keep, which looks like motion to SME and like a difference to CME.
"""
import re
from typing import ClassVar, List

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .clip import ClipModule, clip_shape, unfold

__all__ = ['ClipDrop', 'share_drops']

# Modules of timm, torchvision and transformers that draw once per sample: DropPath, ConvNextDropPath, DropBlock2d, ...
_DROPS = re.compile(r'.*(DropPath|StochasticDepth|DropBlock(2d)?)')


def _rate(name: str) -> property:
    """The rate of the wrapped module, which a schedule can set through the wrapper."""
    return property(lambda shared: getattr(shared.drop, name), lambda shared, rate: setattr(shared.drop, name, rate))


@register_notrace_module
class ClipDrop(ClipModule):
    """Applies the mask that another module draws for a clip's first frame to all frames of the clip.

    Args:
        drop: A module that multiplies its input by a random mask in training: timm's ``DropPath`` or ``DropBlock2d``,
            torchvision's ``StochasticDepth``, transformers' ``...DropPath``.
        num_frames: Frames T of a clip.

    Shapes:
        (B*T, ...) to the same.

    Raises:
        ValueError: drop adds noise, which is no mask. At call time: the input holds no whole number of clips.

    Example:
        >>> import torch
        >>> from timm.layers import DropPath
        >>> y = ClipDrop(DropPath(0.5), num_frames=4)(torch.ones(8, 1, 1, 1)).view(2, 4)
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, drop: nn.Module, num_frames: int) -> None:
        super().__init__(num_frames)
        if getattr(drop, 'with_noise', False):
            raise ValueError('drop must have with_noise=False to be drawn once a clip, got with_noise=True')
        self.drop = drop
        self.training = drop.training

    def forward(self, x: Tensor) -> Tensor:
        num_frames = clip_shape(x.shape[0], self.num_frames)[1]
        if not self.training or num_frames == 1:
            y: Tensor = self.drop(x)
            return y
        clips = unfold(x, self.num_frames)
        mask = self.drop(torch.ones_like(clips[:, 0]))
        y = (clips * mask.unsqueeze(1)).flatten(0, 1)
        return y

    drop_prob = _rate('drop_prob')  # the name in timm and transformers
    p = _rate('p')  # the name in torchvision
    __jit_unused_properties__: ClassVar[List[str]] = ['drop_prob', 'p']

    def extra_repr(self) -> str:
        return f'num_frames={self.num_frames}'


def _is_drop(module: nn.Module) -> bool:
    # a module with children or weights does more than multiply by a mask
    return bool(_DROPS.fullmatch(type(module).__name__)) and not (module._modules or module._parameters)


def share_drops(module: nn.Module, num_frames: int) -> List[ClipDrop]:
    """Draw all drops of a module once per clip, in place. Returns the modules that replace its drops."""
    made = []
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and _is_drop(child) and not isinstance(parent, ClipDrop):
                made.append(ClipDrop(child, num_frames))
                parent._modules[name] = made[-1]
    return made
