"""CME, then TIM, then the convolution behind them, as one operator: equations (1) to (6) and TEINet's temporal layer.

Alone each of the three reads and writes its frames. In training the convolution joins the two layers, so that its input
need not be kept for the backward pass. :mod:`.plain_cme_tim` and :mod:`.triton_cme_tim` are the operator's two forms.
"""
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import plain_cme_tim, reference
from .layout import dense, is_channels_last, is_recorded, like, strides
from .operator import LIBRARY, no_second_derivative, operator
from .path import choose, undisturbed
from .products import has_onednn

__all__ = ['CMEWeights', 'Convolution', 'cme_tim']

Maybe = Optional[Tensor]
Ints = Sequence[int]


class CMEWeights(NamedTuple):
    """W1 (C/r1, C), W2 (C/r2, C), W3 (C, C/r1) and the bias of the gates' logits (C,). All None: there is no CME."""
    w1: Maybe = None
    w2: Maybe = None
    w3: Maybe = None
    b3: Maybe = None


class Convolution(NamedTuple):
    """Arguments of a 2D convolution. No weight: there is none."""
    weight: Maybe = None
    bias: Maybe = None
    stride: Ints = (1, 1)
    padding: Ints = (0, 0)
    dilation: Ints = (1, 1)
    groups: int = 1


def cme_tim(
        x: Tensor, num_frames: int, cme: CMEWeights, taps: Maybe, conv: Convolution = Convolution(),  # noqa: B008
        owner: Any = None, pooled: Maybe = None, prefix: int = 0,
) -> Tensor:
    """CME, TIM and a convolution, one after the other; any of them may be missing.

    Args:
        x: Frames, (N, C, H, W), N = B * T, the frames of a clip next to each other.
        num_frames: Frames T of a clip.
        cme: CME's weights.
        taps: TIM's taps, (C, 1, K).
        conv: The convolution.
        owner: The layer that calls, for :func:`.path.explain`.
        pooled: Shares of the mean of x over its pixels, (splits, N, C), if :func:`.block_end.block_end` left them.
        prefix: Columns at the beginning of W that are no places of the image: CME does not pool them.
    """
    name = ' + '.join((['CME'] if cme.w1 is not None else []) + (['TIM'] if taps is not None else []))
    number = 3 if taps is None else taps.shape[2]
    path = choose(
        owner, name, x, num_frames, [*cme, taps, conv.weight, conv.bias],
        no_kernel='' if number in (1, 3) else f'TIM has {number} taps, the kernels know 1 and 3',
        slower="PyTorch's depthwise convolution is faster" if _gains_nothing(x, cme, taps) else '')
    if path == 'reference':
        y = _reference(x, num_frames, cme, taps, prefix)
    else:
        joins = torch.is_grad_enabled() or (path == 'triton' and _has_kernel(x, num_frames, taps, *conv))
        inside, conv = (conv, Convolution()) if joins else (Convolution(), conv)
        y = torch.ops.cmr_layers.cme_tim(
            x, num_frames, *cme, taps, *inside, pooled, triton=path == 'triton', prefix=prefix)[0]
    return y if conv.weight is None else F.conv2d(y, *conv)  # type: ignore[arg-type]


def _reference(x: Tensor, num_frames: int, cme: CMEWeights, taps: Maybe, prefix: int) -> Tensor:
    clips = reference.clips(x, num_frames)
    if cme.w1 is not None and cme.w2 is not None and cme.w3 is not None:
        clips = reference.cme(clips, cme.w1, cme.w2, cme.w3, cme.b3, prefix)
    if taps is not None:
        clips = reference.tim(clips, taps)
    return clips.reshape(x.shape)


def _has_kernel(
        x: Tensor, num_frames: int, taps: Maybe, weight: Maybe, bias: Maybe, stride: Ints, padding: Ints,
        dilation: Ints, groups: int,
) -> bool:
    """Whether one Triton kernel takes in the convolution, too.

    It mixes the frames once for every 64 output channels, so a wide convolution does not pay. Its tiles hold a power
    of two of frames.
    """
    return (
        taps is not None and weight is not None and tuple(weight.shape[2:]) == (1, 1) and weight.shape[0] <= 64
        and groups == 1 and set(stride) == {1} and set(padding) == {0} and x.dtype in (torch.float16, torch.bfloat16)
        and is_channels_last(x) and num_frames in (2, 4, 8, 16))


def _has_convolution(x: Tensor) -> bool:
    """Whether PyTorch has a fast depthwise convolution over time for frames, which TIM alone then is.

    It has one for a CPU, where the channels of a pixel are next to each other, and may be a part of all channels. In
    float16 its backward pass is slow.
    """
    if x.dtype is torch.float16 and torch.is_grad_enabled():
        return False
    return x.device.type == 'cpu' and x.stride(1) == 1 and not x.is_contiguous() and has_onednn(x.dtype)


def _gains_nothing(x: Tensor, cme: CMEWeights, taps: Maybe) -> bool:
    """Whether the reference is as small and faster: TIM alone, and what keeps nothing and gates a small copy."""
    if is_recorded():
        return False  # the reference it is, and the size of x may be a symbol
    size = x.numel() * x.element_size()  # torch.compile knows no nbytes of a size that is a symbol
    small = taps is not None and not torch.is_grad_enabled() and size <= plain_cme_tim.GATED
    return (cme.w1 is None or small) and _has_convolution(x)


def _form(triton: bool) -> Any:
    if not triton:
        return plain_cme_tim
    from . import triton_cme_tim
    return triton_cme_tim


# `partial`: x is pooled already, see `pooled` above. It has no gradient of its own; that of x takes in the pooling.
# The operator returns y, and for the backward pass pooled vectors, z, k and gates, which are empty without a CME.

@operator
def _cme_tim(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        weight: Maybe, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int, partial: Maybe = None,
        *, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with undisturbed(x):
        form, x = _form(triton), dense(x)
        if w1 is None or w2 is None or w3 is None:
            pooled, z, k, gate = (x.new_empty(0, dtype=torch.float32) for _ in range(4))
            y = form.mix(x, num_frames, None, taps)
        else:
            pooled, z, k, gate, scales = form.gates(x, num_frames, w1, w2, w3, b3, taps, partial, prefix)
            if triton and _has_kernel(x, num_frames, taps, weight, bias, stride, padding, dilation, groups):
                from .triton_cme_tim_conv import gated_conv
                assert weight is not None and scales is not None
                return gated_conv(x, num_frames, scales, weight, bias), pooled, z, k, gate
            y = form.mix(x, num_frames, gate, taps, scales=scales)
        return _conv(y, weight, bias, stride, padding, dilation, groups), pooled, z, k, gate


def _conv(u: Tensor, weight: Maybe, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    if weight is None:
        return u
    y: Tensor = torch.ops.aten.convolution(
        u, weight.to(u.dtype), None if bias is None else bias.to(u.dtype),
        stride, padding, dilation, False, [0, 0], groups)
    y = y.contiguous(memory_format=torch.channels_last if is_channels_last(u) else torch.contiguous_format)
    return y.as_strided_(y.shape, strides(y, is_channels_last(u)))  # in place: an output must be no view


@torch.library.register_fake('cmr_layers::cme_tim', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe, *conv: Any, triton: bool,
        prefix: int = 0,
) -> Tuple[Tensor, ...]:
    n, channels = x.shape[:2]
    sizes = [(0,)] * 4 if w1 is None or w2 is None else [
        (n, width) for width in (channels, w1.shape[0], w2.shape[0], channels)]
    vectors = [x.new_empty(size, dtype=torch.float32) for size in sizes]
    return _conv(torch.empty_like(dense(x)), *conv[:6]), *vectors


@operator
def _cme_tim_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        weight: Maybe, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int,
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor, learns: bool, *, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and all weights, empty where there is none. ``learns``: the gradient of ``weight`` is wanted."""
    form, x = _form(triton), dense(x)
    gated = gate if w1 is not None else None
    g_w1, g_w2, g_w3, g_b3, g_weight, g_bias = (x.new_empty(0) for _ in range(6))
    offset = None
    with undisturbed(x):
        if weight is not None:
            gy = dense(gy, x)
            # The convolution's input is as large as x, and cheap to compute again from gates and taps.
            u = form.mix(x, num_frames, gated, taps)
            if bias is not None:
                g_bias = gy.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
            gy, g, _ = torch.ops.aten.convolution_backward(
                gy.to(x.dtype), u, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups,
                [True, learns, False])
            del u
            if learns:
                g_weight = dense(g.to(weight.dtype).contiguous())
        gy = like(gy, x)
        sums = form.correlate(x, gy, num_frames, 1 if taps is None else taps.shape[2])
        g_gate, g_taps = plain_cme_tim.taps_backward(sums, gated, taps)
        if w1 is not None and w2 is not None and w3 is not None:
            offset, g_w1, g_w2, g_w3, g_b3 = plain_cme_tim.gate_backward(
                g_gate, num_frames, w1, w2, w3, b3, pooled, z, k, gate)
            offset.div_(x.shape[2] * (x.shape[3] - prefix))
        gx = form.mix(gy, num_frames, gated, taps, offset, transpose=True, prefix=prefix)
    if b3 is None:  # x's dtype, as the fake says
        g_b3 = x.new_empty(0)
    if taps is None:
        g_taps = x.new_empty(0)
    return gx, g_w1, g_w2, g_w3, g_b3, g_taps, g_weight, g_bias


@torch.library.register_fake('cmr_layers::cme_tim_backward', lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        weight: Maybe, bias: Maybe, *rest: Any, triton: bool, prefix: int = 0,
) -> Tuple[Tensor, ...]:
    learns = rest[-1]
    weights = w1, w2, w3, b3, taps, weight if learns else None, bias
    return torch.empty_like(dense(x)), *(x.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights)


def _save(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tuple[Tensor, ...]) -> None:
    x, ctx.num_frames, *weights = inputs
    ctx.form, ctx.conv = keyword_only_inputs, weights[7:11]
    ctx.save_for_backward(x, *weights[:7], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gy: Maybe, *rest: Any) -> Tuple[Any, ...]:
    if gy is None:
        return (None,) * 14
    x, *tensors = ctx.saved_tensors
    weights, vectors = tensors[:7], tensors[7:]
    learns = ctx.needs_input_grad[7]  # a weight that is frozen, as a pretrained network's may be, costs nothing
    gx, *gradients = torch.ops.cmr_layers.cme_tim_backward(
        gy, x, ctx.num_frames, *weights, *ctx.conv, *vectors, learns, **ctx.form)
    if not learns:
        weights[5] = None
    return gx, None, *(None if w is None else g for w, g in zip(weights, gradients)), *[None] * 5


torch.library.register_autograd('cmr_layers::cme_tim', _differentiate, setup_context=_save, lib=LIBRARY)
no_second_derivative('cme_tim_backward')


# FLOPs as FlopCounterMode counts the reference: two per multiply-accumulate, of products and convolutions only, and a
# backward pass twice its forward pass. The arguments are shapes.

@register_flop_formula(torch.ops.cmr_layers.cme_tim)
def _flops(
        x: Any, num_frames: int, w1: Any, w2: Any, w3: Any, b3: Any, taps: Any, weight: Any, *rest: Any,
        out_shape: Any = None, **kwargs: Any,
) -> int:
    n, channels, height, width = x
    products = 0
    if w1 is not None:
        products += n * (w1[0] + w2[0]) * (channels + num_frames) + n * channels * w1[0]
    if taps is not None:
        products += n * channels * height * width * taps[2]
    return 2 * products + (0 if weight is None else int(conv_flop_count(x, weight, out_shape[0])))


@register_flop_formula(torch.ops.cmr_layers.cme_tim_backward)
def _backward_flops(gy: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(*args[:9], out_val=[gy])  # registering gave it another argument
