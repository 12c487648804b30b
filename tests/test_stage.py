"""``fuse_stages`` makes blocks hand on what they know; what they compute stays, and nobody's hook is passed over.

On the path 'triton' the kernels run in Triton's interpreter where there is no GPU. What the kernels compute is in
``ops/test_block_end.py``.
"""
import contextlib
import copy

import pytest
import timm
import torch
import torchvision
from folding import EVERY, T, assert_near, clips, small
from helpers import image_net, randomize
from interpreter import DEVICE, interpreted
from stages import PATHS, Calls, another_class, frames, fused, network, on
from torch import nn
from torch.nn.utils import parametrize

from cmr_layers import SME, TIM, ClipModel, CMRBasicBlock, CMRBlock, insert, restore, retrofit
from cmr_layers import set_num_frames as set_frames
from cmr_layers.deploy import fold, fuse_stages
from cmr_layers.ops import use_path
from cmr_layers.stage import FusedStage

pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')

# What a stage computes

@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('kind', [CMRBlock, CMRBasicBlock])
@pytest.mark.parametrize('folded', [True, False])
def test_a_network_computes_what_it_did(path, kind, folded):
    model, x = network(kind, folded), frames()
    twin = fused(model, x)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
    with on(path):
        got = twin(x)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_near(got.double(), want, 1e-5)
        if path != 'triton' and DEVICE == 'cpu':
            assert torch.equal(got, model(x))
        for still in (x[:1], x[:T - 1]):
            with contextlib.nullcontext() if path in ('auto', 'reference') else use_path('auto'):
                assert_near(twin(still), model(still), 1e-5)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, .01), (torch.bfloat16, .05)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_half_precision_and_both_layouts(dtype, tolerance, memory_format):
    model, x = network(), frames(1)
    with torch.no_grad():
        want = model.double()(x.double())
        model, x = (v.to(dtype=dtype, memory_format=memory_format) for v in (model, x))
        twin = fused(model, x)
        for path in PATHS:
            with on(path):
                got = twin(x)
            assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
            assert_near(got.double(), want, tolerance)


def test_what_a_block_knows_goes_to_the_layer_that_wants_it():
    model, x = network(), frames(1)
    twin = fused(model, x)
    with on('triton'), Calls() as calls:
        twin(x)
    assert calls.seen == [
        'cme_tim', 'block_end, motion', 'motion_product',   # SME's output is another than the block's end
        'cme_tim', 'block_end, mean', 'cme_tim, pooled', 'block_end, mean', 'cme_tim, pooled', 'block_end, motion',
        'motion_product', 'cme_tim', 'block_end, mean']
    with on('plain'), Calls() as calls:
        twin(x)
    assert calls.seen == ['cme_tim', 'motion_conv', 'cme_tim', 'cme_tim', 'cme_tim', 'motion_conv', 'cme_tim']
    # an SME that is not folded computes its similarities itself
    model = network(folded=False)
    twin = fused(model, x)
    with on('triton'), Calls() as calls:
        twin(x)
    assert calls.seen[:3] == ['cme_tim', 'block_end, mean', 'motion_conv']


@pytest.mark.parametrize('name', EVERY)
def test_all_blocks_of_every_network_are_fused(name):
    model = timm.create_model(name, device='meta', num_frames=2).eval()
    x = torch.empty(2, 3, 64, 64, device='meta')
    keys, number = list(model.state_dict()), sum(isinstance(m, CMRBlock | CMRBasicBlock) for m in model.modules())
    report = fuse_stages(model, x)
    assert list(report.stages) == ['layer1', 'layer2', 'layer3', 'layer4'] and len(report) == number
    # the SMEs, as nothing is folded
    assert list(report.left) == [f'layer{i}.0.sme' for i in range(1, 5)]
    assert list(model.state_dict()) == keys and type(model.layer1) is FusedStage


@torch.no_grad()
@pytest.mark.parametrize('name', ['cmr_resnet18', 'cmr_seresnet50', 'cmr_resnet26d', 'released_cmr_resnet50'])
@pytest.mark.parametrize('kwargs', [{}, {'drop_path_rate': .1, 'drop_block_rate': .1}], ids=str)
def test_networks(name, kwargs):
    model, x = small(name, **kwargs), clips()
    fold(model, x)
    want = model(x), model.forward_intermediates(x, intermediates_only=True)
    report = fuse_stages(model, x)
    assert not report.left
    assert str(report) == f'{type(model).__name__}: {len(report)} blocks of 4 stages fused, 0 left alone'
    assert torch.equal(model(x), want[0])
    for got, wanted in zip(model.forward_intermediates(x, intermediates_only=True), want[1], strict=True):
        assert torch.equal(got, wanted)
    set_frames(model, 2)
    assert model(clips(num_frames=2)).shape == (2, 5)


def test_stages_of_the_family_hand_on_too():
    model, x = small().to(DEVICE), clips(1).to(DEVICE)
    fold(model, x)
    twin = fused(model, x)

    def entries():
        with Calls() as calls:
            twin(x)
        return [name for name in calls.seen if name.startswith('cme_tim')][::2]     # of each stage's first block

    with on('triton'):
        assert entries() == ['cme_tim', *['cme_tim, pooled'] * 3]
        handle = twin.layer2.register_forward_hook(lambda module, args, y: 2 * y)
        want = model.layer4(model.layer3(2 * model.layer2(model.layer1(model.maxpool(model.act1(
            model.bn1(model.conv1(model.fold(x)))))))))
        assert_near(twin.forward_features(x), want, 1e-5)
        assert entries() == ['cme_tim', 'cme_tim', 'cme_tim', 'cme_tim, pooled']
        handle.remove()
        twin.layer3.forward = lambda x: nn.Sequential.forward(twin.layer3, x)
        assert entries()[2:] == ['cme_tim', 'cme_tim']


@torch.no_grad()
def test_a_whole_network_with_kernels():
    model, x = small(sme='all'), clips(1)
    fold(model, x)
    twin = fused(model, x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, .02)):
        model, twin, x = model.to(DEVICE, dtype), twin.to(DEVICE, dtype), x.to(DEVICE, dtype)
        want = model(x)
        with on('triton'):
            assert_near(twin(x), want, tolerance)


@torch.no_grad()
@pytest.mark.parametrize('make, number', [
    (lambda: image_net('resnet18'), 8), (lambda: image_net('resnet50'), 16),
    (lambda: torchvision.models.resnet18(num_classes=5), 8), (lambda: torchvision.models.resnet50(num_classes=5), 16)])
def test_retrofitted_networks(make, number):
    model = make().eval()
    retrofit(model, num_frames=T)
    randomize(model).eval()
    model, x = ClipModel(model, num_frames=T).eval(), clips()
    fold(model, x)
    want = model(x)
    report = fuse_stages(model, x)
    assert len(report) == number and not report.left
    assert torch.equal(model(x), want)
    restored = restore(model)
    assert not any(isinstance(m, SME) for m in restored.modules())
    assert restored(x).shape == want.shape      # a fused stage calls blocks that are none of ours


# What may not be passed over. Each change is made before or after the stages are fused.

class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def double(module, args, y):
    return 2 * y


def patch(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def put_in(net, at):
    insert(net, TIM, at=at, num_frames=T, example_input=frames(1)[:1], init='random')


def replaced(name, made):
    def change(net):
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, made().eval())
    return change


CHANGES = {
    'hook': lambda net: net.first[1].register_forward_hook(double),
    'pre-hook': lambda net: net.first[2].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    'patch': lambda net: patch(net.first[1]),
    'class': lambda net: another_class(net.first[1]),
    "the ReLU's hook": lambda net: net.first[1].act3.register_forward_hook(double),
    'another ReLU': lambda net: patch(net.first[0].act3),
    'another activation': replaced('first.1.act3', nn.SiLU),
    'another block': replaced('first.1', Doubled),
    'another layer': replaced('first.1.cme', Doubled),
    'another SME': replaced('first.0.sme', Doubled),
    'one SME more': replaced('first.2.sme', Doubled),
    "the SME's hook": lambda net: net.first[0].sme.register_forward_hook(double),
    "the hook of the SME's convolution": lambda net: net.first[0].sme.conv.register_forward_hook(double),
    'a weight': lambda net: parametrize.register_parametrization(net.first[0].sme.conv, 'weight', Doubled()),
    'the norm': lambda net: patch(net.first[0].sme.bn),
    'a layer at a block': lambda net: put_in(net, 'first.1'),
    'a layer at a stage': lambda net: put_in(net, 'first'),
    'a layer at the ReLU': lambda net: put_in(net, 'first.1.act3'),
    'the identity': lambda net: patch(net.first[1].sme),
}


@pytest.mark.parametrize('kernels', [False, True])
@pytest.mark.parametrize('change', CHANGES)
def test_nothing_is_passed_over(change, kernels):
    model, x = network(), frames(1)
    twin, late = fused(model, x), fused(model, x)
    for net in (model, late):
        torch.manual_seed(1)
        CHANGES[change](net)
        net.eval()
    with on('auto'):
        want = model(x)
        assert (want - twin(x)).norm() > .01 * want.norm()      # it does change something
    fuse_stages(model, x)
    with interpreted() if kernels else contextlib.nullcontext(), on('auto'), Calls() as calls:
        for net in (late, model):
            assert_near(net(x), want, 1e-5)
    assert kernels == any('block_end' in name for name in calls.seen)


@torch.no_grad()
def test_a_global_hook_and_patched_classes(monkeypatch):
    model, x = network(), frames(1)
    twin = fused(model, x)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: calls.append(type(module)))
    try:
        twin(x)
    finally:
        handle.remove()
    assert calls.count(CMRBlock) == 5 and nn.ReLU in calls and SME in calls
    for kind, name in ((CMRBlock, 'forward'), (nn.ReLU, 'forward')):
        forward = getattr(kind, name)
        with monkeypatch.context() as patches:
            patches.setattr(kind, name, lambda self, x, forward=forward: 2 * forward(self, x))
            want = model(x)
            assert torch.equal(twin(x), want)


def test_a_block_that_is_compiled_afterwards_is_called():
    model, x = network(), frames(1)
    twin, calls = fused(model, x), []
    twin.first[1].compile(backend=lambda graph, inputs: calls.append(1) or graph)
    with on('auto'):
        assert_near(twin(x), model(x), 1e-6)
    assert calls
    torch._dynamo.reset()


# With gradients

def test_gradients_are_those_of_the_blocks():
    model, x = network(), frames().requires_grad_()
    twin = fused(model, x.detach())
    got, want = (torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]) for net in (twin, model))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    twin.train(), model.train()
    torch.manual_seed(0)
    got = twin(x)
    torch.manual_seed(0)
    assert torch.equal(got, model(x))
