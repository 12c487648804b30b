"""The authors' released variant: its layers, and checkpoints of its layout.

The reference below is an implementation of its own: it computes with a state dict of the file's layout and
``torch.nn.functional`` alone, and shares nothing with the package.
"""
import copy
import gzip
import io
import math
import os
import pickle
import tarfile
import traceback
import warnings
import zipfile

import numpy
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers import randomize

from cmr_layers import SME, TIM, released, released_checkpoint, temporal_keys


def batch_norm(x, sd, name):
    return F.batch_norm(
        x, sd[f'{name}.running_mean'], sd[f'{name}.running_var'], sd[f'{name}.weight'], sd[f'{name}.bias'])


def conv_bn(x, sd, name, conv='0', bn='1', **kwargs):
    y = F.conv2d(x, sd[f'{name}.{conv}.weight'], sd.get(f'{name}.{conv}.bias'), **kwargs)
    return batch_norm(y, sd, f'{name}.{bn}')


def trans_att(x, sd, name, t):
    """CME: projections with BN and ReLU on the map, then the pooling; softmax over dim 1; gate sigma(ReLU(BN(.)))."""
    n, _c = x.shape[:2]
    query = F.relu(conv_bn(x, sd, f'{name}.conv1_reduce_q')).mean((2, 3)).reshape(n // t, t, -1)
    key = F.relu(conv_bn(x, sd, f'{name}.conv1_reduce_k')).mean((2, 3)).reshape(n // t, t, -1)
    fused = torch.empty_like(key)
    for b in range(n // t):
        d = torch.tensor([[-float(query[b, i] @ query[b, j]) for j in range(t)] for i in range(t)], dtype=x.dtype)
        weight = torch.stack([torch.softmax(d[:, j], dim=0) for j in range(t)], dim=1)
        for i in range(t):
            fused[b, i] = key[b, i] + sum(weight[i, j] * key[b, j] for j in range(t))
    gate = torch.sigmoid(F.relu(conv_bn(fused.reshape(n, -1, 1, 1), sd, f'{name}.conv_inflate')))
    return x * gate


def shift_conv(x, sd, name, t):
    n, c, h, w = x.shape
    y = x.reshape(n // t, t, c, h * w).permute(0, 2, 1, 3)
    y = F.conv2d(y, sd[f'{name}.weight'], padding=(1, 0), groups=c)
    return y.permute(0, 2, 1, 3).reshape(n, c, h, w)


def spatial_att(x, sd, name, t):
    n, c, h, w = x.shape
    clips = x.reshape(n // t, t, c, h, w)
    s = F.cosine_similarity(clips[:, :-1], clips[:, 1:], dim=2)
    s = torch.cat([s, s[:, -1:]], dim=1).reshape(n, 1, h, w)
    return conv_bn(x * (1 - s), sd, f'{name}.W') + x


def residual_block(x, sd, name, t, stride):
    net = f'{name}.net' if f'{name}.net.conv1.weight' in sd else name
    y = x
    if f'{name}.trans_att.conv1_reduce_q.0.weight' in sd:
        y = shift_conv(trans_att(y, sd, f'{name}.trans_att', t), sd, f'{name}.shift_conv', t)
    y = F.relu(conv_bn(y, sd, net, 'conv1', 'bn1'))
    y = F.relu(conv_bn(y, sd, net, 'conv2', 'bn2', stride=stride, padding=1))
    y = conv_bn(y, sd, net, 'conv3', 'bn3')
    if f'{net}.downsample.0.weight' in sd:
        x = conv_bn(x, sd, f'{net}.downsample', stride=stride)
    y = F.relu(y + x)
    return spatial_att(y, sd, f'{name}.spatial_att', t) if f'{name}.spatial_att.W.0.weight' in sd else y


def released_forward(x, sd, layers, t):
    sd = {key.removeprefix('module.').removeprefix('base_model.'): value for key, value in sd.items()}
    x = F.relu(batch_norm(F.conv2d(x, sd['conv1.weight'], stride=2, padding=3), sd, 'bn1'))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, count in enumerate(layers, start=1):
        for i in range(count):
            x = residual_block(x, sd, f'layer{stage}.{i}', t, stride=2 if stage > 1 and i == 0 else 1)
    logits = F.linear(x.mean((2, 3)), sd['new_fc.weight'], sd['new_fc.bias'])
    return logits.reshape(-1, t, logits.shape[1]).mean(1)


def released_state_dict(
        layers=(3, 4, 6, 3), num_classes=174, n_round=1, dtype=torch.float32, reduction=8, dropout=True,
        channels=(64, 128, 256, 512)):
    """A file's state dict: exactly the keys of the authors' wrapper, random values."""
    generator = torch.Generator().manual_seed(0)
    sd = {}

    def conv(name, *shape, bias=False):
        fan_in = math.prod(shape[1:])
        sd[f'{name}.weight'] = torch.randn(shape, generator=generator, dtype=dtype) * (1.4 / fan_in ** 0.5)
        if bias:
            sd[f'{name}.bias'] = torch.randn(shape[0], generator=generator, dtype=dtype) * 0.1

    def bn(name, channels):
        sd[f'{name}.weight'] = torch.rand(channels, generator=generator, dtype=dtype) * 0.5 + 0.5
        sd[f'{name}.bias'] = torch.randn(channels, generator=generator, dtype=dtype) * 0.1
        sd[f'{name}.running_mean'] = torch.randn(channels, generator=generator, dtype=dtype) * 0.1
        sd[f'{name}.running_var'] = torch.rand(channels, generator=generator, dtype=dtype) + 0.5
        sd[f'{name}.num_batches_tracked'] = torch.tensor(1000)

    base = 'module.base_model'
    conv(f'{base}.conv1', 64, 3, 7, 7)
    bn(f'{base}.bn1', 64)
    inplanes = 64
    for stage, count in enumerate(layers, start=1):
        planes = channels[stage - 1]
        for i in range(count):
            name = f'{base}.layer{stage}.{i}'
            converted = i % n_round == 0
            net = f'{name}.net' if converted else name
            convs = (planes, inplanes, 1), (planes, planes, 3), (4 * planes, planes, 1)
            for j, (out, inp, size) in enumerate(convs, start=1):
                conv(f'{net}.conv{j}', out, inp, size, size)
                bn(f'{net}.bn{j}', out)
            if i == 0:
                conv(f'{net}.downsample.0', 4 * planes, inplanes, 1, 1)
                bn(f'{net}.downsample.1', 4 * planes)
            if converted:
                for part, out, inp in (
                        ('conv1_reduce_q', inplanes // reduction, inplanes),
                        ('conv1_reduce_k', inplanes // reduction, inplanes),
                        ('conv_inflate', inplanes, inplanes // reduction)):
                    conv(f'{name}.trans_att.{part}.0', out, inp, 1, 1)
                    bn(f'{name}.trans_att.{part}.1', out)
                conv(f'{name}.shift_conv', inplanes, 1, 3, 1)
            if i == 0:
                conv(f'{name}.spatial_att.W.0', 4 * planes, 4 * planes, 1, 1, bias=True)
                bn(f'{name}.spatial_att.W.1', 4 * planes)
            inplanes = 4 * planes
    conv('module.new_fc' if dropout else f'{base}.fc', num_classes, inplanes, bias=True)
    return sd


def whole(state_dict):
    """What the authors' training script saves; its schedule computes the learning rate with numpy."""
    groups = [{'lr': numpy.float64(.01) * .1 ** numpy.sum([0, 1]), 'momentum': .9, 'params': [0, 1]}]
    momentum = {i: {'momentum_buffer': torch.ones(2)} for i in (0, 1)}
    return {
        'epoch': 50, 'optimizer': {'state': momentum, 'param_groups': groups}, 'model': state_dict, 'best_prec1': 49.}


def refused(call, *messages):
    """Assert that a call ends in a ValueError without a way to run what is in the file, and return its text."""
    with pytest.raises(ValueError) as error:
        call()
    shown = ''.join(traceback.format_exception(error.value))
    assert 'weights_only=False' not in shown and '`False`' not in shown
    assert all(message in str(error.value) for message in messages), str(error.value)


@pytest.fixture(scope='module')
def state_dict():
    return released_state_dict()


@pytest.mark.parametrize('t', [1, 2, 5])
def test_cme_computes_what_the_released_code_does(t):
    torch.manual_seed(0)
    layer = released.CME(16, num_frames=t).double().eval()
    for module in layer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -.5, .5)
            torch.nn.init.uniform_(module.running_var, .5, 1.5)
            torch.nn.init.uniform_(module.bias, -.5, .5)
    names = {'w1': 'conv1_reduce_k', 'w2': 'conv1_reduce_q', 'w3': 'conv_inflate'}
    sd = {f'att.{names[key[:2]]}{key[2:]}': value for key, value in layer.state_dict().items()}
    x = torch.randn(3 * t, 16, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), trans_att(x, sd, 'att', t), rtol=1e-12, atol=1e-12)
    assert layer.gate(x).min() >= 0.5  # difference 4
    assert layer.gate(x).shape == (3, t, 16)


def test_cme_refuses_a_reduction_that_does_not_divide():
    with pytest.raises(ValueError, match=r'reduction must divide channels=12, got 8'):
        released.CME(12)


@pytest.mark.parametrize('wrap', [
    whole,
    lambda sd: {'state_dict': sd},
    lambda sd: sd,
    lambda sd: {key.removeprefix('module.'): value for key, value in sd.items()},
], ids=['model', 'state_dict', 'bare', 'without DataParallel'])
def test_checkpoint_gives_the_released_codes_logits(state_dict, wrap, tmp_path):
    torch.save(wrap(state_dict), tmp_path / 'sthv1_8f.pth.tar')
    model = released.load_released_checkpoint(tmp_path / 'sthv1_8f.pth.tar', num_frames=4)
    x = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        logits, expected = model(x), released_forward(x.flatten(0, 1), state_dict, (3, 4, 6, 3), t=4)
    assert logits.shape == (2, 174)
    assert expected.std() > 1e-3  # nothing has died on the way
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_checkpoint_gives_the_released_codes_logits_in_float64(state_dict):
    double = {key: value.double() if value.is_floating_point() else value for key, value in state_dict.items()}
    model = released.load_released_checkpoint(state_dict, num_frames=4).double()
    x = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = released_forward(x.flatten(0, 1), double, (3, 4, 6, 3), t=4)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_deep_checkpoint_leaves_every_other_block_alone():
    layers = (3, 4, 23, 3)
    state_dict = released_state_dict(layers, num_classes=5, n_round=2)
    model = released.load_released_checkpoint(state_dict, num_frames=2)
    kinds = [type(block.cme).__name__ for block in model.layer3]
    assert kinds == ['CME', 'Identity'] * 11 + ['CME']
    x = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        expected = released_forward(x.flatten(0, 1), state_dict, layers, t=2)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_loaded_model_has_the_released_layers_where_the_file_has_them(state_dict):
    model = released.load_released_checkpoint(state_dict)
    count = [sum(isinstance(m, kind) for m in model.modules()) for kind in (released.CME, TIM, SME)]
    assert count == [16, 16, 4]
    assert not model.training and model.drop_rate == 0.5 and model.num_frames == 8 and model.num_classes == 174


def test_timm_saves_a_released_model_and_loads_it_again(tmp_path):
    # of the two kinds, the one with blocks that have no CME
    model = released.load_released_checkpoint(released_state_dict((3, 4, 23, 3), 7, n_round=2), num_frames=2)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 2, 3, 32, 32)
    assert again.num_frames == 2
    assert torch.equal(again(x), model(x))


def test_cme_survives_large_features_in_half_precision():
    layer = released.CME(512, num_frames=4).eval()
    x = torch.randn(4, 512, 2, 2) * 300
    expected = layer.gate(x)
    with torch.autocast('cpu', dtype=torch.float16):
        assert (layer.gate(x).float() - expected).abs().max() < .02
    assert (layer.half().gate(x.half()).float() - expected).abs().max() < .02


def test_weights_do_not_depend_on_the_number_of_frames(state_dict):
    eight = released.load_released_checkpoint(state_dict, num_frames=8).state_dict()
    sixteen = released.load_released_checkpoint(state_dict, num_frames=16).state_dict()
    assert all(torch.equal(eight[key], sixteen[key]) for key in eight)


def test_cme_scripts():
    layer, x = released.CME(16, num_frames=4).eval(), torch.randn(8, 16, 5, 5)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


# What the file shows

@pytest.mark.parametrize('zipped', [True, False])
def test_a_whole_training_checkpoint_comes_in_three_ways(zipped, tmp_path):
    file = str(tmp_path / 'ckpt.pth.tar')
    torch.save(whole(released_state_dict(num_classes=7)), file, _use_new_zipfile_serialization=zipped)
    name, args = 'released_cmr_resnet50', {'num_classes': 7, 'num_frames': 4}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        models = [
            released.load_released_checkpoint(file, num_frames=4),
            timm.create_model(name, checkpoint_path=file, **args).eval(),
            timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={'file': file, 'num_classes': 7}, **args).eval(),
        ]
    first, *others = (model.state_dict() for model in models)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], value) for key, value in first.items())
    x = torch.randn(1, 4, 3, 32, 32)
    assert torch.equal(models[0](x), models[1](x)) and torch.equal(models[0](x), models[2](x))
    assert first['layer1.0.cme.w1.1.num_batches_tracked'] == 1000


@pytest.mark.parametrize('depth, reduction, num_classes, dropout', [
    (50, 8, 7, True), (50, 16, 3, False), (152, 4, 5, True)])
def test_the_network_is_taken_from_the_file(depth, reduction, num_classes, dropout):
    layers, n_round = {50: ((3, 4, 6, 3), 1), 152: ((3, 8, 36, 3), 2)}[depth]
    state_dict = released_state_dict(layers, num_classes, n_round, reduction=reduction, dropout=dropout)
    model = released.load_released_checkpoint(state_dict)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == list(layers)
    assert model.num_classes == num_classes and model.drop_rate == (.5 if dropout else 0)
    assert model.layer4[2].cme.w1[0].weight.shape == (2048 // reduction, 2048, 1, 1)
    head = 'module.new_fc.weight' if dropout else 'module.base_model.fc.weight'
    assert torch.equal(model.fc.weight, state_dict[head])


def test_our_own_state_dict_is_taken_too(state_dict):
    model = released.load_released_checkpoint(state_dict)
    again = released.load_released_checkpoint({'state_dict': model.state_dict()})
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_become_float32(state_dict, dtype):
    other = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}
    model = released.load_released_checkpoint(other)
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.int64 if key.endswith('num_batches_tracked') else torch.float32)
    assert torch.equal(model.fc.bias, state_dict['module.new_fc.bias'].to(dtype).float())


def test_counters_of_batches_may_be_missing(state_dict):
    old = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    model = released.load_released_checkpoint(old)
    assert torch.equal(model.fc.weight, old['module.new_fc.weight']) and model.bn1.num_batches_tracked == 0


# What a file may hold

def rewrite(data, old, new):
    """A saved file with another text in its pickle."""
    if not data.startswith(b'PK'):
        assert old in data
        return data.replace(old, new)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                assert old in content
                content = content.replace(old, new)
            target.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_numpys_numbers_are_read_whichever_numpy_wrote_them(module, zipped, tmp_path):
    numbers = [numpy.float64(.01), numpy.float32(.5), numpy.int64(-3)]
    file = io.BytesIO()
    torch.save(numbers, file, _use_new_zipfile_serialization=zipped)
    ours = type(numbers[0]).__reduce__(numbers[0])[0].__module__
    (tmp_path / 'ckpt.pth').write_bytes(rewrite(file.getvalue(), f'c{ours}\n'.encode(), f'c{module}\n'.encode()))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = released_checkpoint.read(tmp_path / 'ckpt.pth')
    assert found == numbers and [type(n) for n in found] == [type(n) for n in numbers]


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


SCALAR = numpy.float64(1).__reduce__()[0]
FORBIDDEN = {
    'os.system': lambda mark: Runs(os.system, (f'touch {mark}',)),
    'eval': lambda mark: Runs(eval, (f'open({str(mark)!r}, "w")',)),
    'module': lambda mark: torch.nn.Linear(2, 2),
    'array': lambda mark: numpy.zeros(3),
    'complex number': lambda mark: numpy.complex128(1),
    'object number': lambda mark: Runs(SCALAR, (numpy.dtype('O'), 'x')),
    'bare complex number': lambda mark: Runs(SCALAR, (Runs(numpy.dtype, ('c16',)), bytes(16))),
    'bare object number': lambda mark: Runs(SCALAR, (Runs(numpy.dtype, ('O',)), 'x')),
    'large void': lambda mark: Runs(SCALAR, (numpy.dtype('V99999999'),)),
    'number without bytes': lambda mark: Runs(SCALAR, (numpy.dtype('f8'),)),
    'number of too few bytes': lambda mark: Runs(SCALAR, (numpy.dtype('f8'), b'x')),
    'random state': lambda mark: numpy.random.RandomState(0),
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('kind', FORBIDDEN)
def test_a_file_with_anything_else_in_it_is_refused(kind, zipped, tmp_path):
    file, mark = tmp_path / 'ckpt.pth.tar', tmp_path / 'mark'
    content = {**whole({'conv1.weight': torch.zeros(1)}), 'epoch': FORBIDDEN[kind](mark)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(lambda: released.load_released_checkpoint(file), 'ckpt.pth.tar', 'is no checkpoint')
    refused(lambda: small(pretrained=True, pretrained_cfg_overlay={'file': str(file)}), 'is no checkpoint')
    with pytest.raises(RuntimeError):
        small(checkpoint_path=str(file))
    assert not mark.exists()


def test_the_error_names_what_is_refused(tmp_path):
    torch.save({'model': Runs(os.system, ('true',))}, tmp_path / 'a.pth')
    refused(lambda: released.load_released_checkpoint(tmp_path / 'a.pth'), f'it holds {os.name}.system, and only')
    refused(
        lambda: small(pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'a.pth')}),
        f'it holds {os.name}.system, and only')


def test_what_torch_allows_elsewhere_is_as_before(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.save(whole({}), tmp_path / 'a.pth')
    try:
        for allowed in ([], [numpy.dtype], before):
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)
            released_checkpoint.read(tmp_path / 'a.pth')
            assert set(torch.serialization.get_safe_globals()) == set(allowed)
    finally:
        torch.serialization.add_safe_globals(before)
    names = {entry[1] for entry in before if isinstance(entry, tuple) and entry[1].startswith('numpy')}
    assert names == {'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'}


def tar(path):
    torch.save({}, path.with_suffix('.inner'))
    with tarfile.open(path, 'w') as archive:
        archive.add(path.with_suffix('.inner'))


def saved(**kwargs):
    file = io.BytesIO()
    torch.save(whole({'conv1.weight': torch.zeros(1000)}), file, **kwargs)
    return file.getvalue()


def bomb(path):
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr('archive/data/99', bytes(10 ** 7))


OTHER_FILES = {
    'empty': (lambda path: path.write_bytes(b''), 'it is empty'),
    'web page': (lambda path: path.write_text('<!DOCTYPE html><html>Virus scan warning</html>'), 'it is a web page'),
    'web page behind a line': (lambda path: path.write_text('\n <html>'), 'it is a web page'),
    'tar': (tar, 'it is a tar archive; unpack it'),
    'gzip': (lambda path: path.write_bytes(gzip.compress(saved())), 'it is compressed; unpack it'),
    'zip that unpacks to more': (bomb, 'it unpacks to more than its size'),
    'text': (lambda path: path.write_text('epoch 3\n'), 'torch.load cannot read it'),
    'pickle': (lambda path: path.write_bytes(pickle.dumps({'model': {}})), 'torch.load cannot read it'),
    'zip cut short': (lambda path: path.write_bytes(saved()[:900]), 'torch.load cannot read it'),
    'old format cut short': (
        lambda path: path.write_bytes(saved(_use_new_zipfile_serialization=False)[:-9]), 'torch.load cannot read it'),
    'noise': (lambda path: path.write_bytes(bytes(range(256)) * 9), 'torch.load cannot read it'),
    'TorchScript': (
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), 'torch.load cannot read it'),
    'directory': (lambda path: path.mkdir(), 'it is no file, but a directory'),
    'pipe': (os.mkfifo, 'it is no file, but a directory, a pipe'),
    'device': (lambda path: path.symlink_to('/dev/zero'), 'it is no file, but a directory, a pipe or a device'),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize('kind', OTHER_FILES)
def test_any_other_file_is_refused(kind, tmp_path):
    write, message = OTHER_FILES[kind]
    write(tmp_path / 'sthv1_8f.pth.tar')
    file = str(tmp_path / 'sthv1_8f.pth.tar')
    refused(lambda: released.load_released_checkpoint(file), 'sthv1_8f.pth.tar', message)
    refused(lambda: small(pretrained=True, pretrained_cfg_overlay={'file': file}), 'sthv1_8f.pth.tar', message)
    with pytest.raises(Exception):  # noqa: B017  (timm's own reading, and its errors)
        small(checkpoint_path=file)


def test_a_missing_file_is_a_missing_file(tmp_path):
    file = str(tmp_path / 'missing.pth.tar')
    for call in (released.load_released_checkpoint,
                 lambda file: small(pretrained=True, pretrained_cfg_overlay={'file': file}),
                 lambda file: small(checkpoint_path=file)):
        with pytest.raises(FileNotFoundError):
            call(file)


def test_something_else_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'CMR ResNet-50, -101 or -152 as released.*got layer3 of 2 blocks'):
        released.load_released_checkpoint({f'layer3.{i}.conv1.weight': torch.zeros(1) for i in range(2)})
    for nothing in ({'epoch': 3}, {'model': 3, 'epoch': 3}):
        with pytest.raises(ValueError, match=r"must hold a state dict.*got \['epoch'"):
            released.load_released_checkpoint(nothing)
    with pytest.raises(ValueError, match=r'must hold a state dict.*got \[\]'):
        released.load_released_checkpoint({'model': {}})
    with pytest.raises(ValueError, match=r'must be a path or a dict, got int'):
        released.load_released_checkpoint(3)
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match=r'got list'):
        released.load_released_checkpoint(tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='layer3 of 6 blocks'):  # no classifier, and no CME
        released.load_released_checkpoint(timm.create_model('resnet50', num_classes=0).state_dict())
    with pytest.raises(ValueError, match=r'must hold the projections of CME.*got None'):
        released.load_released_checkpoint(timm.create_model('resnet50').state_dict())


CONV, NORM = 'module.base_model.conv1.weight', 'module.base_model.layer2.1.net.bn3'
W1 = 'module.base_model.layer1.0.trans_att.conv1_reduce_k.0.weight'
TAPS = 'module.base_model.layer1.0.shift_conv.weight'
HEAD = 'module.new_fc.weight'


def put(value, shape=(64, 3, 7, 7)):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    return tensor


UNSOUND = {
    'key is an int': ({3: torch.zeros(1)}, 'keys of the checkpoint must be strings, got 3'),
    'key is bytes': ({b'bn': torch.zeros(1)}, "keys of the checkpoint must be strings, got b'bn'"),
    'float': ({CONV: 1.5}, f'{CONV!r} of the checkpoint must be a dense tensor of floating point numbers, got float'),
    'None': ({CONV: None}, f'{CONV!r} of the checkpoint must be a dense tensor of floating point numbers, got None'),
    'array': ({CONV: numpy.zeros(3)}, 'got ndarray'),
    'list': ({CONV: [1.]}, 'got list'),
    'subclass': ({CONV: torch.zeros(1).as_subclass(type('Mine', (torch.Tensor,), {}))}, 'got Mine'),
    'integers': ({CONV: torch.zeros(64, 3, 7, 7, dtype=torch.int64)}, 'got torch.int64 of shape [64, 3, 7, 7]'),
    'bools': ({CONV: torch.zeros(64, 3, 7, 7, dtype=torch.bool)}, 'got torch.bool'),
    'complex': ({CONV: torch.zeros(64, 3, 7, 7, dtype=torch.complex64)}, 'got torch.complex64'),
    'float8': ({CONV: torch.zeros(64, 3, 7, 7, dtype=torch.float8_e5m2)}, 'got torch.float8_e5m2'),
    'sparse': ({CONV: torch.zeros(64, 3, 7, 7).to_sparse()}, 'layout (cpu, torch.sparse_coo)'),
    'meta': ({CONV: torch.zeros(64, 3, 7, 7, device='meta')}, 'got a tensor without values'),
    'NaN': ({CONV: put(float('nan'))}, "'conv1.weight' of the checkpoint must be finite numbers of float32"),
    'infinite': ({CONV: put(-float('inf'))}, "'conv1.weight' of the checkpoint must be finite numbers of float32"),
    'over float32': ({CONV: put(1.).double() * 1e39}, "'conv1.weight' of the checkpoint must be finite"),
    'variance': ({f'{NORM}.running_var': put(-.5, 512)},
                 "running_var' of the checkpoint must not be negative, got -0.5"),
    'NaN variance': ({f'{NORM}.running_var': put(float('nan'), 512)}, 'must be finite'),
    'counter is a float': ({f'{NORM}.num_batches_tracked': torch.tensor(1.)}, 'must be an integer, got torch.float32'),
    'counter is an int': ({f'{NORM}.num_batches_tracked': 3}, 'must be an integer, got int'),
    'counters': ({f'{NORM}.num_batches_tracked': torch.zeros(2, dtype=torch.int64)}, 'of shape [2]'),
    'counter is negative': ({f'{NORM}.num_batches_tracked': torch.tensor(-1)}, 'must not be negative, got -1'),
    'scalar': ({CONV: torch.tensor(1.)}, 'conv1.weight is [], must be [64, 3, 7, 7]'),
    'ndim': ({W1: torch.zeros(8, 64)}, 'must hold the projections of CME'),
    'reduction': ({W1: torch.zeros(7, 64, 1, 1)}, 'must hold the projections of CME'),
    'no projection': ({W1: torch.zeros(0, 64, 1, 1)}, 'must hold the projections of CME'),
    'another reduction': ({W1: torch.zeros(16, 64, 1, 1)}, 'layer1.0.cme.w1.1.weight is [8], must be [16]'),
    'taps': ({TAPS: torch.zeros(64, 1, 5, 1)}, 'layer1.0.tim.weight is [64, 1, 5], must be [64, 1, 3]'),
    'wide taps': ({TAPS: torch.zeros(64, 1, 3, 2)}, 'layer1.0.tim.weight is [64, 1, 3, 2], must be [64, 1, 3]'),
    'head is a vector': ({HEAD: torch.zeros(2048)}, 'classifier of the checkpoint must have rows'),
    'head is a scalar': ({HEAD: torch.tensor(1.)}, 'classifier of the checkpoint must have rows'),
    'no classes': ({HEAD: torch.zeros(0, 2048)}, 'classifier of the checkpoint must have rows'),
    'head without its bias': ({HEAD: torch.zeros(9, 2048)}, 'fc.bias is [174], must be [9]'),
    'unexpected': ({'module.base_model.layer2.1.surprise': torch.zeros(1)}, "keys: ['layer2.1.surprise']. Other"),
    'both heads': ({'module.base_model.fc.weight': torch.zeros(1)}, 'names the same parameter twice'),
    'twice': ({'base_model.conv1.weight': torch.zeros(64, 3, 7, 7)}, 'names the same parameter twice'),
}


@pytest.mark.parametrize('kind', UNSOUND)
def test_an_unsound_state_dict_is_refused(kind, state_dict):
    change, message = UNSOUND[kind]
    refused(lambda: released.load_released_checkpoint({'model': {**state_dict, **change}}), message)


@pytest.mark.parametrize('drop, name', [
    ('module.base_model.layer1.0.trans_att.conv_inflate.1.bias', 'layer1.0.cme.w3.1.bias'),
    ('module.base_model.bn1.weight', 'bn1.weight'), ('module.new_fc.bias', 'fc.bias'),
    ('module.base_model.layer4.0.spatial_att.W.0.bias', 'layer4.0.sme.conv.bias')])
def test_a_missing_key_is_an_error_that_lists_it(state_dict, drop, name):
    wrong = {key: value for key, value in state_dict.items() if key != drop}
    refused(lambda: released.load_released_checkpoint(wrong), f"Missing keys: ['{name}']. Unexpected keys: []")


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('key, shape, message', [
    (HEAD, (2 * 10 ** 8, 2048), 'got shape [200000000, 2048] of 4 bytes'),
    (W1, (64, 6 * 10 ** 9, 1, 1), 'got shape [64, 6000000000, 1, 1] of 4 bytes'),
    (CONV, (64, 3, 7, 7), 'got shape [64, 3, 7, 7] of 4 bytes')])
def test_a_small_file_cannot_ask_for_much_memory(key, shape, message, zipped, tmp_path):
    # 1.6 TB in the first, of one number
    number = torch.tensor(0.)
    content = {key: number.expand(shape), **{f'layer3.{i}.conv3.weight': number for i in range(6)}}
    content.setdefault(HEAD, number)
    torch.save(content, tmp_path / 'tiny.pth', _use_new_zipfile_serialization=zipped)
    assert (tmp_path / 'tiny.pth').stat().st_size < 4000
    refused(lambda: released.load_released_checkpoint(tmp_path / 'tiny.pth'), message)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_storage_that_is_larger_than_the_file_is_refused(zipped, tmp_path):
    file = io.BytesIO()
    torch.save({'model': {'fc.weight': torch.zeros(4)}}, file, _use_new_zipfile_serialization=zipped)
    end = b't' if zipped else b'N'
    data = rewrite(file.getvalue(), b'K\x04' + end, b'\x8a\x06' + (4 * 10 ** 11).to_bytes(6, 'little') + end)
    (tmp_path / 'a.pth').write_bytes(data)
    refused(lambda: released.load_released_checkpoint(tmp_path / 'a.pth'), 'torch.load cannot read it')


# timm's ways

SMALL = {'channels': (8, 8, 8, 8), 'num_frames': 2}


def small(**kwargs):
    """A network of few channels, else as released."""
    return timm.create_model('released_cmr_resnet50', **{**SMALL, **kwargs})


@pytest.fixture(scope='module')
def theirs():
    return released_state_dict(num_classes=174, channels=SMALL['channels'])


def matches(model, theirs):
    """Keys of the model whose values are the file's."""
    renamed = released_checkpoint.rename(theirs)
    return {key for key, value in model.state_dict().items() if key in renamed and torch.equal(value, renamed[key])}


@pytest.mark.parametrize('source', ['file', 'state_dict', 'local-dir', 'safetensors'])
@pytest.mark.parametrize('wrap', [lambda sd: sd, whole, lambda sd: {'state_dict': sd}], ids=['bare', 'whole', 'dict'])
def test_pretrained_takes_their_weights(theirs, source, wrap, tmp_path):
    if source == 'state_dict':
        overlay = {'state_dict': dict(theirs)}
    elif source == 'safetensors':
        safetensors.torch.save_file(theirs, tmp_path / 'a.safetensors')
        overlay = {'file': str(tmp_path / 'a.safetensors')}
    else:
        torch.save(wrap(theirs), tmp_path / 'pytorch_model.bin')
        overlay = {'file': str(tmp_path / 'pytorch_model.bin')}
        if source == 'local-dir':
            overlay = {'source': 'local-dir', 'file': str(tmp_path)}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert matches(model, theirs) == set(model.state_dict())
    other = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert matches(other, theirs) == set(model.state_dict()) - {'fc.weight', 'fc.bias'}
    assert other.fc.weight.shape == (10, 32) and other.fc.weight.abs().max() < .006
    assert small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0).num_classes == 0
    one = small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    torch.testing.assert_close(one.conv1.weight, theirs[CONV].sum(1, keepdim=True))
    assert matches(one, theirs) == set(model.state_dict()) - {'conv1.weight'}


@pytest.mark.parametrize('num_classes', [7, 174, 5])
def test_pretrained_says_how_a_file_of_other_classes_is_loaded(num_classes, tmp_path):
    seven = released_state_dict(num_classes=7, channels=SMALL['channels'])
    torch.save(whole(seven), tmp_path / 'a.pth')
    overlay = {'file': str(tmp_path / 'a.pth')}
    message = 'the classifier in the file has 7 classes, but pretrained_cfg says num_classes=174'
    refused(lambda: small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes), message)
    overlay['num_classes'] = 7
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
    head = {'fc.weight', 'fc.bias'} if num_classes == 7 else set()
    assert matches(model, seven) & {'fc.weight', 'fc.bias'} == head
    assert matches(model, seven) | {'fc.weight', 'fc.bias'} == set(model.state_dict())
    assert small(pretrained=True, pretrained_cfg_overlay=overlay).num_classes == 7


def test_features_of_their_weights(tmp_path):
    seven = released_state_dict(num_classes=7, channels=SMALL['channels'])
    torch.save(seven, tmp_path / 'a.pth')
    extractor = small(pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'a.pth')}, features_only=True)
    assert torch.equal(extractor.conv1.weight, seven[CONV])
    assert extractor(torch.randn(1, 2, 3, 64, 64))[-1].shape == (2, 32, 2, 2)


@pytest.mark.parametrize('num_classes', [174, 10, 1000, 0])
@pytest.mark.parametrize('source', ['file', 'state_dict'])
def test_image_weights_start_everything_but_the_temporal_layers(source, num_classes, tmp_path):
    image = randomize(timm.create_model('resnet50', channels=SMALL['channels'])).state_dict()
    torch.save({f'module.{key}': value for key, value in image.items()}, tmp_path / 'a.pth')
    overlay = {'file': str(tmp_path / 'a.pth')} if source == 'file' else {'state_dict': dict(image)}
    if num_classes == 1000:
        refused(lambda: small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=1000), 'has 1000 classes')
        overlay['num_classes'] = 1000
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
    state, head = model.state_dict(), {'fc.weight', 'fc.bias'}
    arrived = {key for key in state if key in image and torch.equal(state[key], image[key])}
    assert arrived | temporal_keys(model) | head == set(state) | head
    assert (head <= arrived) == (num_classes == 1000)
    if num_classes in (174, 10):
        assert state['fc.weight'].abs().max() < .006 and not state['fc.bias'].any()
    assert torch.equal(state['layer2.0.tim.weight'], TIM(32).weight)
    assert not state['layer2.0.sme.bn.weight'].any()


@pytest.mark.parametrize('num_classes', [174, 10])
@pytest.mark.parametrize('change', [
    lambda sd: {key: value for key, value in sd.items() if 'layer2.0.net.conv1' not in key},
    lambda sd: {key: value for key, value in sd.items() if 'trans_att' not in key},
    lambda sd: {**sd, 'module.surprise': torch.zeros(1)},
    lambda sd: {f'backbone.{key}': value for key, value in sd.items()},
    lambda sd: {**sd, CONV: torch.zeros(64, 3, 5, 5)},
    lambda sd: {**sd, TAPS: torch.zeros(64, 1, 5, 1)},
    lambda sd: {**sd, CONV: put(float('nan'))},
    lambda sd: {**sd, CONV: 3},
    lambda sd: {**sd, HEAD: torch.tensor(3)},
    lambda sd: {3: torch.zeros(1), **sd},
], ids=['missing', 'no CME', 'unexpected', 'prefix', 'stem', 'taps', 'NaN', 'int', 'integer head', 'int key'])
def test_pretrained_refuses_what_does_not_fit(theirs, change, num_classes, tmp_path):
    torch.save(change(theirs), tmp_path / 'a.pth')
    for overlay in ({'file': str(tmp_path / 'a.pth')}, {'state_dict': change(theirs)}):
        with pytest.raises((ValueError, RuntimeError)):
            small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)


@pytest.mark.parametrize('change, error', [
    (lambda sd: {key: value for key, value in sd.items() if 'shift_conv' not in key}, 'Missing key'),
    (lambda sd: {**sd, 'module.surprise': torch.zeros(1)}, 'Unexpected key'),
    (lambda sd: {**sd, HEAD: torch.zeros(7, 32)}, 'size mismatch for fc.weight'),
    (lambda sd: timm.create_model('resnet50', channels=SMALL['channels']).state_dict(), 'Missing key'),
])
def test_checkpoint_path_refuses_what_does_not_fit(theirs, change, error, tmp_path):
    torch.save(whole(change(theirs)), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match=error):
        small(checkpoint_path=str(tmp_path / 'a.pth'))


def test_load_state_dict_refuses_their_names_with_unsound_values(theirs):
    refused(lambda: small().load_state_dict({**theirs, CONV: put(float('nan'))}), 'must be finite')


def test_load_state_dict_of_our_names_is_pytorchs(theirs):
    model = small()
    assert model.load_state_dict({'conv1.weight': theirs[CONV]}, strict=False).unexpected_keys == []
    assert torch.equal(model.conv1.weight, theirs[CONV])
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({'conv1.weight': theirs[CONV]})


@pytest.mark.parametrize('again', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['copy', 'pickle'])
def test_copies_take_their_names_too(theirs, again):
    model = small()
    twin = again(model)
    twin.load_state_dict(theirs)
    assert matches(twin, theirs) == set(twin.state_dict())
    assert not torch.equal(model.conv1.weight, twin.conv1.weight)
