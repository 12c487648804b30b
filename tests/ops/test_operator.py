"""The operators: registered as PyTorch wants them, in both forms, and seen through by its compilers and counters."""
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_near, cl, cme_tim_weights, contiguous, frames, randomize
from interpreter import DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cmr_layers import CME, SME, TIM, CMRBlock, ops
from cmr_layers.cme_tim import cme_tim_conv
from cmr_layers.ops import explain, use_path
from cmr_layers.ops import path as switch

OPS = torch.ops.cmr_layers
# numpy, under the interpreter, warns of norms that are zero
pytestmark = [
    pytest.mark.pairwise, pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')]


def new(*shape, dtype=torch.float32, requires_grad=False, layout=contiguous):
    return frames(*shape, dtype=dtype, layout=layout, device=DEVICE, scale=.5).requires_grad_(requires_grad)


UNIT = [1, 1], [0, 0], [1, 1], 1
NO_CONVOLUTION = None, None, *UNIT


def arguments(name, layout=contiguous, dtype=torch.float32, grad=False, weight_dtype=None):
    """A call of each operator: 2 clips of 3 frames, 6 channels, 3x2 pixels."""
    kw = {'dtype': weight_dtype or dtype, 'requires_grad': grad}
    x = new(6, 6, 3, 2, layout=layout, dtype=dtype, requires_grad=grad)
    cme, taps = cme_tim_weights(6, 2, 3, b3=True, dtype=weight_dtype or dtype, device=DEVICE)
    cme, taps = [w.requires_grad_(grad) for w in cme], taps.requires_grad_(grad)
    square = new(6, 6, 1, 1, **kw), new(6, **kw)
    return {
        'cme_tim': (x, 3, *cme, taps, *NO_CONVOLUTION),
        'cme_tim, CME alone': (x, 3, *cme[:3], None, None, *NO_CONVOLUTION),
        'cme_tim, TIM alone': (x, 3, None, None, None, None, taps, *NO_CONVOLUTION),
        'cme_tim, convolution': (x, 3, *cme, taps, new(4, 6, 1, 1, **kw), new(4, **kw), *UNIT),
        'cme_tim, 3x3': (x, 3, *cme[:3], None, taps, new(4, 3, 3, 3, **kw), None, [2, 2], [1, 1], [1, 1], 2),
        'motion_conv': (x, 3, *square, False),
        'motion_conv, no bias': (x, 3, square[0], None, False),
        'motion_conv, residual': (x, 3, *square, True),
    }[name]


NAMES = ['cme_tim', 'cme_tim, CME alone', 'cme_tim, TIM alone', 'cme_tim, convolution', 'cme_tim, 3x3', 'motion_conv',
         'motion_conv, no bias', 'motion_conv, residual']
SOME = ['cme_tim', 'cme_tim, convolution', 'motion_conv', 'motion_conv, residual']
WEIGHT = {'cme_tim': 7, 'motion_conv': 2}     # the place of the convolution's weight


def operator(name):
    return getattr(OPS, name.partition(',')[0]).default


def rarely(form, slow, *values):
    """A case of a form that is slow in the interpreter."""
    return pytest.param(form, *values, marks=pytest.mark.slow if form == 'triton' and slow else ())


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('form, name', [
    rarely(form, ',' not in name, name) for form in ('plain', 'triton') for name in NAMES],
    indirect=['form'])
def test_opcheck(form, name, layout):
    if form == 'triton' and (layout == 'contiguous' or name not in SOME):
        pytest.skip('what is registered is the same, and slow in the interpreter')
    opcheck(operator(name), arguments(name, LAYOUTS[layout], grad=True), {'triton': form == 'triton'})


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('form, name, layout', [
    rarely(form, name not in SOME and layout != 'channels_last', name, layout)
    for form in ('plain', 'triton') for name in NAMES for layout in (*LAYOUTS, 'other')], indirect=['form'])
def test_fakes_have_the_exact_shapes_strides_and_dtypes(form, name, layout, dtype):
    # opcheck passes a wrong stride on contiguous inputs, and torch 2.11's on channels_last ones too
    if form == 'triton' and dtype == torch.float16 and layout == 'contiguous':
        pytest.skip('slow in the interpreter, and seen in the other layouts')
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


@pytest.mark.parametrize('form, name, layout, learns, dtype', [
    rarely(form, layout == 'contiguous' if name not in SOME else not learns and ',' not in name,
           name, layout, learns, dtype)
    for form in ('plain', 'triton') for name in NAMES for layout, learns, dtype in (
        ('contiguous', True, torch.float32), ('channels_last', True, torch.float16),
        ('channels_last', False, torch.float32))], indirect=['form'], ids=str)
def test_gradients_have_the_exact_shapes_strides_and_dtypes(form, name, layout, learns, dtype):
    # float16 beside weights in float32, as under autocast
    args = arguments(name, LAYOUTS[layout], dtype, weight_dtype=torch.float32)
    triton, kind = form == 'triton', name.partition(',')[0]
    y, *saved = operator(name)(*args, triton=triton)
    backward = torch.randn_like(y), *args, *saved, learns
    run = getattr(OPS, f'{kind}_backward').default
    if dtype == torch.float32 and form == 'plain':     # what is registered is the same
        opcheck(run, backward, {'triton': triton})
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in backward), triton=triton)
    real = run(*backward, triton=triton)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    assert (real[0].shape, real[0].stride(), real[0].dtype) == (args[0].shape, args[0].stride(), dtype)
    weights = [v for v in args[2:] if isinstance(v, torch.Tensor) and (learns or v is not args[WEIGHT[kind]])]
    assert [(g.shape, g.dtype) for g in real[1:] if g.numel()] == [(w.shape, w.dtype) for w in weights]


def call(name, args):
    """The same through the layers' own entry, which has the reference, too."""
    if name == 'motion_conv, residual':
        return ops.sme(*args[:4], None)
    if name.startswith('motion_conv'):
        return ops.motion_conv(*args[:4])
    return ops.cme_tim(*args[:2], ops.CMEWeights(*args[2:6]), args[6], ops.Convolution(*args[7:]))


def test_what_needs_no_gradient_gets_none(form):
    args = arguments('cme_tim')
    x, taps = args[0].requires_grad_(), args[6].requires_grad_()
    gradients = torch.autograd.grad(call('cme_tim', args).sum(), [x, taps])
    assert all(g.isfinite().all() for g in gradients)
    for name in ('cme_tim, convolution', 'motion_conv', 'motion_conv, residual'):
        flops, got = [], []
        args = list(arguments(name, grad=True))
        index = WEIGHT[name.partition(',')[0]]
        for frozen in (False, True):
            args[index] = args[index].detach().requires_grad_(not frozen)
            y = call(name, args).square().sum()
            with FlopCounterMode(display=False) as counter:
                got.append(torch.autograd.grad(y, args[0])[0])
            flops.append(counter.get_total_flops())
        torch.testing.assert_close(*got)
        assert flops[1] > 0
    assert not call('cme_tim', arguments('cme_tim')).requires_grad


class Calls(TorchDispatchMode):
    """Which operators of ours run, and in which form."""

    def __init__(self):
        super().__init__()
        self.seen, self.weights = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'cmr_layers':
            self.seen.append((func._opname, kwargs['triton']))
            self.weights.append(args[7] if func._opname == 'cme_tim' else None)
        return func(*args, **(kwargs or {}))


def test_a_backward_pass_has_the_form_of_its_forward_pass(form):
    triton = form == 'triton'
    for name in SOME:
        args = arguments(name, grad=True)
        inputs = [v for v in args if isinstance(v, torch.Tensor)]
        with Calls() as forward:
            y = call(name, args).sum()
        for path in ('auto', 'plain', 'reference'):
            with use_path(path), Calls() as backward:
                torch.autograd.grad(y, inputs, retain_graph=True)
            kind = name.partition(',')[0]
            assert forward.seen == [(kind, triton)] and backward.seen == [(f'{kind}_backward', triton)]


def test_a_second_derivative_is_refused(form):
    for name in SOME:
        args = arguments(name, grad=True)

        def twice(name=name, args=args):
            g, = torch.autograd.grad(call(name, args).square().sum(), args[0], create_graph=True)
            torch.autograd.grad(g.sum(), args[0])

        with pytest.raises(RuntimeError, match=r'second derivatives: run the layers under cmr_layers\.ops\.use_path'):
            twice()
        with use_path('reference'):
            twice()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes_under_autocast(form, dtype):
    for name in SOME:
        args = arguments(name, cl, dtype, grad=True, weight_dtype=torch.float32)
        with torch.autocast(DEVICE, dtype=dtype):
            y = call(name, args)
        assert y.dtype == dtype
        with use_path('reference'), torch.autocast(DEVICE, dtype=dtype):
            want = call(name, args)
        assert_near(y, want, times=2)      # the reference rounds, too
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
    return randomize(Net(), everything=True).to(DEVICE)


def counted(graph_modules):
    return [str(node.target) for g in graph_modules for node in g.graph.nodes if 'cmr_layers' in str(node.target)]


@pytest.mark.parametrize('form, train, dynamic', [
    ('plain', False, False), ('plain', False, True), ('plain', True, True), ('triton', True, False)], indirect=['form'])
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
    names = [name.split('.')[-1 if name.count('.') < 2 else -2] for name in counted(graphs)]
    assert names == ['cme_tim', 'motion_conv', 'cme_tim']


class Layers(nn.Module):
    """All operators and little else, as Inductor compiles what is between them in a process a kernel."""

    def __init__(self):
        super().__init__()
        self.cme, self.tim, self.conv = CME(8, 3, reduction=4), TIM(8, 3), nn.Conv2d(8, 4, 1)
        self.sme = SME(4, 3)

    def forward(self, x):
        return self.sme(cme_tim_conv(self.cme, self.tim, self.conv, x))


@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_compiled_training_step(backend):
    net, x = randomize(Layers(), everything=True).to(DEVICE), new(6, 8, 4, 4, layout=cl)
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


@pytest.mark.parametrize('name', NAMES)
def test_flops_are_those_of_the_reference(name):
    args = arguments(name, grad=True)

    def count(backward=False):
        y = call(name, args) if backward else None
        with FlopCounterMode(display=False) as counter:
            call(name, args) if y is None else y.sum().backward()
        return counter.get_total_flops()

    with use_path('reference'):
        want = count()
    assert count() == want > 0
    # the counter's own formula for the backward pass of a depthwise convolution counts all pairs of channels
    assert count(backward=True) == 2 * want


# The CUDA branch without a GPU: fake tensors say that they are on one.

@pytest.fixture
def fake_cuda(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.setattr(switch, '_capability', lambda index: (9, 0))
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
    gx, *g_weights = OPS.cme_tim_backward(
        y[:, :64], x, 8, *cme, taps, conv, None, *UNIT, *vectors, True, triton=True)
    assert (gx.shape, gx.stride(), gx.dtype) == (x.shape, x.stride(), dtype)
    assert [g.shape for g in g_weights] == [w.shape for w in cme[:3]] + [(0,), taps.shape, conv.shape, (0,)]
    s = x.new_empty(16, 14, 14, dtype=torch.float32)
    gx, *_ = OPS.motion_conv_backward(y.contiguous(), x, 8, block.sme.conv.weight, None, False, s, s, True, triton=True)
    assert (gx.shape, gx.stride(), gx.dtype) == (x.shape, x.stride(), dtype)


def test_what_explain_says_of_a_gpu(fake_cuda):
    block, x = fake_block(dtype=torch.float16)
    rows = explain(block.eval(), x)
    assert [(row.owner, row.operation, row.path, row.reason) for row in rows] == [
        ('cme', 'CME + TIM', 'triton', ''), ('sme', 'SME', 'triton', '')]


@pytest.mark.parametrize('name, change, reason', [
    ('old GPU', {'capability': (7, 5)}, 'the GPU has compute capability 7.5, 8.0 is wanted'),
    ('no triton', {'triton': False}, 'triton is not installed'),
    ('ROCm', {'hip': '6.4'}, 'the kernels have not been tried on ROCm'),
    ('five taps', {'taps': 5}, 'TIM has 5 taps, the kernels know 1 and 3'),
    ('huge', {'size': 1024}, 'clips of 8 frames of 4x1024x1024 are too large'),
])
def test_what_triton_can_not_take_is_plain_and_says_why(fake_cuda, monkeypatch, name, change, reason):
    monkeypatch.setattr(switch, '_capability', lambda index: change.get('capability', (9, 0)))
    monkeypatch.setattr(switch, '_HAS_TRITON', change.get('triton', True))
    monkeypatch.setattr(torch.version, 'hip', change.get('hip'))
    size = change.get('size', 4)
    layer = TIM(4, num_frames=8, kernel_size=change.get('taps', 3), device='cuda')
    x = torch.empty(8, 4, size, size, device='cuda')
    assert [row[1:] for row in explain(layer, x)] == [('TIM', 'plain', reason)]
    with use_path('triton'), pytest.raises(
            RuntimeError, match=f"^the path 'triton' is forced, but TIM can't take it: {reason}$"):
        layer(x)


def test_a_convolution_that_no_kernel_takes_in_runs_behind(fake_cuda):
    # without gradients, there is nothing to join it for
    with use_path('triton'), torch.no_grad(), Calls() as calls:
        for channels, width in ((256, 64), (1024, 256)):
            x = torch.empty(16, channels, 7, 7, device='cuda', dtype=torch.float16).contiguous(memory_format=cl)
            block = CMRBlock(channels, width, num_frames=8, device='cuda', dtype=torch.float16, sme='none').eval()
            block(x)
    assert [weight is not None for weight in calls.weights] == [True, False]


def test_a_frozen_batch_norm_in_training_has_gradients(form):
    layer = randomize(SME(6, num_frames=3), everything=True).to(DEVICE).eval()
    x = new(6, 6, 3, 2, requires_grad=True)
    got = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with use_path('reference'):
        want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.batch_norm(
            ops.motion_conv(x, 3, layer.conv.weight, None), layer.bn.running_mean, layer.bn.running_var,
            layer.bn.weight, layer.bn.bias) + x, rtol=1e-4, atol=1e-5)
