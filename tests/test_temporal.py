"""The temporal layers alone: saved, loaded, and merged back into the image network, bit for bit or not at all."""
import copy
import json
import re
from functools import partial

import pytest
import timm
import torch
from helpers import image_net, randomize, randomize_layers, small_vit, values
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, freeze, insert, retrofit, set_num_frames, temporal_keys, train_mode
from cmr_layers.released import CME as ReleasedCME
from cmr_layers.temporal import load_temporal, load_temporal_state_dict, save_temporal, temporal_state_dict

T = 4


def built(seed=0, **kwargs):
    """A network with layers: the same image network for the same seed."""
    torch.manual_seed(seed)
    model = image_net()
    retrofit(model, num_frames=T, **kwargs)
    return model


def train(model, steps=2):
    train_mode(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2 * T, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    return model.eval()


def clip():
    return torch.randn(2, T, 3, 32, 32)


# State dicts

@pytest.mark.parametrize('make', [
    built, lambda: ClipModel(built(), T), lambda: timm.create_model('cmr_resnet18', num_frames=T),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), ReleasedCME(8, T))], ids=['retrofit', 'ClipModel', 'family', 'released'])
def test_the_state_dict_has_the_layers_and_nothing_else(make):
    model = make()
    state, whole = temporal_state_dict(model), model.state_dict()
    assert set(state) == temporal_keys(model) and list(state) == [key for key in whole if key in state]
    assert all(state[key].data_ptr() == whole[key].data_ptr() for key in state)
    assert 'retrofit' not in str(make) or any(key.endswith('running_mean') for key in state)


def test_state_dicts_load():
    one, other = randomize_layers(built()), built()
    parameters = dict(other.named_parameters())
    load_temporal_state_dict(other, {key: value.clone() for key, value in temporal_state_dict(one).items()})
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert all(parameters[name] is p for name, p in other.named_parameters())  # as optimizers know them


def test_what_trained_and_extra_keys():
    model = built()
    temporal = temporal_keys(model)
    freeze(model)
    assert set(temporal_state_dict(model, trained=True)) == temporal | {'fc.weight', 'fc.bias'}
    assert set(temporal_state_dict(model, extra=['fc', 'layer?.0.bn1', 'conv1.weight'])) == (
        temporal | {'fc.weight', 'fc.bias', 'conv1.weight'} | {
            f'layer{i}.0.bn1.{key}' for i in (1, 2, 3, 4)
            for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')})
    freeze(model, head=None, norms=True)
    more = set(temporal_state_dict(model, trained=True)) - temporal
    assert 'bn1.running_var' in more and not any('conv' in key or 'fc' in key for key in more)
    other = built(1)
    state = temporal_state_dict(model, extra=['fc'])
    load_temporal_state_dict(other, state, extra=['fc'])
    assert torch.equal(other.fc.weight, model.fc.weight) and not torch.equal(other.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('layer1.0.tim.weight'), r'layer1\.0\.tim\.weight is missing$'),
    (lambda s: s.update({'fc.weight': torch.zeros(5, 16)}), r'fc\.weight is unexpected$'),
    (lambda s: s.update({'nose': torch.zeros(5)}), r'nose is unexpected$'),
    (lambda s: s.update({'layer1.0.tim.weight': torch.zeros(64, 1, 5)}),
     r'layer1\.0\.tim\.weight is \[64, 1, 5\] for \[64, 1, 3\]$'),
    (lambda s: s.update({'layer1.0.tim.weight': torch.zeros(64, 1, 3, dtype=torch.half)}),
     r'layer1\.0\.tim\.weight is torch\.float16 for torch\.float32 \(convert the model by model\.to\(\)\)$'),
    (lambda s: s.update({'layer1.0.tim.weight': torch.zeros(64, 1, 3, device='meta')}),
     r'layer1\.0\.tim\.weight is on the meta device, without values$'),
])
def test_error_nothing_is_loaded_from_a_state_that_does_not_fit(change, message):
    model = built()
    state = {key: value + 1 for key, value in temporal_state_dict(model).items()}
    change(state)
    before = values(model)
    with pytest.raises(ValueError, match=r'^state does not fit model \(ResNet\): ' + message):
        load_temporal_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_error_a_model_on_the_meta_device():
    state = temporal_state_dict(built())
    with pytest.raises(ValueError, match=r'is on the meta device, without values'):
        load_temporal_state_dict(built().to('meta'), state)


@pytest.mark.parametrize('call', [temporal_state_dict, lambda m: load_temporal_state_dict(m, {})])
def test_error_arguments(call):
    with pytest.raises(TypeError, match=r'^model must be an nn.Module, got 3'):
        call(3)
    with pytest.raises(ValueError, match=r'^model \(ResNet\) holds no temporal layer; wanted one with CME, SME or TIM'):
        call(image_net())


def test_error_extra_and_state():
    model = built()
    with pytest.raises(ValueError, match=r"^extra='nose' must be a module of ResNet with a state, .* it has conv1;"):
        temporal_state_dict(model, extra=['nose'])
    for extra in ('fc', [3]):
        with pytest.raises(TypeError, match=r'^extra must be a list of names of modules or keys, got'):
            temporal_state_dict(model, extra=extra)
    for state in ([], {'fc.weight': 3}):
        with pytest.raises(TypeError, match=r'^state must be tensors by key, got (list|dict)$'):
            load_temporal_state_dict(model, state)


# Files, and merging back

@pytest.mark.parametrize('norms', [False, True])
@pytest.mark.parametrize('start', ['identity', 'shift', 'paper'])
def test_merged_back_into_a_fresh_network_bit_for_bit(tmp_path, start, norms):
    model, file = built(start=start), tmp_path / 'layers.safetensors'
    untrained = copy.deepcopy(model).eval()
    freeze(model, norms=norms)
    train(model)
    save_temporal(model, file)
    fresh, x = built(start=start).eval(), torch.randn(2 * T, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh(x), untrained(x))
        load_temporal(fresh, file)
        assert torch.equal(fresh(x), model(x)) and not torch.equal(fresh(x), untrained(x))
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize('name', ['regnetx_002', 'cmr_resnet18'])
def test_other_networks_and_a_file_that_is_small(tmp_path, name):
    def make():
        torch.manual_seed(3)
        if name.startswith('cmr'):
            return timm.create_model(name, num_classes=5, num_frames=T).eval()
        model = timm.create_model(name, num_classes=5).eval()
        retrofit(model, num_frames=T, reduction=16)
        return ClipModel(model, T)

    model, fresh, file, x = make(), make(), tmp_path / 'layers.safetensors', clip()
    freeze(model)
    randomize_layers(model)
    save_temporal(model, str(file))
    load_temporal(fresh, str(file))
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert file.stat().st_size < 4 * trained + 40_000 and not list(tmp_path.glob('*.part'))


def test_a_clip_model_and_the_network_inside_share_files(tmp_path):
    model, file = randomize_layers(built()), tmp_path / 'f'
    save_temporal(ClipModel(model, T), file, trained=False)
    other = built()
    load_temporal(other, file)
    again = ClipModel(built(), T)
    save_temporal(model, file, trained=False)
    load_temporal(again, file)
    for fresh in (other, again.model):
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_layers_by_insert(tmp_path):
    def make():
        torch.manual_seed(0)
        model = timm.create_model('convnext_atto', num_classes=5).eval()
        insert(model, TIM, at='stages.*', num_frames=T)
        insert(model, SME, at='stages.3', num_frames=T)
        return model

    model, fresh, file = randomize_layers(make()), make(), tmp_path / 'f'
    save_temporal(model, file, trained=False)
    load_temporal(fresh, file)
    x = torch.randn(T, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_as_a_start_on_another_image_network(tmp_path):
    model, file = randomize_layers(built()), tmp_path / 'f'
    save_temporal(model, file, trained=False)
    other = built(1)
    before = values(other)
    with pytest.raises(ValueError, match=r'belongs to a ResNet whose image network has other weights than this'):
        load_temporal(other, file)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    load_temporal(other, file, same_image_network=False)
    for key, value in other.state_dict().items():
        assert torch.equal(value, (model.state_dict() if key in temporal_keys(model) else before)[key])


def test_error_batch_norms_that_ran_in_training_mode(tmp_path):
    model, file = built(), tmp_path / 'f'
    freeze(model)
    model.train()(torch.randn(T, 3, 32, 32))  # not train_mode(): the statistics drift
    save_temporal(model, file)
    with pytest.raises(ValueError, match=r'batch norms ran in training mode \(see freeze\(\) and train_mode\(\)\)'):
        load_temporal(built(), file)


def test_error_a_network_that_trains_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match=r'^model \(ResNet\) trains as a whole, .* freeze\(model\) .* trained=False$'):
        save_temporal(built(), tmp_path / 'f')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('make, message', [
    (lambda: built(sme='none'), r'has 20 temporal layers of a ResNet, which are not the 16 of this ResNet: '
                                r'layer1\.0\.sme \(SME\) is not in the model'),
    (lambda: built(sme='all'), r'not the 24 of this ResNet: layer1\.1\.sme \(SME\) of the model is not in the file'),
    (lambda: built(reduction=4), r'layer1\.0\.cme has reduction=\[8, 8\] for \[4, 4\]'),
    (lambda: set_num_frames(built(), 8), r'has num_frames=4, the model has num_frames=8; set_num_frames\(model, 4\)'),
    (lambda: built().half(), r'is torch\.float32 for torch\.float16'),
    (lambda: image_net(), r'^model \(ResNet\) holds no temporal layer'),
    (lambda: ClipModel(net_of_tims(), T), r'layer1\.0\.cme has kind=.CME. for .TIM.'),
], ids=['fewer', 'more', 'reduction', 'num_frames', 'dtype', 'none', 'kind'])
def test_error_a_file_for_another_network(tmp_path, make, message):
    file = tmp_path / 'f'
    save_temporal(built(), file, trained=False)
    model = make()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        load_temporal(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def vit(layers, where='before', **kwargs):
    torch.manual_seed(0)
    model = small_vit()
    insert(model, layers, 'blocks.*', where, num_frames=T, **kwargs)
    return model


@pytest.mark.parametrize('make, other, message', [
    (lambda: vit(TIM), lambda: vit(TIM, 'after'), "blocks.0.tim has at='before blocks.0, 1' for 'after blocks.0, 1'"),
    (lambda: vit([CME, TIM]), lambda: vit([TIM, CME]),
     "blocks.0.cme has at='before blocks.0, 1' for 'before blocks.0, 2'"),
    (lambda: vit(SME), lambda: vit(partial(SME, norm_layer=partial(nn.BatchNorm2d, eps=.1))),
     "blocks.0.sme has norm=['BatchNorm2d', 1e-05, None] for ['BatchNorm2d', 0.1, None]"),
    (lambda: built(cme='none', sme='none'), lambda: tims_before_the_blocks(),
     "layer1.0.tim has at=None for 'before layer1.0, 1'"),
], ids=['side', 'order', 'norm', 'of the block and before it'])
def test_error_layers_at_other_places(tmp_path, make, other, message):
    save_temporal(make(), tmp_path / 'f', trained=False)
    load_temporal(ClipModel(make(), T), tmp_path / 'f')
    with pytest.raises(ValueError, match=re.escape(message)):
        load_temporal(other(), tmp_path / 'f')


def tims_before_the_blocks():
    torch.manual_seed(0)
    model = image_net()
    insert(model, TIM, 'layer?.*', 'before', num_frames=T)
    return model


def test_a_tensor_of_two_names_is_in_the_file(tmp_path):
    def network():
        model = vit(TIM)
        model.other = nn.Linear(24, 10)  # not run
        model.other.weight = model.head.weight
        freeze(model, ['head', 'other'])
        return model

    model = network()
    nn.init.ones_(model.head.weight)
    save_temporal(model, tmp_path / 'f')
    other = network()
    load_temporal(other, tmp_path / 'f')
    assert bool((other.other.weight == 1).all())


def net_of_tims():
    model = built()
    for module in list(model.modules()):
        if isinstance(getattr(module, 'cme', None), CME):
            module.cme = TIM(module.cme.channels, T)
    return model


def test_error_another_head(tmp_path):
    file = tmp_path / 'f'
    model = built()
    freeze(model)
    save_temporal(model, file)
    torch.manual_seed(0)
    other = image_net(num_classes=7)
    retrofit(other, num_frames=T)
    with pytest.raises(ValueError, match=r'fc\.weight is \[5, 16\] for \[7, 16\]'):
        load_temporal(other, file)
    headless = image_net(num_classes=0)
    retrofit(headless, num_frames=T)
    with pytest.raises(ValueError, match=r'does not fit model \(ResNet\): fc.weight; fc.bias is not in the model'):
        load_temporal(headless, file)


def test_error_files(tmp_path):
    model, file = built(), tmp_path / 'f'
    with pytest.raises(FileNotFoundError, match=r'^file=.* is no file; wanted one that save_temporal\(\) wrote'):
        load_temporal(model, file)
    file.write_bytes(b'no tensors')
    with pytest.raises(ValueError, match=r'^file=.* is damaged, or not one that save_temporal\(\) wrote'):
        load_temporal(model, file)
    save_file(temporal_state_dict(model), file)
    with pytest.raises(ValueError, match=r'^file=.* is not one that save_temporal\(\) wrote; load_temporal_state_dict'):
        load_temporal(model, file)
    save_temporal(model, file, trained=False)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r'^file=.* is damaged: its tensors are not those'):
        load_temporal(model, file)


def test_the_header_says_what_the_file_is_for(tmp_path):
    model, file = built(), tmp_path / 'f'
    freeze(model)
    save_temporal(model, file)
    with safe_open(file, framework='pt') as opened:
        header = json.loads(opened.metadata()['cmr_layers_temporal'])
    assert header['num_frames'] == T and header['network'] == 'ResNet' and header['extra'] == ['fc.weight', 'fc.bias']
    assert len(header['layers']) == 20
    assert header['layers']['layer1.0.cme'] == {
        'kind': 'CME', 'channels': 64, 'input_fmt': 'NCHW', 'num_prefix_tokens': 0, 'reduction': [8, 8]}


def test_a_failed_save_leaves_the_old_file(tmp_path):
    model, file = built(), tmp_path / 'f'
    save_temporal(model, file, trained=False)
    old = file.read_bytes()
    with pytest.raises(ValueError, match=r'must be a plain tensor with values, got torch.float32 on meta'):
        save_temporal(built().to('meta'), file, trained=False)
    assert file.read_bytes() == old
    randomize(model)
    save_temporal(model, file, trained=False)
    assert file.read_bytes() != old
