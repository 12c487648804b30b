"""ClipModel: the mean over a clip's frames, and what it passes on to timm's tools of the network that it wraps."""
import copy
import pickle

import pytest
import timm
import torch
import transformers
from helpers import Mean, net, randomize
from timm.data import resolve_data_config
from timm.data.model_config import resolve_input_data_config
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, insert, retrofit, set_num_frames

T = 4


def resnet(name='resnet18', **kwargs):
    return randomize(timm.create_model(name, **{'num_classes': 5, 'channels': (64, 8, 8, 8), **kwargs})).eval()


def pair(**kwargs):
    """A network with layers and a wrapper of its copy."""
    model = resnet(**kwargs)
    retrofit(model, num_frames=T)
    randomize(model)
    return model, ClipModel(copy.deepcopy(model), T)


def clips(batch=2):
    return torch.randn(batch, T, 3, 32, 32)


# The mean over the frames

def test_clip_model_averages_the_frames_of_each_clip():
    model, x = ClipModel(Mean(), 4), torch.randn(2, 4, 3, 5, 7)
    want = x.mean((1, 3, 4))
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model(x.flatten(0, 1)), want)
    assert model.num_frames == 4


def test_clip_model_predicts_each_still():
    x = torch.randn(3, 3, 5, 7)
    torch.testing.assert_close(ClipModel(Mean(), 4)(x), x.mean((2, 3)))


@pytest.mark.parametrize('ndim', [4, 5])
def test_clip_model_of_an_empty_batch(ndim):
    x = torch.zeros(0, 4, 3, 5, 7) if ndim == 5 else torch.zeros(0, 3, 5, 7)
    assert ClipModel(net(), 4)(x).shape == (0, 8)


def test_clip_model_around_a_timm_network():
    model = timm.create_model('mobilenetv3_small_050', num_classes=5).eval()
    x = torch.randn(2, 3, 3, 32, 32)
    want = model(x.flatten(0, 1)).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(ClipModel(model, 3)(x), want)


def test_clip_model_has_the_models_parameters_and_no_more():
    model = net()
    wrapped = ClipModel(model, 4)
    assert [f'model.{key}' for key in model.state_dict()] == list(wrapped.state_dict())
    other = ClipModel(set_num_frames(net(), 8), 8)
    other.load_state_dict(wrapped.state_dict(), strict=True)
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(set_num_frames(other, 4)(x), wrapped(x))


def test_error_clip_model_and_its_layers_must_agree_on_the_clip():
    with pytest.raises(ValueError, match=r'^num_frames=8, but 1 of the model has num_frames=4; set_num_'):
        ClipModel(net(), 8)
    model = ClipModel(net(), 4)
    set_num_frames(model.model, 8)
    with pytest.raises(ValueError, match=r'^num_frames=4, but 1 of the model has num_frames=8'):
        model(torch.randn(2, 4, 3, 8, 8))


def test_clip_model_scripts_whole():
    model, x = ClipModel(net(), 4), torch.randn(2, 4, 3, 8, 8)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_error_a_model_of_clips_is_no_model_of_frames():
    model = timm.create_model('cmr_resnet18', num_classes=5, num_frames=4).eval()
    for one in (model, ClipModel(net(), 4), nn.Sequential(model)):
        with pytest.raises(TypeError, match=r'^model must be a network of frames, got a \w+ that takes clips itself'):
            ClipModel(one, 4)


SMALL = {'hidden_sizes': [8, 8, 8, 12], 'depths': [1, 1, 1, 1], 'num_labels': 5}
TINY_VIT = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 16,
            'image_size': 32, 'num_labels': 5}


@pytest.mark.parametrize('kind', ['ResNet', 'ConvNext', 'ViT'])
def test_clip_model_takes_the_logits_of_a_transformers_output(kind):
    config = getattr(transformers, f'{kind}Config')(**(TINY_VIT if kind == 'ViT' else SMALL))
    model, x = getattr(transformers, f'{kind}ForImageClassification')(config).eval(), torch.randn(2, 4, 3, 32, 32)
    want = model(x.flatten(0, 1)).logits.unflatten(0, (2, 4)).mean(1)
    got = ClipModel(model, 4)(x)
    assert got.shape == (2, 5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('kind', ['ResNet', 'RegNet', 'ConvNext', 'ViT', 'Dinov2', 'Swin'])
def test_clip_model_takes_what_a_headless_network_of_transformers_pooled(kind):
    if kind == 'Swin':
        sizes = {'embed_dim': 12, 'depths': [1, 1], 'num_heads': [1, 2], 'image_size': 32, 'window_size': 4}
    else:
        sizes = TINY_VIT if kind in ('ViT', 'Dinov2') else {**SMALL, 'groups_width': 4}
    model = getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**sizes)).eval()
    x = torch.randn(2, 4, 3, 32, 32)
    pooled = model(x.flatten(0, 1)).pooler_output
    assert pooled.shape[2:] == ((1, 1) if kind in ('ResNet', 'RegNet') else ())
    got = ClipModel(model, 4)(x)
    assert got.ndim == 2
    torch.testing.assert_close(got, pooled.reshape(2, 4, -1).mean(1))


def test_a_headless_network_of_transformers_is_traced_and_exported():
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, layer_type='basic', **SMALL)).eval()
    video, x = ClipModel(model, 4), torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        want = video(x)
        torch.testing.assert_close(torch.jit.trace(video, x)(x), want)
        torch.testing.assert_close(torch.export.export(video, (x,)).module()(x), want)


def test_error_an_output_of_transformers_without_vectors():
    x = torch.randn(2, 4, 3, 32, 32)
    bare = transformers.ViTModel(transformers.ViTConfig(**TINY_VIT), add_pooling_layer=False)
    backbone = transformers.ResNetBackbone(transformers.ResNetConfig(embedding_size=8, layer_type='basic', **SMALL))
    for model, got in ((bare, 'BaseModelOutputWithPooling'), (backbone, 'BackboneOutput')):
        with pytest.raises(TypeError, match=rf'^model must return .* with logits or pooler_output .*, got {got}$'):
            ClipModel(model.eval(), 4)(x)


def test_clip_model_copies_compiles_exports_and_scripts():
    torch._dynamo.reset()
    model, x = ClipModel(net(), 4), torch.randn(3, 4, 3, 5, 7)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), want)
    shapes = ({0: torch.export.Dim('b', min=1, max=8)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for batch in (1, 2, 3):
        torch.testing.assert_close(program(x[:batch]), want[:batch])


@pytest.mark.parametrize('output, got', [
    (lambda x: x, r'\[8, 3, 2, 2\]'), (lambda x: x.mean(), r'\[\]'), (lambda x: x.mean((1, 2, 3)), r'\[8\]'),
    (lambda x: (x, x), 'tuple'), (lambda x: {'logits': x}, 'dict'), (lambda x: None, 'NoneType')])
def test_error_the_model_must_return_one_vector_per_frame(output, got):
    class Model(nn.Module):
        def forward(self, x):
            return output(x)

    message = (
        rf'^model must return a tensor of shape \(B\*T, K\) for the frames of a clip, or an output with logits or '
        rf'pooler_output of that shape, got {got}$')
    with pytest.raises(TypeError, match=message):
        ClipModel(Model(), 4)(torch.zeros(2, 4, 3, 2, 2))


# The mode

def modes(model):
    return [m.training for m in model.modules()]


def test_it_takes_over_the_mode_of_what_it_wraps():
    for mode in (True, False):
        model = ClipModel(resnet().train(mode), T)
        assert set(modes(model)) == {mode}


def test_wrapping_changes_no_mode_of_a_module():
    model = resnet().train()
    model.layer1.eval()
    before = modes(model)
    wrapped = ClipModel(model, T)
    assert modes(model) == before and wrapped.training
    assert modes(wrapped.train()).count(False) == 0 and modes(wrapped.eval()).count(True) == 0


def test_a_loop_that_puts_the_mode_back_leaves_batch_norms_alone():
    model, x = ClipModel(resnet().eval(), T), clips()
    want = model(x)
    was = model.training
    model.eval()
    model.train(was)
    assert not was and torch.equal(model(x), want)


# What timm's tools ask a network for

MATCHED = {
    'resnet18': {}, 'convnext_atto': {}, 'efficientnet_b0': {}, 'mobilenetv3_small_050': {},
    'vit_tiny_patch16_224': {'img_size': 32}, 'densenet121': {}, 'regnetx_002': {}, 'vgg11': {},
    'swin_tiny_patch4_window7_224': {}, 'inception_v4': {}, 'levit_128s': {}, 'coatnet_nano_rw_224': {}}


@pytest.mark.parametrize('name', MATCHED)
def test_layer_decay_finds_the_groups_of_the_network(name):
    model = timm.create_model(name, device='meta', **MATCHED[name])
    wrapped = ClipModel(model, T)
    for coarse in (False, True):
        want = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert group_parameters(wrapped, wrapped.group_matcher(coarse=coarse), reverse=True) == {
            f'model.{key}': group for key, group in want.items()}
        assert len(set(want.values())) > 3


def scales(model, optimizer):
    names = {id(p): name.removeprefix('model.') for name, p in model.named_parameters()}
    return {names[id(p)]: (group['lr_scale'], group['weight_decay'])
            for group in optimizer.param_groups for p in group['params']}


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'mobilenetv3_small_050', 'vit_tiny_patch16_224'])
def test_layer_decay_in_an_optimizer_has_the_scales_of_the_network(name):
    model = timm.create_model(name, device='meta')
    if name == 'convnext_atto':
        insert(model, SME, at='stages.0.blocks.0', num_frames=T, example_input=torch.zeros(1, 3, 64, 64, device='meta'))
    kwargs = {'opt': 'sgd', 'lr': .1, 'weight_decay': .05, 'layer_decay': .5}
    want = scales(model, create_optimizer_v2(model, **kwargs))
    wrapped = ClipModel(model, T)
    assert scales(wrapped, create_optimizer_v2(wrapped, **kwargs)) == want
    assert len(set(want.values())) > 6


def test_layer_decay_of_a_resnet_in_numbers():
    wrapped = pair()[1]
    found = scales(wrapped, create_optimizer_v2(wrapped, opt='sgd', lr=.1, weight_decay=.05, layer_decay=.5))
    assert found['fc.weight'] == (1, .05) and found['fc.bias'] == (1, 0)
    assert found['layer4.1.conv1.weight'] == found['layer4.1.tim.weight'] == (.5, .05)
    assert found['layer1.0.sme.conv.weight'] == (.5 ** 8, .05) and found['conv1.weight'] == (.5 ** 9, .05)


def test_layer_decay_without_a_group_matcher_finds_the_head():
    model = timm.create_model('pit_ti_224', device='meta')
    wrapped = ClipModel(model, T)
    assert not hasattr(model, 'group_matcher') and not hasattr(wrapped, 'group_matcher')
    groups = [{(g['lr_scale'], len(g['params'])) for g in param_groups_layer_decay(m)} for m in (model, wrapped)]
    assert groups[0] == groups[1] and len(groups[0]) > 3


def test_a_group_matcher_that_is_a_function_gets_the_networks_names():
    class Model(Mean):
        def group_matcher(self, coarse=False):
            return {'a': 0, 'b.c': 1}.__getitem__

    assert [ClipModel(Model(), T).group_matcher()(f'model.{name}') for name in ('a', 'b.c')] == [0, 1]


def test_parameters_without_weight_decay_are_the_networks():
    model = timm.create_model('vit_tiny_patch16_224', device='meta')
    wrapped = ClipModel(model, T)
    assert wrapped.no_weight_decay() == {f'model.{name}' for name in model.no_weight_decay()}
    assert 'model.pos_embed' in wrapped.no_weight_decay()
    groups = create_optimizer_v2(wrapped, opt='sgd', lr=.1, weight_decay=.05).param_groups
    assert any(p is model.pos_embed for p in groups[0]['params']) and groups[0]['weight_decay'] == 0


def test_checkpointing_gives_the_same_gradients_and_saves_activations():
    grads, kept = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = pair()[1]
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == model.model.grad_checkpointing == enable
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            y = model(torch.ones(2, T, 3, 32, 32))
        y.square().sum().backward()
        kept.append(sum(saved))
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in grads[0]) and kept[1] < kept[0] / 2
    torch.testing.assert_close(grads[1], grads[0])


def test_features_and_head_are_those_of_the_family():
    family = randomize(timm.create_model('cmr_resnet18', num_frames=T, num_classes=5, channels=(64, 8, 8, 8))).eval()
    model = resnet()
    retrofit(model, num_frames=T, start='paper')
    model.load_state_dict(family.state_dict())
    wrapped, x = ClipModel(model, T), clips()
    for given in (x, x.flatten(0, 1), x[0, :2]):
        features = wrapped.forward_features(given)
        assert torch.equal(features, family.forward_features(given))
        assert features.shape == (given[..., 0, 0, 0].numel(), 8, 1, 1)
        for pre_logits in (False, True):
            torch.testing.assert_close(
                wrapped.forward_head(features, pre_logits=pre_logits), family.forward_head(features, pre_logits))
        torch.testing.assert_close(wrapped.forward_head(features), wrapped(given))
        got, want = (m.forward_intermediates(given, indices=[1, 3]) for m in (wrapped, family))
        assert len(got[1]) == 2 and torch.equal(got[0], want[0])
        assert all(map(torch.equal, got[1], want[1]))
        assert len(wrapped.forward_intermediates(given, indices=2, intermediates_only=True)) == 2
    assert wrapped.feature_info == family.feature_info


def test_error_features_of_clips_of_another_length():
    model = pair()[1]
    for method in (model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r'holds clips of 6 frames, but num_frames=4 is wanted'):
            method(torch.randn(1, 6, 3, 32, 32))
    set_num_frames(model.model, 2)
    with pytest.raises(ValueError, match=r'^num_frames=4, but layer1.0.cme of the model has num_frames=2'):
        model.forward_features(clips())


def test_error_features_of_a_network_that_lost_a_layer():
    model = resnet()
    insert(model, CME, at='layer1.0.conv1', num_frames=T)
    wrapped = ClipModel(model, T)
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1)
    for method in (wrapped.forward_features, wrapped.forward_intermediates, wrapped):
        with pytest.raises(RuntimeError, match=r'^layer1.0.conv1.cme of the ResNet must run once'):
            method(clips())
    with pytest.raises(RuntimeError, match=r'^layer1.0.conv1.cme of the ResNet must run once'):
        ClipModel(model, T)


def test_the_classifier_is_the_networks_and_can_be_changed():
    model = pair()[1]
    assert model.get_classifier() is model.model.fc and model.num_classes == 5
    model.reset_classifier(7)
    assert model(clips()).shape == (2, 7) and model.num_classes == 7 and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(clips()).shape == (2, model.num_features)


def test_data_config_is_that_of_the_network():
    for name, kwargs, size in (
            ('resnet18', {}, 224), ('resnet18.a1_in1k', {'in_chans': 1}, 224), ('mobilenetv3_small_050', {}, 224),
            ('vit_tiny_patch16_224', {'img_size': 64}, 64), ('inception_v3', {}, 299)):
        model = timm.create_model(name, device='meta', **kwargs)
        for resolve in (resolve_data_config, resolve_input_data_config):
            config = resolve(model=ClipModel(model, T))
            assert config == resolve(model=model)
        assert config['input_size'] == (kwargs.get('in_chans', 3), size, size)


def test_what_describes_the_network_is_passed_on_with_the_wrappers_names():
    model, wrapped = pair()
    for name in ('num_classes', 'num_features', 'head_hidden_size', 'in_chans', 'feature_info', 'grad_checkpointing'):
        assert getattr(wrapped, name) == getattr(model, name)
    cfg = wrapped.pretrained_cfg
    assert wrapped.default_cfg == cfg and cfg['classifier'] == 'model.fc' and cfg['first_conv'] == 'model.conv1'
    assert wrapped.get_submodule(cfg['classifier']) is wrapped.model.fc
    assert cfg['mean'] == model.pretrained_cfg['mean'] and not timm.is_model(cfg['architecture'])
    assert wrapped.model.pretrained_cfg == model.pretrained_cfg and model.pretrained_cfg['classifier'] == 'fc'


NAMES = [name for name, member in vars(ClipModel).items() if isinstance(member, property) and name != 'num_frames']


@pytest.mark.parametrize('name', NAMES)
def test_it_has_what_its_network_has_and_no_more(name):
    class Bare(Mean):
        pass

    assert not hasattr(ClipModel(Bare(), T), name)
    with pytest.raises(AttributeError, match=name):
        getattr(ClipModel(Bare(), T), name)
    setattr(Bare, name, Bare.forward)
    assert hasattr(ClipModel(Bare(), T), name)


def test_it_passes_on_what_timm_asks_for():
    assert len(NAMES) == len(set(NAMES)) and set(NAMES) >= {
        'group_matcher', 'set_grad_checkpointing', 'reset_classifier', 'get_classifier', 'no_weight_decay',
        'forward_features', 'forward_intermediates', 'forward_head', 'pretrained_cfg', 'num_classes'}


def test_set_num_frames_reaches_wrapper_and_layers():
    model = pair()[1]
    model.set_num_frames(2)
    assert model.num_frames == 2 and model(torch.randn(3, 2, 3, 32, 32)).shape == (3, 5)
    assert model.forward_features(torch.randn(3, 2, 3, 32, 32)).shape[0] == 6


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_wrapped_timm_network_copies_pickles_scripts_compiles_and_traces():
    torch._dynamo.reset()
    # a block in each stage: deeper networks take the compilers longer, and have nothing else in them
    block = timm.models.resnet.BasicBlock
    network = timm.models.resnet.ResNet(block, (1, 1, 1, 1), num_classes=5, channels=(64, 8, 8, 8))
    retrofit(network, num_frames=T)
    model, x = ClipModel(randomize(network).eval(), T), clips()
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want) and other.num_classes == 5 and other.model is not model.model
        assert torch.equal(other.forward_head(other.forward_features(x)), want)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), want)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), want)
    features = torch.compile(model.forward_features, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(features(x), model.forward_features(x))


@pytest.mark.parametrize('compiled', [False, True])
def test_error_layers_of_another_clip_length_later(compiled):
    # set_num_frames() of a part would mix clips
    torch._dynamo.reset()
    model = ClipModel(net(), 4)
    run = torch.compile(model, backend='eager', fullgraph=True) if compiled else model
    x = torch.randn(2, 4, 3, 5, 7)
    assert run(x).shape == (2, 8)
    next(m for m in model.modules() if isinstance(m, TIM)).set_num_frames(8)
    with pytest.raises((ValueError, RuntimeError), match=r'num_frames=4, but|Observed exception'):
        run(x)
    torch._dynamo.reset()


def test_error_a_layer_that_comes_later_or_is_set_by_hand():
    # whatever happens to the network after it was wrapped, the next call sees it
    model, x = ClipModel(net(), 4), torch.randn(2, 4, 3, 5, 7)
    model(x)
    model.model.append(nn.Sequential(nn.Identity(), TIM(8, num_frames=2)))
    with pytest.raises(ValueError, match=r'^num_frames=4, but \S+\.1 of the model has num_frames=2'):
        model(x)
    model.model[-1][1].num_frames = 4
    model.model[-1] = None
    del model.model[-1]
    model(x)
    next(m for m in model.modules() if isinstance(m, TIM)).num_frames = 8
    with pytest.raises(ValueError, match=r'has num_frames=8'):
        model(x)
