"""The tasks on real videos, rendered rooms and recorded people."""
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.motion import ego, mocap, playback, task
from benchmarks.motion.run import run
from benchmarks.motion.size import SIZES
from benchmarks.motion.tasks import TASKS

# no extra installs it, since it brings much else, see docs/motion.md
needs_videos = pytest.mark.skipif(not importlib.util.find_spec('idtrackerai'), reason='needs the videos of idtrackerai')
needs_takes = pytest.mark.skipif(
    not importlib.util.find_spec('pybullet_data'), reason='pybullet has no wheels for this version of Python')


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of the test's own for what is recorded, and little of it."""
    for module in (task, mocap):
        monkeypatch.setattr(module, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(ego, 'CLIPS', {'train': 12, 'val': 6})
    monkeypatch.setattr(ego, 'MAPS', {'train': range(1, 3), 'val': range(25, 26)})
    for cached in (ego._recorded, playback._videos, *(found.test for found in TASKS.values())):
        cached.cache_clear()
    yield
    for cached in (ego._recorded, playback._videos, *(found.test for found in TASKS.values())):
        cached.cache_clear()


@pytest.mark.parametrize('name', TASKS)
def test_a_task_is_described(name):
    found = TASKS[name]
    assert found.name == name and len(found.groups) == len(found.classes) == len(set(found.classes))
    assert found.levels.frame <= found.levels.frames
    largest = max(found.groups.count(group) for group in found.groups)
    assert found.levels.frames == pytest.approx(len(set(found.groups)) / len(found.classes)) and largest > 1


@needs_takes
def test_bones_keep_their_length_and_people_stand_on_their_feet():
    for action in mocap.ACTIONS:
        times, joints = mocap.take(action)
        assert len(times) == len(joints) and (np.diff(times) > 0).all()
        for name, (parent, offset, _) in mocap._SKELETON.items():
            length = np.linalg.norm(joints[:, mocap._NAMES.index(name)] - joints[:, mocap._NAMES.index(parent)], axis=1)
            np.testing.assert_allclose(length, np.linalg.norm(offset), rtol=1e-6)
    _, walk = mocap.take('walk')
    head, foot = (walk[:, mocap._NAMES.index(name), 1] for name in ('head', 'right ankle'))
    assert (head > 1.2).all() and (foot < .5).all()


@needs_takes
def test_people_walk_forwards_unless_played_backwards():
    made, labels = mocap.clips(400, (1,), 'train', 8, 40)
    assert made.shape == (400, 8, 3, 40, 40) and made.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(len(mocap.CLASSES)))
    # backwards is such windows in the opposite order: over many clips, the frames are alike
    light = made.float().mean((1, 2, 3, 4))
    forwards, backwards = (light[labels % 2 == i].mean() for i in (0, 1))
    assert abs(forwards - backwards) < .1 * forwards
    for way in ('val', 'train'):
        assert torch.equal(*(mocap.clips(3, (2,), way, 8, 40)[0] for _ in range(2)))


@needs_takes
def test_a_missing_package_is_named_and_its_files_are_found_in_the_folder_of_data(data, monkeypatch):
    _, joints = mocap.take('walk')
    source = Path(importlib.util.find_spec('pybullet_data').origin).parent / 'data/motions/humanoid3d_walk.txt'
    mocap.take.cache_clear()
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'the task mocap needs humanoid3d_walk\.txt of pybullet: pip install '):
        mocap.take('walk')
    there = mocap.DATA / 'pybullet_data/data/motions' / source.name
    there.parent.mkdir(parents=True)
    there.write_text(source.read_text())
    assert np.array_equal(mocap.take('walk')[1], joints)
    mocap.take.cache_clear()


def test_rooms_are_recorded_once_and_played_both_ways(data):
    made, again = (ego.clips(40, (1,), 'val', 8, 40)[0] for _ in range(2))
    assert torch.equal(made, again) and made.shape == (40, 8, 3, 40, 40)
    assert (task.DATA / 'ego-val-40.npz').exists()
    clips, movements = ego._recorded('val', 40)
    assert len(clips) == 6 and set(movements.tolist()) <= {0, 1, 2, 3}
    change = (clips[:, 1:].float() - clips[:, :-1].float()).abs().mean((1, 2, 3, 4))
    assert (change > .2).all()  # the camera moves in each of them
    with pytest.raises(ValueError, match='num_frames must divide 16, got 5'):
        ego.clips(1, (1,), 'val', 5, 40)


def test_labels_are_what_the_camera_does():
    """Moving or turning right moves the picture to the left, looking up moves it down."""
    clips, movements = ego.record('val', 48, 40)
    for movement, axis, sign in ((1, 3, -1), (2, 3, -1), (3, 2, 1)):
        shifts = []
        for clip in torch.from_numpy(clips[movements == movement]).float().mean(2):
            now, later = clip[6], clip[7]
            error = {}
            for shift in range(-6, 7):
                moved = torch.roll(now, shift, axis - 2)
                inner = (slice(8, -8), slice(8, -8))
                error[shift] = (moved[inner] - later[inner]).abs().mean().item()
            shifts.append(min(error, key=error.__getitem__))
        assert len(shifts) >= 3 and sign * np.median(shifts) > 0


def test_no_camera_of_the_test_sees_what_one_of_the_training_does_or_its_mirror_image():
    random = np.random.default_rng(0)
    seen = {split: np.array([mocap.turned(random, split) for _ in range(500)]) for split in ('train', 'val')}
    for mirrored in (seen['val'], seen['val'] + np.pi, -seen['val'], np.pi - seen['val']):
        apart = np.abs(np.angle(np.exp(1j * (mirrored[:, None] - seen['train']))))
        assert .0 < apart.min() < .1 and np.cos(2 * mirrored).max() < 0 < np.cos(2 * seen['train']).min()


@pytest.fixture
def one_video(data, monkeypatch):
    """The one file that an extra installs, for both splits."""
    monkeypatch.setattr(playback, 'FILES', dict.fromkeys(('train', 'val'), playback.FILES['train'][:1]))


@pytest.fixture
def choose(monkeypatch):
    """Draw as always, but the n-th array of integers is all of one value."""
    usual = np.random.default_rng

    def fix(number, value):
        class Fixed(np.random.Generator):
            drawn = 0

            def integers(self, low, high=None, size=None, **options):
                found = super().integers(low, high, size, **options)
                if size is not None:
                    Fixed.drawn += 1
                    if Fixed.drawn == number:
                        return np.full(size, value)
                return found
        monkeypatch.setattr(np.random, 'default_rng', lambda seed: Fixed(usual(seed).bit_generator))
    return fix


@pytest.mark.parametrize('module, number, forwards, backwards', [
    pytest.param(mocap, 1, 6, 7, marks=needs_takes), (ego, 2, 0, 1), (playback, 1, 0, 1)])
def test_the_classes_of_a_group_are_the_same_frames_in_the_opposite_order(
        one_video, choose, module, number, forwards, backwards):
    module.clips(1, (0,), 'train', 8, 40)  # records or decodes, if need be
    found = []
    for value in (forwards, backwards):
        choose(number, value)
        found.append(module.clips(5, (3,), 'train', 8, 40))
    (one, label), (other, opposite) = found
    assert torch.equal(one, other.flip(1)) and not torch.equal(one, other)
    assert (opposite - label).unique().tolist() == [1]
    name = module.__name__.rpartition('.')[2]
    groups = TASKS[name].groups
    assert all(groups[a] == groups[b] for a, b in zip(label.tolist(), opposite.tolist()))


def test_playback_is_made_of_frames_of_the_file(one_video, choose):
    made = {}
    for label in range(5):
        choose(1, label)
        made[label], labels = playback.clips(12, (1,), 'train', 8, 40)
        assert (labels == label).all()
    (video,) = playback._videos('train', 40)
    assert video.shape[0] > 200 and min(video.shape[2:]) == playback.SHORT
    still = {label: (clips[:, 1:] == clips[:, :-1]).flatten(1).all(1) for label, clips in made.items()}
    assert still[3].all() and not any(still[label].any() for label in (0, 1, 2, 4))
    for clip, double in zip(made[0], made[4]):  # every second frame, and as many after its end
        assert torch.equal(double[:4], clip[::2]) and torch.equal(double[0], clip[0])
    # the first window is the same for all, before anything is shuffled
    assert sorted(frame.float().sum().item() for frame in made[2][0]) == sorted(
        frame.float().sum().item() for frame in made[0][0])
    assert not torch.equal(made[2][0], made[0][0])


@pytest.mark.parametrize('frames', ['flicker', 'cuts', 'short'])
def test_light_that_flickers_cuts_and_too_few_frames_are_no_motion(monkeypatch, one_video, frames):
    """Pictures of noise: all the same but brighter or darker; each another; fewer than a clip at double speed has."""
    random = np.random.default_rng(0)
    still = random.integers(40, 200, (1, 3, 50, 60))
    made = {'flicker': still + random.integers(-40, 40, (99, 1, 1, 1)),
            'cuts': random.integers(0, 256, (99, 3, 50, 60)), 'short': still.repeat(20, 0)}[frames]
    monkeypatch.setattr(playback, '_videos', cache(lambda split, side: (made.astype(np.uint8),)))
    monkeypatch.setattr(playback, 'TRIES', 50)
    with pytest.raises(ValueError, match=r'bikes\.mp4 must have windows of 31 frames and 40 pixels that change by 5'):
        playback.clips(1, (2,), 'train', 8, 40)


def test_playback_is_of_windows_in_which_something_moves(one_video):
    made, labels = playback.clips(40, (2,), 'train', 8, 40)
    changes = made[labels == 0].float().diff(dim=1)
    assert (changes.std((-2, -1), correction=0).mean((1, 2)) >= playback.CHANGE).all()
    with pytest.raises(ValueError, match='num_frames must divide 8 or twice that, got 5'):
        playback.clips(1, (2,), 'train', 5, 40)


@needs_videos
def test_no_scene_is_in_both_splits():
    small = {split: np.concatenate([playback.decode(file.package, file.file, 16)[::10, :, :, :16] for file in files])
             for split, files in playback.FILES.items()}
    train, val = (torch.from_numpy(small[split]).float().flatten(1) for split in ('train', 'val'))
    assert torch.cdist(val, train).min() / train.shape[1] ** .5 > 8  # of 255


def test_a_video_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r'the task playback needs a\.mp4 of no_such_package'):
        playback.decode('no_such_package', 'a.mp4', 80)


@pytest.mark.parametrize('name', [
    'ego', pytest.param('mocap', marks=needs_takes), pytest.param('playback', marks=needs_videos)])
def test_a_row_runs_on_a_task(data, tmp_path, name):
    found = run(tmp_path, 'all', 0, SIZES['smoke'], TASKS[name])
    assert found['task'] == name and sum(map(sum, found['confusion'])) == SIZES['smoke'].test
    assert 'sweeps' not in found
