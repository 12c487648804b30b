"""The variant that the authors released, and their checkpoints.

The code published with the paper differs from its equations in five ways, all of them in CME:

1. The projections W1 and W2 run on the full feature map, and the pooling comes after them.
2. A batch norm and a ReLU follow each of them.
3. The softmax of equation (5) runs over t instead of j. The columns of the weights sum to 1, the rows do not.
4. A batch norm and a ReLU come before the sigmoid of equation (6). The gates lie in [0.5, 1).
5. No projection has a bias. The paper leaves this open.

Its SME follows the paper, with a bias in the convolution. Its TIM is the depthwise convolution of :class:`TIM`. A
checkpoint trained with that code needs this arithmetic. The rest of the package follows the paper.

:func:`load_released_checkpoint` loads their checkpoints and reads from the file which network it needs. timm loads them
by ``timm.create_model('released_cmr_resnet50', num_classes=...)`` with ``checkpoint_path=...`` or with
``pretrained=True, pretrained_cfg_overlay=dict(file=..., num_classes=...)``.

Their training script saves its learning rates as numpy's numbers. Importing this module therefore allows
``torch.load(..., weights_only=True)`` to read float64, float32 and int64 numbers of numpy, in the whole process.
"""
import math
import os
from functools import partial
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    load_pretrained,
    load_state_dict,
    register_model,
)
from torch import Tensor, nn

from . import block, sme
from . import released_checkpoint as checkpoint
from .checks import check_positive
from .clip import ClipLayer, temporal_keys
from .cmr_resnet import CMRResNet, check_pretrained
from .fuse import fold_norms, register_conv

__all__ = ['CME', 'CMRBlock', 'ReleasedCMRResNet', 'load_released_checkpoint']

torch.serialization.add_safe_globals(checkpoint.numpy_numbers())  # for timm, see above


@register_conv
class Projection(nn.Module):
    """A 1x1 convolution without bias. It starts with PyTorch's default, uniform in +-1/sqrt(in_channels).

    It is no ``nn.Conv2d``: timm initialises every ``nn.Conv2d`` of a network again.
    """
    bias: Optional[Tensor]

    def __init__(self, in_channels: int, out_channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1, device=device, dtype=dtype))
        self.register_parameter('bias', None)  # until it takes over a batch norm
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as described in the class docstring."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[1]}, {self.weight.shape[0]}'


def _projection(in_channels: int, out_channels: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        Projection(in_channels, out_channels, **dd), nn.BatchNorm2d(out_channels, **dd), nn.ReLU())


def _fuse(z: Tensor, k: Tensor) -> Tensor:
    """Equations (4) and (5) with the softmax over t, at least in float32, as dot products overflow half precision."""
    if not torch.jit.is_scripting():
        if not z.is_meta and torch.is_autocast_enabled(z.device.type):
            with torch.autocast(z.device.type, enabled=False):
                return _fuse_wide(z, k)
    return _fuse_wide(z, k)


def _fuse_wide(z: Tensor, k: Tensor) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    values, keys = z.to(dtype), k.to(dtype)
    d = -torch.matmul(keys, keys.transpose(1, 2))
    return (values + torch.matmul(d.softmax(dim=1), values)).to(z.dtype)


@register_notrace_module
class CME(ClipLayer):
    """Channel-wise motion enhancement as released; the module's docstring lists the five differences.

    It starts as in the released code, also within a network. The projections start with PyTorch's default for a
    convolution, uniform in +-1/sqrt(fan_in). The batch norms start with weight 1 and bias 0.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        reduction: Values and keys have C / reduction channels. It must divide C.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.

    Raises:
        ValueError: An argument is no positive int, or reduction does not divide channels. At call time: the input has
            another shape (see :class:`ClipLayer`).

    Example:
        >>> layer = CME(64, num_frames=8).eval()
        >>> gates = layer.gate(torch.randn(16, 64, 14, 14))
        >>> gates.shape, bool((gates >= 0.5).all())
        (torch.Size([2, 8, 64]), True)
    """

    def __init__(
            self,
            channels: int,
            num_frames: int = 8,
            reduction: int = 8,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, num_frames)
        if channels % check_positive('reduction', reduction) != 0:
            raise ValueError(f'reduction must divide channels={channels}, got {reduction}')
        self.w1 = _projection(channels, channels // reduction, **dd)
        self.w2 = _projection(channels, channels // reduction, **dd)
        self.w3 = _projection(channels // reduction, channels, **dd)

    def reset_parameters(self) -> None:
        """Start as described in the class docstring."""
        for projection in (self.w1, self.w2, self.w3):
            for layer in projection[:2]:
                layer.reset_parameters()  # type: ignore[operator]

    def gate(self, x: Tensor) -> Tensor:
        """Gates a in [0.5, 1): (B*T, C, H, W) or (B, T, C, H, W) to (B, T, C)."""
        return self._gate(self._clips(x))

    def _gate(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        z = self.w1(frames).mean((2, 3)).view(x.shape[0], x.shape[1], -1)
        k = self.w2(frames).mean((2, 3)).view(x.shape[0], x.shape[1], -1)
        z = _fuse(z, k)
        a: Tensor = self.w3(z.flatten(0, 1)[:, :, None, None]).sigmoid()
        return a.view(x.shape[0], x.shape[1], -1)

    def forward_clips(self, x: Tensor) -> Tensor:
        return x * self._gate(x).to(x.dtype)[:, :, :, None, None]

    fuse = fold_norms  # for timm's reparameterize_model


class CMRBlock(block.CMRBlock):
    """The residual block as released: :class:`cmr_layers.CMRBlock` with the released CME and a bias in SME."""
    cme_layer = CME
    sme_layer = partial(sme.SME, bias=True)


class ReleasedCMRResNet(CMRResNet):
    """The network as released, made of the released blocks. Deep networks have CME and TIM in every other block.

    The classifier starts as in the released code: the weight normal with a standard deviation of 0.001, the bias zero.

    Args:
        layers: Blocks of each stage. With 23 or more in the third stage, TIM and CME go into the blocks 0, 2, 4, ... of
            each stage (TSM's n_round = 2).
        **kwargs: Arguments of :class:`CMRResNet`. The authors train with drop_rate=0.5.
    """

    def __init__(self, layers: Tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(CMRBlock, layers, **kwargs)
        if layers[2] >= 23:
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                for i, odd in stage.named_children():  # type: ignore[union-attr]
                    if int(i) % 2:
                        odd.cme = odd.tim = nn.Identity()

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Start as the family does, and the classifier as described in the class docstring."""
        super().init_weights(zero_init_last)
        self._start_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Do what timm's does. The new classifier starts as described in the class docstring."""
        super().reset_classifier(num_classes, global_pool)
        self._start_classifier()

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def _start_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=.001)
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Do what PyTorch's does, also for the authors' names, so that timm's ``checkpoint_path=`` takes their file."""
        if any(checkpoint.our_name(key) != key for key in state_dict if isinstance(key, str)):
            state_dict = checkpoint.rename(state_dict)
            checkpoint.check_values(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def load_pretrained(self, path: Union[str, 'os.PathLike[str]']) -> None:
        """Load a file for timm's ``pretrained=True``: a file of the authors, of this package, or of an image network.

        Args:
            path: The file. Its classifier is loaded if two numbers are the file's number of classes: ``num_classes``,
                and 'num_classes' of the network's ``pretrained_cfg`` (174, or as ``pretrained_cfg_overlay`` says).

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no checkpoint, or its number of classes differs from ``pretrained_cfg``.
            RuntimeError: Keys are missing, unexpected or of another shape.
        """
        checkpoint.open_file(path).close()
        try:
            state_dict = load_state_dict(os.fspath(path))
        except Exception as error:
            raise checkpoint.refusal(path, error) from None
        stem = next(module for module in self.conv1.modules() if isinstance(module, nn.Conv2d))
        cfg: Any = self.pretrained_cfg
        load_pretrained(
            self, {**cfg, 'state_dict': state_dict, 'custom_load': False},
            num_classes=self.num_classes, in_chans=stem.in_channels, filter_fn=_check_pretrained)


def _check_pretrained(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Check a state dict as the family does, also one with the authors' names.

    The classifier of an image network is left out if its number of classes differs.
    """
    renamed = checkpoint.rename(state_dict)
    own = model.state_dict()
    cfg: Any = model.pretrained_cfg
    if not temporal_keys(model) & renamed.keys() and 'fc.weight' in renamed:
        if renamed['fc.weight'].shape[:1] not in ((cfg['num_classes'],), (model.num_classes,)):
            renamed = {key: value for key, value in renamed.items() if key not in ('fc.weight', 'fc.bias')}
            if model.num_classes == cfg['num_classes']:  # then timm wants a classifier
                renamed.update({key: value for key, value in own.items() if key in ('fc.weight', 'fc.bias')})
    renamed = check_pretrained(renamed, model)
    checkpoint.check_values(renamed)
    return renamed


_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

default_cfgs = generate_default_cfgs({
    f'released_cmr_resnet{depth}': dict(
        input_size=(3, 224, 224), pool_size=(7, 7), num_classes=174, crop_pct=0.875, interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv='conv1', classifier='fc')
    for depth in _LAYERS})


def _create(depth: int, pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    if pretrained:  # load_pretrained() takes the file
        kwargs['pretrained_cfg_overlay'] = {'custom_load': True, **(kwargs.get('pretrained_cfg_overlay') or {})}
        if kwargs.get('features_only'):
            kwargs['num_classes'] = 0  # timm doesn't tell load_pretrained() that no classifier is wanted
    model: ReleasedCMRResNet = build_model_with_cfg(
        ReleasedCMRResNet, f'released_cmr_resnet{depth}', pretrained, layers=_LAYERS[depth],
        pretrained_filter_fn=_check_pretrained, **kwargs)
    return model


@register_model
def released_cmr_resnet50(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-50 as released, for timm. It takes the arguments of :class:`ReleasedCMRResNet`."""
    return _create(50, pretrained, **kwargs)


@register_model
def released_cmr_resnet101(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-101 as released, for timm. It takes the arguments of :class:`ReleasedCMRResNet`."""
    return _create(101, pretrained, **kwargs)


@register_model
def released_cmr_resnet152(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-152 as released, for timm. It takes the arguments of :class:`ReleasedCMRResNet`."""
    return _create(152, pretrained, **kwargs)


def load_released_checkpoint(
        path_or_dict: Union[str, 'os.PathLike[str]', Mapping[str, Any]],
        num_frames: int = 8,
) -> ReleasedCMRResNet:
    """Turn a checkpoint of the authors' code into a model that computes what their code computes.

    The file tells the depth, the number of classes, CME's reduction and whether there is a dropout. The weights fit any
    ``num_frames``. The released file was trained with 8.

    Nothing in a file is run. It may hold tensors, Python's own types and numpy's numbers, which the authors' training
    script saves. The file is checked before the model is built, and the memory it takes is in proportion to its size.

    Args:
        path_or_dict: The file, or its content: {'model': state_dict, ...}, {'state_dict': state_dict, ...} or the state
            dict itself, with the authors' names or with ours. Half and double precision become float32.
        num_frames: Frames T of a clip.

    Returns:
        The model, in float32 and in eval mode. For further training it has the authors' dropout of 0.5 before the
        classifier. It has none if the file was trained without; the classifier is 'base_model.fc' then, not 'new_fc'.
        timm can save the model and, once this module is imported, load it again.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no sound checkpoint of a CMR ResNet-50, -101 or -152. The message says what is wrong.

    Example:
        >>> load_released_checkpoint('ckpt/sthv1_8f.pth.tar')  # doctest: +SKIP
    """
    if isinstance(path_or_dict, (str, os.PathLike)):
        content = checkpoint.read(path_or_dict)
    elif isinstance(path_or_dict, Mapping):
        content = path_or_dict
    else:
        raise ValueError(f'path_or_dict must be a path or a dict, got {type(path_or_dict).__name__}')
    found = checkpoint.state_dict_in(content)
    state_dict = checkpoint.rename(found)
    name, arguments = _architecture(state_dict)
    if any(str(key).removeprefix('module.').startswith('base_model.fc.') for key in found):
        arguments['drop_rate'] = 0.
    arguments['num_frames'] = num_frames
    # on the meta device: no memory is taken before the file is known to fit
    skeleton = timm.create_model(name, device='meta', **arguments)
    state_dict = checkpoint.check_fit(state_dict, skeleton.state_dict())
    checkpoint.check_values(state_dict)
    model = timm.create_model(name, **arguments)  # not _create(): timm records the arguments for save_for_hf
    assert isinstance(model, ReleasedCMRResNet)
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def _architecture(state_dict: Mapping[str, Tensor]) -> Tuple[str, Dict[str, Any]]:
    """The name of a network in timm and its arguments, read from a state dict with our names."""
    blocks = {key.split('.')[1] for key in state_dict if key.startswith('layer3.')}
    depths = {layers[2]: depth for depth, layers in _LAYERS.items()}
    if len(blocks) not in depths or 'layer3.0.conv3.weight' not in state_dict or 'fc.weight' not in state_dict:
        raise ValueError(
            f'the checkpoint must be one of the CMR ResNet-50, -101 or -152 as released (layer3 of '
            f'{", ".join(map(str, depths))} bottlenecks, and new_fc); got layer3 of {len(blocks)} blocks and keys '
            f'such as {sorted(state_dict)[:4]}'
        )
    classes, w1 = state_dict['fc.weight'], state_dict.get('layer1.0.cme.w1.0.weight')
    if classes.ndim != 2 or not len(classes):
        raise ValueError(f'the classifier of the checkpoint must have rows of weights, got {list(classes.shape)}')
    if w1 is None or w1.ndim != 4 or not len(w1) or w1.shape[1] % len(w1):
        raise ValueError(
            'the checkpoint must hold the projections of CME, of shape [C / reduction, C, 1, 1]; got '
            f'{None if w1 is None else list(w1.shape)} for the first (layer1.0.trans_att.conv1_reduce_k.0.weight)'
        )
    return f'released_cmr_resnet{depths[len(blocks)]}', {
        'num_classes': len(classes), 'reduction': w1.shape[1] // len(w1), 'drop_rate': .5}
