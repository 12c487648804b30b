"""What ``fold`` folds and what it leaves alone, and why: everything that may read what a convolution returns."""
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from folding import BATCH_NORMS, CONVS, check, example, net
from helpers import randomize
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from cmr_layers import SME, TIM, insert
from cmr_layers.deploy import fold

# What folds

@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    {}, {'bias': False, 'groups': 2}, {'stride': 2, 'dilation': 2}, {'padding': 'same'},
    {'padding': 1, 'padding_mode': 'circular'}, {'padding': 1, 'padding_mode': 'reflect'},
], ids=str)
def test_every_convolution_of_pytorch(dims, kwargs):
    check(net(conv=CONVS[dims](4, 6, 3, **kwargs), norm=BATCH_NORMS[dims](6, eps=.1)), ['norm'], {}, example(dims))


@pytest.mark.parametrize('norm', [
    {}, {'affine': False}, {'momentum': None}, {'eps': .5}], ids=str)
def test_every_batch_norm_with_statistics(norm):
    check(net(norm=nn.BatchNorm2d(4, **norm)), ['norm'], {})


def test_timms_convolution():
    check(net(conv=Conv2dSame(4, 4, 3, stride=2)), ['norm'], {})


def test_classes_that_only_have_other_names():
    class Conv(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3)

    class Norm(nn.BatchNorm2d):
        pass

    check(net(conv=Conv(4), norm=Norm(4)), ['norm'], {})


@pytest.mark.parametrize('kwargs, rest', [
    ({'act_layer': nn.PReLU}, ['act']), ({'act_layer': nn.SiLU, 'inplace': True}, ['act']),
    ({'apply_act': False}, []), ({'act_layer': nn.ReLU6, 'drop_layer': nn.Dropout}, ['drop', 'act'])], ids=str)
def test_timms_batch_norm_leaves_its_activation(kwargs, rest):
    model = net(norm=BatchNormAct2d(4, **kwargs))
    kept = {key for key in model.state_dict() if '.act.' in key or key.startswith('conv')}
    parts = [getattr(model.norm, name) for name in rest]
    check(model, ['norm'], {})
    assert type(model.norm) is (nn.Sequential if rest else nn.Identity) and not model.norm.training
    assert [getattr(model.norm, name) for name in rest] == parts == list(model.norm.children())
    assert set(model.state_dict()) == kept


def test_in_containers_and_among_others():
    def run(net, x):
        y = net.pairs['b'](net.norm(net.conv(x)) + net.pairs['a'][0][1](net.pairs['a'][0][0](x)))
        y += 1    # what the batch norm returned is its reader's
        return {'y': net.last(y), 'shape': y.shape}

    pairs = nn.ModuleDict({
        'a': nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))]),
        'b': nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))})
    model, x = net(run, pairs=pairs, last=nn.BatchNorm2d(4)), example()
    want = model(x)['y']
    report = fold(model, x)
    assert report.pairs == [('conv', 'norm'), ('pairs.a.0.0', 'pairs.a.0.1'), ('pairs.b.1', 'pairs.b.2')]
    assert report.left == {'last': 'is not behind a convolution'}
    torch.testing.assert_close(model(x)['y'], want)
    assert str(report) == 'Net: 3 batch norms folded, 1 left alone\n  last  is not behind a convolution'
    assert len(report) == 3


def test_a_convolution_that_runs_layers_before_itself():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    insert(model, TIM, at='2', where='before', num_frames=2)
    check(randomize(model).eval().double(), ['1', '3'], {})


# What is left alone: somebody else reads what the convolution returns

def add(net, x):
    y = net.conv(x)
    return y + net.norm(y)


def add_before(net, x):
    y = net.conv(x)
    z = y.flatten(2).mean(-1)
    return net.norm(y) * z[:, :, None, None]


def in_place(net, x):
    return net.norm(F.relu_(net.conv(x)))


def in_place_by_a_view(net, x):
    y = net.conv(x)
    y[:, :2] = 1.
    return net.norm(y)


def in_place_by_data(net, x):
    y = net.conv(x)
    y.data.mul_(2)
    return net.norm(y)


def in_place_afterwards(net, x):
    y = net.conv(x)
    z = net.norm(y)
    return z + y.zero_()


def returned(net, x):
    y = net.conv(x)
    return net.norm(y), y


def returned_as_a_view(net, x):
    y = net.conv(x)
    return net.norm(y), y[0]


def a_view(net, x):
    return net.norm(net.conv(x).transpose(2, 3))


def a_module(net, x):
    y = net.conv(x)
    return net.norm(y) + net.act(y)


TOO = 'the output of conv is read by Net, too'


@pytest.mark.parametrize('run, reason', [
    (add, TOO), (add_before, TOO), (in_place, TOO), (in_place_by_a_view, TOO), (in_place_by_data, TOO),
    (in_place_afterwards, TOO), (returned, 'the output of conv is returned or kept, too'), (returned_as_a_view, TOO),
    (a_view, 'is not behind a convolution'), (a_module, 'the output of conv is read by act, too')])
def test_another_reader(run, reason):
    check(net(run, act=nn.Sigmoid()), [], {'norm': reason})


@pytest.mark.parametrize('keep', [
    lambda net, y: net.seen.append(y), lambda net, y: net.seen.append([lambda: y]),
    lambda net, y: net.seen.append(iter([y])),
], ids=['tensor', 'closure', 'iterator'])
def test_kept_aside(keep):
    def run(net, x):
        y = net.conv(x)
        keep(net, y)
        return net.norm(y)

    check(net(run, seen=[]), [], {'norm': 'the output of conv is returned or kept, too'})


def test_garbage_is_no_reader():
    def run(net, x):
        y = net.conv(x)
        cycle = [y]
        cycle.append(cycle)
        return net.norm(y)

    check(net(run), ['norm'], {})


@pytest.mark.parametrize('read', [
    lambda y: torch.from_numpy(y.numpy().copy()), lambda y: y.mean().item(), lambda y: torch.from_dlpack(y),
], ids=['numpy', 'item', 'dlpack'])
def test_read_as_something_else(read):
    def run(net, x):
        y = net.conv(x)
        return net.norm(y) + read(y)

    check(net(run), [], {'norm': TOO})


# What is left alone: somebody else has the module or its tensors

def test_run_twice_or_not_at_all():
    check(net(lambda net, x: net.norm(net.conv(net.norm(net.conv(x))))), [], {'norm': 'runs 2 times'})
    check(net(lambda net, x: net.norm(net.conv(net.conv(x)))), [], {'norm': 'its convolution conv runs 2 times'})
    check(net(lambda net, x: net.norm(net.conv(x)) + net.norm(x)), [], {'norm': 'runs 2 times'})
    check(net(lambda net, x: net.conv(x)), [], {'norm': 'does not run'})
    check(net(lambda net, x: net.conv(x), other=nn.Conv2d(4, 4, 1)), [], {'norm': 'does not run'})


def test_one_norm_behind_two_convolutions():
    def run(net, x):
        return net.norm(net.conv(x)) + net.norm(net.other(x))

    check(net(run, other=nn.Conv2d(4, 4, 1)), [], {'norm': 'runs 2 times'})


def test_one_convolution_before_two_norms():
    def run(net, x):
        y = net.conv(x)
        return net.norm(y) + net.other(y)

    check(net(run, other=nn.BatchNorm2d(4)), [], {
        'norm': 'the output of conv is read by other, too', 'other': 'the output of conv is read by norm, too'})


def test_a_norm_behind_a_norm():
    check(net(lambda net, x: net.other(net.norm(net.conv(x))), other=nn.BatchNorm2d(4)), ['norm'], {
        'other': 'is not behind a convolution'})


@pytest.mark.parametrize('part', ['conv', 'norm'])
def test_at_two_places(part):
    model = net()
    model.again = getattr(model, part)
    reason = 'stands at 2 places'
    check(model, [], {'norm': reason if part == 'norm' else f'its convolution conv {reason}'})


@pytest.mark.parametrize('tie', ['module', 'slice', 'buffer', 'norm'])
def test_tied_tensors(tie):
    model = net(other=nn.Conv2d(4, 4, 3, padding=1))
    if tie == 'module':
        model.other.weight = model.conv.weight
    elif tie == 'slice':
        model.other.bias = nn.Parameter(model.conv.bias.data[:])
    elif tie == 'buffer':
        model.register_buffer('copy', model.conv.weight.data)
    else:
        model.third = nn.BatchNorm2d(4).double().eval()
        model.third.running_var = model.norm.running_var
    shares = f'shares memory with {"Net" if tie == "buffer" else "third" if tie == "norm" else "other"}'
    left = {'norm': shares if tie == 'norm' else f'its convolution conv {shares}'}
    check(model, [], {**left, 'third': 'does not run'} if tie == 'norm' else left)


@pytest.mark.parametrize('read, reason', [
    (lambda net, x: F.conv2d(x, net.conv.weight, padding=1), 'its convolution conv has tensors that Net reads, too'),
    (lambda net, x: net.conv.bias.sum(), 'its convolution conv has tensors that Net reads, too'),
    (lambda net, x: net.norm.weight.sum(), 'has tensors that Net reads, too'),
    (lambda net, x: net.norm.running_var.mean(), 'has tensors that Net reads, too'),
    (lambda net, x: F.conv2d(x, net.hidden[0], padding=1), 'its convolution conv has tensors that Net reads, too')])
def test_tensors_that_are_read_elsewhere(read, reason):
    model = net(lambda net, x: net.norm(net.conv(x)) + read(net, x))
    model.hidden = [model.conv.weight]
    check(model, [], {'norm': reason})


def test_computed_from_tensors_instead_of_called():
    def conv(net, x):
        return net.norm(F.conv2d(x, net.conv.weight, net.conv.bias))

    def norm(net, x):
        n = net.norm
        return F.batch_norm(net.conv(x), n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)

    def forward(net, x):
        return net.norm(net.conv.forward(x))

    check(net(conv), [], {'norm': 'is not behind a convolution'})
    check(net(norm), [], {'norm': 'does not run'})
    check(net(forward), [], {'norm': 'is not behind a convolution'})


# What is left alone: what is not PyTorch's own computation

class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Flipped(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.flip(2), bias)


class Called(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) + 1


class Half(nn.Conv2d):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.uniform_(self._parameters['bias'])    # what the property returned was another tensor

    @property
    def bias(self):
        return self._parameters['bias'] / 2

    @bias.setter
    def bias(self, value):
        self._parameters['bias'] = value

    def register_parameter(self, name, value):
        self._parameters[name] = value


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def own(kind, conv=False):
    return f'{"its convolution conv " if conv else ""}is a {kind}, which has a forward of its own'


@pytest.mark.parametrize('part, make, reason', [
    ('conv', lambda: Doubled(4, 4, 3), own('Doubled', True)), ('conv', lambda: Flipped(4, 4, 3), own('Flipped', True)),
    ('conv', lambda: Called(4, 4, 3), 'is not behind a convolution'),
    ('conv', lambda: Half(4, 4, 3), own('Half', True)),
    ('norm', lambda: Clamped(4), own('Clamped')),
    ('conv', lambda: StdConv2d(4, 4, 3), own('StdConv2d', True)),
    ('conv', lambda: nn.ConvTranspose2d(4, 4, 3), own('ConvTranspose2d', True)),
    ('conv', lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
     'its convolution conv has parameters that are computed'),
    ('conv', lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), 'weight', .5),
     'its convolution conv has hooks, or a forward that was replaced'),
    ('norm', lambda: parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), 'has parameters that are computed'),
    ('norm', lambda: nn.SyncBatchNorm(4), own('SyncBatchNorm')),
    ('norm', lambda: torchvision.ops.FrozenBatchNorm2d(4), own('FrozenBatchNorm2d')),
    ('norm', lambda: timm.layers.FrozenBatchNormAct2d(4), own('FrozenBatchNormAct2d')),
    ('norm', lambda: nn.BatchNorm2d(4, track_running_stats=False), 'has no running statistics'),
])
def test_other_modules(part, make, reason):
    check(net(**{part: make()}), [], {'norm': reason})


def test_norms_that_are_no_batch_norms_are_not_mentioned():
    for norm in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True), timm.layers.LayerNorm2d(4)):
        check(net(norm=norm), [], {})


@pytest.mark.parametrize('part', ['conv', 'norm'])
@pytest.mark.parametrize('how', ['hook', 'pre-hook', 'forward', 'backward'])
def test_hooks(part, how):
    model, seen = net(), []
    module = getattr(model, part)
    if how == 'hook':
        module.register_forward_hook(lambda m, args, y: seen.append(1) or y + 1)
    elif how == 'pre-hook':
        module.register_forward_pre_hook(lambda m, args: seen.append(1))
    elif how == 'backward':
        module.register_full_backward_hook(lambda m, g, h: seen.append(1))
    else:
        module.forward = lambda x, forward=module.forward: forward(x) + 1
    reason = 'has hooks, or a forward that was replaced'
    check(model, [], {'norm': reason if part == 'norm' else f'its convolution conv {reason}'})


@pytest.mark.parametrize('part, reason', [
    ('norm', 'runs norm.sme'), ('conv', 'its convolution conv runs conv.sme behind it')])
def test_layers_in_between(part, reason):
    model = net(lambda net, x: net.norm(net.conv(x)).relu())
    insert(model, SME, at=part, num_frames=2, example_input=example()[:1])
    randomize(model)
    check(model, [f'{part}.sme.bn'], {'norm': reason})


def test_layers_in_timms_batch_norm():
    model = net(norm=BatchNormAct2d(4))
    report = insert(model, SME, at='norm.act', num_frames=2, example_input=example()[:1])
    randomize(model)
    assert report.insertions[0].name == 'norm.act.sme'
    check(model, ['norm', 'norm.act.sme.bn'], {})


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, BatchNormAct2d])
def test_a_batch_norm_that_holds_something(kind):
    model = net(norm=kind(4))
    model.norm.extra = nn.Sigmoid().eval()
    check(model, [], {'norm': 'holds extra'})


def test_without_a_batch():
    x = torch.randn(4, 4, dtype=torch.float64)    # to the batch norm a batch of vectors
    check(net(dims=1), [], {'norm': 'its convolution conv got no batch'}, x)


def test_another_data_type():
    model = net().float()
    model.conv.bfloat16()
    x = example().bfloat16()
    with torch.no_grad():
        want = model(x)
        report = fold(model, x)
        assert want.dtype == torch.bfloat16 and len(report) == 1
        torch.testing.assert_close(model(x), want, rtol=.02, atol=.02)
    cast = net(lambda net, x: net.norm(net.conv(x).double())).float()
    cast.norm.double()
    report = fold(cast, example().float())
    assert report.left == {'norm': 'is not behind a convolution'}


def test_weights_that_would_overflow():
    model, x = net().half(), example().half()
    model.norm.running_var.fill_(0)
    model.norm.weight.data.fill_(60000)
    model.conv.weight.data.mul_(100)
    assert fold(model, x).left == {'norm': 'would make its convolution overflow'}
