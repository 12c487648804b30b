"""The command that exports a run: files and folders, what it prints, and what it refuses."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from helpers import randomize
from videos import write_video

from cmr_layers import SME, ClipModel, insert, load_model, retrofit
from cmr_layers.video.augment import normalize
from cmr_layers.video.lists import read_list
from examples.action_recognition import write_graph
from examples.action_recognition.checkpoint import load_network, save
from examples.action_recognition.config import Config
from examples.action_recognition.export import main
from examples.action_recognition.graphs import Spec
from examples.action_recognition.labelled_clips import labelled_clips, readable, spread
from examples.action_recognition.metrics import mean_std
from examples.action_recognition.model import build_model
from examples.action_recognition.model_card import FILES, write_folder

ROOT = Path(__file__).parents[2]
T = 4
CLASSES = ('moves left', 'moves right', 'stays')
pytestmark = pytest.mark.filterwarnings('ignore')  # of the exporters, about themselves


def bars(image, i, seed):
    """Bars that move, in the colours of the seed."""
    at = (np.arange(image.shape[1]) + (5 + seed) * i) // 8 % 4
    image[:] = np.random.default_rng(seed).integers(0, 256, (4, 3), np.uint8)[at]


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """A list of nine videos, one of which is broken, and one of nothing but broken ones."""
    folder = tmp_path_factory.mktemp('videos')
    for i in range(8):
        write_video(folder / f'{i}.mp4', [0] * 12, paint=lambda image, at, seed=i: bars(image, at, seed))
    (folder / 'broken.mp4').write_bytes(b'no video')
    write_list(folder / 'all.csv', [*range(8), 'broken'], [0] * 9)
    write_list(folder / 'unreadable.csv', ['broken'], [0])
    return folder


def write_list(file, names, labels):
    file.write_text(''.join(f'{name}.mp4, {CLASSES[label]}\n' for name, label in zip(names, labels)))


def make_run(folder, videos, seed=0, **options):
    """A run as the trainer leaves it, of a small network."""
    torch.manual_seed(seed)
    config = Config(**{
        'model': 'cmr_resnet18', 'num_frames': T, 'size': 32, 'short_side': 36, 'val_list': str(videos / 'all.csv'),
        'model_args': {'layers': (1, 1, 1, 1), 'channels': (64, 8, 8, 8), 'cme': 'none', 'sme': 'none'}, **options})
    state = randomize(build_model(config, 3), everything=True).state_dict()
    folder.mkdir()
    save(folder / 'best.pt', {'state_dict': state, 'classes': list(CLASSES), 'config': config.to_dict()})
    return folder


@pytest.fixture(scope='module')
def run(videos, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('runs') / 'mine', videos)


def predictions(run, videos):
    """The network's logits for the videos that can be read."""
    loaded = load_network(run)
    clips = torch.cat(list(readable(labelled_clips(read_list(videos / 'all.csv', classes=CLASSES), loaded.config))))
    with torch.no_grad():
        return clips, loaded.model(normalize(clips, *mean_std(loaded.model)))


# Graphs

def test_int8_prints_what_it_costs(run, videos, tmp_path, capsys):
    clips, logits = predictions(run, videos)
    assert clips.shape == (8, T, 3, 32, 32)
    best = logits.argmax(1)
    # the network is right about all but the last two of nine, one of which can't be read
    labels = [*best[:7].tolist(), (int(best[7]) + 1) % 3, 0]
    write_list(videos / 'evaluation.csv', [*range(8), 'broken'], labels)
    out = tmp_path / 'new' / 'mine.onnx'
    assert main([str(run), '--format', 'onnx', '--out', str(out), '--int8', '--list', str(videos / 'all.csv'),
                 '--clips', '6', '--evaluation-list', str(videos / 'evaluation.csv')]) == 0
    session = onnxruntime.InferenceSession(out)
    eight = torch.from_numpy(session.run(['logits'], {'clips': clips.numpy()})[0])
    after = sum(int(a) == b for a, b in zip(eight.argmax(1), labels))
    agree = int((eight.argmax(1) == best).sum())
    assert not torch.equal(eight, logits)
    text = capsys.readouterr().out
    assert (f'evaluation.csv: top-1 77.78% before, {after / 9:.2%} after ({(after - 7) / 9:+.2%}), of 9 videos, '
            f'1 of them unreadable; the same class for {agree} of the 8 others') in text
    assert re.search(r'for the largest logit: \S+ \(batch of 1\), \S+ \(batch of 3\); allowed are 0.5\n', text)
    assert os.listdir(out.parent) == ['mine.onnx']
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(out).metadata_props
            if entry.key in ('classes', 'precision', 'short_side')}
    assert said == {'classes': list(CLASSES), 'precision': 'int8', 'short_side': 36}


def test_the_command_writes_a_file_that_is_the_network(run, videos, tmp_path):
    clips, logits = predictions(run, videos)
    out = tmp_path / 'mine.pt2'
    done = subprocess.run(
        [sys.executable, '-m', 'examples.action_recognition.export', run / 'best.pt', '--format', 'pt2', '--out', out,
         '--frames', str(T)],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert f'{out}: pt2, fp32, ' in done.stdout and 'allowed are 0.0001' in done.stdout
    for batch in (1, 8):
        got = torch.export.load(out).module()(clips[:batch])
        torch.testing.assert_close(got, logits[:batch], rtol=1e-5, atol=1e-5 * logits.abs().max().item())


# Folders

def test_a_folder_loads_bit_for_bit_and_has_a_card(run, videos, tmp_path, capsys):
    assert main([str(run), '--format', 'folder', '--out', str(tmp_path / 'net')]) == 0
    assert f'{tmp_path}/net: folder, fp32, ' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / 'net')) == sorted(FILES)
    loaded, model = load_network(run).model, load_model(tmp_path / 'net')
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    x = torch.randn(2, T, 3, 32, 32)
    assert torch.equal(model(x), loaded(x))
    assert (tmp_path / 'net' / 'classes.txt').read_text() == 'moves left\nmoves right\nstays\n'
    assert json.loads((tmp_path / 'net' / 'preprocessor_config.json').read_text())['crop_size']['height'] == 32
    head, body = card(tmp_path / 'net')
    assert head['library_name'] == 'cmr-layers' and head['pipeline_tag'] == 'video-classification'
    assert 'license' not in head and 'model-index' not in head
    for text in ('# net\n', 'tells 3 actions', '0. moves left\n1. moves right\n2. stays\n', 'short side to 36, centre',
                 'None was found', 'License'):
        assert text in body
    # its lines of Python do what they say
    code = re.search(r'```python\n(.*?)```', body, re.DOTALL).group(1)
    code, names = code.replace("'video.mp4'", repr(str(videos / '0.mp4'))), {}
    cwd = os.getcwd()
    os.chdir(tmp_path / 'net')
    try:
        exec(code, names)
    finally:
        os.chdir(cwd)
    assert names['logits'].shape == (1, 3)


def retrofitted():
    resnet = timm.create_model('resnet18', layers=(1, 1, 1, 1), channels=(64, 8, 8, 8), num_classes=3)
    retrofit(resnet, num_frames=T)
    return ClipModel(resnet, T)


def inserted():
    network = timm.create_model('mobilenetv3_small_050', num_classes=3)
    insert(network, SME, at='blocks.1', num_frames=T)
    return ClipModel(network, T)


@pytest.mark.parametrize('make', [retrofitted, inserted], ids=lambda make: make.__name__)
def test_a_clip_model_has_a_folder_too(make, tmp_path):
    model = randomize(make(), everything=True).eval()
    write_folder(model, Spec(CLASSES, T, 36, 32, (.5, .5, .5), (.2, .2, .2)), tmp_path, 'mine')
    x = torch.randn(1, T, 3, 32, 32)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    assert 'network (ClipModel) takes clips of 4 frames' in card(tmp_path)[1]


def test_error_a_network_that_is_not_loaded_again(tmp_path):
    """Its classifier was replaced: what is built again has another."""
    model = retrofitted()
    model.model.fc = torch.nn.Sequential(torch.nn.Dropout(), model.model.fc)
    with pytest.raises(ValueError, match='fc'):
        write_folder(model.eval(), Spec(CLASSES, T, 36, 32, (.5, .5, .5), (.2, .2, .2)), tmp_path, 'mine')


def card(folder):
    _, head, body = (folder / 'README.md').read_text().split('---\n', 2)
    return yaml.safe_load(head), body


def test_a_file_of_the_folder_loads_in_timm(run, tmp_path):
    main([str(run), '--format', 'folder', '--out', str(tmp_path / 'net')])
    loaded = load_network(run)
    model = timm.create_model(
        'cmr_resnet18', num_classes=3, num_frames=T, checkpoint_path=str(tmp_path / 'net' / 'model.safetensors'),
        layers=(1, 1, 1, 1), channels=(64, 8, 8, 8), cme='none', sme='none').eval()
    x = torch.randn(1, T, 3, 32, 32)
    assert torch.equal(model(x), loaded.model(x))


def test_the_card_has_the_evaluations_of_this_checkpoint(videos, tmp_path):
    run = make_run(tmp_path / 'mine', videos)
    found = {
        'checkpoint': str(run / 'best.pt'), 'ema': True, 'list': '/lists/val.csv', 'clips': 10, 'crops': 3, 'videos': 9,
        'unreadable': 1, 'top1': 7 / 9, 'top5': None}
    for name, change in {'val-10x3': {}, 'old': {}, 'other': {'checkpoint': str(run / 'last.pt')},
                         'weights': {'ema': False}}.items():
        folder = run / f'evaluation-{name}'
        folder.mkdir()
        (folder / 'results.json').write_text(json.dumps({**found, **change}))
    os.utime(run / 'evaluation-old' / 'results.json', (1, 1))  # of a checkpoint that was there before
    assert main([str(run), '--format', 'folder', '--out', str(tmp_path / 'net')]) == 0
    head, body = card(tmp_path / 'net')
    assert body.count('| val | 9, 1 of them unreadable | 10 clips x 3 crops | 77.78% |  |') == 1
    result, = head['model-index']
    assert result['name'] == 'net' and result['results'][0]['dataset']['name'] == 'val'
    metric, = result['results'][0]['metrics']
    assert (metric['type'], metric['value']) == ('accuracy', .7778)


# Bad input

def error(run, out, *args, format='onnx'):
    return [str(run), '--format', format, '--out', str(out), *map(str, args)]


@pytest.mark.parametrize('out, args, message', [
    ('a.onnx', ['--format', 'tflite'], "invalid choice: 'tflite'"),
    ('a.pt2', [], r"--out must end in .onnx for --format onnx, got '.*a.pt2'"),
    ('a.onnx', ['--int8'], '--int8 and --list, the calibration videos, need each other'),
    ('a.onnx', ['--list', 'a.csv'], '--int8 and --list, the calibration videos, need each other'),
    ('a.onnx', ['--int8', '--fp16', '--list', 'a.csv'], 'not allowed with argument'),
    ('a.pt2', ['--format', 'pt2', '--int8', '--list', 'a.csv'], '--int8 needs --format onnx or openvino, got pt2'),
    ('a', ['--format', 'folder', '--fp16'], '--fp16: a folder holds the network as it was trained'),
    ('a.onnx', ['--int8', '--list', 'a.csv', '--clips', '0'], '--clips must be at least 1, got 0'),
])
def test_error_arguments(out, args, message, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(error(run, tmp_path / out, *args))
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('args, message', [
    (['--frames', 8], r'--frames 8: .*mine.* was trained with clips of 4 frames, and the file takes those'),
    (['--int8', '--list', 'no.csv'], r'no\.csv'),
    (['--int8', '--list', '{videos}/all.csv', '--evaluation-list', 'no.csv'], r'no\.csv'),
    (['--evaluation-list', 'no.csv'], r'no\.csv'),
    (['--int8', '--list', '{videos}/unreadable.csv'], 'must have a video that can be read, got none'),
])
def test_error_what_does_not_fit(args, message, run, videos, tmp_path, capsys):
    args = [str(arg).format(videos=videos) for arg in args]
    assert main(error(run, tmp_path / 'a.onnx', *args)) == 1
    assert re.search('(?m)^export: .*' + message, capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_error_no_validation_list(videos, tmp_path, capsys):
    run = make_run(tmp_path / 'mine', videos, val_list=None)
    assert main(error(run, tmp_path / 'a.onnx', '--int8', '--list', videos / 'all.csv')) == 1
    assert re.search('^export: --evaluation-list: .*best.pt has no validation list', capsys.readouterr().err)


def test_error_no_checkpoint(tmp_path, capsys):
    assert main(error(tmp_path / 'nothing', tmp_path / 'a.onnx')) == 1
    assert re.search('(?m)^export: .*nothing', capsys.readouterr().err)


@pytest.mark.parametrize('name', FILES)
def test_error_a_file_is_there(name, run, tmp_path, capsys):
    (tmp_path / name).write_text('mine')
    assert main(error(run, tmp_path, format='folder')) == 1
    assert f"{name}' exists; --force replaces it" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == 'mine'


def test_force_replaces_a_folder(run, tmp_path):
    (tmp_path / 'config.json').write_text('mine')
    (tmp_path / 'other').write_text('mine')
    assert main(error(run, tmp_path, '--force', format='folder')) == 0
    load_model(tmp_path)
    assert (tmp_path / 'other').read_text() == 'mine'


def test_error_a_mismatch_writes_nothing(run, tmp_path, capsys, monkeypatch):
    (tmp_path / 'a.pt2').write_text('old')
    monkeypatch.setitem(write_graph.TOLERANCE, 'fp32', 0.)
    assert main(error(run, tmp_path / 'a.pt2', '--force', format='pt2')) == 1
    message = '(?m)^export: the pt2 file in fp32 must compute what the network does, to 0 of'
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir(tmp_path) == ['a.pt2'] and (tmp_path / 'a.pt2').read_text() == 'old'


def test_some_of_a_list_are_spread_over_it(videos):
    every = read_list(videos / 'all.csv', classes=CLASSES)
    assert spread(every, 99) is every
    assert [Path(entry.path).stem for entry in spread(every, 3).entries] == ['0', '3', '6']
