"""The trainer: what learns, what is written, and what is an error."""
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch
from layouts import CLASSES
from small_run import flags, table
from torch import nn

from cmr_layers import temporal_keys, train_mode
from cmr_layers.clip import ClipLayer
from examples.action_recognition import checkpoint, train
from examples.action_recognition.checkpoint import load, load_network
from examples.action_recognition.config import Config
from examples.action_recognition.engine import check_finite
from examples.action_recognition.model import build_model, freeze
from examples.action_recognition.optim import factor, make_optimizer
from examples.action_recognition.start import start_from
from examples.action_recognition.sync_bn import sync_batch_norms
from examples.action_recognition.train import main

TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 16, 16]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert main(flags(folder, '--ema', '.5', '--tensorboard')) == 0
    return folder


def fails(capsys, *arguments):
    assert main(list(arguments)) == 1
    message = capsys.readouterr().err
    assert message.startswith('train: ')
    return message


def test_a_run_leaves_all_that_is_needed(folder):
    run = folder / 'run'
    assert {path.name for path in run.iterdir()} >= {
        'config.yaml', 'classes.txt', 'log.csv', 'validation.csv', 'last.pt', 'best.pt'}
    assert (run / 'classes.txt').read_text().splitlines() == list(CLASSES)
    assert [row['update'] for row in table(run / 'log.csv')] == [str(i) for i in range(1, 7)]
    assert {row['lr'] for row in table(run / 'log.csv')} == {'0.05', '0.005000000000000001'}
    assert [row['count'] for row in table(run / 'validation.csv')] == ['4', '4']
    assert any(path.name.startswith('events.out.tfevents') for path in run.iterdir())
    assert not list(run.glob('*.part'))


def test_a_run_loads_as_the_network_that_was_evaluated(folder):
    loaded = load_network(folder / 'run')
    content = load(folder / 'run' / 'best.pt')
    assert loaded.classes == CLASSES and loaded.config.num_frames == 4 and not loaded.model.training
    for use_ema, name in ((True, 'state_dict_ema'), (False, 'state_dict')):
        state = load_network(folder / 'run' / 'best.pt', use_ema).model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in content[name].items())
    assert loaded.model(torch.randn(1, 4, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize('more', [
    ('--amp', 'bfloat16', '--accumulate', '2', '--batch-size', '2'),
    ('--model', 'resnet10t', '--model-args', '--temporal', 'retrofit', '--freeze', 'backbone', '--grad-checkpointing',
     '--optimizer', 'adamw', '--no-decay-all', '--schedule', 'cosine', '--warmup-epochs', '1', '--no-channels-last'),
    ('--model', 'convnext_atto', '--model-args', 'depths=[1,1,1,1]', 'dims=[8,8,8,16]', '--temporal', 'insert',
     '--insert-at', 'TIM,SME@stages.*.blocks.*.conv_dw', '--label-smoothing', '.1', '--workers', '2'),
    ('--model', 'resnet10t', '--model-args', '--temporal', 'none', '--partial-bn', '--clip-grad', 'none'),
], ids=['mixed precision', 'retrofit', 'insert', 'image network'])
def test_it_trains(folder, more, tmp_path):
    assert main(flags(folder, '--epochs', '1', *more, '--output', str(tmp_path / 'run'))) == 0
    rows = table(tmp_path / 'run' / 'log.csv')
    assert [row['update'] for row in rows] == ['1', '2', '3'] and all(float(row['loss']) < 5 for row in rows)
    loaded = load_network(tmp_path / 'run')
    assert loaded.model(torch.randn(1, 4, 3, 32, 32)).shape == (1, 2)


def test_accumulated_steps_are_as_one_of_all_their_clips(folder, tmp_path):
    networks = []
    for batch, accumulate in ((4, 1), (2, 2)):
        run = tmp_path / f'{accumulate}'
        # batch norms see fewer clips: frozen ones do not
        more = ('--freeze', 'backbone', '--temporal', 'retrofit', '--model', 'resnet10t', '--model-args')
        sizes = ('--batch-size', str(batch), '--accumulate', str(accumulate), '--epochs', '1')
        assert main(flags(folder, *more, *sizes, '--output', str(run))) == 0
        networks.append(load(run / 'last.pt')['state_dict'])
    # SME's own norm learns, and sees them
    same = [key for key in networks[0] if '.sme.' not in key and 'fc' in key]
    assert same
    for key in same:
        torch.testing.assert_close(networks[0][key], networks[1][key], rtol=.05, atol=.01)


def test_a_frozen_backbone_does_not_move():
    config = Config(model='cmr_resnet18', model_args=TINY, num_frames=4, freeze='backbone', dropout=0.)
    model = build_model(config, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    freeze(model, config)
    train_mode(model)
    optimizer = make_optimizer(model, config, 64)
    for _ in range(2):
        model(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and moved <= temporal_keys(model) | {'fc.weight', 'fc.bias'}
    assert {'fc.weight', 'fc.bias'} <= moved and any('.tim.' in key for key in moved)


def test_any_backbone_is_adapted():
    tiny = {'img_size': 32, 'patch_size': 8, 'depth': 2, 'embed_dim': 24, 'num_heads': 2}
    config = Config(model='vit_tiny_patch16_224', model_args=tiny, num_frames=4, temporal='adapt', freeze='backbone',
                    temporal_args={'sme': 'none'})
    model = build_model(config, 3)
    freeze(model, config)
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, ClipLayer)]
    assert sorted(kinds) == ['CME', 'CME', 'TIM', 'TIM'] and model(torch.randn(1, 4, 3, 32, 32)).shape == (1, 3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == temporal_keys(model) | {
        'model.head.weight', 'model.head.bias'}


def test_partial_bn_leaves_the_first_norm_and_those_of_the_layers():
    config = Config(model='cmr_resnet18', model_args=TINY, num_frames=4, partial_bn=True)
    model = build_model(config, 3)
    freeze(model, config)
    train_mode(model)
    learning = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert learning[0] == 'bn1' and all('.sme.' in name for name in learning[1:]) and len(learning) > 1


@pytest.mark.parametrize(
    'update, want', [(0, 1 / 11), (9, 10 / 11), (10, 1), (30, .5), (49, pytest.approx(0, abs=.01))])
def test_cosine_after_a_warm_up(update, want):
    config = Config(epochs=5, warmup_epochs=1, schedule='cosine', optimizer='adamw')
    assert factor(config, 10, update) == pytest.approx(want)


def test_the_learning_rate_is_linear_in_the_clips_of_an_update():
    model = nn.Linear(2, 2)
    for batch, want in ((64, .01), (128, .02), (8, .00125)):
        assert make_optimizer(model, Config(), batch).param_groups[0]['lr'] == pytest.approx(want)
    assert make_optimizer(model, Config(base_batch=0), 8).param_groups[0]['lr'] == .01
    assert len(make_optimizer(model, Config(), 64).param_groups) == 1
    assert [g['weight_decay'] for g in make_optimizer(model, Config(decay_all=False), 64).param_groups] == [1e-3, 0]


def test_it_starts_from_a_run_and_from_an_image_network(folder, tmp_path):
    config = Config(model='cmr_resnet18', model_args=TINY, num_frames=4)
    best, model = folder / 'run' / 'best.pt', build_model(config, 2)
    assert start_from(model, str(best), config) == f'{best}: weights of this network'
    assert all(torch.equal(model.state_dict()[key], value) for key, value in load(best)['state_dict_ema'].items())
    model = build_model(config, 7)
    assert 'the classifier, of other classes there, starts anew' in start_from(model, str(best), config)
    assert torch.equal(model.conv1.weight, load(best)['state_dict_ema']['conv1.weight'])

    image = timm.create_model('resnet18', num_classes=5)
    file = str(tmp_path / 'image.pth')
    torch.save({'state_dict': {f'module.{key}': value for key, value in image.state_dict().items()}}, file)
    for temporal, name in (('family', 'cmr_resnet18'), ('retrofit', 'resnet18')):
        config = Config(model=name, num_frames=4, temporal=temporal)
        model = build_model(config, 2)
        said = start_from(model, file, config)
        assert 'an image network' in said and 'keep their start' in said and 'starts anew' in said
        assert torch.equal(dict(model.named_parameters(prefix='x.model'))[
            'x.model.conv1.weight' if temporal == 'family' else 'x.model.model.conv1.weight'], image.conv1.weight)


def test_an_image_network_of_a_run_starts_clips_of_any_length(tmp_path):
    def built(**options):
        config = Config(model='resnet10t', **options)
        return config, build_model(config, 2)

    config, image = built(temporal='none', num_frames=1)
    file = tmp_path / 'image.pt'
    torch.save({'state_dict': image.state_dict(), 'config': config.to_dict()}, file)
    config, model = built(temporal='retrofit', temporal_args={'start': 'paper', 'sme': 'none'}, num_frames=4)
    assert 'an image network' in start_from(model, str(file), config)
    assert torch.equal(model.state_dict()['model.conv1.0.weight'], image.state_dict()['model.conv1.0.weight'])
    assert not any('.sme.' in key for key in temporal_keys(model))
    # TIM's shift, where the identity has one tap
    assert all(p.count_nonzero(dim=-1).max() == 1 and p[0].argmax() != p[-1].argmax()
               for name, p in model.named_parameters() if '.tim.' in name)

    torch.save({'state_dict': model.state_dict(), 'config': config.to_dict()}, file)
    config, other = built(temporal='retrofit', temporal_args={'sme': 'none'}, num_frames=8)
    with pytest.raises(ValueError, match='was trained with num_frames=4, got num_frames=8'):
        start_from(other, str(file), config)


@pytest.mark.parametrize('options, message', [
    ({'temporal': 'retrofit', 'temporal_args': {'begin': 'paper'}}, r"temporal_args=\{'begin': 'paper'\} do not fit"),
    ({'temporal': 'retrofit', 'temporal_args': {'start': 'tsm'}},
     "start must be one of 'identity', 'shift', 'paper', got"),
    ({'temporal': 'insert', 'insert_at': ('SME@layer1.0',), 'temporal_args': {'reduction': 4}}, 'do not fit .*insert'),
])
def test_error_arguments_of_the_temporal_layers(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(Config(model='resnet10t', num_frames=4, **options), 2)


def test_error_start(folder, tmp_path):
    best = str(folder / 'run' / 'best.pt')
    config = Config(model='cmr_resnet18', model_args=TINY, num_frames=8)
    with pytest.raises(ValueError, match=r'was trained with num_frames=4, got num_frames=8'):
        start_from(build_model(config, 2), best, config)
    config = Config(model='cmr_resnet34', num_frames=4)
    with pytest.raises(ValueError, match=r'is of another network than model=.cmr_resnet34.: .* and .* more'):
        start_from(build_model(config, 2), best, config)
    bad = tmp_path / 'bad.pt'
    bad.write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match=r'bad.pt.* can not be read safely'):
        start_from(build_model(config, 2), str(bad), config)


def test_error_another_runs_folder(folder, capsys, tmp_path):
    assert 'holds a run of another configuration: lr=0.05 there, 0.1 here' in fails(
        capsys, *flags(folder, '--ema', '.5', '--tensorboard', '--lr', '.1'))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').write_text('precious')
    assert 'is not empty and holds no run' in fails(capsys, *flags(folder, '--output', str(tmp_path / 'mine')))
    assert 'is a file; wanted a folder' in fails(
        capsys, *flags(folder, '--output', str(tmp_path / 'mine' / 'thesis.tex')))
    assert (tmp_path / 'mine' / 'thesis.tex').read_text() == 'precious'


def test_error_other_classes_in_the_folder(folder, capsys, tmp_path):
    shutil.copytree(folder / 'run', tmp_path / 'run')
    (tmp_path / 'run' / 'classes.txt').write_text('walk\nrun\n')
    assert 'holds a run of 2 other classes' in fails(
        capsys, *flags(folder, '--ema', '.5', '--tensorboard', '--output', str(tmp_path / 'run')))


@pytest.mark.parametrize('more, message', [
    (('--train-list', 'nowhere'), 'nowhere'),
    (('--val-list', 'nowhere'), 'nowhere'),
    (('--batch-size', '64'), 'batch_size=64 times accumulate=1 on 1 processes wants 64 videos for one update, got 12'),
    (('--model', 'cmr_resnet81'), "model must be one that timm knows, got 'cmr_resnet81'; did you mean one of"),
    (('--model', 'resnet18'), "temporal must be adapt, retrofit, insert or none for model='resnet18'.* got 'family'"),
    (('--temporal', 'retrofit'), "temporal must be family for model='cmr_resnet18'.* got 'retrofit'"),
    (('--flip', 'same'), None),
    (('--epochs', '0'), 'epochs must be at least 1, got 0'),
])
def test_error_flags(folder, capsys, tmp_path, more, message):
    arguments = flags(folder, '--output', str(tmp_path / 'run'), *more)
    if message is None:  # "down" and "up" are no sides
        assert main([*arguments, '--epochs', '1']) == 0
    else:
        assert re.search(message, fails(capsys, *arguments))


def test_a_folder_is_taken_once_no_option_is_wrong(folder, capsys, tmp_path):
    arguments = flags(folder, '--output', str(tmp_path / 'run'), '--epochs', '1')
    fails(capsys, *arguments, '--batch-size', '64')
    fails(capsys, *arguments, '--checkpoint', str(tmp_path / 'nowhere.pt'))
    assert {path.name for path in (tmp_path / 'run').iterdir()} <= {'.lock'}
    (tmp_path / 'run' / 'config.yaml.part').touch()  # killed at its very first write
    assert main(arguments) == 0


def test_sync_bn_on_a_cpu_wants_plain_norms():
    with pytest.raises(ValueError, match=r'sync_bn on a CPU wants plain nn.BatchNorm2d, but bn1 is a BatchNormAct2d'):
        sync_batch_norms(timm.create_model('efficientnet_lite0'), torch.device('cpu'))


def test_error_the_file_system_is_full(tmp_path):
    file = tmp_path / 'last.pt'
    checkpoint.save(file, {'state_dict': torch.zeros(10)})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r'last.pt cannot be written: .*; the file of before is whole'):
            checkpoint.save(file, {'state_dict': torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ['last.pt']


def test_error_load(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match='wanted a run folder or a checkpoint'):
        load_network(tmp_path)
    torch.save({'model': 1}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=r'is no checkpoint of train.py: it lacks state_dict, config, classes'):
        load_network(tmp_path / 'a.pt')
    torch.save({'state_dict': Config()}, tmp_path / 'b.pt')  # would run code
    with pytest.raises(ValueError, match=r'b.pt.* is no checkpoint that can be read safely'):
        load_network(tmp_path / 'b.pt')
    content = load(folder / 'run' / 'best.pt')
    del content['state_dict_ema']['fc.bias']
    torch.save(content, tmp_path / 'c.pt')
    with pytest.raises(ValueError, match=r'c.pt is of another network: fc.bias is missing'):
        load_network(tmp_path / 'c.pt')


def test_error_a_loss_that_is_not_finite():
    check_finite(1., 1)
    for loss in (float('nan'), float('inf')):
        with pytest.raises(FloatingPointError, match=f'the loss of update 3 is {loss}: the training has diverged'):
            check_finite(loss, 3)


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_is_in_the_weights(folder, capsys, tmp_path, monkeypatch):
    clip = nn.utils.clip_grad_norm_
    calls = []

    def broken(parameters, limit):  # as a root of 0 gives it, with a loss that is finite
        calls.append(1)
        if len(calls) == 4:
            parameters[0].grad.fill_(float('nan'))
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, 'clip_grad_norm_', broken)
    arguments = flags(folder, '--save-every', '1', '--output', str(tmp_path / 'run'))
    assert 'the norm of the gradient of update 4 is nan: the training has diverged' in fails(capsys, *arguments)
    content = load(tmp_path / 'run' / 'last.pt')
    assert content['progress']['update'] == 3
    assert all(value.isfinite().all() for value in content['state_dict'].values())
    monkeypatch.undo()
    assert main(arguments) == 0


def test_a_run_that_ended_in_its_validation_validates_first(folder, capsys, tmp_path, monkeypatch):
    arguments = flags(folder, '--output', str(tmp_path / 'run'))

    def full(*args, **kwargs):
        raise OSError('no space left')

    monkeypatch.setattr(train, 'evaluate', full)
    assert 'no space left' in fails(capsys, *arguments)
    assert load(tmp_path / 'run' / 'last.pt')['progress']['update'] == 3
    monkeypatch.undo()
    assert main(arguments) == 0
    rows = table(tmp_path / 'run' / 'validation.csv')
    assert [(row['update'], row['epoch']) for row in rows] == [('3', '0'), ('6', '1')]


def test_error_other_data(folder, capsys, tmp_path):
    arguments = flags(folder, '--epochs', '1', '--output', str(tmp_path / 'run'))
    assert main(arguments) == 0
    content = load(tmp_path / 'run' / 'last.pt')
    for key, value in (('processes', 8), ('videos', 'others')):
        checkpoint.save(tmp_path / 'run' / 'last.pt', {**content, 'data': {**content['data'], key: value}})
        said = fails(capsys, *arguments)
        assert re.search(f'holds a run of other data: {key} {value!r} there, .* here; to go on', said)


def test_error_another_process_trains_in_the_folder(folder, capsys, tmp_path):
    arguments = flags(folder, '--epochs', '1', '--output', str(tmp_path / 'run'))
    (tmp_path / 'run').mkdir()
    hold = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()'
    with subprocess.Popen([sys.executable, '-c', hold, str(tmp_path / 'run' / '.lock')], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert 'is in use: another process trains in it' in fails(capsys, *arguments)
        other.communicate(b'\n')
    assert main(arguments) == 0
