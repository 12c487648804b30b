"""The clip axis: clip_shape, Fold, Consensus, set_num_frames, temporal_keys, and their errors."""
import io

import numpy as np
import pytest
import torch
from helpers import Mean, net
from timm.models._features_fx import create_feature_extractor
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, insert, restore, retrofit, set_num_frames, temporal_keys
from cmr_layers.checks import check_choice, check_positive
from cmr_layers.clip import Consensus, Fold, clip_shape, unfold


@pytest.mark.parametrize('images, frames, want', [
    (8, 8, (1, 8)), (16, 8, (2, 8)), (7, 8, (7, 1)), (1, 8, (1, 1)), (0, 8, (0, 1)), (5, 1, (5, 1)), (9, 3, (3, 3)),
    (2, 2, (1, 2)), (1, 2, (1, 1)), (0, 1, (0, 1))])
def test_clip_shape(images, frames, want):
    assert clip_shape(images, frames) == want


@pytest.mark.parametrize('images, frames', [(9, 8), (15, 8), (5, 2), (4, 3)])
def test_error_clip_shape_wants_whole_clips(images, frames):
    message = (
        f'^x holds {images} frames, which is not a whole number of clips: with num_frames={frames} it must be a '
        f'multiple of {frames}, or fewer than {frames} stills$')
    with pytest.raises(ValueError, match=message):
        clip_shape(images, frames)


def test_unfold_keeps_the_frames_of_a_clip_together():
    x = torch.arange(6)[:, None]
    assert unfold(x, 3)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert unfold(x[:2], 3)[..., 0].tolist() == [[0], [1]]
    assert unfold(x, 3).data_ptr() == x.data_ptr()    # a view, no copy


@pytest.mark.parametrize('value', [0, -1, 1.5, '8', None, True, torch.tensor(0), torch.tensor(2.5)], ids=repr)
def test_error_check_positive_shows_name_and_value(value):
    with pytest.raises(ValueError, match=r'^thing must be a positive int, got ') as error:
        check_positive('thing', value)
    assert str(error.value).endswith(repr(value))


def test_error_check_choice_shows_name_choices_and_value():
    with pytest.raises(ValueError, match=r"^thing must be one of 'a', 'b', got 'c'$"):
        check_choice('thing', 'c', ('a', 'b'))
    assert check_choice('thing', 'b', ('a', 'b')) == 'b' and check_positive('thing', 3) == 3


# Fold

def test_fold_puts_the_frames_of_a_clip_next_to_each_other():
    x = torch.randn(2, 4, 3, 5, 7)
    y = Fold(4)(x)
    assert y.shape == (8, 3, 5, 7)
    assert all(torch.equal(y[4 * b + t], x[b, t]) for b in range(2) for t in range(4))


@pytest.mark.parametrize('images', [0, 1, 3, 4, 8])
def test_fold_passes_frames_through(images):
    x = torch.randn(images, 3, 5, 7)
    assert Fold(4)(x) is x


def test_fold_of_an_empty_batch_of_clips():
    assert Fold(4)(torch.zeros(0, 4, 3, 5, 7)).shape == (0, 3, 5, 7)


def test_fold_has_no_state():
    assert not Fold(4).state_dict() and not Consensus(4).state_dict()


@pytest.mark.parametrize('shape', [(3,), (4, 3), (3, 5, 7), (1, 1, 4, 3, 5, 7)], ids=str)
def test_error_fold_wants_clips_or_frames(shape):
    got = ', '.join(map(str, shape))
    message = rf'^x must be clips \(B, 4, C, H, W\) or frames \(B\*4, C, H, W\), got \[{got}\]$'
    with pytest.raises(ValueError, match=message):
        Fold(4)(torch.zeros(shape))


def test_error_fold_names_both_numbers_of_frames():
    with pytest.raises(ValueError, match=(
            r'^x of shape \[2, 5, 3, 2, 2\] holds clips of 5 frames, but num_frames=4 is wanted: sample 4 frames, '
            r'or call set_num_frames\(model, 5\)$')):
        Fold(4)(torch.zeros(2, 5, 3, 2, 2))


def test_error_fold_wants_whole_clips():
    with pytest.raises(ValueError, match=r'^x holds 6 frames, which is not a whole number of clips: with num_frames=4'):
        Fold(4)(torch.zeros(6, 3, 2, 2))


@pytest.mark.parametrize(
    'make', [Fold, Consensus, lambda n: ClipModel(Mean(), n)], ids=['Fold', 'Consensus', 'ClipModel'])
@pytest.mark.parametrize('value', [0, -1, 2.5, None, True], ids=repr)
def test_error_num_frames_is_a_positive_int(make, value):
    with pytest.raises(ValueError, match=f'^num_frames must be a positive int, got {value!r}$'):
        make(value)


# Consensus

def test_consensus_is_the_mean_over_a_clips_frames():
    x = torch.randn(8, 5)
    torch.testing.assert_close(Consensus(4)(x), torch.stack([x[:4].mean(0), x[4:].mean(0)]))


@pytest.mark.parametrize('shape', [(3, 5), (1, 5), (0, 5)], ids=str)
def test_consensus_leaves_stills_alone(shape):
    x = torch.randn(shape)
    assert torch.equal(Consensus(4)(x), x)


@pytest.mark.parametrize('shape', [(8, 5, 2, 2), (6, 5, 2, 2), (8, 5, 2)], ids=str)
def test_consensus_leaves_feature_maps_alone(shape):
    x = torch.randn(shape)
    assert Consensus(4)(x) is x


def test_error_consensus_of_half_a_clip():
    with pytest.raises(ValueError, match=r'^x holds 6 frames, which is not a whole number of clips'):
        Consensus(4)(torch.zeros(6, 5))


def test_any_kind_of_int_counts_as_one():
    value = check_positive('thing', np.int64(8))
    assert value == 8 and type(value) is int


@pytest.mark.parametrize('call', [
    lambda x: ClipModel(x), lambda x: set_num_frames(x, 8), lambda x: restore(x), lambda x: retrofit(x),
    lambda x: insert(x, SME, at='0')], ids=['ClipModel', 'set_num_frames', 'restore', 'retrofit', 'insert'])
def test_error_model_is_a_module(call):
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got 'resnet18'$"):
        call('resnet18')


@pytest.mark.parametrize('call', [retrofit, lambda x: insert(x, SME, at='0')], ids=['retrofit', 'insert'])
def test_error_model_is_not_compiled_yet(call):
    with pytest.raises(TypeError, match=r'^model must be the network itself, got what torch.compile made of it'):
        call(torch.compile(net()))


def test_error_hints_at_swapped_axes():
    with pytest.raises(ValueError, match=r'got \[2, 3, 8, 4, 4\], which looks like \(B, C, T, H, W\); if so, '):
        Fold(8)(torch.zeros(2, 3, 8, 4, 4))


@pytest.mark.parametrize('layer', [Fold(8), TIM(8), CME(8), SME(8)], ids=['Fold', 'TIM', 'CME', 'SME'])
def test_error_x_is_a_tensor(layer):
    with pytest.raises(TypeError, match=r"^x must be a tensor, got <class 'numpy.ndarray'>$"):
        layer(np.zeros((8, 8, 4, 4)))


def test_error_clips_are_floating_point():
    with pytest.raises(ValueError, match=r'^x must be a floating point tensor, got torch.uint8$'):
        SME(8)(torch.zeros(8, 8, 2, 2, dtype=torch.uint8))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_clip_model_in_torchscript():
    # without the wrapper's TypeError, which TorchScript can't check, the parts are scriptable
    parts, x = nn.Sequential(Fold(4), net(), Consensus(4)), torch.randn(2, 4, 3, 5, 7)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(parts), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), parts(x))


def test_fx_sees_fold_and_consensus_as_one_node_each():
    parts, x = nn.Sequential(Fold(4), net(), Consensus(4)), torch.randn(2, 4, 3, 5, 7)
    extractor = create_feature_extractor(parts, {'2': 'y'})
    targets = [n.target for n in extractor.graph.nodes if n.op == 'call_module']
    assert targets == ['0', '1.0', '1.1', '1.2', '1.3', '2']
    torch.testing.assert_close(extractor(x)['y'], parts(x))


# set_num_frames and temporal_keys

def test_set_num_frames_reaches_every_layer_and_returns_the_model():
    model = ClipModel(net(), 4)
    assert set_num_frames(model, 6) is model
    found = {type(m).__name__: m.num_frames for m in model.modules() if hasattr(m, 'num_frames')}
    assert found == {name: 6 for name in ('ClipModel', 'Fold', 'CME', 'TIM', 'SME', 'Consensus')}
    assert model(torch.randn(2, 6, 3, 5, 7)).shape == (2, 8)
    with pytest.raises(ValueError, match='num_frames=6'):
        model(torch.randn(2, 4, 3, 5, 7))


def test_set_num_frames_reaches_through_a_wrapper_that_delegates_to_it():
    class Wrapper(nn.Sequential):
        def set_num_frames(self, n):
            set_num_frames(self, n)

    model = Wrapper(TIM(8, 4))
    model.set_num_frames(6)
    assert model[0].num_frames == 6


def test_set_num_frames_takes_a_single_layer():
    layer = TIM(8, 4)
    assert set_num_frames(layer, 2) is layer and layer.num_frames == 2


@pytest.mark.parametrize('value', [0, -1, 2.5, '8', None, True], ids=repr)
def test_error_set_num_frames_changes_nothing(value):
    model = ClipModel(net(), 4)
    with pytest.raises(ValueError, match=f'^num_frames must be a positive int, got {value!r}$'):
        set_num_frames(model, value)
    assert {m.num_frames for m in model.modules() if hasattr(m, 'num_frames')} == {4}


def test_error_set_num_frames_without_a_temporal_layer():
    message = r'^model \(Linear\) holds no layer with num_frames; wanted one with CME, SME or TIM in it$'
    with pytest.raises(ValueError, match=message):
        set_num_frames(nn.Linear(3, 3), 8)


def test_temporal_keys_are_those_of_the_three_layers():
    model = net()
    assert temporal_keys(model) == {key for key in model.state_dict() if key.split('.')[0] in '123'}
    assert temporal_keys(ClipModel(model, 4)) == {f'model.{key}' for key in temporal_keys(model)}
    assert 'model.3.bn.running_mean' in temporal_keys(ClipModel(model, 4))
    assert temporal_keys(TIM(8)) == {'weight'}
    assert temporal_keys(nn.Conv2d(3, 8, 1)) == set()
