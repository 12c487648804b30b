"""Layers on maps (N, H, W, C) and on tokens compute what they compute on maps (N, C, H, W), on every path."""
import copy
import io
from functools import partial

import pytest
import torch
from helpers import F32, F64, HALF, assert_near, randomize
from interpreter import DEVICE, interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from cmr_layers import CME, SME, TIM
from cmr_layers.cme_tim import run
from cmr_layers.ops import explain, use_path

pytestmark = pytest.mark.pairwise

T, C, SIZE = 3, 10, (5, 3)
LAYERS = {'CME': partial(CME, reduction=2), 'SME': SME, 'TIM': TIM}
FORMATS = [('NHWC', 0), ('NLC', 0), ('NLC', 1), ('NLC', 5)]
TWO = [('NHWC', 0), ('NLC', 2)]  # where the form is what is tested


def pair(kind, fmt, prefix, dtype=F64):
    """A layer of a format, and one of maps (N, C, H, W) with the same weights."""
    made = LAYERS[kind]
    layer = randomize(made(C, T, input_fmt=fmt, num_prefix_tokens=prefix)).to(DEVICE, dtype)
    maps = made(C, T).to(DEVICE, dtype)
    maps.load_state_dict(layer.state_dict())
    return layer, maps


def as_given(maps, fmt, prefix=None):
    """Maps (N, C, H, W) in a format, with tokens ``prefix`` (N, p, C) before them."""
    if fmt == 'NHWC':
        return maps.permute(0, 2, 3, 1).contiguous()
    patches = maps.flatten(2).transpose(1, 2)
    return patches.contiguous() if prefix is None else torch.cat([prefix, patches], 1)


def as_maps(x, fmt, prefix):
    if fmt == 'NHWC':
        return x.permute(0, 3, 1, 2)
    return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], C, *SIZE)


def drawn(fmt, prefix, dtype=F64, n=2 * T):
    maps = torch.randn(n, C, *SIZE, dtype=F64).to(DEVICE, dtype)
    tokens = torch.randn(n, prefix, C, dtype=F64).to(DEVICE, dtype)
    return maps.requires_grad_(), as_given(maps.detach(), fmt, tokens).requires_grad_()


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('fmt, prefix', FORMATS)
@pytest.mark.parametrize('kind', LAYERS)
def test_the_numbers_are_those_of_maps_in_float64(kind, fmt, prefix, train):
    layer, maps_layer = (m.train(train) for m in pair(kind, fmt, prefix))
    maps, x = drawn(fmt, prefix)
    y, want = layer(x), maps_layer(maps)
    assert y.shape == x.shape and y.is_contiguous()
    assert_near(as_maps(y, fmt, prefix), want)
    g = torch.randn_like(want)
    g_given = as_given(g, fmt, x.new_zeros(x.shape[0], prefix, C))  # what prefix tokens get has no counterpart
    got = torch.autograd.grad(y, [x, *layer.parameters()], g_given)
    wanted = torch.autograd.grad(want, [maps, *maps_layer.parameters()], g)
    assert_near(as_maps(got[0], fmt, prefix), wanted[0])
    for one, other in zip(got[1:], wanted[1:]):
        assert_near(one, other)
    for one, other in zip(layer.buffers(), maps_layer.buffers()):  # statistics without the prefix tokens
        assert_near(one.double(), other.double())


@pytest.mark.parametrize('prefix', [1, 2])
@pytest.mark.parametrize('kind', LAYERS)
def test_what_becomes_of_prefix_tokens(kind, prefix):
    layer, _ = pair(kind, 'NLC', prefix)
    layer.eval()
    _, x = drawn('NLC', prefix)
    y = layer(x)
    if kind == 'CME':
        want = x[:, :prefix] * layer.gate(x).flatten(0, 1)[:, None]
    elif kind == 'SME':
        want = x[:, :prefix]
        assert torch.equal(y[:, :prefix], want)
    else:
        _, maps_layer = pair('TIM', 'NLC', 0)
        maps_layer.load_state_dict(layer.state_dict())
        want = maps_layer(x[:, :prefix].transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
    assert_near(y[:, :prefix], want)
    if kind != 'TIM':  # and they move nothing else
        moved = x.detach().clone()
        moved[:, :prefix] += 1
        assert torch.equal(layer(moved)[:, prefix:], y[:, prefix:])
    assert torch.autograd.gradcheck(layer, x[:T, :prefix + 2].detach().requires_grad_())


@pytest.mark.parametrize('mode', ['train', 'eval', 'no_grad'])
@pytest.mark.parametrize('fmt, prefix', TWO)
@pytest.mark.parametrize('kind', LAYERS)
def test_every_form_is_the_reference(kind, fmt, prefix, mode, form):
    layer, _ = pair(kind, fmt, prefix)
    exact = pair(kind, fmt, prefix)[0].train(mode == 'train')
    exact.load_state_dict(layer.state_dict())
    layer.to(F32).train(mode == 'train')
    _, x = drawn(fmt, prefix, F32)
    with torch.set_grad_enabled(mode != 'no_grad'):
        y = layer(x)
        with use_path('reference'):
            wide = x.detach().double().requires_grad_(mode != 'no_grad')
            want = exact(wide)
    assert_near(y, want, times=4)
    if mode != 'no_grad':
        g = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, *layer.parameters()], g)
        wanted = torch.autograd.grad(want, [wide, *exact.parameters()], g.double())
        for one, other in zip(got, wanted):
            assert_near(one, other, times=20)


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('kind', LAYERS)
def test_half_precision_on_every_path(kind, dtype, form):
    layer, _ = pair(kind, 'NLC', 2, dtype)
    exact, _ = pair(kind, 'NLC', 2)
    exact.load_state_dict(layer.eval().state_dict())
    _, x = drawn('NLC', 2, dtype)
    with use_path('reference'):
        wide = x.detach().double().requires_grad_()
        want = exact.eval()(wide)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y, want, times=4)
    g = torch.randn_like(y)
    assert_near(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, wide, g.double())[0], times=4)


@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_a_folded_sme_and_one_that_somebody_watches(prefix):
    layer = pair('SME', 'NLC', prefix)[0].eval()
    _, x = drawn('NLC', prefix)
    want, folded, watched = layer(x), copy.deepcopy(layer), copy.deepcopy(layer)
    folded.fuse()
    assert type(folded.bn) is torch.nn.Identity
    shapes = []
    watched.conv.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_near(folded(x), want)
            assert_near(watched(x), want)
    assert shapes == [(2 * T, C, 1, SIZE[0] * SIZE[1])] * 2  # without the prefix tokens


@pytest.mark.parametrize('fmt, prefix', TWO)
@pytest.mark.parametrize('kind', LAYERS)
def test_one_compiled_graph_for_any_number_of_places(kind, fmt, prefix):
    torch._dynamo.reset()
    layer = pair(kind, fmt, prefix, F32)[0].eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for length in (9, 14, 20):
        x = torch.randn(2 * T, *((length, 4) if fmt == 'NHWC' else (length,)), C, device=DEVICE)
        assert_near(compiled(x), layer(x).double(), times=4)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize('fmt, prefix', TWO)
def test_cme_and_tim_run_as_one(fmt, prefix, form):
    (cme, _), (tim, _) = (pair(kind, fmt, prefix, F32) for kind in ('CME', 'TIM'))
    _, x = drawn(fmt, prefix, F32)
    y, want = run([cme, tim], x), tim(cme(x))
    assert y.shape == x.shape
    assert_near(y, want.double(), times=4)
    for one, other in zip(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(want.square().sum(), x)):
        assert_near(one, other.double(), times=20)


@pytest.mark.parametrize('form', ['reference', 'plain', 'triton'], indirect=True)
@pytest.mark.parametrize('dtype', [F32, *HALF])
@pytest.mark.parametrize('fmt, prefix', TWO)
def test_the_start_of_the_pair_is_exact(fmt, prefix, dtype, form):
    made = {'input_fmt': fmt, 'num_prefix_tokens': prefix, 'dtype': dtype, 'device': DEVICE}
    cme, tim = CME(C, T, gate_init=.5, **made), TIM(C, T, init='identity', gain=2., **made)
    x = drawn(fmt, prefix, dtype)[1].detach()
    for scale in (1, 1e-5):
        x = x * scale
        y = run([cme, tim], x)
        # the reference rounds to half precision in between, and half of a number below 2 ** -13 has fewer digits there
        exact = x.abs() >= (2 ** -13 if dtype == torch.float16 and form == 'reference' else 0)
        assert torch.equal(y[exact], x[exact])
        assert (y - x).abs().max() <= (0 if exact.all() else 2 ** -24)


class Copies(TorchDispatchMode):
    """Sizes of the tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten.cat.default):
            self.sizes.append(max(arg.numel() for arg in args if isinstance(arg, torch.Tensor)) if
                              func is not torch.ops.aten.cat.default else sum(arg.numel() for arg in args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE != 'cpu', reason='the copies of the plain form')
@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('fmt, prefix', FORMATS)
def test_frames_are_taken_as_they_lie(kind, fmt, prefix):
    layer, _ = pair(kind, fmt, prefix, F32)
    _, x = drawn(fmt, prefix, F32)
    with torch.no_grad(), use_path('plain'), Copies() as copies:
        layer.eval()(x)
    assert all(size <= 2 * T * max(prefix, 1) * C for size in copies.sizes), copies.sizes
    with torch.no_grad():
        [decision] = explain(layer, x)
    assert decision.path == ('plain' if kind != 'TIM' else decision.path) and 'copy' not in decision.reason


@pytest.mark.parametrize('fmt, prefix', FORMATS)
@pytest.mark.parametrize('kind', LAYERS)
def test_clips_stills_and_other_memory(kind, fmt, prefix):
    layer = pair(kind, fmt, prefix)[0].eval()
    _, x = drawn(fmt, prefix)
    want = layer(x)
    assert torch.equal(layer(x.unflatten(0, (2, T))), want.unflatten(0, (2, T)))
    strange = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strange.is_contiguous()
    assert_near(layer(strange), want)
    still = layer(x[:1])
    assert still.shape == x[:1].shape and still.isfinite().all()
    if kind != 'TIM':
        assert torch.equal(still, torch.cat([layer(x[:1]), layer(x[1:2])])[:1])


@pytest.mark.parametrize('fmt, prefix', TWO)
@pytest.mark.parametrize('kind', LAYERS)
def test_torchscript_trace_and_export_with_any_number_of_places(kind, fmt, prefix):
    layer = pair(kind, fmt, prefix, F32)[0].eval()
    x, longer = (torch.randn(2 * T, *shape, C, device=DEVICE) for shape in (
        [(4, 3), (6, 3)] if fmt == 'NHWC' else [(9,), (14,)]))
    with torch.no_grad():
        want = layer(longer)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(layer), file)
        file.seek(0)
        assert_near(torch.jit.load(file)(longer), want.double(), times=4)
        assert_near(torch.jit.trace(layer, x)(longer), want.double(), times=4)
        program = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim('places', min=4, max=64)},))
        assert_near(program.module()(longer), want.double(), times=4)


def test_the_operators_keep_their_contracts():
    layers = [pair(kind, 'NLC', 2, F32)[0] for kind in ('CME', 'SME', 'TIM')]
    x = torch.randn(2 * T, C, 1, 7, device=DEVICE).to(memory_format=torch.channels_last)
    cme, sme, tim = layers
    tests = ('test_schema', 'test_faketensor', 'test_autograd_registration', 'test_aot_dispatch_dynamic')
    args = x.requires_grad_(), T, cme.w1, cme.w2, cme.w3, None, tim.weight, None, None, (1, 1), (0, 0), (1, 1), 1
    torch.library.opcheck(torch.ops.cmr_layers.cme_tim, args, {'triton': False, 'prefix': 2}, test_utils=tests)
    args = x, T, sme.conv.weight, None, True
    torch.library.opcheck(torch.ops.cmr_layers.motion_conv, args, {'triton': False, 'prefix': 2}, test_utils=tests)


def test_the_kernels_take_prefix_tokens_of_channels_and_of_places():
    # contiguous frames (N, C, 1, L), which no layer hands on but the operators take
    (cme, _), (sme, _) = (pair(kind, 'NLC', 2, F32) for kind in ('CME', 'SME'))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2 * T, C, 1, 7, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
        for layer in (cme, sme.eval()):
            with use_path('reference'):
                want = layer.forward_frames(x, T)
                g_want = torch.autograd.grad(want.square().sum(), x)[0]
            with interpreted(), use_path('triton'):
                got = layer.forward_frames(x, T)
                assert_near(got, want.double(), times=4)
                assert_near(torch.autograd.grad(got.square().sum(), x)[0], g_want.double(), times=20)


@pytest.mark.parametrize('kwargs, x, message', [
    ({'input_fmt': 'NCL'}, None, "^input_fmt must be one of 'NCHW', 'NHWC', 'NLC', got 'NCL'$"),
    ({'num_prefix_tokens': 1}, None, "^num_prefix_tokens must be 0 unless input_fmt='NLC', .* got 1 with .*'NCHW'$"),
    ({'input_fmt': 'NLC', 'num_prefix_tokens': -1}, None, '^num_prefix_tokens must be an int of at least 0, got -1$'),
    ({'input_fmt': 'NLC'}, torch.zeros(T, C, 2, 2), r'^x must have shape \(B\*T, L, 10\) or \(B, 3, L, 10\), got'),
    ({'input_fmt': 'NLC'}, torch.zeros(T, C, 4), r'^x must have shape \(B\*T, L, 10\) .* got \[3, 10, 4\]$'),
    ({'input_fmt': 'NHWC'}, torch.zeros(T, C, 4, 4), r'^x must have shape \(B\*T, H, W, 10\) or \(B, 3, H, W, 10\), g'),
    ({'input_fmt': 'NLC', 'num_prefix_tokens': 5}, torch.zeros(T, 5, C), (
        r'^x must hold patches behind its prefix tokens, got \[3, 5, 10\] with num_prefix_tokens=5$')),
    ({'input_fmt': 'NLC'}, torch.zeros(2, 4, 6, C), r'^x of shape \[2, 4, 6, 10\] holds clips of 4 frames, but nu'),
    ({'input_fmt': 'NLC'}, torch.zeros(T, 4, C, dtype=torch.int32), '^x must be a floating point tensor, got torch.in'),
], ids=str)
@pytest.mark.parametrize('kind', LAYERS)
def test_errors(kind, kwargs, x, message):
    with pytest.raises(ValueError, match=message):
        layer = LAYERS[kind](C, T, **kwargs)
        if x is not None:
            layer(x)
