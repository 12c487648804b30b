"""A video classifier made of an image classifier."""
import re
from typing import Any, Callable, Dict, Set

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .attach import no_image_network
from .clip import Consensus, Fold, check_module, check_num_frames, set_num_frames
from .hosts import check_layers

__all__ = ['ClipModel']


class ClipModel(nn.Module):
    """A video classifier made of an image classifier: fold, run every frame, average the clip's frames.

    What :func:`retrofit` and :func:`insert` leave is a network that still maps (B*T, C, H, W) frames to one output
    each. This wrapper gives it the interface of the ``cmr_resnet`` family, and passes on what timm's tools ask a
    network for, where the network has it: ``forward_features``, ``forward_intermediates`` and ``forward_head``,
    ``get_classifier`` and ``reset_classifier``, ``set_grad_checkpointing``, ``group_matcher`` and ``no_weight_decay``
    (with the names of this wrapper), ``num_classes``, ``num_features``, ``feature_info``, ``pretrained_cfg`` and so
    on. :func:`save_model` saves it.

    Args:
        model: Network from (B*T, C, H, W) to logits or features (B*T, K), or to a transformers output with
            ``logits``. The wrapper is in the mode, training or eval, that it is in.
        num_frames: Frames T of a clip.

    Shapes:
        (B, T, C, H, W), or (B*T, C, H, W) by the rule of :func:`clip_shape`, to (B, K).

    Raises:
        ValueError: num_frames is no positive int, or not that of the layers in the model; at call time, not the
            clip's number of frames.
        RuntimeError: A layer of the model is not at its place any more (see :func:`insert`).
        TypeError: model is no module, or takes clips itself, as the ``cmr_resnet`` family does; at call time, it
            returned something that is not a tensor (B*T, K).

    Example:
        >>> import timm
        >>> model = ClipModel(timm.create_model('resnet18', num_classes=5).eval(), num_frames=4)
        >>> model(torch.randn(2, 4, 3, 64, 64)).shape, model.training, model.num_features
        (torch.Size([2, 5]), False, 512)
    """

    def __init__(self, model: nn.Module, num_frames: int = 8) -> None:
        super().__init__()
        check_module('model', model)
        if any(isinstance(module, Fold) for module in model.modules()):
            raise TypeError(
                f'model must be a network of frames, got a {type(model).__name__} that takes clips itself and needs no '
                f'ClipModel')
        self.fold = Fold(num_frames)
        self.model = model
        self.consensus = Consensus(num_frames)
        # not self.train(): the modules of the model may be in different modes
        self.training = model.training
        self.fold.train(self.training)
        self.consensus.train(self.training)
        self._check_layers()
        check_layers(model)

    @property
    def num_frames(self) -> int:
        """Frames T of a clip; change it with :func:`cmr_layers.set_num_frames`."""
        return self.fold.num_frames

    @torch.jit.unused
    def set_num_frames(self, num_frames: int) -> None:
        """Set the clip length of all layers, see :func:`cmr_layers.set_num_frames`."""
        set_num_frames(self, num_frames)

    @torch.jit.unused
    def _check_layers(self) -> None:
        check_num_frames(self.model, self.num_frames)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_layers()
        x = self.fold(x)
        frames = self.model(x)
        if not torch.jit.is_scripting():
            if isinstance(frames, Proxy):  # which has no shape to check
                return self.consensus(frames)  # type: ignore[no-any-return]
            frames = getattr(frames, 'logits', frames)
        if not isinstance(frames, Tensor) or frames.ndim != 2 or frames.shape[0] != x.shape[0]:
            got = list(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(f'model must return a tensor of shape (B*T, K) for the frames of a clip, got {got}')
        y: Tensor = self.consensus(frames)
        return y


# What timm's tools ask a network for. Each is a property, so that a wrapper has just what its network has.

def _pass_on(wrapper: ClipModel, name: str) -> Any:
    return getattr(wrapper.model, name)


def _features(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """A method of the network that takes frames, and takes clips here."""
    method = getattr(wrapper.model, name)

    def features(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrapper._check_layers()
        if not torch.compiler.is_compiling():
            check_layers(wrapper.model)  # the network's own check is in its forward(), which is not run
        return method(wrapper.fold(x), *args, **kwargs)

    return features


def _head(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """A method of the network that gives a vector per frame, and one per clip here."""
    method = getattr(wrapper.model, name)
    return lambda x, *args, **kwargs: wrapper.consensus(method(x, *args, **kwargs))


def _group_matcher(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """timm's regular expressions, or a function, for the names of parameters, which begin with 'model.' here."""
    matcher = getattr(wrapper.model, name)

    def renamed(pattern: Any) -> Any:
        if isinstance(pattern, (list, tuple)):  # of (pattern, suffix)
            return [(renamed(p), suffix) for p, suffix in pattern]
        # timm matches at the beginning, anchored or not
        return pattern if pattern is None else r'^model\.(?:' + re.sub(r'(?<![\[\\])\^', '', pattern) + ')'

    def group_matcher(coarse: bool = False) -> Any:
        groups = matcher(coarse=coarse)
        if callable(groups):
            return lambda name: groups(name.removeprefix('model.'))
        return {group: renamed(pattern) for group, pattern in groups.items()}

    return group_matcher


def _no_weight_decay(wrapper: ClipModel, name: str) -> Callable[[], Set[str]]:
    names = getattr(wrapper.model, name)
    return lambda: {f'model.{n}' for n in names()}


def _pretrained_cfg(wrapper: ClipModel, name: str) -> Any:
    """timm's description of the network, but for names: that by which timm would build it without this wrapper, and
    those of its first and last layers, which begin with 'model.' here."""
    cfg = no_image_network(getattr(wrapper.model, name))
    if not isinstance(cfg, dict):
        return cfg

    def renamed(names: Any) -> Any:
        if isinstance(names, (list, tuple)):
            return tuple(map(renamed, names))
        return f'model.{names}' if isinstance(names, str) else names

    return {key: renamed(value) if key in ('classifier', 'first_conv') else value for key, value in cfg.items()}


_PASSED_ON: Dict[Callable[[ClipModel, str], Any], str] = {
    _features: 'forward_features forward_intermediates',
    _head: 'forward_head',
    _group_matcher: 'group_matcher',
    _no_weight_decay: 'no_weight_decay',
    _pretrained_cfg: 'pretrained_cfg default_cfg',
    _pass_on: 'get_classifier reset_classifier set_grad_checkpointing grad_checkpointing num_classes num_features '
              'head_hidden_size feature_info in_chans prune_intermediate_layers set_input_size _traits',
}


def _property(get: Callable[[ClipModel, str], Any], name: str) -> property:
    return property(lambda wrapper: get(wrapper, name), doc=f"The network's ``{name}``.")


_NAMES = {name: get for get, names in _PASSED_ON.items() for name in names.split()}
for _name, _get in _NAMES.items():
    setattr(ClipModel, _name, _property(_get, _name))
ClipModel.__jit_unused_properties__ = list(_NAMES)  # type: ignore[attr-defined]
