"""Videos in WebDataset shards."""
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from layouts import CLASSES, LAYOUTS, read_layout, write_layout
from small_run import flags
from torch.utils.data import DataLoader
from videos import write_video

from cmr_layers.video.augment import EvalTransform, TrainTransform
from cmr_layers.video.dataset import VideoDataset
from cmr_layers.video.entries import Entry, VideoList
from cmr_layers.video.index import Index, index_videos
from cmr_layers.video.sampler import EpochSampler
from cmr_layers.video.shard_dataset import ShardDataset, read_shards
from cmr_layers.video.shards import main, write_shards
from examples.action_recognition.studies.killing import losses
from examples.action_recognition.train import Run
from examples.action_recognition.train import main as train

TRAIN, EVAL = TrainTransform(size=32, short_side=40), EvalTransform(size=32, short_side=40, crops=3)


def look(videos):
    return index_videos(videos.paths, num_workers=0, progress=False)


def written(videos, folder, shard_bytes=4000):
    """The index of videos, and the folder of their shards."""
    index = look(videos)
    assert write_shards(videos, index, folder, shard_bytes, progress=False) == {}
    return index, folder


def of_training(folder, **kwargs):
    return ShardDataset(read_shards(folder), TRAIN, num_frames=4, train=True, **kwargs)


def of_evaluation(folder, **kwargs):
    return ShardDataset(read_shards(folder), EVAL, num_frames=4, train=False, **kwargs)


def same(a, b):
    return torch.equal(a.clips, b.clips) and a[1:] == b[1:]


def assert_as_files(videos, index, folder):
    for transform, training, more in ((TRAIN, True, {'span': 6}), (EVAL, False, {'num_clips': 2})):
        files = VideoDataset(videos, index, transform, num_frames=4, train=training, **more)
        shards = ShardDataset(read_shards(folder), transform, num_frames=4, train=training, **more)
        assert len(shards) == len(files) == len(videos)
        assert all(same(files[1, i], shards[1, i]) for i in range(len(videos)))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_shards_give_the_samples_of_the_files(layout, tmp_path):
    videos = read_layout(layout, tmp_path, per_class=1)
    index, folder = written(videos, tmp_path / 'shards')
    read = read_shards(folder)
    assert read.classes == videos.classes
    assert [entry[1:] for entry in read.entries] == [entry[1:] for entry in videos.entries]
    assert_as_files(videos, index, folder)


def test_windows_of_a_video_share_its_bytes(tmp_path):
    path = str(write_video(tmp_path / 'a.mp4', range(0, 240, 8)))
    videos = VideoList((Entry(path, 0, 0, 1), Entry(path, 1, 1, 2.5), Entry(path, 0, 2.5)), ('a', 'b'))
    index, folder = written(videos, tmp_path / 'shards', 10 ** 6)
    assert (folder / '000000.tar').stat().st_size < 2 * os.path.getsize(path) + 10240
    assert_as_files(videos, index, folder)


def test_pictures_of_several_sizes_and_odd_names(tmp_path):
    from PIL import Image
    (tmp_path / 'a.b').mkdir()
    for i, size in ((2, (64, 48)), (10, (80, 60)), (1, (50, 40))):
        Image.effect_noise(size, 90).convert('RGB').save(tmp_path / 'a.b' / f'x.y {i}.png')
    video = write_video(tmp_path / 'a.mp4', range(0, 80, 8)).rename(tmp_path / 'ä, no kind')
    videos = VideoList((Entry(str(tmp_path / 'a.b'), 0), Entry(str(video), 0)), ('a',))
    index, folder = written(videos, tmp_path / 'shards', 10 ** 6)
    assert_as_files(videos, index, folder)


@pytest.mark.parametrize('workers', [0, 2])
def test_processes_share_an_epoch_and_resume_is_its_tail(workers, tmp_path):
    _, folder = written(read_layout('list', tmp_path, per_class=3), tmp_path / 'shards')
    assert len(list(folder.glob('*.tar'))) > 1
    dataset = pickle.loads(pickle.dumps(of_training(folder)))
    seen = []
    for rank in range(2):
        sampler = EpochSampler(6, train=True, rank=rank, world_size=2)
        sampler.set_epoch(3)
        whole = list(DataLoader(dataset, None, sampler=sampler, num_workers=workers))
        sampler.set_epoch(3, start=1)
        tail = list(DataLoader(dataset, None, sampler=sampler, num_workers=workers))
        assert len(tail) == 2 and all(same(a, b) for a, b in zip(whole[1:], tail))
        seen += [sample.index for sample in whole]
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize('layout', ['list', 'sthv1'])
def test_webdataset_reads_the_same_bytes_and_labels(layout, tmp_path):
    wds = pytest.importorskip('webdataset')
    videos = read_layout(layout, tmp_path, per_class=2)
    _, folder = written(videos, tmp_path / 'shards')
    samples = list(wds.WebDataset([str(path) for path in sorted(folder.glob('*.tar'))], shardshuffle=False))
    assert len(samples) == len(videos)
    for sample, entry in zip(samples, videos.entries):
        about = json.loads(sample['json'])
        assert (about['label'], about['class']) == (entry.label, videos.classes[entry.label])
        files = sorted(Path(entry.path).iterdir()) if layout == 'sthv1' else [Path(entry.path)]
        keys = sorted(key for key in sample if key.endswith(('mp4', 'jpg')))
        assert [sample[key] for key in keys] == [file.read_bytes() for file in files]


def test_an_unreadable_video_is_named_and_stays_in_evaluation_alone(tmp_path):
    videos = read_layout('list', tmp_path, per_class=2)
    open(videos.entries[0].path, 'wb').close()
    with pytest.warns(UserWarning, match='cannot be read'):
        index = look(videos)
    changed = videos.entries[2].path
    with open(changed, 'ab') as file:
        file.write(b'0')
    unreadable = write_shards(videos, index, tmp_path / 'shards', progress=False)
    assert list(unreadable) == [videos.entries[0].path, changed] and 'has changed' in unreadable[changed]
    assert sorted(of_training(tmp_path / 'shards').unreadable) == [0, 2] and len(of_training(tmp_path / 'shards')) == 2
    samples = [of_evaluation(tmp_path / 'shards')[i] for i in range(4)]
    assert [sample.failures for sample in samples] == [1, 0, 1, 0]
    assert [sample.label for sample in samples] == [entry.label for entry in videos.entries]


def test_a_picture_that_changes_while_it_is_copied_leaves_no_half_sample(tmp_path):
    videos = read_layout('sthv1', tmp_path, per_class=1)
    index = look(videos)
    last = sorted(Path(videos.entries[0].path).iterdir())[-1]
    last.unlink()
    last.symlink_to(tmp_path / 'gone.jpg')
    os.utime(last.parent, ns=(0, index[videos.entries[0].path].mtime))
    unreadable = write_shards(videos, index, tmp_path / 'shards', 10 ** 6, progress=False)
    assert list(unreadable) == [videos.entries[0].path] and 'is gone' in unreadable[videos.entries[0].path]
    files = VideoDataset(videos, index, EVAL, num_frames=4, train=False)
    assert same(of_evaluation(tmp_path / 'shards')[1], files[1])


def _cut(tar):
    os.truncate(tar, 700)


def _zeros(tar):
    tar.write_bytes(bytes(tar.stat().st_size))


def _data(tar):
    content = tar.read_bytes()
    tar.write_bytes(content[:2048] + bytes(len(content) - 2048))


def _of_others(tar):
    shutil.copy(tar.with_name('000001.tar'), tar)


@pytest.mark.filterwarnings('ignore:.*of the .* shards')
@pytest.mark.parametrize('harm', [os.remove, _cut, _zeros, _data, _of_others])
def test_a_shard_that_is_damaged_counts(harm, tmp_path):
    videos = read_layout('list', tmp_path, per_class=2)
    _, folder = written(videos, tmp_path / 'shards', 1)
    harm(folder / '000000.tar')
    assert [of_evaluation(folder)[i].failures for i in range(4)] == [1, 0, 0, 0]
    sample = of_training(folder)[0, 0]
    assert sample.failures > 0 and sample.index != 0


def test_missing_shards_are_named(tmp_path):
    _, folder = written(read_layout('list', tmp_path, per_class=1), tmp_path / 'shards', 1)
    os.remove(folder / '000001.tar')
    with pytest.warns(UserWarning, match='1 of the 2 shards in .* such as 000001.tar'):
        read_shards(folder)


def test_labels_follow_the_names_of_the_classes(tmp_path):
    videos = read_layout('list', tmp_path, per_class=1)
    _, folder = written(videos, tmp_path / 'shards')
    names = ('another', *reversed(CLASSES))
    assert [entry.label for entry in read_shards(folder, names).entries] == [
        names.index(videos.classes[entry.label]) for entry in videos.entries]
    with pytest.raises(ValueError, match="label 'Moving something up' is not one of the 1 classes"):
        read_shards(folder, CLASSES[:1])


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    videos = read_layout('list', tmp_path, per_class=1)
    index, folder = written(videos, tmp_path / 'shards')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 'UNFINISHED' not in before
    with pytest.raises(FileExistsError, match=r'holds index.json; wanted a new or an empty folder'):
        write_shards(videos, index, folder, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / '000000.tar').touch()
    with pytest.raises(FileExistsError, match=r'holds 000000.tar'):
        write_shards(videos, index, tmp_path / 'other', progress=False)
    with pytest.raises(ValueError, match=r'wanted what cmr_layers.video.shards wrote'):
        read_shards(tmp_path / 'other')


class _Killing(Index):
    """An index that kills its process when it is asked for a path."""

    def __init__(self, index, path):
        super().__init__({name: json.dumps(info.row()).encode() for name, info in index.items()})
        self.path = path

    def __getitem__(self, path):
        if path == self.path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(path)


@pytest.mark.filterwarnings('ignore:.*fork')
def test_writing_that_is_killed_leaves_no_index_and_begins_anew(tmp_path):
    videos, folder = read_layout('list', tmp_path, per_class=2), tmp_path / 'shards'
    index = look(videos)
    killing = _Killing(index, videos.entries[3].path)
    process = multiprocessing.get_context('fork').Process(
        target=write_shards, args=(videos, killing, folder, 4000), kwargs={'progress': False})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in folder.iterdir()}
    assert {'UNFINISHED', '000000.tar'} <= left and 'index.json' not in left
    with pytest.raises(ValueError, match='their writing was interrupted'):
        read_shards(folder)
    written(videos, folder, 10 ** 6)
    assert {path.name for path in folder.iterdir()} == {'index.json', '000000.tar'}
    assert_as_files(videos, index, folder)


def test_the_command(tmp_path, capsys):
    layout, file, root, _ = write_layout('list', tmp_path, per_class=1)
    (root / '1.mp4').write_bytes(b'')
    arguments = ['--layout', layout, '--list', str(file), '--root', str(root), '--out', str(tmp_path / 'out')]
    with pytest.warns(UserWarning, match='1 of 2 videos cannot be read'):
        assert main([*arguments, '--shard-size', '1MiB']) == 0
    out = capsys.readouterr().out
    assert '2 samples of 2 videos written' in out and '; 1 videos cannot be read' in out and '1.mp4: ' in out
    assert len(of_evaluation(tmp_path / 'out')) == 2
    with pytest.warns(UserWarning, match='1 of 2 videos cannot be read'):
        assert main(arguments) == 1
    assert 'holds index.json' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, '--shard-size', '1 apple'])
    assert "wanted a size such as 1GB, 512MiB or 1000000, got '1 apple'" in capsys.readouterr().err


def test_the_trainer_reads_shards_and_goes_on_within_an_epoch(tmp_path, capsys, monkeypatch):
    videos = flags(tmp_path, per_class=6, output='files')
    for name in ('train', 'val'):
        place = videos[videos.index(f'--{name}-list') + 1]
        assert main(['--layout', 'folders', '--root', place, '--out', str(tmp_path / f'{name}.shards'),
                     '--shard-size', '4kB']) == 0
    more = ['--epochs', '1', '--save-every', '2']
    assert train([*videos, *more]) == 0
    shards = [word.replace('/videos', '.shards') for word in videos]
    shards[shards.index('folders')] = 'shards'
    output = shards.index(str(tmp_path / 'files'))
    shards[output] = str(tmp_path / 'whole')
    assert train([*shards, *more]) == 0
    assert len(losses(tmp_path / 'whole')) == 3 and losses(tmp_path / 'whole') == losses(tmp_path / 'files')
    shards[output] = str(tmp_path / 'cut')
    save = Run.save

    def interrupted(self, name):
        save(self, name)
        raise KeyboardInterrupt

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Run, 'save', interrupted)
        assert train([*shards, *more]) == 130
    assert 'interrupted; the same command goes on' in capsys.readouterr().err
    assert train([*shards, *more]) == 0
    assert 'goes on after update 2 of 3' in capsys.readouterr().out
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    assert train([*shards, *more, '--root', 'x']) == 1
    assert 'no root' in capsys.readouterr().err
