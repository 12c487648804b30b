"""freeze, train_mode and trainable_parameters: what learns, and that nothing else moves."""
import pytest
import timm
import torch
import torchvision
import transformers
from helpers import image_net, randomize, small_vit, values
from torch import nn

from cmr_layers import SME, TIM, ClipModel, freeze, insert, retrofit, temporal_keys, train_mode, trainable_parameters
from cmr_layers.temporal import load_temporal, save_temporal, temporal_state_dict

T = 4


def frozen_net(**kwargs):
    model = image_net(**kwargs)
    retrofit(model, num_frames=T)
    return model


def step(model):
    train_mode(model)
    optimizer = torch.optim.SGD([p for _, p in trainable_parameters(model)], .1)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(torch.randn(2, T, 3, 32, 32))
        y.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('norms', [False, True])
def test_only_layers_and_head_move(norms):
    model = ClipModel(frozen_net(), T)
    report = freeze(model, norms=norms)
    before = values(model)
    step(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    temporal, head = temporal_keys(model), {'model.fc.weight', 'model.fc.bias'}
    of_norms = {key for key in before if '.bn' in key or '.downsample.1' in key} if norms else set()
    assert moved <= temporal | head | of_norms
    assert head <= moved and any(key.endswith('tim.weight') for key in moved)
    assert ('model.bn1.weight' in moved) == ('model.bn1.running_mean' in moved) == norms
    assert {name for name, _ in report} == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not norms or all(p.requires_grad for p in model.model.bn1.parameters())


def test_the_norms_of_a_transformer_are_its_layer_norms():
    model = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5))
    insert(model, TIM, at='convnext.encoder.stages.*', num_frames=T)
    names = {name for name, _ in freeze(model, norms=True)}
    assert {'classifier.weight', 'convnext.layernorm.weight'} <= names
    assert not any('dwconv' in name or 'pwconv' in name for name in names)


@pytest.mark.parametrize('make, head', [
    (lambda: timm.create_model('convnext_atto', num_classes=5), 'head.fc'),
    (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 'classifier'),
    (lambda: torchvision.models.resnet18(num_classes=5), 'fc'),
    (lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5)), 'classifier.1'),
], ids=['timm', 'MobileNet of torchvision', 'ResNet of torchvision', 'transformers'])
def test_the_head_is_found(make, head):
    model = make()
    conv = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    insert(model, SME, at=conv, num_frames=T)
    for one in (model, ClipModel(model, T)):
        temporal = temporal_keys(one)
        prefix = '' if one is model else 'model.'
        names = {name for name, _ in freeze(one)} - temporal
        assert names and all(name.startswith(prefix + head) for name in names)


def test_other_heads():
    model = frozen_net()
    assert {name for name, _ in freeze(model, head=None)} <= temporal_keys(model)
    names = {name for name, _ in freeze(model, head=['layer4.1', 'fc'])}
    assert {'layer4.1.conv1.weight', 'fc.weight'} <= names and 'layer4.0.conv1.weight' not in names
    # a second call starts anew
    assert 'layer4.1.conv1.weight' not in {name for name, _ in freeze(model)}


def test_a_network_with_two_heads():
    model = timm.create_model('levit_128s', num_classes=5)
    conv = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    insert(model, SME, at=conv, num_frames=T)
    temporal = temporal_keys(model)
    assert {name.split('.')[0] for name, _ in freeze(model) if name not in temporal} == {'head', 'head_dist'}


def test_a_batch_norm_without_parameters_goes_with_the_parameters_beside_it(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1).requires_grad_(False), nn.BatchNorm2d(8, affine=False), TIM(8, 4),
        nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False), SME(8, 4))
    assert train_mode(model) is model
    assert [m.training for m in model] == [True, False, True, False, True, False, True]
    assert model[6].bn.training
    assert all(m.training for m in train_mode(model.requires_grad_(True)))

    def network():  # a head as of a linear probe: its statistics are learned, kept and loaded
        torch.manual_seed(0)
        vit = small_vit(num_classes=5)
        vit.head = nn.Sequential(nn.BatchNorm1d(24, affine=False), vit.head)
        insert(vit, TIM, 'blocks.*', num_frames=4)
        freeze(vit)
        return vit

    model, x = train_mode(network()), torch.randn(4, 3, 32, 32)
    assert model.head[0].training
    model(x)
    assert 'head.0.running_mean' in temporal_state_dict(model, trained=True)
    save_temporal(model, tmp_path / 'file')
    other = network()
    load_temporal(other, tmp_path / 'file')
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize('name, config, heads', [
    ('LevitForImageClassificationWithTeacher', transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8]),
     {'classifier', 'classifier_distill'}),
    ('SwiftFormerForImageClassification', transformers.SwiftFormerConfig(
        depths=[1, 1, 1, 1], embed_dims=[16, 16, 16, 16]), {'head', 'dist_head'}),
])
def test_both_heads_of_a_distilled_network_learn(name, config, heads):
    model = getattr(transformers, name)(config)
    convolutions = [at for at, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    insert(model, TIM, convolutions[-1], num_frames=2)
    assert {key.partition('.')[0] for key, _ in freeze(model) if '.tim.' not in key} == heads


def test_a_network_that_is_not_frozen_trains_as_a_whole():
    model = train_mode(frozen_net())
    assert all(m.training for m in model.modules())


def test_the_report():
    model = frozen_net()
    everything = trainable_parameters(model)
    assert everything.count == everything.total == sum(p.numel() for p in model.parameters())
    assert str(everything).splitlines()[0].endswith(' parameters train (100.00%)')
    report = freeze(model)
    lines = str(report).splitlines()
    assert report.total == everything.total and len(report) == len(list(report)) > 20
    assert report.count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lines[0] == (
        f'ResNet: {report.count:,} of {report.total:,} parameters train ({report.count / report.total:.2%})')
    assert any(line.split() == ['fc', '85'] for line in lines) and any('layer1.0.cme' in line for line in lines)
    assert str(trainable_parameters(nn.ReLU())) == 'ReLU: 0 of 0 parameters train (0.00%)'


@pytest.mark.parametrize('kwargs, error, message', [
    ({'head': 'nose'}, ValueError, r"^head='nose' must be a module of ResNet with parameters; got none; it has conv1,"),
    ({'head': 'maxpool'}, ValueError, r"^head='maxpool' must be a module of ResNet with parameters; got MaxPool2d; it"),
    ({'head': 3}, TypeError, r"^head must be 'auto', a name, a list of names, or None, got 3$"),
])
def test_error_head(kwargs, error, message):
    model = frozen_net()
    with pytest.raises(error, match=message):
        freeze(model, **kwargs)
    assert all(p.requires_grad for p in model.parameters())


def test_error_no_head():
    for model in (frozen_net(num_classes=0), nn.Sequential(nn.Conv2d(3, 8, 1), TIM(8))):
        with pytest.raises(ValueError, match=r"^head='auto' finds no head with parameters in .* head=None to train"):
            freeze(model)


def test_error_no_layers_and_no_module():
    with pytest.raises(ValueError, match=r'^model \(ResNet\) holds no temporal layer to train; wanted one with CME'):
        freeze(randomize(image_net()))
    for call in (freeze, train_mode, trainable_parameters):
        with pytest.raises(TypeError, match=r'^model must be an nn.Module, got 3'):
            call(3)
