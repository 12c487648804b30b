"""Strides that nobody expects: axes of size 1 may have any, and PyTorch's own kernels do not all know that.

Everything is compared with float64, of a copy that is contiguous in every sense.
"""
import contextlib
import copy
import itertools

import pytest
import torch
from helpers import assert_near, randomize
from interpreter import DEVICE, interpreted
from torch import nn

from cmr_layers import CME, SME, TIM, CMRBlock, released
from cmr_layers.cme_tim import cme_tim_conv
from cmr_layers.ops import use_path
from cmr_layers.ops.layout import dense, rectify_gradient

T, C = 2, 6
SIZES = [(5, 1), (1, 5), (1, 1), (4, 3)]
# numpy, under Triton's interpreter, warns of norms that are zero
pytestmark = [
    pytest.mark.pairwise, pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')]


class Begin(nn.Module):
    """CME, TIM and a convolution, as they stand in a block."""

    def __init__(self):
        super().__init__()
        self.cme, self.tim, self.conv = CME(C, T, reduction=2), TIM(C, T), nn.Conv2d(C, 4, 1)

    def forward(self, x):
        return cme_tim_conv(self.cme, self.tim, self.conv, x)


LAYERS = {
    'CME': lambda: CME(C, T, reduction=2, gate_init=.3), 'SME': lambda: SME(C, T, bias=True), 'TIM': lambda: TIM(C, T),
    'released CME': lambda: released.CME(C, T, reduction=2), 'CME + TIM + conv': Begin,
    'block': lambda: CMRBlock(C, 2, num_frames=T, reduction=2, downsample=nn.Conv2d(C, 8, 1)),
}


def build(name, train):
    torch.manual_seed(0)
    return randomize(LAYERS[name](), everything=True).train(train)


def restrided(x, strides):
    """x with other strides at its axes of size 1, in the same memory."""
    return x.as_strided(x.shape, [strides if size == 1 else s for size, s in zip(x.shape, x.stride(), strict=True)])


def forms(x):
    """x in all kinds of strides."""
    both = torch.empty(x.shape).copy_(x), torch.empty(x.shape, memory_format=torch.channels_last).copy_(x)
    for base, stride in itertools.product(both, (0, 1, 7, 1000)):
        yield restrided(base, stride)
    yield x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])   # tokens
    for order in ((1, 0, 2, 3), (3, 2, 1, 0), (0, 1, 3, 2), (2, 3, 0, 1)):
        back = [order.index(i) for i in range(4)]
        yield x.permute(order).contiguous().permute(back)
    for axis in range(4):   # every second element, and one of two
        wide = torch.randn([2 * size if i == axis else size for i, size in enumerate(x.shape)])
        part = wide.narrow(axis, 0, 1) if x.shape[axis] == 1 else wide[(slice(None),) * axis + (slice(None, None, 2),)]
        yield part.copy_(x)


def run(layer, x, g):
    """Output, gradients and statistics after one pass."""
    layer = copy.deepcopy(layer)
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], g)
    return [y.detach(), *gradients, *layer.buffers()]


def assert_all_near(got, want, times=100):
    # of layers with batch norms: another order of the pixels would be off by as much as the values are
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, torch.float32, times, unit=1 + b.abs().max().item())


def assert_canonical(y):
    """Strides are exactly those of a new tensor, in one of the two layouts."""
    assert y.stride() in (
        torch.empty(y.shape).stride(), torch.empty(y.shape, memory_format=torch.channels_last).stride())


def exact(layer, x, g):
    with use_path('reference'):
        plain = (torch.empty(v.shape, dtype=torch.float64).copy_(v) for v in (x, g))
        return run(copy.deepcopy(layer).double(), *plain)


@pytest.mark.parametrize('path', ['auto', 'reference', 'float64'])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name', LAYERS)
def test_values_and_gradients_do_not_depend_on_strides(name, size, train, path):
    if size == (1, 1) and train and name == 'block':
        pytest.skip('the statistics of 4 values leave too few digits')
    layer = build(name, train)
    x = torch.randn(2 * T, C, *size)
    g = torch.randn(layer(x).shape)
    want = exact(layer, x, g)
    layer = layer.double() if path == 'float64' else layer
    with use_path('reference' if path == 'reference' else 'auto'):
        xs, gs = list(forms(x))[::2], list(forms(g))[::2]
        # each form of x with its own kind of gradient or a contiguous one, and contiguous frames with each form of it
        for v, u in [*zip(xs[::2], gs[::2], strict=True), *((v, g) for v in xs[1::2]), *((x, u) for u in gs)]:
            got = run(layer, *((v.double(), u.double()) if path == 'float64' else (v, u)))
            assert_all_near(got, want)
            if name in ('CME', 'SME', 'TIM', 'released CME'):
                assert_canonical(got[0])


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name', LAYERS)
def test_inference_does_not_depend_on_strides(name, size):
    layer, x = build(name, False), torch.randn(2 * T, C, *size)
    with torch.no_grad():
        with use_path('reference'):
            want = copy.deepcopy(layer).double()(x.double())
        for path, v in itertools.product(('auto', 'reference'), forms(x)):
            with use_path(path):
                assert_all_near([layer(v)], [want])


@pytest.mark.parametrize('size', [
    pytest.param(size, id=str(size), marks=() if size in ((5, 1), (1, 1)) else pytest.mark.slow) for size in SIZES])
@pytest.mark.parametrize('name', ['CME', 'SME', 'TIM', 'CME + TIM + conv'])
def test_the_kernels_do_not_depend_on_strides(name, size):
    pytest.importorskip('triton')
    layer = build(name, True)
    x = torch.randn(2 * T, C, *size)
    g = torch.randn(layer(x).shape)
    want = exact(layer, x, g)
    layer = layer.to(DEVICE)
    with interpreted(), use_path('triton'):
        for v, u in list(zip(forms(x), forms(g), strict=True))[1::5]:
            assert_all_near(run(layer, v.to(DEVICE), u.to(DEVICE)), want)


@pytest.mark.parametrize('path', ['auto', 'reference'])
def test_tokens_and_back(path):
    # (N, L, C) to (N, C, L, 1) and back: the gradient comes with the strides of the tokens
    layer, tokens, g = build('SME', True), torch.randn(2 * T, 5, C), torch.randn(2 * T, 5, C)

    def through(layer, tokens):
        return layer(tokens.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)

    want_layer, v = copy.deepcopy(layer).double(), tokens.double().requires_grad_()
    y = want_layer(v.transpose(1, 2).contiguous().unsqueeze(3).clone())
    want = torch.autograd.grad(
        y, [v, *want_layer.parameters()], g.double().transpose(1, 2).contiguous().unsqueeze(3).clone())
    tokens.requires_grad_()
    with use_path(path):
        got = torch.autograd.grad(through(layer, tokens), [tokens, *layer.parameters()], g)
    assert_all_near(got, want)


@pytest.mark.parametrize('path', ['auto', 'reference'])
@pytest.mark.parametrize('name', ['CME', 'SME', 'TIM'])
def test_a_still_does_not_depend_on_strides(name, path):
    layer, x, g = build(name, True), torch.randn(1, C, 4, 3), torch.randn(1, C, 4, 3)
    want = exact(layer, x, g)
    with use_path(path):
        for v, u in [*zip(forms(x), forms(g), strict=True), *((x, u) for u in forms(g))][::2]:
            assert_all_near(run(layer, v, u), want)


@pytest.mark.parametrize('name', ['CME', 'SME', 'TIM'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_clips_do_not_depend_on_strides(name, size):
    layer = build(name, True)
    x = torch.randn(1, T, C, *size)
    g = torch.randn(x.shape)
    want = exact(layer, x, g)
    for stride, other in itertools.product((0, 1, 7, 1000), repeat=2):
        got = run(layer, restrided(x, stride), restrided(g, other))
        assert_all_near(got, want)
        assert got[0].stride() == torch.empty(x.shape).stride()


@pytest.mark.parametrize('name', ['CME', 'SME', 'TIM', 'CME + TIM + conv'])
def test_compiled_layers_do_not_depend_on_strides(name):
    layer, x = build(name, True), torch.randn(2 * T, C, 5, 1)
    g = torch.randn(layer(x).shape)
    want = exact(layer, x, g)
    torch._dynamo.reset()
    for v in list(forms(x))[1::8]:
        fresh = copy.deepcopy(layer)
        compiled, v = torch.compile(fresh, fullgraph=True, backend='aot_eager'), v.detach().requires_grad_()
        y = compiled(v)
        got = [y.detach(), *torch.autograd.grad(y, [v, *fresh.parameters()], g), *fresh.buffers()]
        assert_all_near(got, want)


@pytest.mark.parametrize('form', ['plain', 'triton'])
def test_vectors_with_strides(form):
    # a column of stacked parameters, as functional_call may get it
    if form == 'triton':
        pytest.importorskip('triton')
    with interpreted() if form == 'triton' else contextlib.nullcontext(), use_path(form):
        for name in ('CME', 'SME', 'TIM', 'CME + TIM + conv'):
            layer, x = build(name, False).to(DEVICE), torch.randn(2 * T, C, 4, 3, device=DEVICE)
            state = {key: torch.stack([v, v], -1)[..., 0] for key, v in layer.state_dict().items()}
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(torch.func.functional_call(layer, state, (x,)), layer(x))


def test_dense_changes_strides_and_nothing_else():
    for size in SIZES:
        x = torch.randn(4, C, *size)
        for v, like in itertools.product(forms(x), forms(x)):
            for y in (dense(v), dense(v, like)):
                assert torch.equal(y, v)
                assert_canonical(y)
            assert dense(v, like).stride() == dense(like).stride()
        assert dense(x) is x and rectify_gradient(x) is x
    last = x.to(memory_format=torch.channels_last)
    assert dense(last) is last and rectify_gradient(last) is last
