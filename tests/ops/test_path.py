"""Which path is chosen, for what reason, and what forcing one does."""
import asyncio
import concurrent.futures
import contextvars
import functools
import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch
import torch.utils.checkpoint
from helpers import small_block as block
from torch import nn

from cmr_layers import CME, SME, TIM, ops
from cmr_layers.ops import explain, plain_cme_tim, products, use_path
from cmr_layers.ops import path as switch

LAYERS = {'CME': CME, 'SME': SME, 'TIM': TIM}


def paths(model, x):
    return [(row.owner, row.operation, row.path, row.reason) for row in explain(model, x)]


def test_a_cpu_takes_the_plain_form_of_every_layer(kind):
    assert paths(LAYERS[kind](8, num_frames=4), torch.randn(4, 8, 3, 2)) == [
        (kind, kind, 'plain', 'x is on cpu')]


@pytest.mark.parametrize('x, reason', [
    (torch.randn(4, 8, 3, 2, dtype=torch.float64), 'x is torch.float64'),
    (torch.empty(4, 8, 3, 2, device='meta'), 'x is on meta'),
    (torch.empty(0, 8, 3, 2), 'x is empty'),
    (torch.randn(4, 8, 3, 2, dtype=torch.float16), 'x is torch.float16 and a weight torch.float32'),
], ids=['float64', 'meta', 'empty', 'mixed dtypes'])
def test_what_the_operators_can_not_take_is_the_references(x, reason):
    layer = TIM(8, num_frames=4, device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else None)
    with use_path('auto'):
        assert switch.choose(None, 'TIM', x, 4, [layer.weight]) == 'reference'
    for path in ('plain', 'triton'):
        with use_path(path), pytest.raises(
                RuntimeError, match=f"^the path '{path}' is forced, but TIM can't take it: {reason}$"):
            switch.choose(None, 'TIM', x, 4, [layer.weight])


def test_a_still_has_no_motion_to_compute():
    assert paths(SME(8, num_frames=4).eval(), torch.randn(2, 8, 3, 2))[0][2:] == ('reference', 'a still has no motion')


def test_transforms_of_torch_func_run_the_reference():
    layer = TIM(8, num_frames=4)
    x = torch.randn(3, 4, 8, 3, 2)
    want = layer(x.flatten(0, 1)).unflatten(0, (3, 4))
    torch.testing.assert_close(torch.vmap(layer)(x), want)
    g = torch.func.grad(lambda v: layer(v).square().sum())(x[0])
    torch.testing.assert_close(g, torch.autograd.functional.vjp(
        lambda v: layer(v).square().sum(), x[0], torch.tensor(1.))[1])
    tangent = torch.randn_like(x[0])
    torch.testing.assert_close(torch.func.jvp(layer, (x[0],), (tangent,))[1], layer(tangent))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, layer(tangent))


@pytest.mark.parametrize('transform', [
    lambda f: lambda v, t: torch.func.jvp(f, (v,), (t,))[1], lambda f: lambda v, t: torch.vmap(f)(torch.stack([v, t])),
    lambda f: lambda v, t: torch.func.grad(lambda u: f(u).square().sum())(v)], ids=['jvp', 'vmap', 'grad'])
def test_transforms_of_torch_func_run_the_reference_when_compiled(transform):
    layer, x, tangent = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2), torch.randn(4, 8, 3, 2)
    f = transform(layer)
    with torch.no_grad():
        want = f(x, tangent)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(f, backend='eager')(x, tangent), want)
    assert want.abs().max() > .1


def test_a_subclass_of_tensor_runs_the_reference():
    class Marked(torch.Tensor):
        pass

    x = torch.randn(4, 8, 3, 2).as_subclass(Marked)
    y = TIM(8, num_frames=4)(x)
    assert isinstance(y, Marked)
    assert paths(TIM(8, num_frames=4), x)[0][2:] == ('reference', 'x is a Marked')


def test_autocast_that_would_round_the_input_runs_the_reference():
    layer, x = CME(8, num_frames=4), torch.randn(4, 8, 3, 2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert paths(layer, x)[0][2:] == (
            'reference', 'autocast to torch.bfloat16 would round x, which is torch.float32')
        assert paths(layer, x.bfloat16())[0][2:] == ('plain', 'x is on cpu')


@pytest.mark.parametrize('path', ['plain', 'reference'])
def test_a_forced_path_is_taken_and_given_back(kind, path):
    layer, x = LAYERS[kind](8, num_frames=4), torch.randn(4, 8, 3, 2)
    with use_path(path):
        assert paths(layer, x)[0][2:] == (path, 'forced')
        with use_path('auto'):
            assert paths(layer, x)[0][2:] == ('plain', 'x is on cpu')
        with pytest.raises(ZeroDivisionError), use_path('auto'):
            raise ZeroDivisionError
        assert paths(layer, x)[0][2:] == (path, 'forced')
    assert paths(layer, x)[0][2:] == ('plain', 'x is on cpu')


def test_error_triton_is_forced_without_a_gpu(kind):
    with use_path('triton'), pytest.raises(
            RuntimeError, match=f"^the path 'triton' is forced, but {kind} can't take it: x is on cpu$"):
        LAYERS[kind](8, num_frames=4)(torch.randn(4, 8, 3, 2))


def test_error_a_path_that_is_none():
    with pytest.raises(ValueError, match=r"^path must be one of 'auto', 'triton', 'plain', 'reference', got 'fast'$"):
        use_path('fast').__enter__()


def start(value, monkeypatch):
    """The module as a process has it that starts with a value of the environment variable."""
    if value is None:
        monkeypatch.delenv('CMR_LAYERS_PATH', raising=False)
    else:
        monkeypatch.setenv('CMR_LAYERS_PATH', value)
    spec = importlib.util.spec_from_file_location('another_path', switch.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'another_path', module)
    spec.loader.exec_module(module)
    return module


def test_the_environment_variable_forces_a_path():
    code = (
        'import torch; from cmr_layers import TIM; from cmr_layers.ops import explain;'
        'print(explain(TIM(8, num_frames=4), torch.randn(4, 8, 3, 2)))')

    environment = {**os.environ, 'CMR_LAYERS_PATH': 'reference'}
    run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == 'TIM  TIM  reference (forced)\n'


@pytest.mark.parametrize('value', ['auto', '', None])
def test_an_environment_variable_that_is_empty_leaves_the_choice(value, monkeypatch):
    assert start(value, monkeypatch).forced == 'auto'


def test_error_an_environment_variable_that_is_no_path(monkeypatch):
    with pytest.raises(
            ValueError, match=r"^CMR_LAYERS_PATH must be one of 'auto', 'triton', 'plain', 'reference', got 'fast'$"):
        start('fast', monkeypatch)


def test_nothing_imports_triton_before_it_is_used():
    code = (
        'import sys, timm, torch; before = "triton" in sys.modules; import cmr_layers;'
        'timm.create_model("cmr_resnet18", num_frames=2).eval()(torch.randn(2, 3, 32, 32));'
        'print(before, "triton" in sys.modules, [m for m in sys.modules if "cmr_layers.ops.triton" in m])')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    before, after, ours = out.split(maxsplit=2)
    assert before == after and ours == '[]\n'


def test_a_traced_network_is_the_reference():
    model, x = timm.create_model('cmr_resnet18', num_frames=2, num_classes=3).eval(), torch.randn(1, 2, 3, 32, 32)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    assert 'cmr_layers::' not in str(traced.inlined_graph)


def test_explain_reads_as_a_table():
    model = timm.create_model('cmr_resnet18', num_frames=2, cme='first').eval()
    lines = str(explain(model, torch.randn(1, 2, 3, 32, 32))).splitlines()
    assert lines[0] == 'layer1.0.cme  CME + TIM  plain (x is on cpu)'
    assert lines[1] == 'layer1.0.sme  SME        plain (x is on cpu)'
    assert lines[2] == 'layer1.1.tim  TIM        plain (x is on cpu)'
    assert len(lines) == 12


def test_error_explain_wants_a_module_that_is_not_compiled():
    for model in (torch.compile(TIM(8)), lambda x: x):
        with pytest.raises(TypeError, match=r'^model must be an nn\.Module that is not compiled, got '):
            explain(model, torch.randn(8, 8, 1, 1))


# Threads

def meanwhile(*functions):
    """Run functions at the same time, each in a thread; their results, or the first error."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


@pytest.fixture
def fast_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_forced_path_is_that_of_its_thread(fast_switches):
    layer, x = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2)

    def decide(path, want):
        for _ in range(300):
            with use_path(path):
                assert switch.choose(layer, 'TIM', x, 4, [layer.weight]) == want
            assert switch.choose(layer, 'TIM', x, 4, [layer.weight]) == 'plain'
        return path

    def fail():
        for _ in range(300):
            with use_path('triton'), pytest.raises(RuntimeError, match="the path 'triton' is forced, but"):
                switch.choose(layer, 'TIM', x, 4, [layer.weight])

    with use_path('reference'):    # threads that are started here do not see it
        got = meanwhile(
            lambda: decide('reference', 'reference'), lambda: decide('auto', 'plain'), lambda: decide('plain', 'plain'),
            fail)
        assert got == ['reference', 'auto', 'plain', None] and switch.forced == 'reference'
    assert switch.forced == 'auto'


def test_explain_lists_the_calls_of_its_thread(fast_switches):
    layers, x = [LAYERS[kind](8, num_frames=4).eval() for kind in LAYERS], torch.randn(4, 8, 3, 2)
    done = threading.Event()

    def explained(layer, path):
        found = []
        for _ in range(60):
            with use_path(path):
                found.append([row[:3] for row in explain(layer, x)])
            assert switch.log is None
        return found

    def call():
        while not done.is_set():
            layers[0](x)
            assert switch.log is None

    def all_explained():
        try:
            return [explained(layer, path) for layer, path in zip(layers, ('plain', 'reference', 'auto'), strict=True)]
        finally:
            done.set()

    first, second, _ = meanwhile(all_explained, lambda: explained(layers[2], 'reference'), call)
    assert first == [
        [[('CME', 'CME', 'plain')]] * 60, [[('SME', 'SME', 'reference')]] * 60,
        [[('TIM', 'TIM', 'plain')]] * 60]
    assert second == [[('TIM', 'TIM', 'reference')]] * 60


def test_an_asyncio_task_sees_its_own_path():
    layer, x = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2)

    async def task(path, want):
        for _ in range(3):
            with use_path(path):
                await asyncio.sleep(0)
                assert paths(layer, x)[0][2] == want

    async def both():
        await asyncio.gather(task('reference', 'reference'), task('plain', 'plain'), task('auto', 'plain'))

    asyncio.run(both())


def test_a_block_that_ends_in_another_context():
    # as a generator's does, whose steps run in contexts of their own
    block = use_path('reference')
    contextvars.copy_context().run(block.__enter__)
    assert switch.forced == 'auto'
    block.__exit__(None, None, None)
    assert switch.forced == 'auto'


@pytest.mark.parametrize('path', ['reference', 'plain', 'auto'])
def test_a_backward_pass_in_another_thread_is_that_of_its_forward_pass(path):
    made, x = block(), torch.randn(4, 8, 3, 2, requires_grad=True)
    with use_path(path):
        y = made(x).square().sum()
        want = torch.autograd.grad(y, [x, *made.parameters()], retain_graph=True)
    with use_path('plain' if path == 'reference' else 'reference'):
        got, = meanwhile(lambda: torch.autograd.grad(y, [x, *made.parameters()]))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class Nested(torch.autograd.Function):
    """Its backward pass starts another one, and so on: PyTorch runs the 61st in a thread of its own.

    That is a thread such as the ones that run the backward passes on a GPU.
    """

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.depth:
            x = torch.zeros(1, requires_grad=True)
            with torch.enable_grad():
                y = Nested.apply(x, ctx.depth - 1, ctx.seen)
            y.backward()
        else:
            ctx.seen.append((threading.get_ident(), switch.forced))
        return g, None, None


def test_a_thread_of_autograds_has_the_default():
    # as use_path says of a forward pass that gradient checkpointing repeats for a GPU
    seen, x = [], torch.zeros(1, requires_grad=True)
    with use_path('reference'):
        Nested.apply(x, 70, seen).backward()
        Nested.apply(x, 3, seen).backward()
    (other, path), (same, forced) = seen
    assert other != same == threading.get_ident() and (path, forced) == ('auto', 'reference')


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('path', ['reference', 'plain', 'auto'])
def test_checkpointing_repeats_the_path(path, reentrant):
    made, x = block().train(), torch.randn(4, 8, 3, 2, requires_grad=True)
    with use_path(path):
        want = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
        torch.utils.checkpoint.checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    for p, g in zip([x, *made.parameters()], want, strict=True):
        assert torch.equal(p.grad, g)


def test_a_compiled_layer_takes_the_path_of_each_call():
    layer, x, taken = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2), []

    def backend(graph, example_inputs):
        has_operator = any('cmr_layers' in str(node.target) for node in graph.graph.nodes)
        return lambda *args: taken.append('plain' if has_operator else 'reference') or graph(*args)

    def call(path):
        with use_path(path):
            compiled(x)

    for first, second in (('auto', 'reference'), ('reference', 'auto'), ('plain', 'reference')):
        torch._dynamo.reset()
        taken.clear()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for path in (first, second, first):
            call(path)
        want = ['reference' if path == 'reference' else 'plain' for path in (first, second, first)]
        assert taken == want
        with use_path('reference'):    # which the thread does not see
            meanwhile(functools.partial(compiled, x))
        assert taken == [*want, 'plain']
    torch._dynamo.reset()


def test_explain_sees_a_compiled_part():
    layer, x = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='eager')
    compiled(x)
    assert [row[2] for row in explain(nn.Sequential(layer, compiled), x)] == ['plain', 'plain']
    torch._dynamo.reset()


def test_explaining_leaves_no_trace():
    layer, x = TIM(8, num_frames=4), torch.randn(4, 8, 3, 2)
    explain(layer, x)
    assert switch.log is None
    with pytest.raises(ValueError):
        explain(layer, torch.randn(6, 8, 3, 2))
    assert switch.log is None


def test_ops_exports_the_switch():
    assert ops.use_path is use_path and ops.explain is explain


@pytest.mark.parametrize('channels', [8, 3])
@pytest.mark.parametrize('has', [True, False])
def test_tim_alone_is_left_to_pytorchs_convolution_where_there_is_a_fast_one(channels, has, monkeypatch):
    monkeypatch.setattr(sys.modules['cmr_layers.ops.cme_tim'], 'has_onednn', lambda dtype: has)
    reason = "PyTorch's depthwise convolution is faster"
    x = torch.randn(4, 8, 3, 2)
    wide = x.contiguous(memory_format=torch.channels_last)[:, :channels]    # a part of the channels, or all
    layer, cme = TIM(channels, num_frames=4), CME(channels, num_frames=4, reduction=1)
    want = [('reference', reason) if has else ('plain', 'x is on cpu'), ('plain', 'x is on cpu')]
    for frames in (wide, x[:, :channels]):
        assert paths(layer, frames)[0][2:] == want[0 if frames is wide else 1]
        assert paths(cme, frames)[0][2:] == ('plain', 'x is on cpu')
        y = layer(frames)
        for path in ('plain', 'reference'):
            with use_path(path):
                assert paths(layer, frames)[0][2:] == (path, 'forced')
                torch.testing.assert_close(layer(frames), y)


def test_onednn_takes_what_the_processor_has_instructions_for():
    onednn = torch.ops.mkldnn
    assert not products.has_onednn(torch.float64)
    assert products.has_onednn(torch.float32) == torch.backends.mkldnn.is_available()
    for dtype, native in (
            (torch.bfloat16, onednn._is_mkldnn_bf16_supported), (torch.float16, onednn._is_mkldnn_fp16_supported)):
        assert products.has_onednn(dtype) == (torch.backends.mkldnn.is_available() and native())
        wanted = dtype if products.has_onednn(dtype) else torch.float32
        assert products.product_dtype(torch.empty(0, dtype=dtype)) == wanted


def test_without_gradients_cme_and_tim_of_a_small_clip_are_left_to_it_too(monkeypatch):
    monkeypatch.setattr(sys.modules['cmr_layers.ops.cme_tim'], 'has_onednn', lambda dtype: True)
    weights, taps = CME(8, num_frames=4, reduction=1).weights(), torch.randn(8, 1, 3)
    x = torch.randn(4, 8, 3, 2).contiguous(memory_format=torch.channels_last)

    class Both(nn.Module):
        def forward(self, x):
            return ops.cme_tim(x, 4, weights, taps, owner=self)

    def taken():
        return paths(Both(), x)[0][1:]

    assert taken() == ('CME + TIM', 'reference', "PyTorch's depthwise convolution is faster")  # no_grad
    assert 'cme_tim' in type(ops.cme_tim(x.requires_grad_(), 4, weights, taps).grad_fn).__name__
    monkeypatch.setattr(plain_cme_tim, 'GATED', 0)
    assert taken() == ('CME + TIM', 'plain', 'x is on cpu')
