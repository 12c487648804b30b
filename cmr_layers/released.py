"""The variant that the authors released, and their checkpoints.

The code published with the paper computes something else than its equations in five ways, all of them in CME:

1. the projections W1 and W2 run on the full feature map and are pooled afterwards, not the other way round;
2. a batch norm and a ReLU follow each of them;
3. the softmax of equation (5) runs over t instead of j, so the columns of the weights sum to 1 and the rows do not;
4. a batch norm and a ReLU come before the sigmoid of equation (6), so the gates lie in [0.5, 1);
5. no projection has a bias, which the paper leaves open.

Its SME follows the paper, with a bias in the convolution; its TIM is the depthwise convolution of :class:`TIM`. A
checkpoint trained with that code only means something with this arithmetic. Everything else of the package is the
paper's.

Their checkpoints come in by :func:`load_released_checkpoint`, which reads from the file what network it needs, or by
``timm.create_model('released_cmr_resnet50', num_classes=...)`` with ``checkpoint_path=...`` or with
``pretrained=True, pretrained_cfg_overlay=dict(file=..., num_classes=...)``. Their training script saves its learning
rates as numpy's numbers. For timm, importing this module allows ``torch.load(..., weights_only=True)`` to read those
(float64, float32 and int64), in the whole process.
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
from .clip import ClipLayer, check_positive, temporal_keys
from .cmr_resnet import CMRResNet, check_pretrained
from .fuse import fold_norms, register_conv

__all__ = ['CME', 'CMRBlock', 'ReleasedCMRResNet', 'load_released_checkpoint']

torch.serialization.add_safe_globals(checkpoint.numpy_numbers())  # for timm, see above


@register_conv
class Projection(nn.Module):
    """A 1x1 convolution without bias, which starts with PyTorch's default: uniform in +-1/sqrt(in_channels).

    It is no ``nn.Conv2d``, since timm starts each of those anew in a network, whoever owns it.
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
    """Equations (4) and (5) with the softmax over t, in float32 at least: dot products overflow half precision."""
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
    """Channel-wise motion enhancement as released, see the five differences above.

    As there, the projections start with PyTorch's default for a convolution, uniform in +-1/sqrt(fan_in), in a
    network, too, and the batch norms with weight 1 and bias 0.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        reduction: Values and keys have C / reduction channels; it has to divide C.

    Shapes:
        (B*T, C, H, W) or (B, T, C, H, W) to the same.

    Raises:
        ValueError: An argument is no positive int, or reduction does not divide channels; at call time, another
            shape (see :class:`ClipLayer`).

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
    """The residual block as released: :class:`cmr_layers.CMRBlock` with this file's CME and a bias in SME."""
    cme_layer = CME
    sme_layer = partial(sme.SME, bias=True)


class ReleasedCMRResNet(CMRResNet):
    """The network as released: CMR blocks of this file, in the deep networks only every other one of a stage.

    The classifier starts as there, normal with a standard deviation of 0.001, its bias zero.

    Args:
        layers: Blocks of each stage. With 23 or more in the third, TIM and CME go into the blocks 0, 2, 4, ... of
            each stage (TSM's n_round = 2).
        **kwargs: As :class:`CMRResNet`. The authors train with drop_rate=0.5.
    """

    def __init__(self, layers: Tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(CMRBlock, layers, **kwargs)
        if layers[2] >= 23:
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                for i, plain in stage.named_children():  # type: ignore[union-attr]
                    if int(i) % 2:
                        plain.cme = plain.tim = nn.Identity()

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def init_weights(self, zero_init_last: bool = True) -> None:
        """As the family's, and the classifier as described in the class docstring."""
        super().init_weights(zero_init_last)
        self._start_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As timm's; the new classifier starts as described in the class docstring."""
        super().reset_classifier(num_classes, global_pool)
        self._start_classifier()

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def _start_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=.001)
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, and takes the authors' names, too: with them timm's ``checkpoint_path=`` takes their file."""
        if any(checkpoint.our_name(key) != key for key in state_dict if isinstance(key, str)):
            state_dict = checkpoint.rename(state_dict)
            checkpoint.check_values(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def load_pretrained(self, path: Union[str, 'os.PathLike[str]']) -> None:
        """Load a file for timm's ``pretrained=True``: the authors', one of ours, or an image network's weights.

        Args:
            path: The file. Its classifier arrives if 'num_classes' of the network's ``pretrained_cfg`` (174 if
                ``pretrained_cfg_overlay`` says nothing else) and ``num_classes`` are the file's number of classes.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no checkpoint, or has another number of classes than ``pretrained_cfg`` says.
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
    """As the family's, of the authors' names, too. An image network's classifier stays out, if it is of other classes.
    """
    renamed = checkpoint.rename(state_dict)
    own = model.state_dict()
    cfg: Any = model.pretrained_cfg
    if not temporal_keys(model) & renamed.keys() and 'fc.weight' in renamed:
        if renamed['fc.weight'].shape[:1] not in ((cfg['num_classes'],), (model.num_classes,)):
            renamed = {key: value for key, value in renamed.items() if key not in ('fc.weight', 'fc.bias')}
            if model.num_classes == cfg['num_classes']:  # where timm wants a classifier
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
    if pretrained:  # a file is for load_pretrained()
        kwargs['pretrained_cfg_overlay'] = {'custom_load': True, **(kwargs.get('pretrained_cfg_overlay') or {})}
        if kwargs.get('features_only'):
            kwargs['num_classes'] = 0  # timm doesn't tell load_pretrained() that no classifier is wanted
    model: ReleasedCMRResNet = build_model_with_cfg(
        ReleasedCMRResNet, f'released_cmr_resnet{depth}', pretrained, layers=_LAYERS[depth],
        pretrained_filter_fn=_check_pretrained, **kwargs)
    return model


@register_model
def released_cmr_resnet50(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-50 as released, for timm; arguments as :class:`ReleasedCMRResNet`."""
    return _create(50, pretrained, **kwargs)


@register_model
def released_cmr_resnet101(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-101 as released, for timm; arguments as :class:`ReleasedCMRResNet`."""
    return _create(101, pretrained, **kwargs)


@register_model
def released_cmr_resnet152(pretrained: bool = False, **kwargs: Any) -> ReleasedCMRResNet:
    """The ResNet-152 as released, for timm; arguments as :class:`ReleasedCMRResNet`."""
    return _create(152, pretrained, **kwargs)


def load_released_checkpoint(
        path_or_dict: Union[str, 'os.PathLike[str]', Mapping[str, Any]],
        num_frames: int = 8,
) -> ReleasedCMRResNet:
    """Turn a checkpoint of the authors' code into a model that computes what theirs does.

    Depth, number of classes, CME's reduction and whether there is a dropout are read from the file. The weights fit
    any ``num_frames``; the released file was trained with 8.

    Nothing in a file is run: besides tensors and Python's own types it may hold numpy's numbers, which the authors'
    training script saves, and nothing else. It is checked before the model is built, and what it makes allocate is
    in proportion to its size.

    Args:
        path_or_dict: The file, or what is in it: {'model': state_dict, ...}, {'state_dict': state_dict, ...} or the
            state dict itself, with the authors' names or with ours. Half and double precision become float32.
        num_frames: Frames T of a clip.

    Returns:
        The model, in float32 and in eval mode. For further training it has the authors' dropout of 0.5 before the
        classifier, unless the file is of a training without (then the classifier is 'base_model.fc', not 'new_fc').
        timm can save it and, once this module is imported, load it again.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no sound checkpoint of a CMR ResNet-50, -101 or -152; the message says what is wrong.

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
    # without memory, as long as it isn't known that the file fills it
    skeleton = timm.create_model(name, device='meta', **arguments)
    state_dict = checkpoint.check_fit(state_dict, skeleton.state_dict())
    checkpoint.check_values(state_dict)
    model = timm.create_model(name, **arguments)  # not _create(): timm records the arguments, for save_for_hf
    assert isinstance(model, ReleasedCMRResNet)
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def _architecture(state_dict: Mapping[str, Tensor]) -> Tuple[str, Dict[str, Any]]:
    """timm's name of a network and its arguments, as a state dict of our names shows them."""
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
