"""SME as an operator: the similarity of equation (7), and the convolution of equation (8).

:mod:`.plain_sme` and :mod:`.triton_sme` are its two forms.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import plain_sme, reference
from .layout import dense, like
from .operator import LIBRARY, no_derivative, no_second_derivative, operator
from .path import choose, undisturbed

__all__ = ['Norm', 'motion_conv', 'sme']

Maybe = Optional[Tensor]


class Norm(NamedTuple):
    """A batch norm with running statistics: (C,) each, and eps, which it adds to the variance."""
    mean: Maybe
    var: Maybe
    weight: Maybe
    bias: Maybe
    eps: float


def motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, owner: Any = None, prefix: int = 0,
) -> Tensor:
    """The 1x1 convolution of equation (8) of frames weighted by their motion. In training a batch norm comes next.

    Args:
        x: Frames, (N, C, H, W), N = B * T, the frames of a clip next to each other.
        num_frames: Frames T of a clip.
        weight: Weight of the convolution, (C, C, 1, 1).
        bias: Its bias, (C,).
        owner: The layer that calls, for :func:`.path.explain`.
        prefix: Columns at the beginning of W that are no places of the image.

    Returns:
        Frames like x; zero in the columns of the prefix.
    """
    path = _choose(owner, x, num_frames, weight, bias)
    if path == 'reference':
        return F.pad(_reference(x[..., prefix:], num_frames, weight, bias), (prefix, 0))
    return _run(x, num_frames, weight, bias, False, path, prefix)


def sme(
        x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, norm: Optional[Norm], owner: Any = None,
        similarity: Maybe = None, prefix: int = 0,
) -> Tensor:
    """All of equation (8), with the norm's running statistics, or without a norm if it is folded.

    Arguments and shape as :func:`motion_conv`, and ``similarity``: what :func:`.block_end.block_end` left of x, (N, H,
    W). With it there is no derivative. The columns of the prefix are those of x.
    """
    path = _choose(owner, x, num_frames, weight, bias)
    if path == 'reference':
        prefixes, x = x[..., :prefix], x[..., prefix:]
        h = _reference(x, num_frames, weight, bias)
        if norm is not None:
            h = F.batch_norm(h, norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
        return x + h if prefix == 0 else torch.cat([prefixes, x + h], dim=3)
    if norm is not None:
        weight, bias = _folded(weight, bias, norm)
    if similarity is not None:
        v: Tensor = torch.ops.cmr_layers.motion_product(x, weight, bias, similarity, triton=path == 'triton')
        return v
    return _run(x, num_frames, weight, bias, True, path, prefix)


def _folded(weight: Tensor, bias: Maybe, norm: Norm) -> Tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the norm behind it. In float32; the product rounds them.

    PyTorch's ``fuse_conv_bn_weights`` makes parameters, which torch.compile can't look into.
    """
    assert norm.mean is not None and norm.var is not None
    scale, shift = (norm.var.float() + norm.eps).rsqrt(), -norm.mean.float()
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    if bias is not None:
        shift = shift + bias.float()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.float()
    return weight.float() * scale.view(-1, 1, 1, 1), shift


def _choose(owner: Any, x: Tensor, num_frames: int, weight: Tensor, bias: Maybe) -> str:
    still = 'a still has no motion' if num_frames == 1 else ''
    return choose(owner, 'SME', x, num_frames, [weight, bias], still)


def _reference(x: Tensor, num_frames: int, weight: Tensor, bias: Maybe) -> Tensor:
    return F.conv2d(reference.motion(reference.clips(x, num_frames)).reshape(x.shape), weight, bias)


def _run(x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, residual: bool, path: str, prefix: int) -> Tensor:
    y: Tensor = torch.ops.cmr_layers.motion_conv(
        x, num_frames, weight, bias, residual, triton=path == 'triton', prefix=prefix)[0]
    return y


def _form(triton: bool) -> Any:
    if not triton:
        return plain_sme
    from . import triton_sme
    return triton_sme


# The operator: the convolution, plus x if it is the residual, then similarities and inverse norms, (N, H, W) each.
# Columns of the prefix are computed with the rest, since to take the others out of the frames would copy them. They get
# similarity 1 and inverse norm 0, which takes them out of all gradients, and their results are overwritten.

@operator
def _motion_conv(
        x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, residual: bool, *, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    with undisturbed(x):
        s, inverse_norm = _form(triton).similarity(x, num_frames)
        if prefix:
            s[..., :prefix], inverse_norm[..., :prefix] = 1, 0
        y = _form(triton).product(x, s, weight.flatten(1), bias, residual)
        if prefix:
            y[..., :prefix] = x[..., :prefix] if residual else 0
    return y, s, inverse_norm


@torch.library.register_fake('cmr_layers::motion_conv', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, num_frames: int, *rest: Any, triton: bool, prefix: int = 0) -> Tuple[Tensor, ...]:
    maps = (x.new_empty(x.shape[0], *x.shape[2:], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), *maps  # as many channels come out as go in


@operator
def _motion_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, residual: bool, s: Tensor,
        inverse_norm: Tensor, learns: bool, *, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty for those that are not there or not wanted (``learns``: the weight's)."""
    x = dense(x)
    gy = like(gy, x)
    with undisturbed(x):
        g_bias = x.new_empty(0) if bias is None else gy[..., prefix:].sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
        gx, g_weight = _form(triton).motion_conv_backward(gy, x, num_frames, weight, s, inverse_norm, learns)
        return gx.add_(gy) if residual else gx, g_weight, g_bias


@torch.library.register_fake('cmr_layers::motion_conv_backward', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
        gy: Tensor, x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, *rest: Any, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, ...]:
    weights = weight if rest[-1] else None, bias
    return torch.empty_like(dense(x)), *(x.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights)


def _save(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tuple[Tensor, ...]) -> None:
    x, ctx.num_frames, weight, bias, ctx.residual = inputs
    ctx.form = keyword_only_inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gy: Maybe, *rest: Any) -> Tuple[Any, ...]:
    if gy is None:
        return (None,) * 5
    x, weight, bias, s, inverse_norm = ctx.saved_tensors
    learns = ctx.needs_input_grad[2]
    gx, g_weight, g_bias = torch.ops.cmr_layers.motion_conv_backward(
        gy, x, ctx.num_frames, weight, bias, ctx.residual, s, inverse_norm, learns, **ctx.form)
    return gx, None, g_weight if learns else None, None if bias is None else g_bias, None


torch.library.register_autograd('cmr_layers::motion_conv', _differentiate, setup_context=_save, lib=LIBRARY)
no_second_derivative('motion_conv_backward')


@operator
def _motion_product(x: Tensor, weight: Tensor, bias: Maybe, s: Tensor, *, triton: bool) -> Tensor:
    """The convolution plus x, where the similarities are known; for inference."""
    with undisturbed(x):
        y: Tensor = _form(triton).product(dense(x), s, weight.flatten(1), bias, True)
    return y


@torch.library.register_fake('cmr_layers::motion_product', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Maybe, s: Tensor, *, triton: bool) -> Tensor:
    return torch.empty_like(dense(x))


no_derivative('motion_product')


# FLOPs are counted as in cme_tim.py: only the convolution has any.

@register_flop_formula(torch.ops.cmr_layers.motion_conv)
def _flops(x: Any, num_frames: int, weight: Any, *rest: Any, **kwargs: Any) -> int:
    return int(conv_flop_count(x, weight, x))


@register_flop_formula(torch.ops.cmr_layers.motion_product)
def _product_flops(x: Any, weight: Any, *rest: Any, **kwargs: Any) -> int:
    return _flops(x, 0, weight)


@register_flop_formula(torch.ops.cmr_layers.motion_conv_backward)
def _backward_flops(gy: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(*args)
