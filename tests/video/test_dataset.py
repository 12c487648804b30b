"""Labelled videos as a dataset."""
import logging
import pickle

import pytest
import torch
from layouts import CLASSES, LAYOUTS, read_layout
from torch.utils.data import DataLoader
from videos import write_video

from cmr_layers.video import read_clip
from cmr_layers.video.augment import EvalTransform, TrainTransform, flip_table
from cmr_layers.video.dataset import VideoDataset
from cmr_layers.video.index import index_videos
from cmr_layers.video.lists import Entry, VideoList
from cmr_layers.video.sampler import EpochSampler

TRAIN, EVAL = TrainTransform(size=32, short_side=40), EvalTransform(size=32, short_side=40, crops=3)
EVAL1 = EvalTransform(size=32, short_side=40)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    return read_layout('folders', tmp_path_factory.mktemp('folders'))


@pytest.fixture(scope='module')
def index(videos):
    return index_videos(videos.paths, num_workers=0, progress=False)


def training(videos, index, **kwargs):
    return VideoDataset(videos, index, TRAIN, num_frames=4, train=True, **kwargs)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_clips_of_its_labels(layout, tmp_path):
    videos = read_layout(layout, tmp_path, per_class=1)
    assert videos.classes == CLASSES and sorted(entry.label for entry in videos.entries) == [0, 1]
    index = index_videos(videos.paths, num_workers=0, progress=False)
    dataset = VideoDataset(videos, index, EVAL, num_frames=4, num_clips=2, train=False)
    for i, entry in enumerate(videos.entries):
        sample = dataset[0, i]
        assert sample.clips.shape == (6, 4, 3, 32, 32) and sample.clips.dtype == torch.uint8
        assert (sample.label, sample.index, sample.failures) == (entry.label, i, 0)
        assert sample.clips.float().std() > 20  # the bar is in it
        drawn = training(videos, index)[0, i]
        assert drawn.clips.shape == (4, 3, 32, 32) and (drawn.label, drawn.index) == (entry.label, i)


def test_one_clip_of_evaluation_is_that_of_read_clip(videos, index):
    dataset = VideoDataset(videos, index, EVAL1, num_frames=5, train=False)
    for i, entry in enumerate(videos.entries):
        assert torch.equal(dataset[i].clips, EVAL1(read_clip(entry.path, 5).frames))


def test_views_are_the_crops_of_one_clip_after_the_other(videos, index):
    dataset = VideoDataset(videos, index, EVAL, num_frames=4, num_clips=2, train=False)
    frames = read_clip(videos.entries[3].path, 8).frames
    assert torch.equal(dataset[3].clips, torch.cat([EVAL(frames[::2]), EVAL(frames[1::2])]))


def test_a_window_holds_no_other_frames(tmp_path):
    path = str(write_video(tmp_path / 'a.mp4', range(0, 240, 8)))  # 30 frames, 10 a second
    videos = VideoList((Entry(path, 0, .5, 1.), Entry(path, 1, 2.)), ('a', 'b'))
    index = index_videos(videos.paths, num_workers=0, progress=False)
    for i, (low, high) in enumerate([(5, 10), (20, 30)]):
        for dataset in (training(videos, index), training(videos, index, span=4)):
            levels = {float(frame.float().mean().div(8).round()) for epoch in range(20)
                      for frame in dataset[epoch, i].clips}
            assert levels <= set(range(low, high)) and len(levels) > 3
        clip = VideoDataset(videos, index, EVAL1, num_frames=2, train=False)[i].clips[0]
        assert torch.equal(clip, EVAL1(read_clip(path, 2, *videos.entries[i][2:]).frames)[0])


def test_an_item_follows_from_seed_epoch_and_index_alone(videos, index):
    dataset = training(videos, index, seed=3)
    want = {at: dataset[at] for at in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    torch.manual_seed(5)
    again = training(videos, pickle.loads(pickle.dumps(index)), seed=3)
    for at in reversed(want):  # another order
        assert torch.equal(pickle.loads(pickle.dumps(again))[at].clips, want[at].clips)
    assert torch.equal(dataset[0].clips, want[0, 0].clips)  # an index alone is of epoch 0
    assert not torch.equal(want[0, 0].clips, want[1, 0].clips)
    assert not torch.equal(training(videos, index, seed=4)[0, 0].clips, want[0, 0].clips)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_read_what_the_process_itself_reads(method, videos, index):
    dataset, sampler = training(videos, index), EpochSampler(8, train=True)
    loader = DataLoader(
        dataset, 3, sampler=sampler, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    for epoch in (0, 1):  # the workers of the second epoch are those of the first
        sampler.set_epoch(epoch)
        want = [dataset[at] for at in sampler]
        batches = list(loader)
        assert [len(batch.label) for batch in batches] == [3, 3, 2]
        assert torch.equal(torch.cat([batch.clips for batch in batches]), torch.stack([s.clips for s in want]))
        assert torch.cat([batch.index for batch in batches]).tolist() == [s.index for s in want]


def test_a_flip_takes_its_label(videos, index):
    table = flip_table(CLASSES, [CLASSES])
    dataset = VideoDataset(videos, index, TrainTransform(32, 40, flip=table), num_frames=4, train=True)
    found = {(videos.entries[s.index].label, s.label) for s in (dataset[e, i] for e in range(8) for i in range(8))}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


def broken(videos, tmp_path):
    """The list with a file that is no video, one that is missing, and a window without a frame."""
    bad = tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video')
    more = (Entry(str(bad), 0), Entry(str(tmp_path / 'missing.mp4'), 1), Entry(videos.entries[0].path, 0, 50.))
    videos = VideoList(more[:1] + videos.entries + more[1:], videos.classes)
    with pytest.warns(UserWarning, match='cannot be read'):
        return videos, index_videos(videos.paths, num_workers=0, progress=False)


def test_videos_known_to_be_unreadable_are_left_out_of_training_and_said(videos, tmp_path):
    videos, index = broken(videos, tmp_path)
    dataset = training(videos, index)
    assert list(dataset.unreadable) == [0, 9, 10] and len(dataset) == 8
    assert 'bad.mp4' in dataset.unreadable[0] and 'missing.mp4' in dataset.unreadable[9]
    assert 'no frame lies in the window' in dataset.unreadable[10]
    assert [dataset[i].index for i in range(8)] == list(range(1, 9)) and not any(dataset[i].failures for i in range(8))


def test_they_stay_in_evaluation_as_black_failures(videos, tmp_path):
    videos, index = broken(videos, tmp_path)
    dataset = VideoDataset(videos, index, EVAL, num_frames=4, num_clips=2, train=False)
    assert len(dataset) == 11
    samples = [dataset[i] for i in range(11)]
    assert [s.failures for s in samples] == [1] + 8 * [0] + [1, 1]
    assert [s.index for s in samples] == list(range(11))
    for s in samples:
        assert s.clips.shape == (6, 4, 3, 32, 32) and bool(s.clips.any()) == (not s.failures)


def test_a_video_that_fails_later_is_logged_and_another_is_drawn(videos, tmp_path, caplog):
    paths = [tmp_path / f'{i}.mp4' for i in range(3)]
    for i, path in enumerate(paths):
        write_video(path, [60 * i] * 6)
    videos = VideoList(tuple(Entry(str(path), i) for i, path in enumerate(paths)), ('a', 'b', 'c'))
    index = index_videos(videos.paths, num_workers=0, progress=False)
    paths[1].write_bytes(b'gone bad')
    dataset = training(videos, index)
    with caplog.at_level(logging.WARNING):
        drawn = [dataset[epoch, 1] for epoch in range(30)]
    assert {s.index for s in drawn} == {0, 2} and all(s.index == s.label for s in drawn)
    assert all(s.failures >= 1 for s in drawn) and max(s.failures for s in drawn) > 1
    assert len(caplog.records) == 1 and str(paths[1]) in caplog.text  # once a file
    assert dataset[0, 0].failures == 0
    evaluated = VideoDataset(videos, index, EVAL1, num_frames=4, train=False)[1]
    assert evaluated.failures == 1 and not evaluated.clips.any() and evaluated.label == 1

    for path in paths:
        path.unlink()
    with pytest.raises(RuntimeError, match=r'10 videos, drawn one after the other, do not decode: .*mp4'):
        dataset[0, 0]


def test_error_nothing_is_readable(tmp_path):
    videos = VideoList((Entry(str(tmp_path / 'a.mp4'), 0),), ('a',))
    with pytest.warns(UserWarning):
        index = index_videos(videos.paths, num_workers=0, progress=False)
    with pytest.raises(ValueError, match=r'1 videos and none is readable, such as: .*a.mp4'):
        training(videos, index)
    assert VideoDataset(videos, index, EVAL1, train=False)[0].failures == 1


@pytest.mark.parametrize('kwargs, message', [
    ({'num_frames': 0}, 'num_frames'), ({'num_clips': 2}, r'num_clips must be 1 in training, .* got 2'),
    ({'span': 3}, 'span must be at least num_frames=4, got 3'), ({'seed': -1}, 'seed must be an int >= 0, got -1'),
])
def test_error_arguments(kwargs, message, videos, index):
    with pytest.raises(ValueError, match=message):
        VideoDataset(videos, index, TRAIN, **{'num_frames': 4, 'train': True, **kwargs})


def test_error_index(videos, index, tmp_path):
    other = index_videos(videos.paths[:3], num_workers=0, progress=False)
    with pytest.raises(ValueError, match='index lacks 5 of the videos, such as'):
        training(videos, other)
    for i in (8, -1):
        with pytest.raises(IndexError, match=rf'index must be in \[0, 8\), got {i}'):
            training(videos, index)[i]


def test_clips_of_too_many_pixels_together_are_read_one_by_one(videos, index, monkeypatch):
    dataset = VideoDataset(videos, index, EVAL, num_frames=4, num_clips=3, train=False)
    want, reads, read = dataset[1].clips, [], dataset._frames
    monkeypatch.setattr('cmr_layers.video.dataset.MAX_CLIP_PIXELS', 64 * 48 * 4 * 3 - 1)
    monkeypatch.setattr(dataset, '_frames', lambda path, indices, info: (
        reads.append(len(indices)), read(path, indices, info))[1])
    assert torch.equal(dataset[1].clips, want) and reads == [4, 4, 4]
