"""The videos of the worked example: they decode, and a single frame says nothing on the class."""
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('av')
pytest.importorskip('skimage')

from cmr_layers.video.index import index_videos
from cmr_layers.video.lists import read_folders, read_list
from examples.action_recognition import motion_videos
from examples.action_recognition.motion_videos import (
    CLASSES,
    FRAMES,
    PHOTOGRAPHS,
    SIDE,
    THINGS,
    main,
    make_videos,
    path_of,
    render,
)


def test_files_decode_and_classes_are_balanced(tmp_path, capsys):
    arguments = [str(tmp_path), '--train', '1', '--val', '1']
    assert main(arguments) == 0
    for split, count in (('train', 1), ('val', 1)):
        videos = read_folders(tmp_path / split)
        assert set(videos.classes) == set(CLASSES)
        assert np.bincount([entry.label for entry in videos.entries]).tolist() == [count] * len(CLASSES)
        index = index_videos(videos.paths, progress=False)
        assert not index.broken
        assert {(info.num_frames, info.width, info.height) for info in index.values()} == {(FRAMES, SIDE, SIDE)}
        listed = read_list(tmp_path / f'{split}-things.csv')
        assert sorted(listed.paths) == sorted(videos.paths) and set(listed.classes) <= set(THINGS)
    files = {file: file.read_bytes() for file in tmp_path.rglob('*.mp4')}
    lost = min(files)
    lost.unlink()
    assert main(arguments) == 0
    assert '1 files written' in capsys.readouterr().out
    assert {file: file.read_bytes() for file in tmp_path.rglob('*.mp4')} == files


def test_opposite_classes_are_the_same_frames_in_reverse():
    names = list(CLASSES)
    for one, other in zip(names[::2], names[1::2]):
        first = [np.asarray(frame) for frame in render(one, 'star', 'train', np.random.default_rng(3))]
        second = [np.asarray(frame) for frame in render(other, 'star', 'train', np.random.default_rng(3))]
        assert all((a == b).all() for a, b in zip(first, second[::-1]))
        assert (first[0] != first[-1]).any()


def test_place_and_size_in_a_frame_have_one_distribution():
    # a frame at a random time of each of 2500 videos of a class
    random, levels = np.random.default_rng(0), np.linspace(.05, .95, 19)
    quantiles = []
    for label in CLASSES:
        frames = np.array([path_of(label, random)[random.integers(FRAMES)] for _ in range(2500)])
        assert abs(np.corrcoef(frames.T)[np.triu_indices(3, 1)]).max() < .08
        quantiles.append(np.quantile(frames, levels, axis=0))
    spread = np.ptp(quantiles, axis=0).max(0)
    assert (spread < (.05, .05, .04)).all(), spread
    # the measure sees a class whose resting coordinate has another distribution
    still = np.quantile(random.uniform(.22, .78, 2500), levels)
    assert abs(still - quantiles[0][:, 0]).max() > .05


def test_each_thing_is_drawn_and_as_often_in_each_class(tmp_path):
    frames = {thing: np.asarray(render(next(iter(CLASSES)), thing, 'val', np.random.default_rng(1))[0])
              for thing in THINGS}
    assert len({frame.tobytes() for frame in frames.values()}) == len(THINGS)
    make_videos(tmp_path, train=len(THINGS), val=0)
    listed = read_list(tmp_path / 'train-things.csv')
    assert listed.classes == tuple(sorted(THINGS))
    pairs = {(Path(entry.path).parent.name, entry.label) for entry in listed.entries}
    assert len(pairs) == len(listed.entries) == len(CLASSES) * len(THINGS)


@pytest.mark.parametrize('name', ['av', 'skimage'])
def test_a_missing_package_is_named_with_its_extra(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    motion_videos.photograph.cache_clear()
    assert main([str(tmp_path), '--train', '1', '--val', '0']) == 1
    wanted = f'motion_videos: making the videos needs {name}: pip install "cmr-layers[example]"'
    assert wanted in capsys.readouterr().err


def test_no_photograph_is_in_both_splits():
    assert not set(PHOTOGRAPHS['train']) & set(PHOTOGRAPHS['val'])


@pytest.mark.parametrize('flag', ['--train', '--val', '--seed'])
def test_negative_numbers_are_refused(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), flag, '-1'])
    assert f'{flag} must be at least 0, got -1' in capsys.readouterr().err
