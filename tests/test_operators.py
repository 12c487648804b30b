"""The operators: registered as PyTorch wants them, in both forms, and seen through by its compilers and counters."""
import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, interpreted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cmr_layers import CMRBlock
from cmr_layers.ops import (
    CMEWeights,
    Convolution,
    dispatch,
    front,
    front_conv,
    motion_conv,
    rectified_sum,
    reference,
    sme,
    state,
    use_path,
)

OPS = torch.ops.cmr_layers
# numpy, under the interpreter, warns of norms that are zero
pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')
cl, contiguous = torch.channels_last, torch.contiguous_format


@pytest.fixture(autouse=True)
def _float32_is_float32():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=['plain', 'triton'])
def form(request):
    """Both forms of the operators; Triton's in its interpreter where there is no GPU."""
    if request.param == 'triton':
        pytest.importorskip('triton')
    with interpreted() if request.param == 'triton' else contextlib.nullcontext(), use_path(request.param):
        yield request.param


def new(*shape, dtype=torch.float32, requires_grad=False, layout=contiguous):
    x = (torch.randn(shape) / 2).to(DEVICE, dtype)
    return (x.contiguous(memory_format=layout) if len(shape) == 4 else x).requires_grad_(requires_grad)


def arguments(name, layout=contiguous, dtype=torch.float32, grad=False):
    """A call of each operator: 2 clips of 3 frames, 6 channels, 3x2 pixels."""
    kw = {'dtype': dtype, 'requires_grad': grad}
    x = new(6, 6, 3, 2, layout=layout, **kw)
    cme, taps = [new(2, 6, **kw), new(3, 6, **kw), new(6, 2, **kw), new(6, **kw)], new(6, 1, 3, **kw)
    square = new(6, 6, 1, 1, **kw), new(6, **kw)
    norm = 1 / x.detach().float().norm(dim=1)
    known = reference.similarity(reference.clips(x.detach().float(), 3)).flatten(0, 1), norm
    return {
        'front': (x, 3, *cme, taps),
        'front, CME alone': (x, 3, *cme[:3], None, None),
        'front, TIM alone': (x, 3, None, None, None, None, taps),
        'front_conv': (x, 3, *cme, taps, new(4, 6, 1, 1, **kw), new(4, **kw), [1, 1], [0, 0], [1, 1], 1),
        'front_conv, 3x3': (x, 3, *cme[:3], None, taps, new(4, 3, 3, 3, **kw), None, [2, 2], [1, 1], [1, 1], 2),
        'motion_conv': (x, 3, *square),
        'motion_conv, no bias': (x, 3, square[0], None),
        'rectified_sum': (x, new(6, 6, 3, 2, layout=layout, **kw), 3),
        'motion_product': (x, 3, *square, *known),
        'sme': (x.detach(), 3, square[0].detach(), None, new(6), new(6).abs(), new(6), new(6), 1e-5, None),
        'sme, folded': (x.detach(), 3, *(v.detach() for v in square), None, None, None, None, 0., known[0]),
    }[name]


NAMES = ['front', 'front, CME alone', 'front, TIM alone', 'front_conv', 'front_conv, 3x3', 'motion_conv',
         'motion_conv, no bias', 'rectified_sum', 'motion_product', 'sme', 'sme, folded']
LAYOUTS = {'contiguous': contiguous, 'channels_last': cl}


def operator(name):
    return getattr(OPS, name.partition(',')[0]).default


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', NAMES)
def test_opcheck(form, name, layout):
    torch.manual_seed(0)
    opcheck(operator(name), arguments(name, LAYOUTS[layout], grad=True), {'triton': form == 'triton'})


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('layout', [*LAYOUTS, 'other'])
@pytest.mark.parametrize('name', NAMES)
def test_fakes_have_the_exact_shapes_strides_and_dtypes(form, name, layout, dtype):
    # opcheck passes a wrong stride on contiguous inputs, and torch 2.11's on channels_last ones too
    args = arguments(name, LAYOUTS.get(layout, contiguous), dtype)
    if layout == 'other':
        args = (args[0].transpose(2, 3).contiguous().transpose(2, 3), *args[1:])
    real = operator(name)(*args, triton=form == 'triton')
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args)
        fake = operator(name)(*fakes, triton=form == 'triton')
    real, fake = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)
    if layout == 'channels_last':
        assert real[0].is_contiguous(memory_format=cl) and not real[0].is_contiguous()


@pytest.mark.parametrize('name', ['front', 'front, CME alone', 'front, TIM alone', 'front_conv', 'front_conv, 3x3',
                                  'motion_conv', 'motion_conv, no bias'])
@pytest.mark.parametrize('layout, learns', [('contiguous', True), ('channels_last', True), ('channels_last', False)])
def test_gradients_have_the_exact_shapes_strides_and_dtypes(form, name, layout, learns):
    args = arguments(name, LAYOUTS[layout], grad=True)
    triton = form == 'triton'
    y, *saved = operator(name)(*args, triton=triton)
    kind = name.partition(',')[0]
    tensors = [v.detach() if isinstance(v, torch.Tensor) else v for v in args]
    if kind == 'motion_conv':
        backward = torch.randn_like(y), *tensors[:4], *saved
    else:
        backward = torch.randn_like(y), *tensors[:7], *saved, *tensors[7:]
    if kind != 'front':
        backward = *backward, learns
    run = getattr(OPS, f'{kind}_backward').default
    opcheck(run, backward, {'triton': triton})
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in backward), triton=triton)
    for r, f in zip(run(*backward, triton=triton), fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def call(name, args):
    """The same through the layers' own entry, which has the reference, too."""
    kind = name.partition(',')[0]
    if kind == 'front':
        return front(*args[:2], CMEWeights(*args[2:6]), args[6])
    if kind == 'front_conv':
        return front_conv(*args[:2], CMEWeights(*args[2:6]), args[6], Convolution(*args[7:]))
    if kind == 'motion_product':
        known = None if state.path == 'reference' else args[4:]
        return motion_conv(*args[:4], known=known)
    if kind == 'rectified_sum':
        return (args[0] + args[1]).relu() if state.path == 'reference' else rectified_sum(*args)[0]
    if kind == 'sme':
        return sme(*args[:9], known=None if state.path == 'reference' or args[9] is None else (args[9], args[9]))
    return motion_conv(*args)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', NAMES)
def test_values_and_gradients_are_those_of_the_reference(form, name, layout):
    args = arguments(name, LAYOUTS[layout], grad=True)
    got = call(name, args)
    exact = [v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v for v in args]
    with use_path('reference'):
        want = call(name, exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    if got.requires_grad:
        g = torch.randn_like(got)
        inputs = [v for v in args if isinstance(v, torch.Tensor) and v.requires_grad]
        wanted = [v for v in exact if isinstance(v, torch.Tensor) and v.requires_grad]
        for g_got, g_want in zip(
                torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, wanted, g.double()), strict=True):
            torch.testing.assert_close(g_got.double(), g_want, rtol=1e-4, atol=1e-4)


def test_gradients_that_arrive_in_another_layout(form):
    for name in ('front', 'front_conv', 'motion_conv'):
        args = arguments(name, cl, grad=True)
        y = call(name, args)
        g = torch.randn_like(y)
        inputs = [v for v in args if isinstance(v, torch.Tensor)]
        straight = torch.autograd.grad(y, inputs, g, retain_graph=True)
        for other in (g.contiguous(), g.transpose(2, 3).contiguous().transpose(2, 3), g[:, :1].expand_as(g)):
            if other.stride(1) == 0:
                straight = torch.autograd.grad(y, inputs, other.clone(), retain_graph=True)
            for a, b in zip(torch.autograd.grad(y, inputs, other, retain_graph=True), straight, strict=True):
                torch.testing.assert_close(a, b)


def test_what_needs_no_gradient_gets_none(form):
    args = arguments('front')
    x, taps = args[0].requires_grad_(), args[6].requires_grad_()
    gradients = torch.autograd.grad(call('front', args).sum(), [x, taps])
    assert all(g.isfinite().all() for g in gradients)
    for name in ('front_conv', 'motion_conv'):
        args = list(arguments(name, grad=True))
        index = 7 if name == 'front_conv' else 2
        want = torch.autograd.grad(call(name, args).square().sum(), args[0])[0]
        args[index] = args[index].detach()  # frozen
        with FlopCounterMode(display=False) as counter:
            got, = torch.autograd.grad(call(name, args).square().sum(), args[0])
        torch.testing.assert_close(got, want)
        assert counter.get_total_flops() > 0
    assert not call('front', arguments('front')).requires_grad


class Calls(TorchDispatchMode):
    """Which operators of ours run, and in which form."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'cmr_layers':
            self.seen.append((func._opname, kwargs['triton']))
        return func(*args, **(kwargs or {}))


def test_a_backward_pass_has_the_form_of_its_forward_pass(form):
    triton = form == 'triton'
    for name in ('front', 'front_conv', 'motion_conv'):
        args = arguments(name, grad=True)
        inputs = [v for v in args if isinstance(v, torch.Tensor)]
        with Calls() as forward:
            y = call(name, args).sum()
        for path in ('auto', 'plain', 'reference'):
            with use_path(path), Calls() as backward:
                torch.autograd.grad(y, inputs, retain_graph=True)
            assert forward.seen == [(name, triton)] and backward.seen == [(f'{name}_backward', triton)]


def test_a_second_derivative_is_refused(form):
    x = new(6, 6, 3, 2, requires_grad=True)
    taps = new(6, 1, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'second derivatives: run the layers under cmr_layers\.ops\.use_path'):
        g, = torch.autograd.grad(front(x, 3, CMEWeights(), taps).square().sum(), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)
    with use_path('reference'):
        g, = torch.autograd.grad(front(x, 3, CMEWeights(), taps).square().sum(), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes_under_autocast(form, dtype, monkeypatch):
    if form == 'triton' and dtype is torch.bfloat16 and DEVICE == 'cpu':
        # the interpreter multiplies the bits of bfloat16s, not the numbers
        import triton.language as tl

        from cmr_layers.ops import triton_sme
        monkeypatch.setattr(triton_sme, '_product', partial(triton_sme._product, dot=tl.float32))
    for name in ('front', 'front_conv', 'motion_conv'):
        args = arguments(name, cl, grad=True)
        x = args[0].detach().to(dtype).requires_grad_()
        args = (x, *args[1:])
        with torch.autocast(DEVICE, dtype=dtype):
            y = call(name, args)
        assert y.dtype == dtype
        with use_path('reference'), torch.autocast(DEVICE, dtype=dtype):
            want = call(name, args)
        torch.testing.assert_close(y, want, rtol=.05, atol=.05)
        inputs = [v for v in args if isinstance(v, torch.Tensor)]
        for v, g in zip(inputs, torch.autograd.grad(y.float().square().sum(), inputs), strict=True):
            assert g.dtype == v.dtype and g.isfinite().all()


class Net(nn.Module):
    """A block of each type and a convolution between them."""

    def __init__(self, num_frames=3):
        super().__init__()
        down = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
        self.a = CMRBlock(8, 4, downsample=down, num_frames=num_frames, reduction=4)
        self.b = CMRBlock(16, 4, num_frames=num_frames, sme='none', reduction=4)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-.5, .5)
    return net.to(DEVICE)


def counted(graph_modules):
    return [str(node.target) for g in graph_modules for node in g.graph.nodes if 'cmr_layers' in str(node.target)]


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_into_one_graph_that_holds_the_operators(form, net, train, dynamic):
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    net.train(train)
    x = new(6, 8, 4, 4, layout=cl)
    with torch.set_grad_enabled(train):
        want = net(x)
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), want)
        if dynamic:
            compiled(new(9, 8, 4, 4, layout=cl))
    assert len(graphs) == 1
    names = ['front_conv', 'motion_conv', 'front_conv'] if train else ['front', 'sme', 'front']
    if form == 'triton':  # what writes the block's output knows the similarities
        names[1:2] = ['rectified_sum', 'motion_product' if train else 'sme']
    assert [name.split('.')[-1 if name.count('.') < 2 else -2] for name in counted(graphs)] == names


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_compiled_training_step(net, backend):
    x = new(6, 8, 4, 4, layout=cl)
    net(x).square().mean().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()
    # a cache of an earlier version of the operators would hold their backward passes
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(net, backend=backend, fullgraph=True)(x).square().mean().backward()
    for p, g in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)


def test_export_leaves_no_operator_of_ours_unless_forced(net):
    net.eval()
    x = new(6, 8, 4, 4)
    program = torch.export.export(net, (x,))
    assert not counted([program.graph_module])
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
    with use_path('plain'):
        program = torch.export.export(net, (x,))
    assert counted([program.graph_module])
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'rectified_sum'])  # which has none
def test_flops_are_those_of_the_reference(name):
    args = arguments(name, grad=not name.startswith('sme'))

    def count(backward=False):
        y = call(name, args) if backward else None
        with FlopCounterMode(display=False) as counter:
            call(name, args) if y is None else y.sum().backward()
        return counter.get_total_flops()

    with use_path('reference'):
        want = count()
    assert count() == want > 0
    if not name.startswith('sme'):
        # the counter's own formula for the backward pass of a depthwise convolution counts all pairs of channels
        assert count(backward=True) == 2 * want


# The CUDA branch without a GPU: fake tensors say that they are on one.

@pytest.fixture
def fake_cuda(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.setattr(dispatch, '_capability', lambda index: (9, 0))
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: 0, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def fake_block(**kwargs):
    with torch.device('cuda'):
        x = torch.empty(16, 256, 14, 14, **kwargs).contiguous(memory_format=cl)
        block = CMRBlock(256, 64, num_frames=8, sme='all', **kwargs)
    return block, x


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_the_cuda_branch_under_fake_tensors(fake_cuda, dtype, train):
    block, x = fake_block(dtype=dtype)
    with torch.set_grad_enabled(train), use_path('triton'):
        y = block.train(train)(x)
    assert y.device.type == 'cuda' and y.dtype == dtype and y.shape == x.shape
    # autograd wants a real device, so the backward passes are called by hand
    cme, taps, conv = block.cme.weights(), block.tim.weight, block.conv1.weight
    vectors = [x.new_empty(16, width, dtype=torch.float32) for width in (256, 32, 32, 256)]
    gx, *g_weights = OPS.front_conv_backward(
        y[:, :64], x, 8, *cme, taps, *vectors, conv, None, [1, 1], [0, 0], [1, 1], 1, True, triton=True)
    assert (gx.shape, gx.stride(), gx.dtype) == (x.shape, x.stride(), dtype)
    assert [g.shape for g in g_weights] == [w.shape for w in cme[:3]] + [(0,), taps.shape, conv.shape, (0,)]
    s = x.new_empty(16, 14, 14, dtype=torch.float32)
    gx, *_ = OPS.motion_conv_backward(y.contiguous(), x, 8, block.sme.conv.weight, None, s, s, True, triton=True)
    assert (gx.shape, gx.stride(), gx.dtype) == (x.shape, x.stride(), dtype)


def test_what_explain_says_of_a_gpu(fake_cuda):
    block, x = fake_block(dtype=torch.float16)
    block.eval()
    rows = dispatch.explain(block, x)
    assert [(row.owner, row.operation, row.path, row.reason) for row in rows] == [
        ('cme', 'CME + TIM + conv', 'triton', ''), ('sme', 'block end + SME', 'triton', '')]
    wide = CMRBlock(1024, 256, num_frames=8, device='cuda', dtype=torch.float16, sme='none').eval()
    x = torch.empty(16, 1024, 7, 7, device='cuda', dtype=torch.float16).contiguous(memory_format=cl)
    assert [row.operation for row in dispatch.explain(wide, x)] == ['CME + TIM']


@pytest.mark.parametrize('name, change, reason', [
    ('old GPU', {'capability': (7, 5)}, 'the GPU has compute capability 7.5, 8.0 is wanted'),
    ('no triton', {'triton': False}, 'triton is not installed'),
    ('ROCm', {'hip': '6.4'}, 'the kernels have not been tried on ROCm'),
    ('five taps', {'taps': 5}, 'TIM has 5 taps, the kernels know 1 and 3'),
    ('huge', {'size': 1024}, 'clips of 8 frames of 4x1024x1024 are too large'),
])
def test_what_triton_can_not_take_is_plain_and_says_why(fake_cuda, monkeypatch, name, change, reason):
    monkeypatch.setattr(dispatch, '_capability', lambda index: change.get('capability', (9, 0)))
    monkeypatch.setattr(dispatch, '_HAS_TRITON', change.get('triton', True))
    monkeypatch.setattr(torch.version, 'hip', change.get('hip'))
    num_frames, size = change.get('frames', 8), change.get('size', 4)
    x, taps = torch.empty(num_frames, 4, size, size, device='cuda'), torch.empty(
        4, 1, change.get('taps', 3), device='cuda')
    assert dispatch.triton_obstacle(x, num_frames, taps) == reason
    assert dispatch.choose(None, 'TIM', x, num_frames, [taps], taps) == 'plain'
    with use_path('triton'), pytest.raises(
            RuntimeError, match=f"^the path 'triton' is forced, but TIM can't take it: {reason}$"):
        dispatch.choose(None, 'TIM', x, num_frames, [taps], taps)


def test_a_frozen_batch_norm_in_training_has_gradients(form):
    from cmr_layers import SME
    layer = SME(6, num_frames=3).to(DEVICE).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-1, 1)
    x = new(6, 6, 3, 2, requires_grad=True)
    got = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with use_path('reference'):
        want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.batch_norm(
            motion_conv(x, 3, layer.conv.weight, None), layer.bn.running_mean, layer.bn.running_var, layer.bn.weight,
            layer.bn.bias) + x, rtol=1e-4, atol=1e-5)
