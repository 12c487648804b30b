"""The CMR-ResNet family, registered with timm: ``timm.create_model('cmr_resnet50', num_frames=8)``.

Each name is timm's ResNet of the same depth with CMR blocks. It folds the clip axis at the door and averages over the
frames at the end. The parameters of the image network keep timm's names.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
import warnings
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_pretrained,
    register_model,
)
from timm.models.resnet import ResNet
from torch import Tensor, nn

from .block import PLACEMENTS, CMRBasicBlock, CMRBlock, is_placed
from .checks import check_choice
from .clip import ClipLayer, Consensus, Fold, check_num_frames, set_num_frames, temporal_keys
from .stage import run_stages

__all__ = ['CMRResNet']  # timm's registry adds the names of the family

Block = Union[Type[CMRBlock], Type[CMRBasicBlock]]


class StageBlocks:
    """A block class for one stage of timm's ResNet that tells each block whether it is the stage's first.

    timm calls it once per block, in order. A block alone can't always know (see :class:`CMRBasicBlock`).
    """

    def __init__(self, block: Block, **placements: str) -> None:
        self.block = block
        self.expansion = block.expansion
        self.placements = placements
        self.built = 0

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        placed = {
            name: 'all' if is_placed(name, where, self.built == 0) else 'none'
            for name, where in self.placements.items()}
        self.built += 1
        return self.block(*args, **kwargs, **placed)  # type: ignore[arg-type]


class CMRResNet(ResNet):
    """A video ResNet of CMR blocks.

    Args:
        block: :class:`CMRBlock` or :class:`CMRBasicBlock`.
        layers: Blocks of each stage.
        num_frames: Frames T of a clip.
        cme: Blocks with a CME: 'all', each stage's 'first', or 'none' (Table 5). Write 'none', not None, since timm
            drops arguments that are None.
        tim: Likewise for TIM.
        sme: Likewise for SME.
        reduction: CME's reduction, r1 = r2 or (r1, r2) (Table 3).
        consensus: 'logits' averages a clip's logits, 'features' the features before the dropout.
        block_args: Further arguments of the block.
        **kwargs: Arguments of timm's ``ResNet``: num_classes, in_chans, drop_rate (dropout before the classifier;
            the authors train with 0.5), output_stride, ...

    Shapes:
        (B, T, C, H, W), or (B*T, C, H, W) with the frames of a clip next to each other, to (B, num_classes).
        In the folded form, fewer frames than one clip are stills, with one prediction each. Feature maps
        (``forward_features``, ``forward_intermediates``, ``features_only``) are per frame, (B*T, C, H, W).

    There are two ways to load a file of your own, say with 7 classes. ``timm.create_model(name, num_classes=7,
    checkpoint_path=...)`` takes a file of this family or of the image network, whose classifier has 7 classes.
    ``pretrained=True, pretrained_cfg_overlay=dict(file=..., num_classes=7)`` also adapts to other ``in_chans``, and
    the classifier starts anew if the model's ``num_classes`` differs from the overlay's.

    Raises:
        ValueError: A placement or consensus is none of its choices, num_frames or reduction is no positive int, or
            block_args holds one of them; at call time, T is not num_frames or a folded batch holds no whole number
            of clips.
        TypeError: block is no CMR block, or an argument is unknown.

    Example:
        >>> import timm, torch, cmr_layers
        >>> model = timm.create_model('cmr_resnet18', num_classes=174, num_frames=8).eval()
        >>> model(torch.randn(1, 8, 3, 64, 64)).shape
        torch.Size([1, 174])
    """

    def __init__(
            self,
            block: Block,
            layers: Sequence[int],
            num_frames: int = 8,
            cme: str = 'all',
            tim: str = 'all',
            sme: str = 'first',
            reduction: Union[int, Tuple[int, int]] = 8,
            consensus: str = 'logits',
            block_args: Optional[Dict[str, Any]] = None,
            **kwargs: Any,
    ) -> None:
        placements = {'cme': cme, 'tim': tim, 'sme': sme}
        for name, where in placements.items():
            check_choice(name, where, PLACEMENTS)
        check_choice('consensus', consensus, ('logits', 'features'))
        if not (isinstance(block, type) and issubclass(block, (CMRBlock, CMRBasicBlock))):
            raise TypeError(f'block must be CMRBlock, CMRBasicBlock or made of one of them, got {block!r}')
        taken = {'num_frames', 'reduction', *placements} & set(block_args or {})
        if taken:
            raise ValueError(f'block_args must not hold {sorted(taken)}: these are arguments of the model')
        super().__init__(
            tuple(StageBlocks(block, **placements) for _ in layers),  # type: ignore[arg-type]  # one for each stage
            tuple(layers),
            block_args=dict(num_frames=num_frames, reduction=reduction, **(block_args or {})),
            **kwargs,
        )
        self.average_features = consensus == 'features'
        self.consensus = Consensus(num_frames)
        # First of the children: timm's FeatureListNet and FeatureDictNet run the children in order and never call
        # forward(), so a fold that only stood there would be skipped.
        children = dict(self._modules)
        self._modules.clear()
        self.fold = Fold(num_frames)
        self._modules.update(children)

    @property
    def num_frames(self) -> int:
        """Frames T of a clip; change it with :func:`cmr_layers.set_num_frames`."""
        return self.fold.num_frames

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_num_frames(self, num_frames: int) -> None:
        """Set the clip length of all layers, see :func:`cmr_layers.set_num_frames`."""
        set_num_frames(self, num_frames)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def record_num_frames(self, num_frames: int) -> None:
        """Record the clip length for ``save_for_hf``."""
        self._model_args = dict(getattr(self, '_model_args', {}), num_frames=int(num_frames))

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Start the image network as timm does, and the temporal layers as their docstrings say.

        Args:
            zero_init_last: Start the last batch norm of each residual branch at zero. SME is the identity either way.
        """
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, ClipLayer) and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, and for what timm's ``checkpoint_path=`` reads.

        A prefix that all keys share, such as ``module.`` or ``model.``, is left out. If ``strict``, the keys of the
        temporal layers may be missing, all of them together: then the file is an image network's. The temporal layers
        keep their values, a warning says so, and the result names the missing keys.

        Args:
            state_dict: Weights of this network or of its image network.
            strict: Whether any other difference of the keys is an error.
            assign: As PyTorch's.

        Returns:
            Missing and unexpected keys.

        Raises:
            RuntimeError: Keys or shapes differ.
        """
        state_dict = without_prefix(state_dict, self)
        own, temporal = self.state_dict(), temporal_keys(self)
        if not strict or not temporal or not temporal.isdisjoint(state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        result = super().load_state_dict({**state_dict, **{key: own[key] for key in temporal}}, strict, assign)
        warnings.warn(
            f'the state dict is of an image network: the {len(temporal)} keys of the temporal layers of this '
            f'{type(self).__name__} are missing. These layers keep their values; those of a network that was just '
            f'built are their start', stacklevel=2)
        result.missing_keys.extend(sorted(temporal))
        return result

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Union[
            List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """As timm's, of the clip's frames: maps are (B*T, C, H, W)."""
        check_num_frames(self, self.num_frames)
        return super().forward_intermediates(self.fold(x), *args, **kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, T, C, H, W) or (B*T, C, H, W) to the last feature map of each frame, (B*T, C, H, W)."""
        if not torch.jit.is_scripting():
            check_num_frames(self, self.num_frames)
        x = self.fold(x)
        # from here on timm's forward_features, written out because TorchScript knows no super()
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        elif not torch.jit.is_scripting():
            x = run_stages([self.layer1, self.layer2, self.layer3, self.layer4], x)
        else:
            x = self.layer1(x)  # type: ignore[operator]
            x = self.layer2(x)  # type: ignore[operator]
            x = self.layer3(x)  # type: ignore[operator]
            x = self.layer4(x)  # type: ignore[operator]
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps (B*T, C, H, W) to logits (B, num_classes), or to the classifier's input, (B, C)."""
        x = self.global_pool(x)
        if self.average_features or pre_logits:
            x = self.consensus(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        if pre_logits:
            return x
        x = self.fc(x)
        return x if self.average_features else self.consensus(x)


def without_prefix(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Leave out a prefix that all keys share and the model has not, and the counter of PyTorch's ``AveragedModel``.

    Both are of what held the network: DDP, ``torch.compile``, an EMA, Lightning, :class:`ClipModel`.
    """
    own = {key.partition('.')[0] for key in model.state_dict()}
    keys = {key: key for key in state_dict if key != 'n_averaged'}  # maps a key of the file to the network's
    while len(prefixes := {key.partition('.')[0] for key in keys.values()}) == 1 and not prefixes & own:
        if not all('.' in key for key in keys.values()):
            break
        keys = {key: name.partition('.')[2] for key, name in keys.items()}
    if all(key == keys.get(key) for key in state_dict):
        return state_dict  # itself, as it knows the versions of its modules
    return {name: state_dict[key] for key, name in keys.items()}


def check_pretrained(state_dict: Dict[str, Tensor], model: nn.Module, features_only: bool = False) -> Dict[str, Tensor]:
    """Complete an image network's weights with the temporal layers' start; refuse anything else that differs.

    timm loads loosely as soon as num_classes differs from the checkpoint's, and would then keep random weights where
    a file is wrong. It takes the checkpoint's num_classes from ``pretrained_cfg``, without a look at the file, and
    leaves out the classifier if that differs from the model's. The classifier is left to timm where ``pretrained_cfg``
    is right about the file. A prefix is left out as :meth:`CMRResNet.load_state_dict` does.

    Raises:
        ValueError: The classifier in the file has another number of classes than ``pretrained_cfg`` says.
        RuntimeError: The keys differ.
    """
    state_dict = dict(without_prefix(state_dict, model))
    own = model.state_dict()
    temporal = temporal_keys(model)
    cfg: Any = model.pretrained_cfg
    rows = getattr(state_dict.get('fc.weight'), 'shape', ())[:1]
    said = cfg.get('num_classes')
    if model.num_classes and not features_only and rows and said is not None:
        if rows[0] != said + cfg.get('label_offset', 0):
            raise ValueError(
                f'the classifier in the file has {rows[0]} classes, but pretrained_cfg says num_classes={said}, by '
                f'which timm decides whether it fits a model of num_classes={model.num_classes}: add '
                f'num_classes={rows[0]} to pretrained_cfg_overlay (to keep the classifier, num_classes={rows[0]} '
                f'is the argument of the model, too)'
            )
    # old checkpoints have no such counters, and torch does without
    ignored = {key for key in {*own, *state_dict} if key.endswith('.num_batches_tracked')} | {'fc.weight', 'fc.bias'}
    missing = own.keys() - state_dict.keys() - ignored
    unexpected = state_dict.keys() - own.keys() - ignored
    if missing >= temporal - ignored:
        missing -= temporal
        state_dict = {**state_dict, **{key: own[key] for key in temporal}}
    if missing or unexpected:
        raise RuntimeError(
            f'the weights do not fit {type(model).__name__}: only the keys of the temporal layers may be missing, '
            f'all of them together. Missing keys: {sorted(missing)}. Unexpected keys: {sorted(unexpected)}.'
        )
    return state_dict


def _create_cmr_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CMRResNet:
    filter_fn = partial(check_pretrained, features_only=bool(kwargs.get('features_only')))
    model: CMRResNet = build_model_with_cfg(CMRResNet, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)
    return model


# The stem and the downsample of timm's d-variants.
_D = {'stem_width': 32, 'stem_type': 'deep', 'avg_down': True}

_ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    'resnet18': dict(block=CMRBasicBlock, layers=(2, 2, 2, 2)),
    'resnet18d': dict(block=CMRBasicBlock, layers=(2, 2, 2, 2), **_D),
    'resnet26': dict(block=CMRBlock, layers=(2, 2, 2, 2)),
    'resnet26d': dict(block=CMRBlock, layers=(2, 2, 2, 2), **_D),
    'resnet34': dict(block=CMRBasicBlock, layers=(3, 4, 6, 3)),
    'resnet34d': dict(block=CMRBasicBlock, layers=(3, 4, 6, 3), **_D),
    'resnet50': dict(block=CMRBlock, layers=(3, 4, 6, 3)),
    'resnet50d': dict(block=CMRBlock, layers=(3, 4, 6, 3), **_D),
    'resnet101': dict(block=CMRBlock, layers=(3, 4, 23, 3)),
    'resnet101d': dict(block=CMRBlock, layers=(3, 4, 23, 3), **_D),
    'resnet152': dict(block=CMRBlock, layers=(3, 8, 36, 3)),
    'resnet152d': dict(block=CMRBlock, layers=(3, 8, 36, 3), **_D),
    'resnext50_32x4d': dict(block=CMRBlock, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    'resnext50d_32x4d': dict(block=CMRBlock, layers=(3, 4, 6, 3), cardinality=32, base_width=4, **_D),
    'wide_resnet50_2': dict(block=CMRBlock, layers=(3, 4, 6, 3), base_width=128),
    'seresnet50': dict(block=CMRBlock, layers=(3, 4, 6, 3), block_args=dict(attn_layer='se')),
}


def _image_cfgs(name: str) -> Dict[str, Dict[str, Any]]:
    """timm's weights of the image network, under their tags: hub id, mean, std and all; timm's default comes first."""
    cfgs = [get_pretrained_cfg(key) for key in (name, *list_pretrained(f'{name}.*'))]
    return {f'cmr_{name}.{cfg.tag}': {**cfg.to_dict(), 'architecture': f'cmr_{name}'} for cfg in cfgs if cfg}


default_cfgs = generate_default_cfgs({
    key: cfg for name in _ARCHITECTURES for key, cfg in _image_cfgs(name).items()})


def _register(name: str) -> Callable[..., CMRResNet]:
    """Register ``cmr_<name>`` with timm."""

    def create(pretrained: bool = False, **kwargs: Any) -> CMRResNet:
        model_args = dict(_ARCHITECTURES[name])
        if 'block_args' in model_args:
            model_args['block_args'] = {**model_args['block_args'], **(kwargs.pop('block_args', None) or {})}
        return _create_cmr_resnet(f'cmr_{name}', pretrained, **{**model_args, **kwargs})

    create.__name__ = create.__qualname__ = f'cmr_{name}'
    create.__doc__ = f"""timm's {name} with CMR blocks; arguments as :class:`CMRResNet`."""
    return register_model(create)


for _name in _ARCHITECTURES:
    globals()[f'cmr_{_name}'] = _register(_name)
