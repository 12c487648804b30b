"""Copies and formats of a network with fused stages; what ``fuse_stages`` reports, and its errors.

What such a network computes is in ``test_stage.py``.
"""
import copy
import pickle

import pytest
import torch
from folding import T, assert_near, clips, resaved, small
from helpers import anatomy, assert_same, values
from interpreter import DEVICE, interpreted
from stages import Calls, Net, another_class, frames, fused, network, on
from timm.models import create_feature_extractor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmr_layers import save_model
from cmr_layers import stage as staging
from cmr_layers.block import TemporalBlock
from cmr_layers.deploy import fold, fuse_stages
from cmr_layers.ops import explain
from cmr_layers.ops import path as switch
from cmr_layers.stage import FusedStage

pytestmark = pytest.mark.filterwarnings('ignore:(overflow|invalid value|divide by zero):RuntimeWarning')

# Copies and formats

@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), resaved],
    ids=['deepcopy', 'pickle', 'torch.save'])
def test_copies(clone):
    model, x = network(), frames()
    twin = clone(fused(model, x))
    assert type(twin.first) is FusedStage and list(twin.state_dict()) == list(model.state_dict())
    with on('auto'):
        assert torch.equal(twin(x), model(x))
    with on('triton'), Calls() as calls:
        twin(x)
    assert 'cme_tim, pooled' in calls.seen
    other = fused(network(), x)
    other.load_state_dict(twin.state_dict(), strict=True)
    with on('auto'):
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize('path', ['auto', 'triton'])
def test_compiles_into_one_graph(path):
    model, x = network(), frames(1)
    twin = fused(model, x)
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if 'cmr_layers' in str(node.target))
        return graph

    with on(path):
        torch.testing.assert_close(torch.compile(twin, backend=backend, fullgraph=True)(x), twin(x))
    assert sum('block_end' in name for name in targets) == (5 if path == 'triton' else 0)
    torch._dynamo.reset()


@torch.no_grad()
def test_export_script_trace_and_fx():
    model, x = network(), frames()
    twin = fused(model, x)
    want = model(x)
    program = torch.export.export(twin, (x,))
    assert not [node for node in program.graph.nodes if 'cmr_layers' in str(node.target)]
    for made in (program.module(), torch.jit.script(twin), torch.jit.trace(twin, x), torch.fx.symbolic_trace(twin)):
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
def test_features_only(feature_cls):
    kwargs = {} if feature_cls == 'list' else {'feature_cls': feature_cls}
    model, x = small(features_only=True, **kwargs), clips()
    fold(model, x)
    want = model(x)
    assert len(fuse_stages(model, x)) == 8
    got = model(x)
    for key in want if isinstance(want, dict) else range(len(want)):
        assert torch.equal(got[key], want[key])


@torch.no_grad()
def test_a_feature_extractor_of_fx():
    model, x = small(), clips()
    fold(model, x)
    nodes = ['layer1', 'layer4']
    want = create_feature_extractor(copy.deepcopy(model), nodes)(x)
    got = create_feature_extractor(fused(model, x), nodes)(x)
    for key in nodes:
        assert_near(got[key], want[key], 1e-6)


def test_error_it_is_not_saved(tmp_path):
    for folds in (False, True):
        model, x = small(), clips()
        if folds:
            fold(model, x)
        fuse_stages(model, x)
        with pytest.raises(ValueError, match='folded'):
            save_model(model, tmp_path)


# The report

@torch.no_grad()
def test_what_is_left_alone_and_why():
    model = network()
    model.first[0].register_forward_hook(lambda *args: None)
    model.first[1].act3 = nn.SiLU().eval()
    another_class(model.first[2])
    model.first[3].act3.register_forward_hook(lambda *args: None)
    model.second = nn.Sequential(
        model.second[0], nn.Conv2d(16, 8, 1).to(DEVICE), network(folded=False).first).eval()
    report = fuse_stages(model, frames())
    assert report.stages == {'second': ['second.0'], 'second.2': [f'second.2.{i}' for i in range(4)]}
    own = 'computes its similarities itself: its batch norm is not folded, or it is no SME of ours'
    assert report.left == {
        'first.0': 'is hooked, patched or compiled', 'first.1': 'ends with a SiLU, not a ReLU',
        'first.2': 'is a OwnBlock, which has methods of its own', 'first.3': 'ends with a ReLU, hooked or patched',
        'second.2.0.sme': own, 'second.2.3.sme': own}
    assert str(report).startswith('Net: 5 blocks of 2 stages fused, 6 left alone\n  first.0         is hooked')


@torch.no_grad()
def test_a_second_time_changes_nothing_and_networks_without_blocks_stay():
    x = frames()
    for model in (fused(network(), x), nn.Sequential(nn.Conv2d(8, 4, 1)).to(DEVICE).eval()):
        before, tree = values(model), anatomy(model)
        report = fuse_stages(model, x)
        assert not len(report) and not report.left
        assert_same(before, model.state_dict())
        assert anatomy(model) == tree
    model = network()
    model.second = nn.ModuleList(model.second)      # no stage that could run them
    report = staging._find(model)
    assert report.left == {'second.0': 'is not in an nn.Sequential'} and len(report) == 4


def test_what_explain_says_of_a_gpu(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.setattr(switch, '_capability', lambda index: (9, 0))
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: 0, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device('cuda'):
        model = Net(dtype=torch.float16).eval()
        model.first[0].downsample[1] = model.first[0].sme.bn = nn.Identity()
        model.first.__class__ = FusedStage
        rows = explain(model, torch.empty(2 * T, 8, 14, 14, dtype=torch.float16))
    assert [row[:3] for row in rows[:5]] == [
        ('first.0.cme', 'CME + TIM', 'triton'), ('first.0', 'block end', 'triton'), ('first.0.sme', 'SME', 'triton'),
        ('first.1.cme', 'CME + TIM', 'triton'), ('first.1', 'block end', 'triton')]


# Errors

def test_errors():
    model, x = network(), frames()
    for wrong in (None, lambda x: x):
        with pytest.raises(TypeError, match=r'^model must be an nn\.Module, got '):
            fuse_stages(wrong, x)
    with pytest.raises(TypeError, match=r'^example_input must be a tensor, got list$'):
        fuse_stages(model, [x])
    with pytest.raises(TypeError, match=r'^model must be the network itself, got what torch\.compile made of it'):
        fuse_stages(torch.compile(model), x)
    with pytest.raises(ValueError, match=r'^example_input must lead to finite numbers, got a result without'):
        fuse_stages(model, x * torch.inf)
    model.first[0].bn1.train()
    with pytest.raises(ValueError, match=r'^model must be in eval mode, got one in training mode; call model\.eval'):
        fuse_stages(model, x)


class Nosy(Net):
    """A network that asks for the class of its stage."""

    def forward(self, x):
        return self.first(x) * (2 if type(self.first) is nn.Sequential else 1)


def test_error_a_network_that_would_compute_something_else_stays():
    model, x = network(), frames()
    model.__class__ = Nosy
    before, tree = values(model), anatomy(model)
    with pytest.raises(RuntimeError, match=r'^first, second can not be fused: the Nosy would compute something else'):
        fuse_stages(model, x)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree


@pytest.mark.parametrize('spoilt, motion', [('with_mean', False), ('with_similarity', True)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_error_a_kernel_that_is_wrong_on_a_device(monkeypatch, spoilt, motion, dtype):
    # in half precision the result of a network is too coarse to show it
    pytest.importorskip('triton')
    from cmr_layers.ops import triton_block_end
    model, x = network().to(dtype), frames().to(dtype)
    right = getattr(triton_block_end, spoilt)

    def wrong(*args):
        y, known = right(*args)
        return y, known.roll(1, 0) if motion else known * .8

    with on('triton'):
        assert len(fuse_stages(copy.deepcopy(model), x)) == 5
        monkeypatch.setattr(triton_block_end, spoilt, wrong)
        with pytest.raises(RuntimeError, match=r'^the kernel at the end of a block is wrong on this device: off by '):
            fuse_stages(model, x)
    assert type(model.first) is nn.Sequential


def test_a_network_of_float32_may_run_under_autocast():
    pytest.importorskip('triton')
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = network(), frames()
        with interpreted(), torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
            assert len(fuse_stages(model, x)) == 5


def test_a_block_of_somebody_elses_without_branches_is_called():
    class Mine(TemporalBlock):
        def forward(self, x):
            return x * 2

    model, x = network(), frames()
    model.second.append(Mine().eval())
    want = model(x)
    report = fuse_stages(model, x)
    assert 'methods of its own' in report.left['second.1']
    with torch.no_grad():
        assert_near(model(x), want, 1e-5)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('at', range(1, 3))
def test_an_interrupted_call_leaves_the_network_as_it_was(monkeypatch, error, at):
    model, x, calls, check = network(), frames(), [], staging._check
    before, tree = values(model), anatomy(model)

    def breaks(*args):
        calls.append(args)
        if len(calls) == at:    # the first is of the copy
            raise error('stop')
        check(*args)

    monkeypatch.setattr(staging, '_check', breaks)
    with pytest.raises(error):
        fuse_stages(model, x)
    assert_same(before, model.state_dict())
    assert anatomy(model) == tree and type(model.first) is nn.Sequential
