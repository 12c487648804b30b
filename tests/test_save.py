"""save_model and load_model: every network with layers comes back bit for bit, what does not fit is refused."""
import copy
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from helpers import anatomy, assert_same, randomize, values
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

from cmr_layers import (
    CME,
    SME,
    TIM,
    ClipModel,
    CMRBlock,
    insert,
    load_model,
    restore,
    retrofit,
    save_model,
    set_num_frames,
    temporal_keys,
)
from cmr_layers.drop import ClipDrop
from cmr_layers.save import _digest

T = 4
CHANGED = r'made a video network; save it with cmr_layers.save_model\(\) and load it with load_model\(\)'


def resnet(name='resnet18', **kwargs):
    return timm.create_model(name, **{'num_classes': 5, 'channels': (64, 8, 8, 8), **kwargs})


def hf_resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config)


def convnext():
    return transformers.ConvNextModel(transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 2], drop_path_rate=.5))


def retrofitted(model=None, **kwargs):
    model = resnet() if model is None else model
    retrofit(model, **{'num_frames': T, **kwargs})
    return model


def inserted(model, *calls):
    for layer, at, kwargs in calls:
        insert(model, layer, at=at, num_frames=T, **kwargs)
    return model


def nested(part_first):
    """Layers with two roots."""
    model, image = resnet(), torch.zeros(1, 64, 8, 8)
    calls = [
        lambda: insert(model.layer1[0], CME, at='conv1', where='before', num_frames=T, example_input=image),
        lambda: insert(model, CME, at='layer1.0.conv2', where='before', num_frames=T, gate_init=.7)]
    for call in calls if part_first else calls[::-1]:
        call()
    return model


def reset(model, *args):
    model.reset_classifier(*args)
    return model


IN_FRONT = {'where': 'before'}
MADE = {
    'resnet18': lambda: retrofitted(),
    'resnet50 paper': lambda: retrofitted(resnet('resnet50'), start='paper', reduction=(4, 2), sme='all'),
    'cme without tim': lambda: retrofitted(tim='none'),
    'cme first': lambda: retrofitted(cme='first', sme='none'),
    'tim first': lambda: retrofitted(cme='none', tim='first', sme='all'),
    'tag': lambda: retrofitted(timm.create_model('resnet18.a1_in1k')),
    'se': lambda: retrofitted(resnet('seresnext26t_32x4d', channels=(64, 16, 16, 16))),
    'block_args': lambda: retrofitted(resnet(block_args={'attn_layer': 'se'}, act_layer='silu')),
    'hooks': lambda: retrofitted(resnet('res2net50_14w_8s', channels=(64, 64, 64, 64))),
    'other classes': lambda: retrofitted(reset(resnet(), 7)),
    'no classes': lambda: retrofitted(reset(resnet(), 0)),
    'float64': lambda: retrofitted(resnet().double()),
    'bfloat16': lambda: retrofitted(resnet().bfloat16()),
    'drops': lambda: retrofitted(resnet(drop_path_rate=.5, drop_block_rate=.3, drop_rate=.2)),
    'T': lambda: set_num_frames(retrofitted(num_frames=8), T),
    'many layers': lambda: inserted(
        resnet(), (CME, 'layer1.0.conv1', {'gate_init': .9, 'reduction': (4, 2), **IN_FRONT}),
        (TIM, 'layer1.0.conv1', {'kernel_size': 5, 'init': 'random', 'gain': 2, **IN_FRONT}),
        (TIM, 'layer1.0.conv1', {'init': 'tsm_reversed', 'shift_div': 4}),
        (SME, ['layer*.1', 'bn1'], {'bias': True}), (CME, 'layer1.0.conv1', IN_FRONT), (SME, 'layer1.1', {})),
    'numbers of numpy': lambda: inserted(
        resnet(), (TIM, 'layer1.0', {'kernel_size': np.int64(5)}), (CME, 'layer1', {'gate_init': np.float32(.7)})),
    'after retrofit': lambda: inserted(
        retrofitted(cme='first'), (CME, 'layer1.0.conv1', IN_FRONT), (SME, 'layer1.*', {})),
    'nested, part first': lambda: nested(True),
    'nested, whole first': lambda: nested(False),
    'convnext': lambda: inserted(
        timm.create_model('convnext_atto', num_classes=5, drop_path_rate=.3), (SME, 'stages.*', {})),
    'efficientnet': lambda: inserted(
        timm.create_model('efficientnet_b0', num_classes=5, drop_path_rate=.3), (CME, 'blocks.*.0', IN_FRONT)),
    'features': lambda: inserted(
        timm.create_model('resnet18', features_only=True, out_indices=(2, 4)), (SME, 'layer2', {})),
    'overlay': lambda: retrofitted(timm.create_model('resnet18', pretrained_cfg_overlay={'num_classes': 7})),
    'family': lambda: timm.create_model(
        'cmr_resnet18', num_frames=T, num_classes=5, channels=(64, 8, 8, 8), drop_path_rate=.5, drop_block_rate=.3),
    'family, other arguments': lambda: set_num_frames(timm.create_model(
        'cmr_resnet50d', num_classes=5, channels=(64, 8, 8, 8), consensus='features', reduction=(8, 4), sme='all',
        block_args={'attn_layer': 'se'}), T),
    'clip model': lambda: ClipModel(retrofitted(), T),
    'clip model of another T': lambda: set_num_frames(ClipModel(retrofitted(), T), 8),
    'clip model without layers': lambda: ClipModel(resnet(), T),
    'clip model of a vit': lambda: ClipModel(timm.create_model('vit_tiny_patch16_224', img_size=64, depth=2), T),
    'in a clip model': lambda: inserted(ClipModel(resnet(), T), (SME, 'model.layer1.0', {})),
    'unsaved buffers': lambda: ClipModel(timm.create_model(
        'swin_tiny_patch4_window7_224', img_size=64, window_size=2, depths=(1, 1, 1, 1)).bfloat16(), T),
    'unsaved filters': lambda: retrofitted(resnet('resnetblur50').bfloat16()),
}
# Networks that load_model() needs: what was saved, and what it is given
GIVEN = {
    'torchvision': (lambda m: retrofitted(m), lambda: torchvision.models.resnet18(num_classes=5)),
    'torchvision, hooks': (
        lambda m: inserted(m, (SME, 'layer1', {}), (CME, 'conv1', {})),
        lambda: torchvision.models.resnet18(num_classes=5)),
    'transformers': (lambda m: ClipModel(retrofitted(m), T), hf_resnet),
    'transformers, drops': (lambda m: inserted(m, (SME, 'encoder.stages.*', {})), convnext),
    'a class as argument': (lambda m: retrofitted(m), lambda: resnet(block=timm.models.resnet.BasicBlock)),
    'timm': (lambda m: retrofitted(m), resnet),
    'blocks of ours': (
        lambda m: set_num_frames(m, T),
        lambda: timm.create_model('resnet26', block=CMRBlock, channels=(64, 8, 8, 8), num_classes=5)),
    'a clip model in it': (
        lambda m: inserted(set_num_frames(m, T), (SME, '1.model.layer1.1', {})),
        lambda: nn.Sequential(nn.BatchNorm2d(3), ClipModel(resnet(), 8))),
    'weights that are one': (lambda m: inserted(m, (SME, 'a', {})), lambda: Tied()),
}


class Tied(nn.Module):
    """Two convolutions with one weight, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b.weight, self.again = self.a.weight, self.norm

    def forward(self, x):
        return self.again(self.b(self.norm(self.a(x)))).mean((2, 3))


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    y = getattr(y, 'logits', getattr(y, 'pooler_output', y))
    return y if isinstance(y, list) else [y]


def assert_loads(model, folder, given=None):
    randomize(model).eval()
    dtype = next(model.parameters()).dtype
    frames = next((m.num_frames for m in model.modules() if hasattr(m, 'num_frames')), T)
    x = torch.randn(2 * frames, 3, 64, 64).to(dtype)
    want, cfg = outputs(model, x), getattr(model, 'pretrained_cfg', None)
    before = anatomy(model)
    save_model(model, folder)
    assert anatomy(model) == before
    same = load_model(folder, given)
    got = outputs(same, x)
    assert len(got) == len(want) > 0 and all(map(torch.equal, got, want))
    assert_same(values(model), same.state_dict())
    assert [v.dtype for v in same.state_dict().values()] == [v.dtype for v in model.state_dict().values()]
    # an optimizer's state goes by the order
    assert [name for name, _ in same.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert getattr(same, 'pretrained_cfg', None) == cfg
    assert not any(m.training for m in same.modules()) and all(p.device.type == 'cpu' for p in same.parameters())
    assert temporal_keys(same) == temporal_keys(model)
    return same


@pytest.mark.parametrize('name', MADE)
def test_what_was_made_comes_back_bit_for_bit(name, tmp_path):
    model = MADE[name]()
    same = assert_loads(model, tmp_path)
    if name != 'in a clip model':  # its guard is the network's then
        assert anatomy(same) == anatomy(model)
    rates = [[(type(m).__name__, getattr(m, 'drop_prob', None), getattr(m, 'num_frames', None))
              for m in net.modules()] for net in (model, same)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize('name', GIVEN)
def test_a_network_that_timm_did_not_build_comes_back_in_one_that_is_given(name, tmp_path):
    change, build = GIVEN[name]
    model, given = change(build()), build()
    same = assert_loads(model, tmp_path, given)
    assert (same.model if type(same) is ClipModel and type(given) is not ClipModel else same) is given
    assert anatomy(same) == anatomy(model)


def test_one_parameter_of_two_names_stays_one(tmp_path):
    model, given = Tied(), Tied()
    insert(model, SME, at='a', num_frames=T)
    save_model(model, tmp_path)
    same = load_model(tmp_path, given)
    assert same.b.weight is same.a.weight and same.again is same.norm
    assert torch.equal(same.a.weight, model.a.weight)


def test_a_loaded_network_is_as_good_as_the_first(tmp_path):
    model = retrofitted(resnet(drop_path_rate=.5))
    insert(model, CME, at='layer1.0.conv2', num_frames=T)
    randomize(model)
    save_model(model, tmp_path / 'a')
    same = load_model(tmp_path / 'a')
    save_model(same, tmp_path / 'b')
    for name in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    # it guards its layers, trains on, changes its clips' length, and gives the image network back
    x = torch.randn(2 * T, 3, 64, 64)
    for net in (model, same):
        torch.manual_seed(3)
        net.train()(x).square().sum().backward()
        optimizer = create_optimizer_v2(net, opt='sgd', lr=.1, layer_decay=.5)
        optimizer.step()
    assert_same(values(model), values(same))
    same.eval(), model.eval()
    assert torch.equal(set_num_frames(same, 2)(x), set_num_frames(model, 2)(x))
    assert torch.equal(copy.deepcopy(same)(x), same(x))
    assert torch.equal(pickle.loads(pickle.dumps(same))(x), same(x))
    broken = copy.deepcopy(same)
    broken.layer1[0].conv2 = nn.Conv2d(64, 64, 3, padding=1)
    with pytest.raises(RuntimeError, match=r'^layer1.0.cme2 of the ResNet|^layer1.0.conv2.cme of the ResNet'):
        broken(x)
    image = resnet(drop_path_rate=.5)
    assert anatomy(restore(same)) == anatomy(image.eval())
    assert same.pretrained_cfg == image.pretrained_cfg and timm.is_model(same.pretrained_cfg['architecture'])


def test_a_part_of_a_network_can_be_restored_if_it_was_changed_by_itself(tmp_path):
    save_model(nested(True), tmp_path)
    model = load_model(tmp_path)
    restore(model.layer1[0].conv1)
    with pytest.raises(RuntimeError, match=r'must run once'):
        model(torch.zeros(T, 3, 32, 32))


def test_layers_that_were_inserted_in_a_clip_model_are_guarded_in_what_was_loaded(tmp_path):
    save_model(inserted(ClipModel(resnet(), T), (SME, 'model.layer1.0.conv1', {})), tmp_path)
    model = load_model(tmp_path)
    model.model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1)
    with pytest.raises(RuntimeError, match=r'^layer1.0.conv1.sme of the ResNet must run once'):
        model(torch.zeros(1, T, 3, 32, 32))


def test_a_network_in_training_mode_with_frozen_parts_comes_back_in_eval_mode_and_trains(tmp_path):
    model = retrofitted().train()
    model.layer1.requires_grad_(False)
    model.layer2.eval()
    before = [m.training for m in model.modules()]
    save_model(model, tmp_path)
    assert [m.training for m in model.modules()] == before
    same = load_model(tmp_path)
    assert not any(m.training for m in same.modules()) and all(p.requires_grad for p in same.parameters())


def test_what_trained_on_several_devices_comes_back_with_plain_batch_norms(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(retrofitted())).eval()
    save_model(model, tmp_path)
    same, x = load_model(tmp_path), torch.randn(T, 3, 32, 32)
    assert type(same.bn1) is type(same.layer1[0].sme.bn) is nn.BatchNorm2d
    assert torch.equal(same(x), model(x))


def test_memory_format_and_views_of_one_tensor_do_not_matter(tmp_path):
    model = randomize(retrofitted()).eval()
    flat = torch.cat([p.detach().flatten() for p in model.layer4.parameters()])
    start = 0
    for p in model.layer4.parameters():
        p.data = flat[start:start + p.numel()].view_as(p)
        start += p.numel()
    model.layer1.to(memory_format=torch.channels_last)
    want = values(model)
    save_model(model, tmp_path)
    assert_same(want, load_model(tmp_path).state_dict())


@pytest.mark.parametrize('kind', [str, pathlib.Path], ids=['str', 'Path'])
def test_any_path_will_do_and_files_of_others_stay(kind, tmp_path):
    folder = kind(tmp_path / 'a b' / 'ä')
    first, second = retrofitted(), retrofitted(resnet(num_classes=7))
    save_model(first, folder)
    (pathlib.Path(folder) / 'README.md').write_text('mine')
    save_model(second, folder)
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert_same(values(second), load_model(folder).state_dict())


def test_a_new_process_loads_it(tmp_path):
    model = randomize(ClipModel(retrofitted(), T)).eval()
    save_model(model, tmp_path / 'model')
    x = torch.randn(2, T, 3, 32, 32)
    save_file({'x': x, 'y': model(x).detach()}, tmp_path / 'x.safetensors')
    code = (
        'import sys, torch; from safetensors.torch import load_file; from cmr_layers import load_model; '
        'torch.set_num_threads(1); d = load_file(sys.argv[1] + "/x.safetensors"); '
        'print(torch.equal(load_model(sys.argv[1] + "/model")(d["x"]), d["y"]))')
    run = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True)
    assert run.stdout == 'True\n', run.stderr


# What save_model() refuses

class Mine(SME):
    pass


class MyClipModel(ClipModel):
    pass


def changed(change, model=None):
    model = retrofitted() if model is None else model
    change(model)
    return model


def set_at(name, value):
    owner, _, attribute = name.rpartition('.')
    return lambda m: setattr(m.get_submodule(owner), attribute, value)


class Chain(nn.ModuleList):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class Holder(nn.Module):
    """A module that holds the layers of its body, which itself runs all that it holds."""

    def __init__(self):
        super().__init__()
        self.body = Chain([nn.Conv2d(3, 3, 1), nn.ReLU()])

    def forward(self, x):
        return self.body(x).mean((2, 3))


def with_hook(model):
    model.layer4.register_forward_hook(lambda module, args, output: output * 2)
    return model


def without_skips(model):
    for module in model.modules():
        if hasattr(module, 'has_skip'):
            module.has_skip = False
    return model


REFUSED = {
    "somebody's hook": (lambda: with_hook(retrofitted()), r'^layer4 must have no forward hooks to be saved'),
    "a setting of timm's": (lambda: without_skips(inserted(timm.create_model('mobilenetv3_small_050'), (
        SME, 'blocks.0.0', {}))), r'has_skip=False for True'),
    'layer': (lambda: inserted(resnet(), (Mine, 'layer1.0', {})),
              r'^layer1.0.mine must be a CME, SME or TIM to be saved, got a Mine$'),
    'norm': (lambda: inserted(resnet(), (SME, 'layer1.0', {'norm_layer': nn.InstanceNorm2d})),
             r'^layer1.0.sme must have an nn.BatchNorm2d to be saved, got InstanceNorm2d'),
    'folded': (lambda: timm.utils.reparameterize_model(retrofitted().eval()),
               r'^layer1.0.sme must have an nn.BatchNorm2d to be saved, got Identity\(\); save a network before it is'),
    'folded without sme': (
        lambda: timm.utils.reparameterize_model(retrofitted(sme='none').eval()), r"class='Identity' for 'BatchNorm2d'"),
    'folded family': (lambda: timm.utils.reparameterize_model(timm.create_model('cmr_resnet18').eval()),
                      r"layer1\.0\.bn1 has class='Identity' for 'BatchNorm2d'"),
    'folded torchvision': (
        lambda: timm.utils.reparameterize_model(retrofitted(torchvision.models.resnet18()).eval()),
        r'save a network before it is folded$'),
    'activation': (lambda: changed(set_at('act1', nn.GELU())), r"act1 has class='GELU' for 'ReLU'\."),
    'head': (lambda: changed(set_at('fc', nn.Linear(8, 7, bias=False))), r'fc.bias is missing'),
    'stride': (lambda: changed(set_at('layer1.0.conv1.stride', (2, 2))), r'conv1 has stride=\[2, 2\] for \[1, 1\]\.'),
    'pool': (lambda: changed(set_at('maxpool', nn.AvgPool2d(3, 2, 1))), r"maxpool has class='AvgPool2d' for 'MaxPool"),
    'eps': (lambda: changed(set_at('bn1.eps', .1)), r'bn1 has eps=0.1 for 1e-05\. What'),
    'consensus of the family': (
        lambda: changed(set_at('average_features', True), timm.create_model('cmr_resnet18')),
        r'itself has average_features=True for False\. What'),
    'adapter': (lambda: changed(lambda m: set_at('layer1.0.conv1', nn.Sequential(m.layer1[0].conv1))(m)),
                r'layer1.0.conv1.0 is new; layer1.0.conv1 has class='),
    'parameter': (lambda: changed(lambda m: m.register_parameter('scale', nn.Parameter(torch.ones(1)))),
                  r'scale is unexpected$'),
    'part': (lambda: changed(set_at('layer1.0.tim', nn.Conv2d(64, 64, 1))),
             r'^layer1.0.tim must be a CME, SME or TIM to be saved, got a Conv2d$'),
    'forward': (lambda: changed(set_at('layer1.forward', lambda x: x)),
                r'^layer1 must have the forward of its class to be saved$'),
    'class': (lambda: changed(lambda m: setattr(m, '__class__', type('Net', (type(m),), {}))),
              r"itself has class='Net' for 'ResNet'\. What"),
    'no values': (lambda: retrofitted(resnet(device='meta')), r'must be a plain tensor with values to be saved'),
    'consensus': (lambda: changed(set_at('consensus', nn.Identity()), ClipModel(resnet(), T)),
                  r'^model must be a ClipModel as it was built, got a ClipModel with fold: Fold, consensus: Identity$'),
    'one more part': (lambda: changed(set_at('head', nn.Linear(5, 5)), ClipModel(resnet(), T)),
                      r'^model must be a ClipModel as it was built, got .*, head: Linear$'),
    'subclass': (lambda: MyClipModel(resnet(), T), r'^model must be a ClipModel as it was built, got a MyClipModel'),
    'frames': (lambda: changed(lambda m: set_num_frames(m.layer1, 8)),
               r'^model \(ResNet\) has layers of different num_frames: \[4, 8\]$'),
    'frames of a clip model': (lambda: changed(lambda m: set_num_frames(m.model, 8), ClipModel(retrofitted(), T)),
                               r'^num_frames=4, but layer1.0.cme of the model has num_frames=8'),
    'layer outside': (lambda: inserted(Holder(), (SME, 'body', {})).body,
                      r'^model \(Chain\) holds a part or a copy: it runs layers that were put there through a module'),
}


def test_a_classifier_that_was_put_in_timms_place_comes_back(tmp_path):
    model, x = retrofitted(resnet()), torch.randn(T, 3, 32, 32)
    model.fc = nn.Linear(model.fc.in_features, 7)
    save_model(model.eval(), tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.num_classes == 7 and torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('name', REFUSED)
def test_error_what_is_not_as_it_was_built_is_not_saved(name, tmp_path):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        save_model(build(), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_error_a_quantized_network_is_not_saved(tmp_path):
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('weight', torch.quantize_per_tensor(torch.ones(3), .1, 0, torch.qint8))

    with pytest.raises(ValueError, match=r'^weight must be a plain tensor'):
        save_model(Quantized(), tmp_path / 'new')


def test_error_a_lost_layer_is_not_saved(tmp_path):
    model = inserted(resnet(), (SME, 'layer1.0.conv1', {}))
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3)
    with pytest.raises(RuntimeError, match=r'^layer1.0.conv1.sme of the ResNet must run once, at layer1.0.conv1'):
        save_model(model, tmp_path)
    model = inserted(ClipModel(torchvision.models.resnet18(), T), (SME, 'model.layer1.0.conv1', {}))
    model.model.layer1[0].conv1 = nn.Conv2d(64, 64, 3)
    with pytest.raises(RuntimeError, match=r'^model.layer1.0.conv1.sme of the ClipModel must run once'):
        save_model(model, tmp_path)


@pytest.mark.parametrize('wrap, got', [
    (torch.compile, 'what torch.compile made of it'), (nn.DataParallel, 'a DataParallel of it; pass model.module')])
def test_error_a_wrapped_network_is_not_saved(wrap, got, tmp_path):
    with pytest.raises(TypeError, match=f'^model must be the network itself, got {got}'):
        save_model(wrap(retrofitted()), tmp_path)
    model = retrofitted()
    model.compile()
    with pytest.raises(TypeError, match=r'^model must be the network itself'):
        save_model(model, tmp_path)
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got 'resnet18'$"):
        save_model('resnet18', tmp_path)


def test_error_a_call_that_fails_leaves_the_old_files(tmp_path):
    model = retrofitted()
    save_model(model, tmp_path)
    with pytest.raises(ValueError):
        save_model(changed(set_at('act1', nn.GELU())), tmp_path)
    assert_same(values(model), load_model(tmp_path).state_dict())


# What load_model() refuses

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('saved')
    save_model(ClipModel(retrofitted(), T), path)
    return path


@pytest.mark.parametrize('given, message', [
    (lambda: nn.Linear(3, 3), r'^model must be a ResNet, as was saved, got a Linear$'),
    (lambda: ClipModel(resnet(), T), r'^model must be a ResNet, as was saved, got a ClipModel$'),
    (lambda: torchvision.models.resnet18(num_classes=5), r'act1 is new; .* and \d+ more\. .* pass model= built'),
    (lambda: resnet(num_classes=6), r'fc has out_features=5 for 6\. What'),
    (lambda: resnet(channels=(64, 8, 8, 16)), r'layer4.0.conv1 has out_channels=8 for 16'),
    (lambda: resnet('resnet34'), r'layer1.2 is gone'),
    (lambda: resnet(act_layer='silu'), r"act1 has class='ReLU' for 'SiLU'"),
    (lambda: resnet(output_stride=8), r'layer3.0 has stride|layer3.0.downsample is new'),
    (lambda: resnet(drop_path_rate=.5), r'layer1.1.drop_path is gone'),
    (lambda: resnet(in_chans=1), r'conv1 has in_channels=3 for 1\. What'),
    (lambda: retrofitted(), r'^model \(ResNet\) has temporal layers already; wanted one without$'),
    (lambda: inserted(resnet(), (SME, 'bn1', {})), r'^model \(ResNet\) has temporal layers already'),
    (lambda: changed(lambda m: m.layer1[1].register_parameter('w', nn.Parameter(torch.ones(1))), resnet()),
     r'layer1.1.w is missing$'),
    (lambda: changed(lambda m: setattr(m, 'layer1', nn.Sequential(m.layer1[0])), resnet()),
     r"^model \(ResNet\) must have 'layer1.1', where the saved one has layers$"),
    (lambda: changed(lambda m: setattr(m.layer1, '1', nn.Identity()), resnet()),
     r'^layer1.1 of the ResNet must be a block of timm or torchvision, got a Identity$'),
])
def test_error_a_network_that_does_not_fit_stays_as_it_was(given, message, folder):
    model = randomize(given()).train()
    before, state, cfg = anatomy(model), values(model), copy.deepcopy(getattr(model, 'pretrained_cfg', None))
    with pytest.raises(ValueError, match=message):
        load_model(folder, model)
    assert anatomy(model) == before and getattr(model, 'pretrained_cfg', None) == cfg
    assert_same(state, values(model))


def test_error_the_network_is_needed(tmp_path):
    save_model(ClipModel(retrofitted(torchvision.models.resnet18()), T), tmp_path)
    with pytest.raises(ValueError, match=r'^model must be a ResNet without temporal layers, built as .*; got None$'):
        load_model(tmp_path)
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got 'resnet18'$"):
        load_model(tmp_path, 'resnet18')
    with pytest.raises(TypeError, match=r'^model must be the network itself, got what torch.compile made of it'):
        load_model(tmp_path, torch.compile(torchvision.models.resnet18()))


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_error_a_file_is_missing(name, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'x')
    (tmp_path / 'x' / name).rename(tmp_path / 'x' / f'{name}.part')
    with pytest.raises(FileNotFoundError, match=rf'has no {name}; wanted one that save_model\(\) wrote\. What timm'):
        load_model(tmp_path / 'x')


def test_error_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'has no config.json'):
        load_model(tmp_path / 'nowhere')


TOGETHER = r'model.safetensors and config.json were not written together, or changed since$'


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_error_files_of_two_calls(name, folder, tmp_path):
    save_model(ClipModel(randomize(retrofitted()), T), tmp_path)  # as the other one, but for the weights
    shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=TOGETHER):
        load_model(tmp_path)


@pytest.mark.parametrize('damage', [
    lambda b: b[:-1], lambda b: b[:100], lambda b: b'', lambda b: b + b'x',
    lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]], ids=['cut', 'short', 'empty', 'long', 'one bit'])
def test_error_damaged_weights(damage, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'x')
    file = tmp_path / 'x' / 'model.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=TOGETHER):
        load_model(tmp_path / 'x')


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '3', '{}', '{"sha256": "x"}', '\x00', '\xff'], ids=repr)
def test_error_a_config_of_somebody_else(text, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'x')
    (tmp_path / 'x' / 'config.json').write_bytes(text.encode('latin1'))
    with pytest.raises(ValueError, match=r'has a config.json that save_model\(\) did not write$'):
        load_model(tmp_path / 'x')


def test_error_a_config_that_was_edited(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'x')
    file = tmp_path / 'x' / 'config.json'
    file.write_text(file.read_text().replace('"num_frames": 4', '"num_frames": 8'))
    with pytest.raises(ValueError, match=TOGETHER):
        load_model(tmp_path / 'x')


def forge(folder, target, edit):
    """A folder of somebody who knows how the digest is made."""
    shutil.copytree(folder, target)
    config = json.loads((target / 'config.json').read_text())
    edit(config)
    config['sha256'] = _digest(target / 'model.safetensors', config)
    (target / 'config.json').write_text(json.dumps(config))
    return target


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('key', ['checkpoint_path', 'pretrained', 'pretrained_cfg', 'cache_dir', 'model_name'])
def test_error_a_config_reads_no_other_file(key, folder, tmp_path):
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(Evil(tmp_path / 'run')))
    path = forge(folder, tmp_path / 'x', lambda c: c['timm']['args'].update({key: str(tmp_path / 'evil.pth')}))
    with pytest.raises(ValueError, match=rf"^config.json must not have \['{key}'\] as arguments of timm$"):
        load_model(path)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('edit, message', [
    (lambda c: c['timm'].update(name='local-dir:elsewhere'), r"^timm knows no 'local-dir:elsewhere'"),
    (lambda c: c['timm'].update(name='my_resnet'), r"^timm knows no 'my_resnet'; import the module that registers it"),
    (lambda c: c['timm']['args'].update(num_classes=6), r'fc.weight is \[5, 8\] for \[6, 8\]'),
    (lambda c: c['timm']['args'].update(colour='red'), r'^timm can not build the resnet18 of folder=.*colour'),
    (lambda c: c['layers']['layer1.0.cme'].update(channels=32), r'layer1.0.cme.w1 is \[8, 64\] for \[4, 32\]'),
    (lambda c: c['blocks'].pop(), r'layer4.1.cme.w1 is unexpected'),
])
def test_error_a_config_that_does_not_fit_the_weights(edit, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_model(forge(folder, tmp_path / 'x', edit))


def test_error_a_pickle_is_not_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'x')
    file = tmp_path / 'x' / 'model.safetensors'
    file.write_bytes(pickle.dumps(Evil(tmp_path / 'run')))
    path = forge(tmp_path / 'x', tmp_path / 'y', lambda c: None)
    with pytest.raises(ValueError, match=r'has a model.safetensors that save_model\(\) did not write$'):
        load_model(path)
    assert not (tmp_path / 'run').exists()


def test_the_folder_holds_json_and_safetensors(folder):
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    assert load_file(folder / 'model.safetensors').keys() == retrofitted().state_dict().keys()
    config = json.loads((folder / 'config.json').read_text())
    assert config['timm']['name'] == 'resnet18' and config['num_frames'] == config['clip_model'] == T
    assert config['layers']['layer1.0.cme'] == {
        'kind': 'CME', 'channels': 64, 'reduction': [8, 8], 'gate_init': .5,
        'input_fmt': 'NCHW', 'num_prefix_tokens': 0}


# timm's own way

TIMM = {
    'retrofit': lambda: retrofitted(),
    'insert': lambda: inserted(resnet(), (SME, 'layer1.0', {})),
    'ClipModel': lambda: ClipModel(resnet(), T),
    'ClipModel of retrofit': lambda: ClipModel(retrofitted(), T),
    'insert in ClipModel': lambda: inserted(ClipModel(resnet(), T), (SME, 'model.layer1.0', {})),
}


@pytest.mark.parametrize('safe', [True, False], ids=['safetensors', 'pickle'])
@pytest.mark.parametrize('name', TIMM)
def test_error_timm_loads_no_image_network_from_what_it_saved(name, safe, tmp_path):
    save_for_hf(TIMM[name](), tmp_path, safe_serialization=safe)
    for kwargs in ({}, {'num_classes': 5}, {'num_classes': 9}):
        with pytest.raises(RuntimeError, match=CHANGED):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **kwargs)
    with pytest.raises((FileNotFoundError, ValueError), match=r'save_model\(\)'):
        load_model(tmp_path)


@pytest.mark.parametrize('name', TIMM)
def test_error_timm_loads_no_image_network_from_what_we_saved(name, tmp_path):
    save_model(TIMM[name](), tmp_path)
    for kwargs in ({}, {'num_classes': 9}):
        with pytest.raises(RuntimeError, match=CHANGED):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **kwargs)


def test_timm_saves_and_loads_a_restored_network_and_the_family(tmp_path):
    model = randomize(restore(retrofitted()))
    save_for_hf(model, tmp_path / 'a', safe_serialization=True)
    assert_same(values(model), timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True).state_dict())
    other = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True, num_classes=9)
    assert torch.equal(other.conv1.weight, model.conv1.weight) and other.num_classes == 9
    model = randomize(timm.create_model('cmr_resnet18', num_frames=T, channels=(64, 8, 8, 8)))
    save_for_hf(model, tmp_path / 'b', safe_serialization=True)
    assert_same(values(model), timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True).state_dict())


def test_a_retrofitted_copy_of_a_network_does_not_rename_the_other():
    model = resnet()
    cfg = copy.deepcopy(model.pretrained_cfg)
    twin = copy.copy(model.pretrained_cfg)
    retrofitted(copy.deepcopy(model))
    wrapped = ClipModel(model, T)
    assert not timm.is_model(wrapped.pretrained_cfg['architecture'])
    assert model.pretrained_cfg == twin == cfg and resnet().pretrained_cfg == cfg


def test_drops_are_drawn_once_a_clip_in_what_was_loaded(tmp_path):
    save_model(retrofitted(resnet(drop_path_rate=.5)), tmp_path)
    drops = [m for m in load_model(tmp_path).modules() if isinstance(m, ClipDrop)]
    assert len(drops) == 7 and {m.num_frames for m in drops} == {T}
