"""retrofit in networks whose stages and blocks are packed in other ways than timm's ResNet has them."""
import copy

import pytest
import timm
import torch
import torchvision
import transformers
from helpers import anatomy, assert_same, image_net, randomize, values
from timm.layers import BatchNormAct2d
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.cspnet import CspModelCfg, CspNet, CspStagesCfg, CspStemCfg
from timm.models.dla import DLA, DlaBasic, DlaBottle2neck
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.resnet import BasicBlock
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from cmr_layers import CME, SME, TIM, ClipModel, load_model, restore, retrofit, save_model, temporal_keys

T = 4


def images(n=2 * T, size=32):
    return torch.randn(n, 3, size, size)


def output(model, x):
    y = model(x)
    y = getattr(y, 'logits', y)
    return y if isinstance(y, torch.Tensor) else y[-1]


class Cifar(nn.Module):
    """A ResNet for CIFAR: three stages."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        for i, width in ((2, 16), (3, 24)):
            before = 8 if i == 2 else 16
            setattr(self, f'layer{i}', nn.Sequential(
                BasicBlock(before, width, 2, nn.Conv2d(before, width, 1, 2)), BasicBlock(width, width)))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(self.conv1(x)))).mean((2, 3)))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


class Detectron(nn.Module):
    """The names of detectron2's ResNet: a stem with a conv1 of its own, and res2 to res5."""

    def __init__(self):
        super().__init__()
        self.stem = Stem()
        for i in range(2, 6):
            setattr(self, f'res{i}', nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)))

    def forward(self, x):
        return self.res5(self.res4(self.res3(self.res2(self.stem(x))))).mean((2, 3))


class Listed(nn.Module):
    """Stages in a list."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.parts = nn.ModuleList([nn.Sequential(BasicBlock(8, 8)), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))])

    def forward(self, x):
        x = self.conv1(x)
        for part in self.parts:
            x = part(x)
        return x.mean((2, 3))


class PreAct(nn.Module):
    """A block as many write it: functions for activations, and a shortcut that reads the activated input."""

    def __init__(self, channels, out):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else None
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x):
        y = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(self.bn2(self.conv1(y)).relu())


def preact():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sequential(PreAct(8, 8), PreAct(8, 8)), nn.Sequential(PreAct(8, 12), PreAct(12, 12)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten())


def byob(**kwargs):
    blocks = tuple(ByoBlockCfg('bottle', d=2, c=c, s=2, gs=0, br=.5) for c in (16, 24))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_chs=8, **kwargs), num_classes=5)


def bit():
    return transformers.BitForImageClassification(transformers.BitConfig(
        num_groups=4, embedding_size=8, hidden_sizes=[16, 32, 32, 32], depths=[1, 2, 1, 1], num_labels=5))


def regnet(**kwargs):
    return transformers.RegNetForImageClassification(transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 2, 1, 1], groups_width=8, num_labels=5, **kwargs))


def darknet():
    stages = CspStagesCfg(depth=(1, 2), out_chs=(16, 32), stride=2, stage_type='dark')
    return CspNet(CspModelCfg(stem=CspStemCfg(out_chs=8, stride=2), stages=stages), num_classes=5)


def dla(block):
    return DLA(
        (1, 1, 1, 2, 2, 1), (8, 8, 16, 16, 32, 32), block=block, num_classes=5,
        **({} if block is DlaBasic else {'cardinality': 1, 'base_width': 28}))


def torchvision_children():
    *parts, fc = randomize(torchvision.models.resnet18(num_classes=5)).children()
    return nn.Sequential(*parts, nn.Flatten(), fc)


# Each with the names of the first block of each stage, and of the module that runs CME and TIM of the first one.
NETWORKS = {
    'CIFAR': (Cifar, ['layer1.0', 'layer2.0', 'layer3.0'], 'layer1.0.conv1'),
    'detectron2': (Detectron, ['res2.0', 'res3.0', 'res4.0', 'res5.0'], 'res2.0.conv1'),
    'ModuleList': (Listed, ['parts.0.0', 'parts.1.0'], 'parts.0.0.conv1'),
    'timm children': (
        lambda: nn.Sequential(*image_net().children()), ['4.0', '5.0', '6.0', '7.0'], '4.0.conv1'),
    'torchvision children': (torchvision_children, ['4.0', '5.0', '6.0', '7.0'], '4.0.conv1'),
    'features_only': (
        lambda: timm.create_model('resnetv2_18', features_only=True, out_indices=(1, 3), channels=(16, 16, 16, 16)),
        ['stages_0.blocks.0', 'stages_1.blocks.0', 'stages_2.blocks.0'], 'stages_0.blocks.0.conv1'),
    'pre-activation': (preact, ['1.0', '2.0'], '1.0.conv1'),
    'ResNetV2': (
        lambda: ResNetV2((1, 2), (32, 32), num_classes=5, stem_chs=8, norm_layer=BatchNormAct2d),
        ['stages.0.blocks.0', 'stages.1.blocks.0'], 'stages.0.blocks.0.conv1'),
    'ResNetV2 basic': (
        lambda: ResNetV2(
            (1, 2), (16, 24), num_classes=5, stem_chs=8, basic=True, norm_layer=BatchNormAct2d),
        ['stages.0.blocks.0', 'stages.1.blocks.0'], 'stages.0.blocks.0.conv1'),
    'ResNetV2 post-activation': (
        lambda: ResNetV2(
            (1, 2), (32, 32), num_classes=5, stem_chs=8, norm_layer=BatchNormAct2d, preact=False),
        ['stages.0.blocks.0', 'stages.1.blocks.0'], 'stages.0.blocks.0.conv1'),
    'RegNetY': (
        lambda: timm.create_model('regnety_002', num_classes=5), ['s1.b1', 's2.b1', 's3.b1', 's4.b1'], 's1.b1.conv1'),
    'RegNetZ': (
        lambda: timm.create_model('regnetz_005', num_classes=5), ['s1.b1', 's2.b1', 's3.b1', 's4.b1'], 's1.b1.conv1'),
    'RegNet of torchvision': (
        lambda: torchvision.models.RegNet(
            torchvision.models.regnet.BlockParams.from_init_params(
                depth=6, w_0=16, w_a=8, w_m=2, group_width=8, se_ratio=.25), num_classes=5), None, None),
    'NF-ResNet': (
        lambda: NormFreeNet(NfCfg(depths=(1, 2), channels=(16, 32), stem_chs=8, num_features=0), num_classes=5),
        ['stages.0.0', 'stages.1.0'], 'stages.0.0.conv1'),
    'CSP': (
        lambda: timm.create_model('cspresnet50', num_classes=5), [f'stages.{i}.blocks.0' for i in range(4)],
        'stages.0.blocks.0.conv1'),
    'CS3': (
        lambda: timm.create_model('cs3darknet_s', num_classes=5), [f'stages.{i}.blocks.0' for i in range(4)],
        'stages.0.blocks.0.conv1'),
    'Darknet': (darknet, ['stages.0.blocks.0', 'stages.1.blocks.0'], 'stages.0.blocks.0.conv1'),
    'DLA': (
        lambda: dla(DlaBasic), ['level2.tree1', 'level3.tree1.tree1', 'level4.tree1.tree1', 'level5.tree1'],
        'level2.tree1.conv1'),
    'DLA of Res2Net': (
        lambda: dla(DlaBottle2neck), ['level2.tree1', 'level3.tree1.tree1', 'level4.tree1.tree1', 'level5.tree1'],
        'level2.tree1.conv1'),
    'byobnet': (byob, ['stages.0.0', 'stages.1.0'], 'stages.0.0.conv1_1x1'),
    'resnet50_clip': (
        lambda: timm.create_model('resnet50_clip', num_classes=5),
        ['stages.0.0', 'stages.1.0', 'stages.2.0', 'stages.3.0'], 'stages.0.0.conv1_1x1'),
    'resnext26ts': (
        lambda: timm.create_model('resnext26ts', num_classes=5),
        ['stages.0.0', 'stages.1.0', 'stages.2.0', 'stages.3.0'], 'stages.0.0.conv1_1x1'),
    'BiT of transformers': (
        bit, [f'bit.encoder.stages.{i}.layers.0' for i in range(4)], 'bit.encoder.stages.0.layers.0.conv1'),
    'RegNet of transformers': (
        regnet, [f'regnet.encoder.stages.{i}.layers.0' for i in range(4)],
        'regnet.encoder.stages.0.layers.0.layer.0'),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_identity_restore_and_a_step(name):
    make, firsts, at = NETWORKS[name]
    model, size = randomize(make()).eval(), 64 if 'clip' in name else 32
    x = images(T, size)
    still = x[:1]
    before, state = anatomy(model), values(model)
    with torch.no_grad():
        wants = output(model, x), output(model, still)
        report = retrofit(model, num_frames=T)
        assert torch.equal(output(model, x), wants[0]) and torch.equal(output(model, still), wants[1])
    assert wants[0].isfinite().all() and wants[0].std() > 0
    kinds = [insertion.kind for insertion in report]
    blocks = kinds.count('CME')
    assert kinds.count('TIM') == blocks > kinds.count('SME') > 1
    if firsts is not None:
        assert [i.name for i in report if i.kind == 'SME'] == [f'{first}.sme' for first in firsts]
        assert [i.at for i in report if i.kind != 'SME'][:2] == [at, at]

    # a step moves the layers
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), .1)
    layers = {key: value for key, value in values(model).items() if key in temporal_keys(model)}
    output(model, images(2 * T, size)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(value, layers[key]) for key, value in values(model).items() if key in layers)
    # they do something, and go without a trace
    model.eval()
    randomize(model)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert not torch.allclose(output(model, x), wants[0])
        restore(model)
        assert anatomy(model) == before
        assert_same(state, model.state_dict())
        assert torch.equal(output(model, x), wants[0])


@pytest.mark.parametrize('name', ['pre-activation', 'NF-ResNet', 'DLA', 'byobnet', 'RegNet of torchvision'])
def test_the_layers_see_what_the_first_convolution_reads_and_the_shortcut_does_not_see_them(name):
    model = randomize(NETWORKS[name][0]()).eval()
    report = retrofit(model, num_frames=T, sme='none')
    seen, inputs = {}, {}

    def look(name, into):
        def hook(module, args):
            into[name] = args[0]
        return hook

    blocks = sorted({i.name.rpartition('.')[0] for i in report})
    for block in blocks:
        own = model.get_submodule(block)
        own.cme.register_forward_pre_hook(look(block, seen))
        own.register_forward_pre_hook(look(block, inputs))
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, TIM):
                m.weight.zero_()  # the residual branches get zeros, the shortcuts the image
        a, b = output(model, images(T)), output(model, images(T) + 1)
    assert set(seen) == set(blocks) and not torch.allclose(a, b)
    assert all(seen[block].shape == inputs[block].shape for block in blocks)
    if name in ('DLA', 'byobnet', 'RegNet of torchvision'):
        assert all(torch.equal(seen[block], inputs[block]) for block in blocks)
    else:
        assert not any(torch.equal(seen[block], inputs[block]) for block in blocks)


def test_a_saved_regnet_loads(tmp_path):
    model = timm.create_model('regnetx_002', num_classes=5).eval()
    retrofit(model, num_frames=T)
    video, clip = ClipModel(randomize(model), T), torch.randn(1, T, 3, 64, 64)
    save_model(video, tmp_path)
    assert torch.equal(load_model(tmp_path)(clip), video(clip))


# Stages that the caller names

@pytest.mark.parametrize('name, stages, firsts, entries', [
    ('convnext_atto', 'stages.*', [f'stages.{i}.blocks.0' for i in range(4)], {'conv_dw'}),
    ('hrnet_w18_small', ['layer1', 'stage?'],
     ['layer1.0', *(f'stage{i}.0.branches.0.0' for i in (2, 3, 4))], {'conv1'}),
    ('efficientnet_lite0', ['blocks.1', 'blocks.2'], ['blocks.1.0', 'blocks.2.0'], {'conv_pw'}),
    ('resnet18', 'layer2', ['layer2.0'], {'conv1'}),
    ('resnet18', ['layer2.1', 'layer1.0'], ['layer2.1', 'layer1.0'], {'conv1'}),
])
def test_stages_by_name(name, stages, firsts, entries):
    model = randomize(timm.create_model(name, num_classes=5)).eval()
    x, before = images(T, 64), anatomy(model)
    with torch.no_grad():
        want, still = model(x), model(x[:1])
        report = retrofit(model, num_frames=T, stages=stages)
        assert [i.name for i in report if i.kind == 'SME'] == [f'{first}.sme' for first in firsts]
        assert {i.at.rpartition('.')[2] for i in report if i.kind != 'SME'} == entries
        assert torch.equal(model(x), want) and torch.equal(model(x[:1]), still)
        assert anatomy(restore(model)) == before and torch.equal(model(x), want)


def test_the_report_names_the_stages():
    assert str(retrofit(Detectron(), num_frames=T)).startswith('Detectron (res2 to res5): 8 CME, 8 TIM, 4 SME')
    assert str(retrofit(image_net(), stages='layer2')).startswith('ResNet (layer2): 2 CME')


@pytest.mark.parametrize('stages, error, message', [
    ('layer7', ValueError, r"^stages='layer7' matches no module of ResNet; it has conv1, bn1, .*layer1"),
    ([], ValueError, r'^stages must name at least one module, got \[\]'),
    (3, TypeError, r'^stages must be names or patterns of modules, or None, got 3'),
    (['layer1', nn.ReLU()], TypeError, r'^stages must be names or patterns of modules, or None, got '),
    ('maxpool', ValueError, r"^stages='maxpool' must hold blocks with a convolution, got a MaxPool2d"),
    ('conv1', ValueError, r"^stages='conv1' must hold blocks with a convolution, got a Conv2d"),
    (['layer1', 'layer1.0'], ValueError, r'^stages=.* must be modules that hold different blocks; some'),
])
def test_error_stages(stages, error, message):
    model = image_net()
    before = anatomy(model)
    with pytest.raises(error, match=message):
        retrofit(model, stages=stages)
    assert anatomy(model) == before


# What is not clear

@pytest.mark.parametrize('name, message', [
    ('coatnet_0_224', r'^model \(MaxxVit\) holds no plain ResNet: beside the blocks of stages.0 to stages.1 is '
                      r'stages.2, which'),
    ('mobilevit_s', r'^model \(ByobNet\) holds no plain ResNet: .* is stages.2.1, which is not known'),
    ('hgnetv2_b1', r'holds no plain ResNet: .* is stages.2.blocks.0.aggregation, which is not known'),
    ('xcit_tiny_12_p16_224', r'holds no plain ResNet: .* is blocks.0.attn, which is not known'),
    ('hrnet_w18_small', r'^model \(HighResolutionNet\) holds several ResNets: stage2.0.branches, '),
    ('densenet121', r"block 'features.denseblock1.denselayer1' \(DenseLayer\) does not hand its input to 'conv1', .*"
                    r'its input is no tensor'),
])
def test_error_no_plain_resnet_names_the_way_out(name, message):
    model = timm.create_model(name, device='meta')
    before = anatomy(model)
    with pytest.raises(ValueError, match=message) as error:
        retrofit(model)
    assert 'stages=' in str(error.value) and anatomy(model) == before


def test_error_a_traced_network():
    model = create_feature_extractor(torchvision.models.resnet18(), {'layer4': 'out'})
    with pytest.raises(ValueError, match=r"block 'layer1\.0' \(Module\) is not called in a forward pass, as in"):
        retrofit(model)


def test_error_several_branches():
    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.a(x) + self.b(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Inception(), Inception()))
    with pytest.raises(ValueError, match=r"block '1\.0' \(Inception\) has several branches: 'a' and 'b' read the same"):
        retrofit(model, stages='1')


# Networks of a fixed size

def test_a_network_of_a_fixed_size_is_probed_at_its_size():
    model = timm.create_model('vit_base_resnet26d_224', num_classes=5, embed_dim=32, depth=1, num_heads=2).eval()
    x = images(T, 224)
    with torch.no_grad():
        want = model(x)
        assert len(retrofit(model, num_frames=T)) == 20
        assert torch.equal(model(x), want)


def test_a_small_image_is_tried_first():
    model, sizes = Cifar(), []
    model.conv1.register_forward_pre_hook(lambda m, args: sizes.append(tuple(args[0].shape)))
    retrofit(model, num_frames=T)
    assert sizes == [(2, 3, 64, 64), (1, 3, 64, 128)]


def test_error_a_network_that_runs_on_neither_size():
    class Fixed(Cifar):
        def forward(self, x):
            assert x.shape[-1] == 48, 'wants 48 pixels'
            return super().forward(x)

    model = Fixed().eval()
    with pytest.raises(ValueError, match=r'(?s)could not run on images of shape \[2, 3, 224, 224\] .*wants 48 '
                                         r'pixels.*Pass one that it can run on as example_input'):
        retrofit(model)
    assert len(retrofit(copy.deepcopy(model), num_frames=T, example_input=images(1, 48))) == 6 + 6 + 3
    assert not any(isinstance(m, (CME, SME, TIM)) for m in model.modules())
