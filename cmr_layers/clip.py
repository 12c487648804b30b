"""The clip axis: how frames become clips and clips become frames.

Inside a network every tensor is (B*T, ...) with the frames of a clip next to each other, "(b t)". A module that
needs the clip unfolds it by the rule of :func:`clip_shape`. T is called ``num_frames`` throughout (TSM calls it
n_segment, mmaction2 num_segments).
"""
from typing import Any, ClassVar, Set, Tuple

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy

from .checks import check_module, check_positive
from .format import as_maps, check_format, from_maps, shapes
from .ops import reference
from .ops.layout import dense
from .ops.path import is_transformed

__all__ = [
    'ClipLayer', 'Consensus', 'Fold', 'clip_shape', 'set_num_frames', 'temporal_keys',
]


def clip_shape(num_images: int, num_frames: int) -> Tuple[int, int]:
    """Split a folded batch into clips.

    Fewer images than one clip are stills, clips of a single frame each. More images must be whole clips.

    Args:
        num_images: Size N of the folded axis of (N, C, H, W).
        num_frames: Frames T of a clip.

    Returns:
        (clips, frames per clip): (N, 1) for stills, (N / T, T) otherwise.

    Raises:
        ValueError: N is larger than T and no multiple of it.

    Example:
        >>> clip_shape(16, num_frames=8), clip_shape(2, num_frames=8)
        ((2, 8), (2, 1))
    """
    if num_images < num_frames:
        return num_images, 1
    if num_images % num_frames != 0:
        raise ValueError(
            f'x holds {num_images} frames, which is not a whole number of clips: with num_frames={num_frames} it '
            f'must be a multiple of {num_frames}, or fewer than {num_frames} stills'
        )
    return num_images // num_frames, num_frames


def unfold(x: Tensor, num_frames: int) -> Tensor:
    """(B*T, ...) -> (B, T, ...) by the rule of :func:`clip_shape`."""
    return reference.clips(x, clip_shape(x.shape[0], num_frames)[1])


def _check_frames(x: Tensor, num_frames: int) -> None:
    if x.shape[1] != num_frames:
        raise ValueError(
            f'x of shape {list(x.shape)} holds clips of {x.shape[1]} frames, but num_frames={num_frames} is wanted: '
            f'sample {num_frames} frames, or call set_num_frames(model, {x.shape[1]})'
        )


def _way_out(x: Any) -> str:
    """What torch.fx can do instead of tracing the inside of a layer."""
    return (
        '; torch.fx takes a layer as a node of the network around it, so trace nn.Sequential(layer)'
        if isinstance(x, Proxy) else '')


class OneNode(nn.Module):
    """A module that every tracer of torch.fx records as a node of its own, and does not look into.

    timm's tracer has a list of such modules (``register_notrace_module``). Other tracers, among them
    ``torch.fx.symbolic_trace`` and torchvision's, don't know that list, and would stop where a tensor's shape is asked.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Proxy):
            return super().__call__(*args, **kwargs)

        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy('call_module', tracer.path_of_module(self), args, kwargs)

        tracer: Any = x.tracer
        return tracer.call_module(self, record, args, kwargs)


class ClipModule(OneNode):
    """Something that knows how many frames a clip has."""
    num_frames: int

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.num_frames = check_positive('num_frames', num_frames)

    def set_num_frames(self, num_frames: int) -> None:
        self.num_frames = check_positive('num_frames', num_frames)


class ClipLayer(ClipModule):
    """Base of CME, SME and TIM: takes (B*T, C, H, W) or (B, T, C, H, W) and returns the same, memory layout included.

    With another ``input_fmt`` it takes and returns maps (B*T, H, W, C) or tokens (B*T, L, C), or clips of them. The
    equations are the same, and so are the numbers.

    A subclass defines :meth:`forward_clips`, which receives clips (B, T, C, H, W) with T = num_frames. T is 1 when the
    folded input holds fewer frames than one clip (stills). Tokens arrive as (B, T, C, 1, L), prefix tokens first. A
    subclass may also define :meth:`forward_frames`, which receives folded frames (B*T, C, H, W) and is used instead,
    except in TorchScript.

    Args:
        channels: Channels C of the input.
        num_frames: Frames T of a clip.
        input_fmt: How the input lies: 'NCHW', 'NHWC' or 'NLC' (tokens).
        num_prefix_tokens: Tokens before the patches, such as a class token and registers; only with 'NLC'.

    Raises:
        ValueError: An argument is no positive int, input_fmt none of the three, or there are prefix tokens without
            'NLC'; at call time, the input has another number of dimensions, channels or frames, has no patch, or is
            not floating point.
        TypeError: At call time, the input is no tensor.
    """
    channels: int
    input_fmt: str
    num_prefix_tokens: int
    own_forward_frames: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        defines = [{'forward_clips', 'forward_frames'} & vars(base).keys() for base in cls.__mro__]
        if next(filter(None, defines)) == {'forward_clips'}:  # the forward_frames of a base class does something else
            cls.forward_frames = ClipLayer.forward_frames  # type: ignore[method-assign]
        cls.own_forward_frames = cls.forward_frames  # as it is now: somebody may patch the class

    def __init__(self, channels: int, num_frames: int, input_fmt: str = 'NCHW', num_prefix_tokens: int = 0) -> None:
        super().__init__(num_frames)
        self.channels = check_positive('channels', channels)
        self.input_fmt, self.num_prefix_tokens = check_format(input_fmt, num_prefix_tokens)

    @property
    def frame_ndim(self) -> int:
        """Dimensions of a folded batch of frames; clips have one more."""
        return 3 if self.input_fmt == 'NLC' else 4

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f'x must be a tensor, got {type(x)}{_way_out(x)}')
        ndim = self.frame_ndim
        axis = -3 if self.input_fmt == 'NCHW' else -1
        if (x.ndim != ndim and x.ndim != ndim + 1) or x.shape[axis] != self.channels:
            raise ValueError(
                f'x must have shape {shapes(self.input_fmt, self.channels, self.num_frames)}, got {list(x.shape)}')
        if self.num_prefix_tokens > 0 and x.shape[-2] <= self.num_prefix_tokens:
            raise ValueError(
                f'x must hold patches behind its prefix tokens, got {list(x.shape)} with '
                f'num_prefix_tokens={self.num_prefix_tokens}')
        if not x.is_floating_point():
            raise ValueError(f'x must be a floating point tensor, got {x.dtype}')
        if x.ndim == ndim + 1:
            _check_frames(x, self.num_frames)

    def _clips(self, x: Tensor) -> Tensor:
        """See x as clips (B, T, C, H, W)."""
        self._check(x)
        if x.ndim == self.frame_ndim:
            x = unfold(x, self.num_frames)
        return self._maps(x)

    def _maps(self, x: Tensor) -> Tensor:
        return x if self.input_fmt == 'NCHW' else as_maps(x, self.input_fmt)

    def frames(self, x: Tensor) -> Tuple[Tensor, int]:
        """See x as frames (B*T, C, H, W); how many of them are a clip."""
        self._check(x)
        if x.ndim > self.frame_ndim:
            num_frames = x.shape[1]
            x = x.flatten(0, 1)
        else:
            num_frames = clip_shape(x.shape[0], self.num_frames)[1]
        return self._maps(x), num_frames

    def like_input(self, y: Tensor, x: Tensor) -> Tensor:
        """Undo :meth:`frames`: results as maps, in the format and the shape of the input x."""
        if self.input_fmt != 'NCHW':
            y = from_maps(y)
        # reshape, not flatten: to a tracer a batch of N frames stays N, and does not become N // T * T
        return y.reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            y = self.like_input(self.forward_clips(self._clips(x)), x)
            return dense(y, x) if x.ndim == 4 or x.is_contiguous() else y
        frames, num_frames = self.frames(x)
        y = self.forward_frames(frames, num_frames)
        if not is_transformed():  # under vmap a tensor knows no channels_last
            y = dense(y, frames)
        return self.like_input(y, x)

    def forward_frames(self, x: Tensor, num_frames: int) -> Tensor:
        return self.forward_clips(reference.clips(x, num_frames)).reshape(x.shape)

    def forward_clips(self, x: Tensor) -> Tensor:
        raise RuntimeError('a ClipLayer defines forward_clips')

    def extra_repr(self) -> str:
        fmt = '' if self.input_fmt == 'NCHW' else f', input_fmt={self.input_fmt!r}'
        prefix = '' if self.num_prefix_tokens == 0 else f', num_prefix_tokens={self.num_prefix_tokens}'
        return f'{self.channels}, num_frames={self.num_frames}{fmt}{prefix}'


@register_notrace_module
class Fold(ClipModule):
    """The door of a video network: (B, T, C, H, W) -> (B*T, C, H, W).

    A folded batch that holds whole clips or stills passes through (see :func:`clip_shape`).

    Args:
        num_frames: Frames T of a clip.

    Raises:
        ValueError: At call time: neither 4-D nor 5-D, another T, or no whole number of clips.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f'x must be a tensor, got {type(x)}{_way_out(x)}')
        if x.ndim == 5:
            # an image has 1 to 4 channels, a clip of as many frames is rare
            if x.shape[1] <= 4 and x.shape[1] != self.num_frames and x.shape[2] == self.num_frames:
                raise ValueError(
                    f'x must be clips (B, T, C, H, W) with T = num_frames = {self.num_frames}, got {list(x.shape)}, '
                    f'which looks like (B, C, T, H, W); if so, x.transpose(1, 2) puts it right'
                )
            _check_frames(x, self.num_frames)
            x = x.flatten(0, 1)
        elif x.ndim == 4:
            clip_shape(x.shape[0], self.num_frames)
        else:
            raise ValueError(
                f'x must be clips (B, {self.num_frames}, C, H, W) or frames (B*{self.num_frames}, C, H, W), '
                f'got {list(x.shape)}'
            )
        return x

    def extra_repr(self) -> str:
        return f'num_frames={self.num_frames}'


@register_notrace_module
class Consensus(ClipModule):
    """One prediction for a clip: the mean over its frames, (B*T, K) -> (B, K) (TSN's average consensus).

    Only vectors are averaged. Feature maps, (B*T, C, H, W), pass through, one per frame.

    Args:
        num_frames: Frames T of a clip; fewer rows than that are stills and stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        return unfold(x, self.num_frames).mean(1) if x.ndim == 2 else x

    def extra_repr(self) -> str:
        return f'num_frames={self.num_frames}'


def check_num_frames(model: nn.Module, num_frames: int) -> None:
    """Raise a ValueError if a layer has another T: it would mix the frames of different clips without a word."""
    for name, module in model.named_modules():
        if isinstance(module, ClipModule) and module.num_frames != num_frames:
            raise ValueError(
                f'num_frames={num_frames}, but {name or type(module).__name__} of the model has '
                f'num_frames={module.num_frames}; set_num_frames() sets both'
            )


def set_num_frames(model: nn.Module, num_frames: int) -> nn.Module:
    """Set the clip length of every layer of a model, in place. Weights do not depend on it.

    Args:
        model: A ``cmr_resnet``, a retrofitted network, or any module that holds CME, SME or TIM.
        num_frames: Frames T of a clip.

    Returns:
        The same model.

    Raises:
        ValueError: num_frames is no positive int, or the model holds no layer that has one.
        TypeError: model is no module.

    Example:
        >>> import timm, cmr_layers
        >>> model = set_num_frames(timm.create_model('cmr_resnet18', num_frames=8), 16)
        >>> model.num_frames
        16
    """
    check_positive('num_frames', num_frames)
    check_module('model', model)
    if not any(isinstance(module, ClipModule) for module in model.modules()):
        raise ValueError(
            f'model ({type(model).__name__}) holds no layer with num_frames; wanted one with CME, SME or TIM in it'
        )
    for module in model.modules():
        if isinstance(module, ClipModule):
            module.set_num_frames(num_frames)
        elif hasattr(module, 'record_num_frames'):
            module.record_num_frames(num_frames)  # type: ignore[operator]
    return model


def temporal_keys(model: nn.Module) -> Set[str]:
    """Keys of the state dict that belong to CME, SME or TIM, which no image checkpoint has.

    Args:
        model: Any module.

    Returns:
        Set of state dict keys, empty if the model holds no such layer.

    Example:
        >>> from cmr_layers import TIM
        >>> temporal_keys(nn.Sequential(nn.Conv2d(3, 8, 1), TIM(8)))
        {'1.weight'}
    """
    return {
        f'{name}.{key}' if name else key
        for name, module in model.named_modules() if isinstance(module, ClipLayer)
        for key in module.state_dict()
    }
