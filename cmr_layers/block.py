"""The CMR block: a residual block with CME and TIM in front of its residual branch, and SME at its end (Figure 4).

Type A is CME, TIM and the block. Type B is type A with SME. Three placements decide which type a block is.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Optional, Tuple, Union

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .checks import check_choice
from .clip import ClipLayer
from .cme import CME
from .cme_tim import cme_tim_conv
from .drop import share_drops
from .fuse import fold_norms
from .sme import SME
from .tim import TIM

__all__ = ['CMRBasicBlock', 'CMRBlock', 'PLACEMENTS', 'TemporalBlock', 'is_placed']

PLACEMENTS = ('all', 'first', 'none')


def is_placed(name: str, where: str, opens_stage: bool) -> bool:
    """Whether a block takes a layer: in all blocks of a network, in each stage's first, or in none (Table 5)."""
    check_choice(name, where, PLACEMENTS)
    return where == 'all' or (where == 'first' and opens_stage)


class TemporalBlock(nn.Module):
    """A residual block with temporal layers: how it begins.

    A block defines ``_branches``, what is between its beginning and the sum at its end, and the name of the activation
    of that sum. A fused stage (:mod:`.stage`) runs a block by these.
    """
    last_act: ClassVar[str]
    if TYPE_CHECKING:  # TorchScript reads annotations and has no type for modules
        cme: nn.Module
        tim: nn.Module
        sme: nn.Module
        conv1: Any

    def _begin(self, x: Tensor, pooled: Optional[Tensor] = None) -> Tensor:
        """``conv1(tim(cme(x)))``; ``pooled``: what the block before knows of x, see :func:`.ops.cme_tim`."""
        if torch.jit.is_scripting():
            x = self.cme(x)
            x = self.tim(x)
            x = self.conv1(x)
        else:
            x = cme_tim_conv(self.cme, self.tim, self.conv1, x, pooled)
        return x

    fuse = fold_norms  # for timm's reparameterize_model


class _BuiltBlock(TemporalBlock):
    """The common part of the two blocks: timm's block with temporal layers."""
    cme_layer: Callable[..., ClipLayer] = CME
    tim_layer: Callable[..., ClipLayer] = TIM
    sme_layer: Callable[..., ClipLayer] = SME

    def __init__(
            self,
            *args: Any,
            num_frames: int = 8,
            cme: str = 'all',
            tim: str = 'all',
            sme: str = 'first',
            reduction: Union[int, Tuple[int, int]] = 8,
            device: Any = None,
            dtype: Any = None,
            **kwargs: Any,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(*args, **dd, **kwargs)  # timm's block, which stands next in line
        opens_stage = self.downsample is not None
        in_channels: Any = self.conv1.in_channels
        out_channels: Any = getattr(self, 'conv3', self.conv2).out_channels  # type: ignore[union-attr]

        dd['num_frames'] = num_frames
        self.cme = nn.Identity()
        self.tim = nn.Identity()
        self.sme = nn.Identity()
        if is_placed('cme', cme, opens_stage):
            self.cme = self.cme_layer(in_channels, reduction=reduction, **dd)
        if is_placed('tim', tim, opens_stage):
            self.tim = self.tim_layer(in_channels, **dd)
        if is_placed('sme', sme, opens_stage):
            self.sme = self.sme_layer(out_channels, **dd)
        share_drops(self, num_frames)


class CMRBlock(_BuiltBlock, Bottleneck):
    """timm's Bottleneck with the temporal layers: CMR-BlockA, or CMR-BlockB where ``sme`` puts an SME at its end.

    CME and TIM sit on the residual branch only, and the shortcut takes the block's input as it is. SME sees the block's
    output after the ReLU. Its own output is not rectified, as in the authors' code.

    Args:
        *args: timm's ``Bottleneck`` arguments (inplanes, planes, stride, downsample, ...), as they are.
        num_frames: Frames T of a clip.
        cme: The network's blocks that take a CME: 'all', each stage's 'first', or 'none'. A block with a downsample
            counts as the first of its stage.
        tim: Likewise for TIM.
        sme: Likewise for SME.
        reduction: CME's reduction, r1 = r2 or (r1, r2).
        **kwargs: timm's ``Bottleneck`` keyword arguments.

    Shapes:
        (B*T, inplanes, H, W) to (B*T, 4 * planes, H / stride, W / stride).

    Raises:
        ValueError: A placement is none of the three, or an argument of a layer is out of its range.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model('resnet26', block=CMRBlock, block_args=dict(num_frames=4, sme='none'))
        >>> model.eval()(torch.randn(4, 3, 64, 64)).shape  # a plain timm ResNet has no consensus: one row per frame
        torch.Size([4, 1000])
    """

    last_act = 'act3'

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self._branches(self._begin(x), x)
        x += shortcut
        x = self.act3(x)
        x = self.sme(x)

        return x

    def _branches(self, x: Tensor, shortcut: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)  # type: ignore[misc]

        x = self.conv3(x)
        x = self.bn3(x)

        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x, shortcut


class CMRBasicBlock(_BuiltBlock, BasicBlock):
    """timm's BasicBlock with the temporal layers, the sibling of :class:`CMRBlock` for ResNet-18 and -34.

    Arguments and errors are the same, with one difference. The first stage of timm's ResNet-18 and -34 has no
    downsample, so its blocks can't know which of them is the first, and 'first' leaves that stage without the layer.
    ``cmr_resnet18`` and ``cmr_resnet34`` tell their blocks, and have the layer there.

    Shapes:
        (B*T, inplanes, H, W) to (B*T, planes, H / stride, W / stride).

    Example:
        >>> import torch
        >>> CMRBasicBlock(64, 64, num_frames=4)(torch.randn(8, 64, 14, 14)).shape
        torch.Size([8, 64, 14, 14])
    """

    last_act = 'act2'

    def forward(self, x: Tensor) -> Tensor:
        x, shortcut = self._branches(self._begin(x), x)
        x += shortcut
        x = self.act2(x)
        x = self.sme(x)

        return x

    def _branches(self, x: Tensor, shortcut: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)  # type: ignore[misc]

        x = self.conv2(x)
        x = self.bn2(x)

        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return x, shortcut
