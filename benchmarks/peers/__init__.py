"""What a user would pick instead of CMR, each a builder of ResNet-50 with ``num_frames`` and ``num_classes``.

Every file names its source and says where the paper and the code that was released differ, and which of them it is.
They are written for reading and for timing, not for training to a paper's accuracy, and share what does not
distinguish them: timm's ResNet-50, :class:`cmr_layers.ClipModel` for the clip axis, and :class:`cmr_layers.TIM` for
every depthwise convolution over time. So a peer with such a convolution has our fused path of it, too.

A builder returns a network from clips (B, T, 3, H, W), or frames (B*T, 3, H, W), to logits (B, num_classes). What
else it is given goes to timm: ``device``, ``channels``, ...

Example:
    >>> import torch
    >>> model = PEERS['tsm'](num_frames=4, num_classes=174).eval()
    >>> model(torch.randn(1, 4, 3, 64, 64)).shape
    torch.Size([1, 174])
"""
from collections.abc import Callable

from torch import nn

from .gsm import gsm_resnet50
from .resnet import tsn_resnet50
from .stm import stm_resnet50
from .tdrl import tdrl_resnet50
from .tea import tea_res2net50
from .tei import tei_resnet50
from .tsm import tsm_resnet50

__all__ = ['PEERS']

PEERS: dict[str, Callable[..., nn.Module]] = {
    'tsn': tsn_resnet50,
    'tsm': tsm_resnet50,
    'tei': tei_resnet50,
    'stm': stm_resnet50,
    'tdrl': tdrl_resnet50,
    'tea': tea_res2net50,
    'gsm': gsm_resnet50,
}
