"""Checkpoints of the released code: what is taken from a file, and what a file may hold."""
import gzip
import io
import os
import pickle
import tarfile
import warnings
import zipfile

import numpy
import pytest
import timm
import torch
from released_files import CONV, HEAD, NORM, TAPS, W1, put, refused, released_state_dict, saved, small, whole

from cmr_layers import released, released_checkpoint


@pytest.fixture(scope='module')
def state_dict():
    return released_state_dict()


def test_a_whole_training_checkpoint_comes_in_three_ways(tmp_path):
    # in the older of the two formats; the other one is what all other tests write
    file = str(tmp_path / 'ckpt.pth.tar')
    torch.save(whole(released_state_dict(num_classes=7)), file, _use_new_zipfile_serialization=False)
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
