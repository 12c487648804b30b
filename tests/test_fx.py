"""torch.fx: whoever traces a network finds a layer to be one node, and the graph computes what the network does."""
import copy

import pytest
import timm
import torch
from helpers import randomize
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from cmr_layers import CME, SME, TIM, ClipModel, released
from cmr_layers.clip import ClipModule, Fold

T = 2
THIN = {'channels': (4, 8, 8, 8), 'num_classes': 3}
NETWORKS = {
    'cmr_resnet18': lambda: timm.create_model('cmr_resnet18', num_frames=T, **THIN),
    'features': lambda: timm.create_model('cmr_resnet18', num_frames=T, consensus='features', **THIN),
    'deep stem, dropout': lambda: timm.create_model(
        'cmr_resnet18', num_frames=T, stem_type='deep', stem_width=4, drop_rate=.5, **THIN),
    'bottlenecks': lambda: timm.create_model(
        'cmr_resnet26', num_frames=T, sme='all', channels=(8, 8, 8, 8), num_classes=3),
    'released': lambda: released.ReleasedCMRResNet((1, 1, 1, 1), num_frames=T, channels=(8, 8, 8, 8), num_classes=3),
    'ClipModel': lambda: ClipModel(
        nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), CME(8, T), TIM(8, T), SME(8, T), nn.ReLU(),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), T),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return randomize(NETWORKS[request.param]()).double()


def clips():
    return torch.randn(3, T, 3, 32, 32, dtype=torch.float64)


def layers_of(network):
    return {name for name, m in network.named_modules() if isinstance(m, ClipModule)}


def seeded(model, x):
    torch.manual_seed(1)    # dropout draws
    return model(x)


@pytest.mark.parametrize('train', [False, True])
def test_symbolic_trace_is_the_network(network, train):
    network.train(train)
    x, twin = clips(), copy.deepcopy(network)
    traced = symbolic_trace(network)
    assert layers_of(network) <= {str(n.target) for n in traced.graph.nodes if n.op == 'call_module'}
    y, want = seeded(traced, x), seeded(twin, x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in twin.named_parameters()]
    parameters = dict(traced.named_parameters())
    assert sorted(parameters) == sorted(names)
    got = torch.autograd.grad(y.square().sum(), [parameters[name] for name in names])
    for g, h in zip(got, torch.autograd.grad(want.square().sum(), list(twin.parameters())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-6)
    buffers = dict(traced.named_buffers())
    for name, v in twin.named_buffers():    # the statistics moved, too, once
        torch.testing.assert_close(buffers[name], v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seeded(copy.deepcopy(traced), x), seeded(twin, x), rtol=1e-9, atol=1e-9)
    assert traced.float()(x.float()).dtype == torch.float32


def test_fuse_is_the_network(network):
    network.eval()
    x = clips()
    fused = fuse(network)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-9, atol=1e-9)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (fused, network)]
    assert norms[0] < norms[1]


def test_create_feature_extractor_is_the_network(network):
    x = clips()
    node = next(name for name, m in network.named_modules() if isinstance(m, SME))
    last = 'fc' if getattr(network, 'average_features', False) else 'consensus'
    extractor = create_feature_extractor(network.train(), {node: 'x', last: 'y'})
    for train in (False, True):
        extractor.train(train)
        twin, seen = copy.deepcopy(network).train(train), []
        twin.get_submodule(node).register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
        want = seeded(twin, x)
        got = seeded(extractor, x)
        torch.testing.assert_close(got['x'], seen[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got['y'], want, rtol=1e-9, atol=1e-9)
    assert all(layers_of(network) <= set(names) for names in get_graph_node_names(network))


def test_feature_maps_of_a_stage():
    network, x = randomize(NETWORKS['cmr_resnet18']()).double().eval(), clips()
    got = create_feature_extractor(network, {'layer4': 'x'}).eval()(x)['x']
    torch.testing.assert_close(got, network.forward_features(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('layer', [CME(8), SME(8), TIM(8), Fold(8)], ids=lambda layer: type(layer).__name__)
def test_error_tracing_the_inside_of_a_layer_names_the_way_out(layer):
    message = (
        r"^x must be a tensor, got <class 'torch\.fx\.proxy\.Proxy'>; torch\.fx takes a layer as a node of the network "
        r'around it, so trace nn\.Sequential\(layer\)$')
    with pytest.raises(TypeError, match=message):
        symbolic_trace(layer)
    shape = (2, 8, 3, 4, 4) if isinstance(layer, Fold) else (16, 8, 4, 4)
    x = torch.randn(shape)
    assert torch.equal(symbolic_trace(nn.Sequential(layer.eval()))(x), layer(x))
