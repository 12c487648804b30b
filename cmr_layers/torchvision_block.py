"""torchvision's residual blocks with the temporal layers. :func:`cmr_layers.retrofit` makes them.

Nobody builds these blocks. A block of torchvision becomes one of them and keeps its parts. Other than in timm's blocks,
one ReLU serves all places. :mod:`.block` has timm's.
"""
from typing import TYPE_CHECKING, Optional, Tuple

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .block import TemporalBlock

__all__ = ['CMRBasicBlock', 'CMRBottleneck']


class _Block(TemporalBlock):
    last_act = 'relu'

    if TYPE_CHECKING:  # TorchScript reads annotations and has no type for modules
        bn1: nn.Module
        conv2: nn.Module
        bn2: nn.Module
        conv3: nn.Module
        bn3: nn.Module
        relu: nn.Module
        downsample: Optional[nn.Module]


class CMRBasicBlock(_Block, BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's BasicBlock with CME and TIM in front of its residual branch and SME at its end."""

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self._branches(self._begin(x), x)
        x += shortcut
        x = self.relu(x)
        x = self.sme(x)

        return x

    def _branches(self, x: Tensor, shortcut: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.bn1(x)
        x = self.relu(x)

        x = self.conv2(x)
        x = self.bn2(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x, shortcut


class CMRBottleneck(_Block, Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck with CME and TIM in front of its residual branch and SME at its end."""

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self._branches(self._begin(x), x)
        x += shortcut
        x = self.relu(x)
        x = self.sme(x)

        return x

    def _branches(self, x: Tensor, shortcut: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.bn1(x)
        x = self.relu(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.relu(x)

        x = self.conv3(x)
        x = self.bn3(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x, shortcut
