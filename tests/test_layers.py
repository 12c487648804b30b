"""What CME, SME and TIM share: shapes, layouts, dtypes, compilers, saving, and the errors of a wrong call."""
import copy
import io
import pickle

import pytest
import timm
import torch
from helpers import randomize
from timm.models._features_fx import create_feature_extractor
from timm.models.resnet import ResNet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from cmr_layers import CME, SME, TIM, released
from cmr_layers.clip import ClipLayer
from cmr_layers.ops import use_path

LAYERS = {'CME': CME, 'SME': SME, 'TIM': TIM}
HALF = [torch.float16, torch.bfloat16]
CLOSE = {'rtol': 2e-2, 'atol': 2e-2}    # two roundings to bfloat16 more or less
cl = torch.channels_last


def clips(batch=2, num_frames=4, channels=8, height=3, width=2, **kw):
    return torch.randn(batch, num_frames, channels, height, width, **kw)


# Shapes and layouts

@pytest.mark.parametrize('num_frames', [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize('size', [(1, 1), (7, 5)], ids=str)
@pytest.mark.parametrize('channels', [1, 5, 8, 12])
def test_odd_sizes_keep_their_shape_and_5d_is_4d(build, kind, num_frames, size, channels):
    # 5 channels: fewer than the reduction and than shift_div; 12: no multiple of either
    layer, x = build(kind, channels, num_frames), clips(2, num_frames, channels, *size)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    torch.testing.assert_close(layer(x.flatten(0, 1)), y.flatten(0, 1))


@pytest.mark.parametrize('train', [False, True])
def test_frames_are_folded_clip_by_clip(build, kind, train):
    # clip 0 is frames 0..3, not every second frame
    layer, x = build(kind), clips()
    layer.train(train and kind != 'SME')    # batch statistics know the whole batch
    torch.testing.assert_close(layer(x.flatten(0, 1))[:4], layer(x[0]))
    torch.testing.assert_close(layer(x.flatten(0, 1))[4:], layer(x[1]))


def test_the_time_axis_matters(build, kind):
    layer, x = build(kind), clips(1)
    stills = torch.cat([layer(frame) for frame in x[0].split(1)])
    assert (layer(x[0]) - stills).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize('ndim', [4, 5])
def test_empty_batch(build, kind, ndim):
    x = torch.zeros(0, 8, 3, 2) if ndim == 4 else torch.zeros(0, 4, 8, 3, 2)
    assert build(kind)(x).shape == x.shape


@pytest.mark.parametrize('size', [(3, 2), (1, 1), (7, 5)], ids=str)
@pytest.mark.parametrize('batch, num_frames', [(1, 4), (2, 4), (2, 3), (1, 1), (3, 1)])
def test_channels_last_stays_channels_last(build, kind, batch, num_frames, size):
    layer, x = build(kind, num_frames=num_frames), clips(batch, num_frames, 8, *size).flatten(0, 1)
    y = layer(x.to(memory_format=cl))
    assert y.is_contiguous(memory_format=cl)
    torch.testing.assert_close(y, layer(x))
    if num_frames > 1:    # the stride of an axis of one frame means nothing, so a 5-D still has no one layout
        y = layer(x.to(memory_format=cl).unflatten(0, (batch, num_frames)))
        assert y.flatten(0, 1).is_contiguous(memory_format=cl)


@pytest.mark.parametrize('size', [(3, 2), (1, 1), (7, 5)], ids=str)
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('ndim', [4, 5])
def test_contiguous_stays_contiguous(build, kind, batch, ndim, size):
    x = clips(batch, 4, 8, *size)
    y = build(kind)(x if ndim == 5 else x.flatten(0, 1))
    assert y.is_contiguous()
    assert y.stride() == y.contiguous().stride()


def test_any_other_layout_gives_the_same_values(build, kind):
    layer, x = build(kind), clips()
    want = layer(x)
    strided = clips(2, 8, 8, 3, 2)[:, ::2].copy_(x)
    swapped = x.transpose(3, 4).contiguous().transpose(3, 4)
    frames_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    for y in (strided, swapped, frames_first):
        assert not y.is_contiguous()
        torch.testing.assert_close(layer(y), want)
    torch.testing.assert_close(layer(x[:1].expand(2, -1, -1, -1, -1)), want[:1].expand_as(want))


def test_the_input_is_left_alone(build, kind):
    x = clips()
    before = x.clone()
    build(kind)(x)
    assert torch.equal(x, before)


# Clips of one frame, and how many frames there are

def test_fewer_frames_than_a_clip_are_stills(build, kind):
    layer, x = build(kind), torch.randn(3, 8, 3, 2)
    want = layer(x)
    layer.set_num_frames(1)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(torch.cat([layer(frame) for frame in x.split(1)]), want)


@pytest.mark.parametrize('num_frames', [1, 4])
@pytest.mark.parametrize('train', [False, True])
def test_every_parameter_has_a_gradient(build, kind, num_frames, train):
    layer = build(kind, num_frames=num_frames, **{'CME': {'gate_init': .3}, 'SME': {'bias': True}}.get(kind, {}))
    x = clips(num_frames=num_frames, requires_grad=True)
    layer.train(train)(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert (x.grad != 0).all()
    if num_frames > 1 and not (train and kind == 'SME'):    # a bias before a batch norm has the gradient zero
        assert all((p.grad != 0).any() for p in layer.parameters())


def test_stills_give_every_parameter_a_gradient(build, kind):
    layer = build(kind)
    layer(torch.randn(2, 8, 3, 2)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_set_num_frames_needs_no_other_weights(build, kind):
    layer, x = build(kind), torch.randn(8, 8, 3, 2)
    as_two_clips = layer(x)
    layer.set_num_frames(8)
    assert layer.num_frames == 8 and 'num_frames=8' in repr(layer)
    as_one_clip = layer(x)
    assert not torch.allclose(as_one_clip, as_two_clips)
    other = LAYERS[kind](8, num_frames=8).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), as_one_clip)


# Derivatives and dtypes

@pytest.mark.parametrize('num_frames', [1, 3])
@pytest.mark.parametrize('ndim', [4, 5])
def test_gradients_through_the_module(build, kind, num_frames, ndim):
    layer = build(kind, 3, num_frames, dtype=torch.float64)
    names, params = zip(*layer.named_parameters(), strict=True)
    x = clips(2, num_frames, 3, 2, 1, dtype=torch.float64)

    def call(x, *params):
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    x = (x if ndim == 5 else x.flatten(0, 1)).requires_grad_()
    assert gradcheck(call, (x, *(p.detach().requires_grad_() for p in params)))


@pytest.mark.parametrize('dtype', [torch.float64, *HALF], ids=str)
def test_dtype_argument(kind, dtype):
    layer = LAYERS[kind](8, num_frames=4, dtype=dtype).eval()
    assert all(v.dtype == dtype for v in layer.state_dict().values() if v.is_floating_point())
    assert layer(clips(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_half_precision_is_close_to_float64(build, kind, dtype, tolerance):
    # float64 with the same, already rounded, weights and clip
    layer = build(kind).to(dtype)
    x = clips().to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), layer.double()(x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize('half_input', [False, True])
def test_autocast(build, kind, dtype, tolerance, half_input):
    layer = build(kind)
    x = clips().to(dtype if half_input else torch.float32)
    want = layer(x.float())
    x.requires_grad_()
    with torch.autocast('cpu', dtype=dtype):
        y = layer(x)
    # the product and the residual of CME and SME promote to the clip's dtype; TIM is a convolution and nothing more
    assert y.dtype == (dtype if kind == 'TIM' else x.dtype)
    torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=tolerance)
    y.float().square().sum().backward()
    assert x.grad.dtype == x.dtype
    assert all(p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_to_bfloat16_moves_the_output(kind):
    assert LAYERS[kind](8, num_frames=4).to(torch.bfloat16).eval()(clips(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device(kind):
    layer = LAYERS[kind](8, num_frames=4, device='meta')
    assert all(v.is_meta for v in layer.state_dict().values())
    for x in (clips(device='meta'), torch.empty(8, 8, 3, 2, device='meta'), torch.empty(2, 8, 3, 2, device='meta')):
        y = layer(x)
        assert y.is_meta and y.shape == x.shape
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert layer(clips(device='meta')).is_meta


def test_device_context_is_obeyed(kind):
    with torch.device('meta'):
        assert all(v.is_meta for v in LAYERS[kind](8).state_dict().values())


def test_a_layer_from_the_meta_device_starts_like_any_other(kind):
    # what to_empty leaves is whatever the memory held: NaN is the worst of it
    layer = LAYERS[kind](8, num_frames=4, device='meta').to_empty(device='cpu').eval()
    with torch.no_grad():
        for v in layer.state_dict().values():
            v.fill_(float('nan') if v.is_floating_point() else 7)
    layer.reset_parameters()
    assert layer(clips()).isfinite().all()


# Compilers

@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('ndim', [4, 5])
def test_compile_is_one_graph_for_all_batch_sizes(build, kind, dynamo, ndim):
    layer, counter = build(kind), CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    counts = []
    for batch in (2, 3, 5, 7, 11):
        x = clips(batch) if ndim == 5 else clips(batch).flatten(0, 1)
        torch.testing.assert_close(compiled(x), layer(x))
        counts.append(counter.frame_count)
    # one for the first size, one (SME: two) when the second and third show that it changes, then no more
    assert counts[2] <= 3 and counts[2:] == counts[2:3] * 3


def test_compile_runs_one_clip_stills_and_another_num_frames(build, kind, dynamo):
    layer = build(kind)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for n in (8, 4, 3, 1):
        x = torch.randn(n, 8, 3, 2)
        torch.testing.assert_close(compiled(x), layer(x))
    layer.set_num_frames(2)
    x = torch.randn(8, 8, 3, 2)
    torch.testing.assert_close(compiled(x), layer(x))


def test_compile_trains(build, kind, dynamo):
    layer, x = build(kind).train(), clips()
    twin = copy.deepcopy(layer)
    torch.compile(layer, fullgraph=True, backend='aot_eager')(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_compile_under_autocast(build, kind, dynamo):
    layer, x = build(kind), clips()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        want = layer(x)
        got = torch.compile(layer, fullgraph=True, backend='aot_eager')(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_inductor_gives_the_same_values(build, dynamo):
    layers = nn.Sequential(build('CME'), build('TIM'), build('SME'))
    x = clips()
    torch.testing.assert_close(torch.compile(layers, fullgraph=True, backend='inductor')(x), layers(x))


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('ndim', [4, 5])
def test_export_with_a_dynamic_batch(build, kind, ndim, strict):
    layer = build(kind)
    # torch guards N // 4 != 1 for any view of a folded batch, so one clip has to come as (1, T, C, H, W)
    b = torch.export.Dim('b', min=1 if ndim == 5 else 2, max=64)
    x = clips(3) if ndim == 5 else clips(3).flatten(0, 1)
    shapes = ({0: b if ndim == 5 else 4 * b},)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict).module()
    for batch in (1, 2, 7) if ndim == 5 else (2, 7):
        x = clips(batch) if ndim == 5 else clips(batch).flatten(0, 1)
        torch.testing.assert_close(program(x), layer(x))


def test_an_exported_layer_survives_a_file(build, kind):
    layer, x, file = build(kind), clips(), io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with use_path('reference'):    # an exported graph is the reference's, to the bit
        assert torch.equal(loaded(x), layer(x))
    torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_gives_the_same_values(build, kind):
    layer, file = build(kind), io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for x in (clips(), torch.randn(8, 8, 3, 2), torch.randn(3, 8, 3, 2), clips(dtype=torch.bfloat16)):
        layer, scripted = layer.to(x.dtype), scripted.to(x.dtype)
        torch.testing.assert_close(scripted(x), layer(x), **({} if x.dtype == torch.float32 else CLOSE))
        with use_path('reference'):
            torch.testing.assert_close(scripted(x), layer(x), rtol=0, atol=0)
    with pytest.raises(torch.jit.Error, match='num_frames=4'):
        scripted(torch.randn(6, 8, 3, 2))


@pytest.mark.filterwarnings('ignore')
def test_torch_jit_trace_records_the_layer(build, kind):
    layer, x = build(kind), clips()
    traced = torch.jit.trace(layer, x)
    with use_path('reference'):
        assert torch.equal(traced(x), layer(x))
    torch.testing.assert_close(traced(x), layer(x))


def test_fx_sees_the_layer_as_one_node(build, kind):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), build(kind), nn.ReLU())
    extractor = create_feature_extractor(net, {'1': 'layer', '2': 'relu'})
    assert [n.target for n in extractor.graph.nodes if n.op == 'call_module'] == ['0', '1', '2']
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(extractor(x)['layer'], net[:2](x))


def test_vmap_over_models(build, kind):
    layer, x = build(kind), clips()
    stacked = {k: torch.stack([v, v * 2]) for k, v in layer.named_parameters()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(both, torch.stack([layer(x), doubled(x)]))


ENSEMBLES = {
    'CME': lambda: CME(8, 2), 'SME': lambda: SME(8, 2), 'TIM': lambda: TIM(8, 2),
    'released CME': lambda: released.CME(8, 2),
    'cmr_resnet18': lambda: timm.create_model('cmr_resnet18', num_frames=2, channels=(8, 8, 8, 8), num_classes=3),
}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, cl], ids=str)
@pytest.mark.parametrize('path', ['auto', 'reference'])
@pytest.mark.parametrize('name', ENSEMBLES)
def test_an_ensemble_of_models_in_one_call(name, path, memory_format):
    # the recipe of torch.func, of one batch for all models and of one for each
    models = [randomize(ENSEMBLES[name]()).eval() for _ in range(3)]
    x = torch.randn(3, 4, 3, 32, 32) if name == 'cmr_resnet18' else torch.randn(3, 4, 8, 6, 5)
    x = x.flatten(0, 1).to(memory_format=memory_format).unflatten(0, (3, 4))
    state, base = torch.func.stack_module_state(models), copy.deepcopy(models[0]).to('meta')

    def call(params, buffers, x):
        return torch.func.functional_call(base, (params, buffers), (x,))

    with use_path(path):
        for in_dims, v in ((0, x), (None, x[0])):
            got = torch.func.vmap(call, in_dims=(0, 0, in_dims))(*state, v)
            want = [model(v if in_dims is None else v[i]) for i, model in enumerate(models)]
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


def test_gradients_of_single_clips(build, kind):
    layer, x = build(kind), clips(3)

    def loss(params, clip):
        return torch.func.functional_call(layer, params, (clip,)).square().sum()

    params = {name: p.detach() for name, p in layer.named_parameters()}
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i, clip in enumerate(x):
        want = torch.autograd.grad(layer(clip).square().sum(), list(layer.parameters()))
        for (name, g), w in zip(got.items(), want, strict=True):
            torch.testing.assert_close(g[i], w, rtol=1e-4, atol=1e-4, msg=name)


def test_error_vmap_of_a_batch_norm_in_training_is_pytorchs():
    for layer, shape in ((SME(8, 4), (4, 8, 3, 2)), (nn.BatchNorm2d(8), (4, 8, 3, 2))):
        with pytest.raises(RuntimeError, match='Batch norm got a batched tensor as input while the running_mean'):
            torch.vmap(layer)(torch.randn(2, *shape))


# Copies and files

def test_deepcopy_is_equal_and_independent(build, kind):
    layer, x = build(kind), clips()
    want, twin = layer(x), copy.deepcopy(layer)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(layer(x), want) and not torch.equal(twin(x), want)


def test_pickle_round_trip(build, kind):
    layer, x = build(kind), clips()
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)


def test_state_dict_round_trip_through_a_file(build, kind):
    layer, x, file = build(kind), clips(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LAYERS[kind](8, num_frames=4).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), layer(x))


STATE = {
    'CME': ({}, {'w1': (2, 12), 'w2': (2, 12), 'w3': (12, 2)}),
    'CME with bias': (
        {'gate_init': .98, 'reduction': (4, 6)},
        {'w1': (3, 12), 'w2': (2, 12), 'w3': (12, 3), 'b3': (12,)}),
    'SME': ({}, {
        'conv.weight': (12, 12, 1, 1), 'bn.weight': (12,), 'bn.bias': (12,), 'bn.running_mean': (12,),
        'bn.running_var': (12,), 'bn.num_batches_tracked': ()}),
    'SME with bias': ({'bias': True}, {
        'conv.weight': (12, 12, 1, 1), 'conv.bias': (12,), 'bn.weight': (12,), 'bn.bias': (12,),
        'bn.running_mean': (12,), 'bn.running_var': (12,), 'bn.num_batches_tracked': ()}),
    'TIM': ({}, {'weight': (12, 1, 3)}),
    'TIM with 5 taps': ({'kernel_size': 5}, {'weight': (12, 1, 5)}),
}


@pytest.mark.parametrize('num_frames', [1, 8, 16])
@pytest.mark.parametrize('name', STATE)
def test_keys_and_shapes_of_the_state_dict_are_frozen(name, num_frames):
    kwargs, want = STATE[name]
    state = LAYERS[name.split()[0]](12, num_frames=num_frames, **kwargs).state_dict()
    assert {key: tuple(v.shape) for key, v in state.items()} == want


# Initialisation by others

def test_starts_survive_timms_init_weights():
    # timm's ResNet starts every convolution anew, and zeroes what has a zero_init_last
    net = nn.ModuleDict({
        'conv': nn.Conv2d(8, 8, 3), 'cme': CME(8, gate_init=.5), 'sme': SME(8), 'tim': TIM(8),
        'same': TIM(8, init='identity')})
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net['sme'].bn.weight.fill_(3.)
        net['sme'].bn.bias.fill_(3.)
    ResNet.init_weights(net, zero_init_last=True)
    after = net.state_dict()
    assert not torch.equal(after['conv.weight'], before['conv.weight'])    # it did run
    for key in ('cme.w3', 'sme.bn.weight', 'sme.bn.bias', 'tim.weight', 'same.weight'):
        assert torch.equal(after[key], before[key]), key
    x = torch.randn(8, 8, 3, 2)
    assert torch.equal(net['sme'](x), x) and torch.equal(net['cme'](x), x / 2) and torch.equal(net['same'](x), x)


def test_reset_parameters_restores_the_start(build, kind):
    fixed = {'CME': ['w3', 'b3'], 'SME': ['bn.weight', 'bn.bias'], 'TIM': ['weight']}[kind]
    kwargs = {'gate_init': .9} if kind == 'CME' else {}
    start, layer = LAYERS[kind](8, num_frames=4, **kwargs).state_dict(), build(kind, **kwargs)
    assert not any(torch.equal(layer.state_dict()[key], start[key]) for key in fixed)
    layer.reset_parameters()
    assert all(torch.equal(layer.state_dict()[key], start[key]) for key in fixed)


# Errors

BAD_INTS = [0, -1, 1.5, '8', None, True]


@pytest.mark.parametrize('value', BAD_INTS, ids=repr)
@pytest.mark.parametrize('name', ['channels', 'num_frames'])
def test_error_channels_and_num_frames_are_positive_ints(kind, name, value):
    with pytest.raises(ValueError, match=f'^{name} must be a positive int, got {value!r}$'):
        LAYERS[kind](**{'channels': 8, 'num_frames': 4, name: value})


@pytest.mark.parametrize('value', BAD_INTS, ids=repr)
def test_error_set_num_frames_keeps_the_old_value(build, kind, value):
    layer = build(kind)
    with pytest.raises(ValueError, match=f'^num_frames must be a positive int, got {value!r}$'):
        layer.set_num_frames(value)
    assert layer.num_frames == 4


@pytest.mark.parametrize('shape', [(8,), (8, 8), (8, 3, 2), (8, 7, 3, 2), (2, 4, 9, 3, 2), (2, 4, 8, 3, 2, 1)], ids=str)
def test_error_wrong_dimensions_or_channels(build, kind, shape):
    message = rf'^x must have shape \(B\*T, 8, H, W\) or \(B, 4, 8, H, W\), got \[{", ".join(map(str, shape))}\]$'
    with pytest.raises(ValueError, match=message):
        build(kind)(torch.zeros(shape))


def test_error_another_number_of_frames(build, kind):
    message = (
        r'^x of shape \[2, 3, 8, 3, 2\] holds clips of 3 frames, but num_frames=4 is wanted: sample 4 frames, '
        r'or call set_num_frames\(model, 3\)$')
    with pytest.raises(ValueError, match=message):
        build(kind)(torch.zeros(2, 3, 8, 3, 2))


def test_error_no_whole_number_of_clips(build, kind):
    message = (
        '^x holds 6 frames, which is not a whole number of clips: with num_frames=4 it must be a multiple of 4, '
        'or fewer than 4 stills$')
    with pytest.raises(ValueError, match=message):
        build(kind)(torch.zeros(6, 8, 3, 2))


def test_error_a_clip_layer_without_forward_clips():
    with pytest.raises(RuntimeError, match=r'^a ClipLayer defines forward_clips$'):
        ClipLayer(8, 4)(torch.zeros(4, 8, 1, 1))
