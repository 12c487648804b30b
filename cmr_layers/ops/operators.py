"""The layers as PyTorch operators, ``torch.ops.cmr_layers``: one call for what stands in front of a block's
convolutions, one for SME.

Each has an implementation in two forms (``triton`` or plain), a shape function with the exact strides, a derivative and
a FLOP formula, so ``torch.compile``, ``torch.export``, CUDA graphs and ``FlopCounterMode`` see through them. All take
folded frames x (N, C, H, W), N = B * T, and weights of any floating dtype, compute in float32 and return x's dtype,
with the strides of :mod:`.layout`.
"""
from functools import wraps
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import plain
from .dispatch import is_narrow
from .layout import dense, is_channels_last, strides

__all__: List[str] = []

_CME = 'Tensor? w1, Tensor? w2, Tensor? w3, Tensor? b3, Tensor? taps'
_SAVED = 'Tensor pooled, Tensor z, Tensor k, Tensor gate'
_CONV = 'Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups'
_FORM = '*, bool triton'
_FIVE = '(Tensor, Tensor, Tensor, Tensor, Tensor)'

_SCHEMAS = (
    # y, then what backward needs: pooled vectors, z, k and gates; empty tensors for what is not there
    f'front(Tensor x, int num_frames, {_CME}, {_FORM}) -> {_FIVE}',
    f'front_backward(Tensor gy, Tensor x, int num_frames, {_CME}, {_SAVED}, {_FORM}) -> '
    '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    f'front_conv(Tensor x, int num_frames, {_CME}, {_CONV}, {_FORM}) -> {_FIVE}',
    f'front_conv_backward(Tensor gy, Tensor x, int num_frames, {_CME}, {_SAVED}, {_CONV}, '
    f'bool learns, {_FORM}) -> '
    '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    # the convolution of equation (8), then the similarities and inverse norms
    f'motion_conv(Tensor x, int num_frames, Tensor weight, Tensor? bias, {_FORM}) -> (Tensor, Tensor, Tensor)',
    'motion_conv_backward(Tensor gh, Tensor x, int num_frames, Tensor weight, Tensor? bias, Tensor s, '
    f'Tensor inverse_norm, bool learns, {_FORM}) -> (Tensor, Tensor, Tensor)',
    # the end of a block, relu(x + shortcut), and the similarities and inverse norms of what it writes
    f'rectified_sum(Tensor x, Tensor shortcut, int num_frames, {_FORM}) -> (Tensor, Tensor, Tensor)',
    # motion_conv where they are known
    'motion_product(Tensor x, int num_frames, Tensor weight, Tensor? bias, Tensor s, Tensor inverse_norm, '
    f'{_FORM}) -> Tensor',
    # all of equation (8) with the running statistics; it has no derivative
    'sme(Tensor x, int num_frames, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, '
    f'Tensor? beta, float eps, Tensor? s, {_FORM}) -> Tensor',
)

_LIBRARY = torch.library.Library('cmr_layers', 'DEF')
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)

_OPS = torch.ops.cmr_layers

Maybe = Optional[Tensor]
Ints = Sequence[int]


def _implement(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register an implementation for CPU and CUDA. The dtypes are the operator's own business, so autocast is off.

    Frames come in any strides; vectors and matrices are contiguous when they arrive, as the kernels want them.
    """

    @wraps(function)
    def run(first: Tensor, *args: Any, triton: bool) -> Any:
        device = first.device
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return run(first, *args, triton=triton)
        args = tuple(v.contiguous() if isinstance(v, Tensor) and v.ndim < 4 else v for v in args)
        if device.type == 'cuda' and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(first, *args, triton=triton)
        return function(first, *args, triton=triton)

    for key in ('CPU', 'CUDA'):
        _LIBRARY.impl(function.__name__.lstrip('_'), run, key)
    return function


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a shape function."""
    name = function.__name__[len('_fake_'):]
    torch.library.register_fake(f'cmr_layers::{name}', function, lib=_LIBRARY)
    return function


def _front_form(triton: bool) -> Any:
    """The module with the functions of CME and TIM."""
    if not triton:
        return plain
    from . import triton_front
    return triton_front


@_implement
def _front(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe, *, triton: bool,
) -> Tuple[Tensor, ...]:
    x = dense(x)
    result: Tuple[Tensor, ...] = _front_form(triton).front(x, num_frames, w1, w2, w3, b3, taps)
    return result


@_fake
def _fake_front(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe, *, triton: bool,
) -> Tuple[Tensor, ...]:
    n, channels = x.shape[:2]
    widths = [] if w1 is None or w2 is None else [channels, w1.shape[0], w2.shape[0], channels]
    vectors = [x.new_empty(n, width, dtype=torch.float32) for width in widths]
    return torch.empty_like(dense(x)), *(vectors or [x.new_empty(0, dtype=torch.float32) for _ in range(4)])


@_implement
def _front_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor, *, triton: bool,
) -> Tuple[Tensor, ...]:
    x = dense(x)
    result: Tuple[Tensor, ...] = _front_form(triton).front_backward(
        plain.like(gy, x), x, num_frames, w1, w2, w3, b3, taps, pooled, z, k, gate)
    return result


@_fake
def _fake_front_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor, *, triton: bool,
) -> Tuple[Tensor, ...]:
    return torch.empty_like(dense(x)), *map(_gradient, (x,) * 5, (w1, w2, w3, b3, taps))


def _gradient(x: Tensor, weight: Maybe) -> Tensor:
    return x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _convolution(u: Tensor, weight: Tensor, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int,
                 ) -> Tensor:
    y: Tensor = torch.ops.aten.convolution(
        u, weight.to(u.dtype), None if bias is None else bias.to(u.dtype),
        stride, padding, dilation, False, [0, 0], groups)
    y = y.contiguous(memory_format=torch.channels_last if is_channels_last(u) else torch.contiguous_format)
    return y.as_strided_(y.shape, strides(y, is_channels_last(u)))  # in place: an output must be no view


@_implement
def _front_conv(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        weight: Tensor, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int, *, triton: bool,
) -> Tuple[Tensor, ...]:
    x = dense(x)
    if (triton and taps is not None and w1 is not None and w2 is not None and w3 is not None
            and is_narrow(x, num_frames, weight, stride, padding, groups)):
        from . import triton_conv, triton_front
        saved = triton_front.gates(x, num_frames, w1, w2, w3, b3)
        return triton_conv.gated_conv(x, num_frames, saved[3], taps, weight, bias), *saved
    u, *vectors = _front(x, num_frames, w1, w2, w3, b3, taps, triton=triton)
    return _convolution(u, weight, bias, stride, padding, dilation, groups), *vectors


@_fake
def _fake_front_conv(
        x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        weight: Tensor, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int, *, triton: bool,
) -> Tuple[Tensor, ...]:
    u, *vectors = _fake_front(x, num_frames, w1, w2, w3, b3, taps, triton=triton)
    return _convolution(u, weight, bias, stride, padding, dilation, groups), *vectors


@_implement
def _front_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor,
        weight: Tensor, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int, learns: bool,
        *, triton: bool,
) -> Tuple[Tensor, ...]:
    x = dense(x)
    gy = dense(gy, x)
    form = _front_form(triton)
    # What the convolution saw is as large as x, and cheap to compute again from gates and taps.
    u = form.mix(x, num_frames, None if w1 is None else gate, taps)
    gu, g_weight, _ = torch.ops.aten.convolution_backward(
        gy.to(x.dtype), u, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups,
        [True, learns, False])
    del u
    g_weight = g_weight.to(weight.dtype).contiguous() if learns else x.new_empty(0)
    g_bias = x.new_empty(0) if bias is None else gy.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return (
        *form.front_backward(plain.like(gu, x), x, num_frames, w1, w2, w3, b3, taps, pooled, z, k, gate),
        g_weight, g_bias)


@_fake
def _fake_front_conv_backward(
        gy: Tensor, x: Tensor, num_frames: int, w1: Maybe, w2: Maybe, w3: Maybe, b3: Maybe, taps: Maybe,
        pooled: Tensor, z: Tensor, k: Tensor, gate: Tensor,
        weight: Tensor, bias: Maybe, stride: Ints, padding: Ints, dilation: Ints, groups: int, learns: bool,
        *, triton: bool,
) -> Tuple[Tensor, ...]:
    weights = w1, w2, w3, b3, taps, weight if learns else None, bias
    return torch.empty_like(dense(x)), *(_gradient(x, w) for w in weights)


@_implement
def _motion_conv(x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, *, triton: bool) -> Tuple[Tensor, ...]:
    x = dense(x)
    if not triton:
        return plain.motion_conv(x, num_frames, weight, bias)
    from . import triton_sme
    return triton_sme.motion_conv(x, num_frames, weight, bias)


@_fake
def _fake_motion_conv(x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, *, triton: bool) -> Tuple[Tensor, ...]:
    n, _, height, width = x.shape
    h = _fake_sme(x, num_frames, weight, triton=triton)
    return h, *(x.new_empty(n, height, width, dtype=torch.float32) for _ in range(2))


@_implement
def _motion_conv_backward(
        gh: Tensor, x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, s: Tensor, inverse_norm: Tensor,
        learns: bool, *, triton: bool,
) -> Tuple[Tensor, ...]:
    x = dense(x)
    gh = plain.like(gh, x)
    g_bias = x.new_empty(0) if bias is None else gh.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    if not triton:
        return *plain.motion_conv_backward(gh, x, num_frames, weight, s, inverse_norm, learns), g_bias
    from . import triton_sme
    convolution = torch.ops.aten.convolution_backward
    unit: Tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    q = convolution(gh, x, weight.to(x.dtype), None, *unit, [True, False, False])[0]
    gx, m = triton_sme.motion_gradient(plain.like(q, x), x, num_frames, s, inverse_norm)
    if not learns:
        return gx, x.new_empty(0), g_bias
    g_weight = convolution(gh, m, weight.to(x.dtype), None, *unit, [False, True, False])[1]
    return gx, g_weight.to(weight.dtype).contiguous(), g_bias


@_fake
def _fake_motion_conv_backward(
        gh: Tensor, x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, s: Tensor, inverse_norm: Tensor,
        learns: bool, *, triton: bool,
) -> Tuple[Tensor, ...]:
    return torch.empty_like(dense(x)), _gradient(x, weight if learns else None), _gradient(x, bias)


@_implement
def _rectified_sum(x: Tensor, shortcut: Tensor, num_frames: int, *, triton: bool) -> Tuple[Tensor, ...]:
    x = dense(x)
    shortcut = plain.like(shortcut, x)
    if not triton:
        y = (x + shortcut).relu_()
        return y, *plain.similarity(y, num_frames)
    from . import triton_sme
    return triton_sme.rectified_sum(x, shortcut, num_frames)


@_fake
def _fake_rectified_sum(x: Tensor, shortcut: Tensor, num_frames: int, *, triton: bool) -> Tuple[Tensor, ...]:
    n, _, height, width = x.shape
    return torch.empty_like(dense(x)), *(x.new_empty(n, height, width, dtype=torch.float32) for _ in range(2))


@_implement
def _motion_product(
        x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, s: Tensor, inverse_norm: Tensor, *, triton: bool,
) -> Tensor:
    x = dense(x)
    if not triton:
        return plain.product(x, s, weight.flatten(1), bias, residual=False)
    from . import triton_sme
    return triton_sme.motion_product(x, weight, bias, s)


@_fake
def _fake_motion_product(x: Tensor, num_frames: int, weight: Tensor, *args: Any, triton: bool) -> Tensor:
    return torch.empty_like(dense(x))


@_implement
def _sme(
        x: Tensor, num_frames: int, weight: Tensor, bias: Maybe, mean: Maybe, var: Maybe, gamma: Maybe, beta: Maybe,
        eps: float, s: Maybe, *, triton: bool,
) -> Tensor:
    x = dense(x)
    if not triton:
        if s is None:
            s, _ = plain.similarity(x, num_frames)
        return plain.normed_product(x, s, weight, bias, mean, var, gamma, beta, eps)
    from . import triton_sme
    return triton_sme.sme(x, num_frames, weight, bias, mean, var, gamma, beta, eps, s)


@_fake
def _fake_sme(x: Tensor, num_frames: int, weight: Tensor, *norm: Any, triton: bool) -> Tensor:
    return torch.empty_like(dense(x))  # as many channels come out as went in


# Derivatives. An empty gradient stands for the None of a tensor that was not there. A backward pass has the form of its
# forward pass: it may run in another thread, which knows of no path that was forced.

def _gradients(inputs: Sequence[Maybe], gradients: Sequence[Tensor]) -> List[Maybe]:
    return [None if given is None else g for given, g in zip(inputs, gradients)]


def _save_front(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tuple[Tensor, ...]) -> None:
    x, ctx.num_frames, *weights = inputs
    ctx.form = keyword_only_inputs
    ctx.save_for_backward(x, *weights[:5], *output[1:], *weights[5:7])
    ctx.convolution = weights[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_front(ctx: Any, gy: Maybe, *rest: Any) -> Tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    if gy is None:
        return (None,) * (2 + len(tensors) - 4 + len(ctx.convolution))
    if len(tensors) == 9:
        gx, *gradients = _OPS.front_backward(gy, x, ctx.num_frames, *tensors, **ctx.form)
        return gx, None, *_gradients(tensors[:5], gradients)
    learns = ctx.needs_input_grad[7]  # a weight that is frozen, as a pretrained network's may be, costs nothing
    gx, *gradients = _OPS.front_conv_backward(
        gy, x, ctx.num_frames, *tensors, *ctx.convolution, learns, **ctx.form)
    inputs = [*tensors[:5], tensors[9] if learns else None, tensors[10]]
    return gx, None, *_gradients(inputs, gradients), None, None, None, None


def _save_motion(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tuple[Tensor, ...]) -> None:
    x, ctx.num_frames, weight, bias = inputs
    ctx.form = keyword_only_inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_motion(ctx: Any, gh: Maybe, *rest: Any) -> Tuple[Any, ...]:
    if gh is None:
        return None, None, None, None
    x, weight, bias, s, inverse_norm = ctx.saved_tensors
    learns = ctx.needs_input_grad[2]
    gx, g_weight, g_bias = _OPS.motion_conv_backward(
        gh, x, ctx.num_frames, weight, bias, s, inverse_norm, learns, **ctx.form)
    return gx, None, g_weight if learns else None, None if bias is None else g_bias


def _save_product(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tensor) -> None:
    x, ctx.num_frames, *tensors = inputs
    ctx.form = keyword_only_inputs
    ctx.save_for_backward(x, *tensors)


def _differentiate_product(ctx: Any, gh: Tensor) -> Tuple[Any, ...]:
    # the similarities are a function of x, and their derivative is in that of x
    return *_differentiate_motion(ctx, gh), None, None


def _save_sum(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_sum(ctx: Any, gy: Maybe, *rest: Any) -> Tuple[Any, ...]:
    g = None if gy is None else torch.ops.aten.threshold_backward(gy, ctx.saved_tensors[0], 0)
    return g, g, None


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "the operators of cmr_layers have no second derivatives: run the layers under "
        "cmr_layers.ops.use_path('reference')")


def _save_nothing(ctx: Any, inputs: Tuple[Any, ...], keyword_only_inputs: Any, output: Any) -> None:
    pass


_DERIVATIVES: Tuple[Tuple[str, Callable[..., None], Callable[..., Any]], ...] = (
    ('front', _save_front, _differentiate_front),
    ('front_conv', _save_front, _differentiate_front),
    ('motion_conv', _save_motion, _differentiate_motion),
    ('motion_product', _save_product, _differentiate_product),
    ('rectified_sum', _save_sum, _differentiate_sum),
    ('front_backward', _save_nothing, _refuse),
    ('front_conv_backward', _save_nothing, _refuse),
    ('motion_conv_backward', _save_nothing, _refuse),
)
for _name, _save, _differentiate in _DERIVATIVES:
    torch.library.register_autograd(f'cmr_layers::{_name}', _differentiate, setup_context=_save, lib=_LIBRARY)


# FLOPs as FlopCounterMode counts the reference: two per multiply-accumulate, of products and convolutions only; a
# backward pass twice those of its forward pass. The arguments are shapes.

def _front_flops(x: Any, num_frames: int, w1: Any, w2: Any, w3: Any, b3: Any, taps: Any, *rest: Any, **kw: Any) -> int:
    n, channels, height, width = x
    products = 0
    if w1 is not None:
        products += n * (w1[0] + w2[0]) * (channels + num_frames) + n * channels * w1[0]
    if taps is not None:
        products += n * channels * height * width * taps[2]
    return 2 * products


def _front_conv_flops(x: Any, *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return _front_flops(x, *args) + int(conv_flop_count(x, args[6], out_shape[0]))


def _motion_flops(x: Any, num_frames: int, weight: Any, *args: Any, **kw: Any) -> int:
    return int(conv_flop_count(x, weight, x))


def _front_backward_flops(gy: Any, *args: Any, **kw: Any) -> int:
    return 2 * _front_flops(*args)


def _front_conv_backward_flops(gy: Any, x: Any, *args: Any, **kw: Any) -> int:
    return 2 * (_front_flops(x, *args) + int(conv_flop_count(x, args[10], gy)))


def _motion_backward_flops(gh: Any, *args: Any, **kw: Any) -> int:
    return 2 * _motion_flops(*args)


for _operator, _flops in (
        (_OPS.front, _front_flops), (_OPS.front_conv, _front_conv_flops), (_OPS.motion_conv, _motion_flops),
        (_OPS.motion_product, _motion_flops), (_OPS.sme, _motion_flops), (_OPS.front_backward, _front_backward_flops),
        (_OPS.front_conv_backward, _front_conv_backward_flops), (_OPS.motion_conv_backward, _motion_backward_flops)):
    register_flop_formula(_operator)(_flops)
