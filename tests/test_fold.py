"""What ``fold`` keeps, on one convolution and one batch norm, and its errors; it folds all or nothing."""
import copy
import ctypes
from typing import NamedTuple

import pytest
import torch
from folding import check, example, net
from helpers import anatomy, assert_same, randomize, values
from timm.layers import BatchNormAct2d
from torch import nn

from cmr_layers import SME, deploy, insert
from cmr_layers.deploy import fold

# What is kept

def test_types_formats_and_what_learns():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model = net().to(dtype=dtype, memory_format=torch.channels_last)
        model.conv.weight.requires_grad_(False)
        exact = copy.deepcopy(model).double()
        fold(model, example().to(dtype)), fold(exact, example())
        assert model.conv.weight.dtype == model.conv.bias.dtype == dtype
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.conv.weight.requires_grad and model.conv.bias.requires_grad
        for got, want in zip(model.conv.parameters(), exact.conv.parameters(), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


class Result(NamedTuple):
    logits: torch.Tensor
    mask: torch.Tensor
    note: str


def test_results_of_any_structure():
    def run(net, x):
        y = net.norm(net.conv(x))
        return [{'a': Result(y, y > 0, 'note')}, (y.argmax(1), None, y.masked_fill(y < 0, -torch.inf)), 3]

    model, x = net(run), example()
    want = model(x)
    assert len(fold(model, x)) == 1
    torch.testing.assert_close(model(x)[1][2], want[1][2])


def test_networks_that_do_not_run_in_float64_or_cannot_be_copied():
    def only_float32(net, x):
        if x.dtype != torch.float32:
            raise RuntimeError('float32, please')
        return net.norm(net.conv(x))

    for run in (only_float32, lambda net, x: net.norm(net.conv(x))):
        model, x = net(run).float(), example().float()
        if run is not only_float32:
            model.lock = (i for i in ())    # a generator can't be copied
        want = model(x)
        assert len(fold(model, x)) == 1
        torch.testing.assert_close(model(x), want)


def test_random_numbers_are_left_as_they_were():
    model, x = net(lambda net, x: net.norm(net.conv(x + torch.randn_like(x)))), example()
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert len(fold(model, x)) == 1
    assert torch.equal(torch.rand(2), want)


# Errors

def test_errors():
    model, x = net(), example()
    for wrong in (None, lambda x: x):
        with pytest.raises(TypeError, match=r'^model must be an nn\.Module, got '):
            fold(wrong, x)
    with pytest.raises(TypeError, match=r'^example_input must be a tensor, got list$'):
        fold(model, [x])
    model.norm.train()
    with pytest.raises(ValueError, match=r'^model must be in eval mode, got one in training mode; call model\.eval'):
        fold(model, x)
    with pytest.raises(TypeError, match=r'^model must be the network itself, got what torch\.compile made of it'):
        fold(torch.compile(net()), x)
    with pytest.raises(TypeError, match=r'^model must return tensors, got float$'):
        fold(net(lambda net, x: float(net.norm(net.conv(x)).sum())), x)
    with pytest.raises(ValueError, match=r'^example_input must lead to finite numbers, got a result without'):
        fold(net(), x * torch.inf)


def test_error_a_layer_is_gone():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    insert(model, SME, at='2', num_frames=2)
    model[2] = nn.ReLU()
    model.eval()
    with pytest.raises(RuntimeError, match=r'must run once, at 2, but 2 is another ReLU now'):
        fold(model, example().float())


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('at', range(1, 5))
def test_an_interrupted_call_leaves_the_network_as_it_was(monkeypatch, error, at):
    model = nn.Sequential(*(
        module for _ in range(3) for module in (nn.Conv2d(4, 4, 1), BatchNormAct2d(4)))).eval().double()
    randomize(model)
    before, tree, x, calls = values(model), anatomy(model), example(), []
    want, fold_pair = model(x), deploy.fold_pair

    def breaks(*args):
        calls.append(args)
        if len(calls) == at + 2:    # the first three are of the copy
            raise error('stop')
        fold_pair(*args)

    monkeypatch.setattr(deploy, 'fold_pair', breaks)
    with pytest.raises(error):
        fold(model, x)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree and torch.equal(model(x), want)


def test_an_error_of_the_network_leaves_no_hooks():
    def run(net, x):
        raise ValueError('no')

    model = net(run)
    tree = anatomy(model)
    with pytest.raises(ValueError, match=r'^no$'):
        fold(model, example())
    assert anatomy(model) == tree


def test_an_error_that_the_network_catches():
    def run(net, x):
        try:
            net.other(x[:, :1])
        except RuntimeError:
            pass
        return net.norm(net.conv(x))

    check(net(run, other=nn.Sequential(nn.Conv2d(4, 4, 1))), ['norm'], {})


# What no operation shows

def from_memory(y):
    memory = ctypes.string_at(y.data_ptr(), y.untyped_storage().nbytes())
    return torch.frombuffer(bytearray(memory), dtype=y.dtype).view(y.shape)


@torch.no_grad()
@pytest.mark.parametrize('dtypes', [(torch.float64, torch.float32), (torch.float32,)], ids=['float64', 'float32 alone'])
@pytest.mark.parametrize('read', [from_memory, lambda y: y.new_tensor(y.tolist())], ids=['memory', 'list'])
def test_error_somebody_reads_without_an_operation(read, dtypes):
    def run(net, x):
        if x.dtype not in dtypes:
            raise RuntimeError('float32, please')
        y = net.conv(x)
        return net.second(net.norm(y) + read(y))

    model, x = net(run, second=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).to(dtypes[0]), example()
    before, tree = values(model), anatomy(model)
    message = r'^norm can not be folded into conv: the Net would compute something else on example_input, by .* of its '
    with pytest.raises(RuntimeError, match=message + 'size, and was left as it is'):
        fold(model, x.to(dtypes[0]))
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


@pytest.mark.parametrize('read', [lambda net: net.norm.num_features, lambda net: net.norm.act.inplace and net.norm.eps])
def test_error_somebody_reads_attributes_of_the_batch_norm(read):
    model, x = net(lambda net, x: read(net) * net.norm(net.conv(x)), norm=BatchNormAct2d(4)), example()
    before, tree = values(model), anatomy(model)
    with pytest.raises(RuntimeError, match=r'^norm can not be folded into conv: the Net .*attributes of norm\.'):
        fold(model, x)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


def test_attributes_that_stay_may_be_read():
    model, x = net(lambda net, x: net.norm.act.inplace + net.norm(net.conv(x)), norm=BatchNormAct2d(4)), example()
    want = model(x)
    assert len(fold(model, x)) == 1
    torch.testing.assert_close(model(x), want)


def test_a_weight_that_half_precision_can_not_hold_stays():
    m = nn.Sequential(nn.Conv2d(64, 64, 7, padding=3, bias=False), nn.BatchNorm2d(64)).eval()
    with torch.no_grad():
        m[0].weight.mul_(.5)
        m[1].weight.fill_(2e-3)
        m[1].running_var.fill_(6e4)
    report = fold(m.half(), torch.randn(1, 64, 8, 8).half() * 300)
    assert report.left == {'1': 'would lose digits in the float16 of its convolution'}


class Clamped(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x).clamp(-50, 50)


class Clamp:
    def __call__(self, x, weight, bias):
        return nn.functional.conv2d(x, weight, bias).clamp(-50, 50)


def test_other_calls_and_patches_of_what_is_inside_stay():
    x = torch.randn(2, 3, 8, 8)
    m = nn.Sequential(nn.Conv2d(3, 4, 1), Clamped(4)).eval()
    assert 'forward of its own' in fold(m, x).left['1']
    m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    m[0]._conv_forward = Clamp()
    assert 'a forward that was replaced' in fold(m, x).left['1']


def test_a_network_that_holds_a_script_module_folds():
    m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU())).eval()
    x = torch.randn(2, 3, 8, 8)
    want = m(x)
    assert len(fold(m, x)) == 1
    torch.testing.assert_close(m(x), want)


class Counting(nn.Sequential):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_buffers_keep_their_values():
    m = Counting(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert len(fold(m, torch.randn(2, 3, 8, 8))) == 1 and m.calls == 0


def test_a_hook_on_the_identity_inside_a_norm_stays():
    from timm.layers import BatchNormAct2d
    m, seen = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, apply_act=False)).eval(), []
    m[1].act.register_forward_hook(lambda *args: seen.append(1))
    fold(m, torch.randn(2, 3, 8, 8))
    seen.clear()
    m(torch.randn(2, 3, 8, 8))
    assert seen == [1]
