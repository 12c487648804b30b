"""timm's checkpoint_path= with the files that training leaves behind, and with an image network's."""
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomize
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cmr_layers import ClipModel, retrofit

T = 4
SMALL = {'layers': (1, 1, 1, 1), 'channels': (64, 16, 16, 16), 'num_classes': 7}


def family(**kwargs):
    return timm.create_model('cmr_resnet18', num_frames=T, **{**SMALL, **kwargs}).eval()


def image_network(**kwargs):
    return randomize(timm.create_model('resnet18', zero_init_last=False, **{**SMALL, **kwargs}), everything=True).eval()


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    return randomize(family(), everything=True).eval()


@pytest.fixture
def clip():
    return torch.randn(1, T, 3, 32, 32)


def read(content, folder: Path, **kwargs):
    """The network that timm builds of a file. No warning may come."""
    torch.save(content, folder / 'a.pt')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return family(checkpoint_path=str(folder / 'a.pt'), **kwargs)


class Lightning(nn.Module):
    """Holds its network as those of Lightning do."""

    def __init__(self, model):
        super().__init__()
        self.model = model


WRAPPERS = {
    'model.': Lightning,
    'module.': nn.DataParallel,
    'an EMA of timm': ModelEmaV3,
    'an EMA of PyTorch': AveragedModel,
    'compiled': torch.compile,
    'model. in module.': lambda model: nn.DataParallel(Lightning(model)),
    'module. in model.': lambda model: Lightning(nn.DataParallel(model)),
    'an EMA of a model.': lambda model: AveragedModel(Lightning(model)),
}


@pytest.mark.parametrize('wrapper, key', [
    (wrapper, key) for wrapper in WRAPPERS for key in (None, 'state_dict', 'state_dict_ema', 'model')
    if key == 'state_dict_ema' or wrapper == 'model.'])
def test_prefixes(wrapper, key, trained, clip, tmp_path):
    state = WRAPPERS[wrapper](trained).state_dict()
    assert not state.keys() & trained.state_dict().keys()  # it has a prefix
    loaded = read(state if key is None else {key: state, 'progress': {'epoch': 3}}, tmp_path)
    assert torch.equal(loaded(clip), trained(clip))


def test_the_ema_comes_before_the_weights_unless_there_is_none(trained, clip, tmp_path):
    other = randomize(family(), everything=True).eval()
    content = {'state_dict': other.state_dict(), 'state_dict_ema': trained.state_dict(), 'classes': ['a'] * 7}
    assert torch.equal(read(content, tmp_path)(clip), trained(clip))
    assert torch.equal(read({**content, 'state_dict_ema': None}, tmp_path)(clip), other(clip))


def test_safetensors_with_a_prefix(trained, clip, tmp_path):
    save_file({f'model.{key}': value for key, value in trained.state_dict().items()}, tmp_path / 'a.safetensors')
    assert torch.equal(family(checkpoint_path=str(tmp_path / 'a.safetensors'))(clip), trained(clip))


def test_a_clip_model_around_a_retrofitted_network_is_a_network_of_the_family(clip, tmp_path):
    resnet = image_network()
    retrofit(resnet, num_frames=T)
    model = ClipModel(randomize(resnet, everything=True).eval(), T)
    torch.testing.assert_close(read({'state_dict': model.state_dict()}, tmp_path)(clip), model(clip))


def test_pretrained_cfg_overlay_leaves_a_prefix_out_too(trained, clip, tmp_path):
    torch.save({'state_dict': Lightning(trained).state_dict()}, tmp_path / 'a.pt')
    loaded = family(pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'a.pt'), 'num_classes': 7})
    assert torch.equal(loaded(clip), trained(clip))


# An image network as the start

@pytest.mark.parametrize('prefix', ['', 'module.', 'model.'])
@pytest.mark.parametrize('counters', [True, False])
def test_an_image_network_is_the_start_and_what_is_missing_is_said(prefix, counters, tmp_path):
    image = image_network()
    state = {f'{prefix}{k}': v for k, v in image.state_dict().items() if counters or 'num_batches' not in k}
    torch.save({'state_dict': state}, tmp_path / 'a.pt')
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match='of an image network: the 40 keys of the temporal layers of this CMRResNet '):
        model = family(checkpoint_path=str(tmp_path / 'a.pt'))
    torch.manual_seed(1)
    start, own = family().state_dict(), model.state_dict()
    for key, value in own.items():
        assert torch.equal(value, image.state_dict().get(key, start[key])), key


def test_the_result_names_the_missing_keys():
    model = family()
    with pytest.warns(UserWarning, match='temporal layers'):
        result = model.load_state_dict(image_network().state_dict())
    assert set(result.missing_keys) == model.state_dict().keys() - image_network().state_dict().keys()
    assert result.unexpected_keys == []


def test_the_family_without_temporal_layers_takes_an_image_network_without_a_warning(tmp_path):
    image = image_network()
    loaded = read(image.state_dict(), tmp_path, cme='none', tim='none', sme='none')
    assert all(torch.equal(value, image.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize('change, message', [
    (lambda state: {**state, 'layer1.0.tim.weight': torch.zeros(64, 1, 3)}, 'Missing key.*layer1.0.cme'),
    (lambda state: {k: v for k, v in state.items() if k != 'layer2.0.conv1.weight'}, 'Missing key.*layer2.0.conv1'),
    (lambda state: {k: v for k, v in state.items() if not k.startswith('fc.')}, 'Missing key.*fc.weight'),
    (lambda state: {**state, 'layer5.weight': torch.zeros(1)}, 'Unexpected key.*layer5.weight'),
    (lambda state: {**state, 'fc.weight': torch.zeros(1000, 16), 'fc.bias': torch.zeros(1000)},
        r'size mismatch for fc.weight.*\[1000, 16\].*\[7, 16\]'),
    (lambda state: {('backbone.' if k == 'bn1.bias' else '') + k: v for k, v in state.items()},
        'Unexpected key.*backbone.bn1.bias'),
    (lambda state: {f'model.{k}': v for k, v in state.items()} | {f'ema.{k}': v for k, v in state.items()},
        'Unexpected key.*ema.bn1.bias'),
    (lambda state: {'weight': torch.zeros(1)}, 'Missing key'),
    (lambda state: {}, 'Missing key'),
], ids=['a temporal key', 'a part', 'headless', 'more', 'other classes', 'one prefix', 'twice', 'one key', 'empty'])
def test_error_another_network(change, message, tmp_path):
    state, model = change(image_network().state_dict()), family()
    for prefix in ('', 'model.'):
        torch.save({f'{prefix}{key}': value for key, value in state.items()}, tmp_path / 'a.pt')
        with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
            load_checkpoint(model, str(tmp_path / 'a.pt'))  # what checkpoint_path= calls


def test_a_part_of_the_weights_is_loaded_as_ever(trained):
    model, part = family(), {k: v for k, v in trained.state_dict().items() if k.startswith('layer1.')}
    assert model.load_state_dict(part, strict=False).unexpected_keys == []
    assert all(torch.equal(model.state_dict()[key], value) for key, value in part.items())
