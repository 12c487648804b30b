"""``fold`` takes batch norms out of the networks of others, with and without layers, and what they compute stays."""
import pytest
import timm
import torch
import torchvision
import transformers
from folding import T, assert_folds, assert_near, batch_norms, clips, norms, retrofitted
from helpers import randomize

from cmr_layers import CME, SME, TIM, ClipModel, CMRBasicBlock, insert, restore, retrofit, set_num_frames
from cmr_layers.deploy import fold


@pytest.mark.parametrize('wrap', [False, True])
@pytest.mark.parametrize('make', [timm.create_model, torchvision.models.get_model])
def test_retrofitted_networks(make, wrap):
    model, x = retrofitted(make, wrap)
    assert len(assert_folds(model, x)) == 24


@pytest.mark.parametrize('name', ['res2net50_14w_8s', 'resnest14d', 'skresnet18'])
def test_retrofitted_networks_whose_convolutions_run_layers(name):
    model = timm.create_model(name, num_classes=5)
    retrofit(model, num_frames=T)
    model, x = ClipModel(randomize(model).eval(), num_frames=T), clips(1, dtype=torch.float64)
    assert_folds(model.double(), x, 1e-11)
    restore(model)    # the layers, not the batch norms
    assert not any(isinstance(m, (CME, SME, TIM)) for m in model.modules()) and not norms(model)


@torch.no_grad()
def test_transformers():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type='basic', num_labels=5)
    model = transformers.ResNetForImageClassification(config)
    retrofit(model, num_frames=T)
    randomize(model).eval().double()
    x = clips(dtype=torch.float64).flatten(0, 1)
    want = model(x).logits
    report = fold(model, x)
    assert len(report) and not report.left and not norms(model)
    assert_near(model(x).logits, want, 1e-11)


def test_timms_network_of_cmr_blocks():
    model = timm.models.ResNet(CMRBasicBlock, (1, 1, 1, 1), num_classes=5, block_args={'num_frames': T})
    assert_folds(randomize(model).eval(), clips().flatten(0, 1))


@pytest.mark.parametrize('at, where, layer', [
    ('blocks.*.0', 'after', SME), ('blocks.*.0.conv_pw', 'before', CME), ('blocks.*.0.conv_pw', 'before', TIM)])
def test_inserted_layers(at, where, layer):
    model = timm.create_model('mobilenetv3_small_050', num_classes=5)
    insert(model, layer, at=at, where=where, num_frames=T)
    model, x = randomize(model).eval().double(), clips(dtype=torch.float64).flatten(0, 1)
    report = assert_folds(model, x, 1e-11)
    assert all(conv.endswith('.sme.conv') == norm.endswith('.sme.bn') for conv, norm in report.pairs)
    set_num_frames(model, 2)
    model(x[:2])    # the guard finds all layers at their places


# Networks of timm, some with layers. What is left alone stands behind something else than a convolution (a sum, a
# concatenation, an activation, a pool, a linear layer), or somebody else reads the convolution's output, too. The
# numbers are what was found when this was written; that the networks compute what they did is what is tested.

NETWORKS = {
    # name: (size, folded, left alone)
    'darknet17': (64, 16, 0), 'densenet121': (64, 59, 62), 'dla46_c': (64, 48, 0),
    'dpn48b': (64, 33, 21), 'ecaresnet26t': (64, 31, 0), 'edgenext_xx_small': (64, 0, 0),
    'efficientformerv2_s0': (224, 74, 1), 'efficientnet_b0': (64, 49, 0), 'efficientnet_lite0': (64, 49, 0),
    'efficientvit_b0': (64, 26, 0), 'efficientvit_m0': (64, 112, 1), 'ese_vovnet19b_dw': (64, 23, 0),
    'fastvit_t8': (64, 46, 24), 'fbnetc_100': (64, 65, 0), 'gernet_s': (64, 45, 0), 'ghostnet_050': (64, 80, 0),
    'ghostnetv2_100': (64, 122, 0), 'hardcorenas_a': (64, 34, 0), 'hgnetv2_b0': (64, 42, 0),
    'hrnet_w18_small': (64, 91, 0), 'lambda_resnet26t': (64, 28, 9), 'lcnet_035': (64, 27, 0),
    'levit_128s': (224, 4, 48), 'levit_conv_128s': (224, 50, 2), 'mixnet_s': (64, 15, 34), 'mnasnet_small': (64, 46, 0),
    'mobilenetv1_100': (64, 27, 0), 'mobilenetv2_035': (64, 52, 0), 'mobilenetv3_small_050': (64, 34, 0),
    'mobilenetv4_conv_small_035': (64, 46, 0), 'mobileone_s0': (64, 191, 35), 'mobilevit_xxs': (64, 32, 0),
    'mobilevitv2_050': (64, 25, 0), 'regnetx_002': (64, 44, 0), 'regnety_002': (64, 44, 0),
    'repghostnet_050': (64, 80, 32), 'repvgg_a0': (64, 44, 17), 'repvit_m0_9': (64, 83, 25), 'resnest14d': (64, 23, 0),
    'resnet10t': (64, 14, 0), 'resnetv2_18': (64, 8, 9), 'rexnetr_100': (64, 62, 0), 'semnasnet_050': (64, 49, 0),
    'seresnet18': (64, 20, 0), 'shvit_s1': (64, 73, 1), 'skresnet18': (64, 36, 0), 'spnasnet_100': (64, 64, 0),
    'starnet_s1': (64, 35, 1), 'swiftformer_xs': (64, 21, 5), 'tf_efficientnet_lite0': (64, 49, 0),
    'tf_efficientnetv2_b0': (64, 59, 0), 'tiny_vit_5m_224': (64, 27, 0), 'tinynet_e': (64, 31, 0),
    'xcit_nano_12_p16_224': (64, 4, 12),
}
LAYERS = {
    'densenet121': (CME, 'features.denseblock*.denselayer1.conv2', 'before'),
    'dla46_c': (TIM, 'level*.root', 'after'),
    'efficientnet_b0': (SME, 'blocks.*.0', 'after'),
    'ghostnet_050': (SME, 'blocks.*.0', 'after'),
    'hgnetv2_b0': (SME, 'stages.*.blocks.0', 'after'),
    'mobilenetv2_035': (CME, 'blocks.*.1.conv_pw', 'before'),
    'mobilenetv3_small_050': (SME, 'blocks.*.0', 'after'),
    'regnetx_002': (SME, 's*.b1', 'after'),
    'repvit_m0_9': (TIM, 'stages.*.blocks.0', 'before'),
    'tf_efficientnet_lite0': (TIM, 'blocks.*.0.conv_dw', 'before'),
}


# with each layer at each place, and left alone for each reason; the others take as long and find no more
SOME = [
    'densenet121', 'dla46_c', 'edgenext_xx_small', 'ghostnet_050', 'levit_conv_128s', 'mixnet_s', 'mobilenetv2_035',
    'mobilenetv3_small_050', 'regnetx_002', 'repvgg_a0', 'repvit_m0_9', 'resnetv2_18', 'tf_efficientnet_lite0']


@torch.no_grad()
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in NETWORKS])
def test_networks_of_timm(name):
    size, num_folded, num_left = NETWORKS[name]
    model = timm.create_model(name, num_classes=5)
    num_layers = 0
    if name in LAYERS:
        layer, at, where = LAYERS[name]
        num_layers = len(insert(model, layer, at=at, where=where, num_frames=2))
    model, x = randomize(model).eval().double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    other = 2 * x.flip(0)
    want = model(x), model(other)
    report = fold(model, x)
    for got, y in zip((model(x), model(other)), want, strict=True):
        assert_near(got, y, 1e-11)
    assert len(report) == num_folded + (num_layers if name in LAYERS and layer is SME else 0)
    assert len(report.left) == num_left and set(report.left) == batch_norms(model)


def test_no_list_of_networks_is_short():
    assert len(NETWORKS) >= 40 and all(name in NETWORKS for name in (*LAYERS, *SOME))
    assert {LAYERS[name][::2] for name in SOME if name in LAYERS} == {found[::2] for found in LAYERS.values()}
