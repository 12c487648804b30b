"""Turn an image classifier into a video classifier."""
import re
from typing import Any, Callable, Dict, Set

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .attach import no_image_network
from .checks import check_module
from .clip import ClipModule, Consensus, Fold, check_num_frames, set_num_frames
from .hosts import check_layers

__all__ = ['ClipModel']


class ClipModel(nn.Module):
    """A video classifier made of an image classifier: it folds clips, runs every frame and averages per clip.

    A network that :func:`retrofit` or :func:`insert` changed still maps frames (B*T, C, H, W) to one output each. This
    wrapper gives it the interface of the ``cmr_resnet`` family. It passes on the following, if the network has it, so
    that timm's tools work: ``forward_features``, ``forward_intermediates`` and ``forward_head``, ``get_classifier`` and
    ``reset_classifier``, ``set_grad_checkpointing``, ``group_matcher`` and ``no_weight_decay`` (with the names of this
    wrapper), ``num_classes``, ``num_features``, ``feature_info``, ``pretrained_cfg`` and so on. :func:`save_model`
    saves the wrapper.

    Args:
        model: Network from (B*T, C, H, W) to logits or features (B*T, K), or to an output of transformers. Of such an
            output the wrapper takes ``logits`` if there are any, and ``pooler_output`` otherwise, which networks
            without a head return. A pooled map (B*T, K, 1, 1), as of ``ResNetModel``, is flattened to (B*T, K). The
            wrapper takes over the network's mode, training or eval.
        num_frames: Frames T of a clip.

    Shapes:
        (B, T, C, H, W), or (B*T, C, H, W) by the rule of :func:`clip_shape`, to (B, K).

    Raises:
        ValueError: num_frames is no positive int, or the layers of the model have another one. At call time: the clip
            has another number of frames.
        RuntimeError: A layer of the model is not at its place any more (see :func:`insert`).
        TypeError: model is no module, or takes clips itself, as the ``cmr_resnet`` family does. At call time: it
            did not return a tensor (B*T, K), nor an output that has one.

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
        # not self.train(): the modules of the model may differ in mode
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
        # at every call, as layers may come, go and be set at any time: so it has to be quick
        if torch.compiler.is_compiling() or not _all_have(self.model, self.num_frames):
            check_num_frames(self.model, self.num_frames)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_layers()
        x = self.fold(x)
        frames = self.model(x)
        if not torch.jit.is_scripting():
            if isinstance(frames, Proxy):  # a proxy has no shape to check
                return self.consensus(frames)  # type: ignore[no-any-return]
            frames = _vectors(frames)
        if not isinstance(frames, Tensor) or frames.ndim != 2 or frames.shape[0] != x.shape[0]:
            got = list(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise TypeError(
                f'model must return a tensor of shape (B*T, K) for the frames of a clip, or an output with logits or '
                f'pooler_output of that shape, got {got}')
        y: Tensor = self.consensus(frames)
        return y


def _vectors(output: Any) -> Any:
    """What an output of transformers says of the frames: logits, or else what was pooled. Others pass through."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, 'logits', None)
    if logits is not None:
        return logits
    pooled = getattr(output, 'pooler_output', None)
    if isinstance(pooled, Tensor) and pooled.ndim == 4 and pooled.shape[2:] == (1, 1):
        return pooled.flatten(1)
    return output if pooled is None else pooled


def _all_have(model: nn.Module, num_frames: int) -> bool:
    """What :func:`check_num_frames` finds out, in a fraction of its time: no names are made, none is looked up."""
    queue, found = [model], {model}  # a module may be at several places
    for module in queue:  # which grows as it is walked through
        if isinstance(module, ClipModule) and module.num_frames != num_frames:
            return False
        for child in module._modules.values():
            if child is not None and child not in found:
                found.add(child)
                queue.append(child)
    return True


# The attributes that timm's tools ask for. Each is a property: the wrapper has it only if its network does.

def _pass_on(wrapper: ClipModel, name: str) -> Any:
    return getattr(wrapper.model, name)


def _features(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """A method that takes frames in the network, and clips in the wrapper."""
    method = getattr(wrapper.model, name)

    def features(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrapper._check_layers()
        if not torch.compiler.is_compiling():
            check_layers(wrapper.model)  # the network checks in its forward(), which does not run here
        return method(wrapper.fold(x), *args, **kwargs)

    return features


def _head(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """A method that returns one vector per frame in the network, and one per clip in the wrapper."""
    method = getattr(wrapper.model, name)
    return lambda x, *args, **kwargs: wrapper.consensus(method(x, *args, **kwargs))


def _group_matcher(wrapper: ClipModel, name: str) -> Callable[..., Any]:
    """timm's regular expressions, or its function, for parameter names. The wrapper's names begin with 'model.'."""
    matcher = getattr(wrapper.model, name)

    def renamed(pattern: Any) -> Any:
        if isinstance(pattern, (list, tuple)):  # pairs (pattern, suffix)
            return [(renamed(p), suffix) for p, suffix in pattern]
        # timm matches from the start of a name, with or without an anchor
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
    """timm's description of the network, with other names.

    The name of the architecture is one that timm can't build, as it would build the network without this wrapper. The
    names of the first and last layers begin with 'model.'.
    """
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
    return property(lambda wrapper: get(wrapper, name), doc=f'``{name}`` of the network.')


_NAMES = {name: get for get, names in _PASSED_ON.items() for name in names.split()}
for _name, _get in _NAMES.items():
    setattr(ClipModel, _name, _property(_get, _name))
ClipModel.__jit_unused_properties__ = list(_NAMES)  # type: ignore[attr-defined]
