"""The rows of the study: each holds its image network, and differs from the others in what its name says."""
import pytest
import torch
import torch.nn.functional as F

from benchmarks.motion import variants
from benchmarks.motion.rows import GROUPS, IMAGE_NETWORKS, ROWS, build, image_network, load_image_weights
from benchmarks.motion.run import shape_of
from benchmarks.motion.size import SIZES
from benchmarks.peers.tdrl import PEM
from benchmarks.peers.tei import MEM
from cmr_layers import CME, SME, CMRBlock, released, retrofit

SHAPE = SIZES['smoke'].shape
SIDE = 24


@pytest.fixture(scope='module')
def weights():
    """As if trained: no tensor has its default, statistics neither."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    found = {}
    for kind in IMAGE_NETWORKS:
        state = image_network(kind, 6, shape(kind)).state_dict()
        found[kind] = {
            key: value + torch.rand(value.shape, generator=generator) / 2 if value.is_floating_point() else value + 7
            for key, value in state.items()}
    return found


def shape(kind):
    return shape_of(kind, SIZES['smoke'])


def clip(frames, clips=2):
    return torch.randn(clips * frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', ROWS)
def test_a_row_maps_clips_to_logits_and_all_that_may_learn_does(name, weights):
    row = ROWS[name]
    model = build(name, 5, shape(row.image), weights[row.image], seed=0).train()
    logits = model(clip(row.num_frames))
    assert logits.shape == (2, 5) and logits.abs().max() == 0  # the classifier starts at zero
    torch.nn.init.normal_((model.fc if hasattr(model, 'fc') else model.model.fc).weight)
    model(clip(row.num_frames)).square().sum().backward()
    unused = {'broken_cme': 'cme.', 'broken_sme': 'sme.', 'alone': 'cme.w2'}.get(name, 'none')
    for key, p in model.named_parameters():
        if p.requires_grad and unused not in key:
            assert p.grad is not None, key
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('name', ROWS)
def test_a_row_holds_all_of_its_image_network(name, weights):
    kind = ROWS[name].image
    own = build(name, 5, shape(kind), weights[kind], seed=0).state_dict()
    for key, value in weights[kind].items():
        if not key.startswith('fc.'):
            place, _, tensor = key.rpartition('.')
            # peers put their layers around a convolution
            where = [f'{prefix}{place}{inner}.{tensor}' for prefix in ('', 'model.') for inner in ('', '.0', '.1')]
            assert [torch.equal(own[found], value) for found in where if found in own] == [True], key


@pytest.mark.parametrize('name, order_matters', [
    ('plain', False), ('only_cme', False), ('broken_sme', False), ('only_sme', True), ('cme_sme', True),
    ('tim', True), ('all', True), ('tsm', True)])
def test_what_can_see_the_order_of_frames(name, order_matters, weights):
    """Without TIM and SME a network is a function of the set of its frames: it can't exceed the level of theory."""
    model = build(name, 5, SHAPE, weights['resnet'], seed=0).double().eval()
    for key, p in model.named_parameters():
        if 'fc.' in key or '.sme.bn.' in key:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    x = clip(8).double()
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 7, 2, 5, 1, 6, 4]):
        y = model(x)
        change = (model(x.unflatten(0, (-1, 8))[:, order].flatten(0, 1)) - y).abs().max() / y.abs().max()
        assert change > 1e-8 if order_matters else change < 1e-13


@pytest.mark.parametrize('name, layer', [('mem', MEM), ('pem', PEM)])
def test_peers_layers_start_in_a_row_as_they_do_alone(name, layer, weights):
    model = build(name, 5, SHAPE, weights['resnet'], seed=0)
    for found in model.modules():
        if isinstance(found, layer):
            alone = layer(found.channels)
            for (key, p), q in zip(found.named_parameters(), alone.parameters()):
                if p.ndim > 1 and p.numel() > 20:
                    assert .6 < p.std() / q.std() < 1.6, key


def test_plain_is_the_mean_of_the_image_network(weights):
    image = image_network('resnet', 5, SHAPE).eval()
    model = build('plain', 5, SHAPE, weights['resnet'], seed=0).eval()
    image.load_state_dict({**weights['resnet'], **{
        key: value for key, value in model.state_dict().items() if key.startswith('fc.')}})
    for network in (image.double(), model.double()):
        torch.nn.init.normal_(network.fc.weight, generator=torch.Generator().manual_seed(2))
    x = clip(8).double()
    torch.testing.assert_close(model(x), image(x).unflatten(0, (-1, 8)).mean(1))


def test_the_row_that_is_named_after_the_start_as_a_shift_starts_so(weights):
    retrofitted = image_network('resnet', 5, SHAPE)
    retrofit(retrofitted, num_frames=8, start='shift')
    row = build('even', 5, SHAPE, weights['resnet'], seed=0)
    for key, value in retrofitted.state_dict().items():
        if '.tim.' in key or '.b3' in key or '.sme.bn' in key:
            assert torch.equal(row.state_dict()[key], value), key
    assert len([m for m in row.modules() if isinstance(m, CME)]) == 4


def test_an_image_network_that_is_not_all_there_is_an_error(weights):
    model = image_network('resnet', 5, SHAPE)
    with pytest.raises(ValueError, match=r"must be in the network, got none for \['extra'\]"):
        load_image_weights(model, {**weights['resnet'], 'extra': torch.zeros(1)})


def test_groups_name_rows():
    assert {row for group in GROUPS.values() for row in group} == set(ROWS)


X = torch.randn(2, 4, 16, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def pair(kind, base=CME):
    torch.manual_seed(0)
    layer = kind(16, num_frames=4, dtype=torch.float64)
    other = base(16, num_frames=4, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    return layer.eval(), other.eval()


def by_loops(layer, x, sign, over_t):
    """Equations (2) to (6), one number after the other."""
    out = []
    for frames in x.mean((3, 4)):
        z, k = frames @ layer.w1.T, frames @ layer.w2.T
        d = torch.tensor([[sign * (k[t] * k[j]).sum().item() for j in range(4)] for t in range(4)], dtype=x.dtype)
        share = d.exp() / d.exp().sum(0 if over_t else 1, keepdim=True)
        fused = torch.stack([z[t] + sum(share[t, j] * z[j] for j in range(4)) for t in range(4)])
        out.append((fused @ layer.w3.T).sigmoid())
    return torch.stack(out)


@pytest.mark.parametrize('kind, sign, over_t', [
    (variants.SoftmaxOverT, -1, True), (variants.SimilarCME, 1, False), (CME, -1, False)])
def test_a_variant_differs_from_the_paper_in_one_thing(kind, sign, over_t):
    layer, paper = pair(kind)
    torch.testing.assert_close(layer.gate(X), by_loops(layer, X, sign, over_t))
    torch.testing.assert_close(layer(X), X * layer.gate(X)[..., None, None])
    assert kind is CME or (layer.gate(X) - paper.gate(X)).abs().max() > 1e-4


def test_alone_means_that_no_other_frame_matters():
    layer, paper = pair(variants.AloneCME)
    changed = X.clone()
    changed[:, 2] += 1
    still = [0, 1, 3]
    torch.testing.assert_close(layer(changed)[:, still], layer(X)[:, still], rtol=0, atol=0)
    assert (paper(changed)[:, still] - paper(X)[:, still]).abs().max() > 1e-4


def test_linear_projections_may_pool_first_or_last_and_the_released_ones_may_not():
    layer, _ = pair(CME)
    maps = F.conv2d(X.flatten(0, 1), layer.w1[..., None, None]).mean((2, 3))
    torch.testing.assert_close(maps, X.flatten(0, 1).mean((2, 3)) @ layer.w1.T)
    first, last = pair(variants.PoolFirstCME, released.CME)
    assert (first(X) - last(X)).abs().max() > 1e-4
    pooled = X.mean((3, 4), keepdim=True)
    torch.testing.assert_close(first.gate(X), last.gate(pooled))


def test_depthwise_scales_each_channel_by_itself():
    layer, _ = variants.DepthwiseSME(16, num_frames=4).double().eval(), None
    torch.nn.init.normal_(layer.bn.weight)
    moving = X * (1 - layer.similarity(X))[:, :, None]
    scale = layer.conv.weight.flatten() * layer.bn.weight * (1 + layer.bn.eps) ** -.5
    torch.testing.assert_close(layer(X), X + moving * scale[:, None, None])
    assert layer.conv.weight.shape == (16, 1, 1, 1)


def test_mapless_sees_no_other_frame_and_all_places_alike():
    layer, paper = pair(variants.MaplessSME, SME)
    for each in (layer, paper):
        torch.nn.init.normal_(each.bn.weight, generator=torch.Generator().manual_seed(1))
    frame = layer.conv.weight[:, :, 0, 0] @ X[0, 1, :, 2, 3]
    scale = layer.bn.weight * (1 + layer.bn.eps) ** -.5
    torch.testing.assert_close(layer(X)[0, 1, :, 2, 3], X[0, 1, :, 2, 3] + frame * scale)
    assert (layer(X) - paper(X)).abs().max() > 1e-3


@pytest.mark.parametrize('training', [True, False])
def test_early_is_before_the_relu(training):
    torch.manual_seed(0)
    early, late = variants.EarlyBlock(16, 4, num_frames=4, sme='all'), CMRBlock(16, 4, num_frames=4, sme='all')
    late.load_state_dict(early.state_dict())
    for block in (early, late):
        block.train(training)
        torch.nn.init.normal_(block.sme.bn.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, 16, 6, 6)
    with torch.set_grad_enabled(training):
        assert early(x).min() >= 0 and late(x).min() < 0


@pytest.mark.parametrize('kind', [variants.BrokenCME, variants.BrokenSME])
def test_broken_hands_on_its_input(kind):
    layer = kind(16, num_frames=4).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    assert torch.equal(layer(X), X)


@pytest.mark.parametrize('kind, base', [(variants.ShuffledCME, CME), (variants.ShuffledSME, SME)])
def test_shuffled_is_the_layer_with_frames_in_another_order(kind, base):
    layer, right = pair(kind, base)
    if base is SME:
        for each in (layer, right):
            torch.nn.init.normal_(each.bn.weight, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    order = torch.randperm(4)
    assert order.tolist() != [0, 1, 2, 3]
    torch.manual_seed(4)
    found = layer(X)
    if base is CME:
        torch.testing.assert_close(found, X * right.gate(X)[:, order][..., None, None])
    else:
        torch.testing.assert_close(found[:, order], right(X[:, order]))
