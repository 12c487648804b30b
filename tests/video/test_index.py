"""Looking at videos: what is known of each, which are broken, and what the cache keeps."""
import json
import os
import pickle
import shutil
import signal
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from videos import LEVEL, RATE, encode, grey, packets, write_video

from cmr_layers.video import index as module
from cmr_layers.video import read_clip
from cmr_layers.video.cache import write_cache
from cmr_layers.video.index import Index, VideoInfo, index_videos
from cmr_layers.video.look import look
from cmr_layers.video.worker import _Worker, pack

av = pytest.importorskip('av')

N = 24


def made_anew(paths, cache):
    """The index, and which of the videos were looked at: they have new lines in the cache."""
    _, *lines = cache.read_bytes().split(b'\n') if cache.exists() else [b'', b'']
    index = index_videos(paths, cache, 0, progress=False)
    _, *after = cache.read_bytes().split(b'\n')
    return index, sorted(json.loads(line[9:].split(b'\t')[0]) for line in set(after) - set(lines))


@pytest.fixture
def videos(tmp_path):
    return [str(write_video(tmp_path / f'{i}.mp4', range(0, (i + 3) * LEVEL, LEVEL))) for i in range(3)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'videos.index'


class TestInfo:
    @pytest.mark.parametrize('name, codec, options', [
        ('a.mp4', 'libx264', {'bf': '3'}), ('a.webm', 'libvpx-vp9', {}), ('a.ts', 'libx264', {'bf': '3'}),
        ('a.avi', 'mpeg4', {}), ('b.avi', 'libx264', {'bf': '3'}), ('a.mkv', 'ffv1', {}),
    ])
    def test_frames_and_times(self, tmp_path, name, codec, options):
        path = encode(tmp_path / name, range(N) if name.endswith('avi') else range(5, 5 + N), codec, options=options)
        info = look(path)
        assert (info.num_frames, info.width, info.height, info.rotation) == (N, 64, 48, 0)
        assert info.rate == pytest.approx(RATE) and info.duration == pytest.approx(N / RATE)
        assert (info.error, info.damage) == (None, None) and isinstance(info.steps, int)
        assert [float(time) for time in info.times] == read_clip(path, N).times

    def test_varying_rate(self, tmp_path):
        stamps = [i * 3 + i * i // 5 for i in range(N)]
        path = encode(tmp_path / 'varying.mp4', stamps, time_base=Fraction(1, 90))
        info = look(path)
        assert info.times == [Fraction(stamp, 90) for stamp in stamps] and isinstance(info.steps, bytes)
        assert [float(time) for time in info.times] == read_clip(path, N).times

    def test_milliseconds_stay_exact_and_small(self, tmp_path):
        path = encode(tmp_path / 'long.webm', [i * 1000 // 30 for i in range(300)], 'libvpx', Fraction(1, 1000),
                      paint=lambda level: grey(level % 200))
        info = look(path)
        assert [float(time) for time in info.times] == read_clip(path, 300).times and len(info.steps) < 40

    def test_clock_that_restarts(self, tmp_path):
        parts = [write_video(tmp_path / f'{i}.ts', range(0, 80, LEVEL)).read_bytes() for i in range(2)]
        path = tmp_path / 'both.ts'
        path.write_bytes(b''.join(parts))
        info = look(path)
        assert [float(time) for time in info.times] == read_clip(path, info.num_frames).times

    def test_rows(self, tmp_path):
        for info in (look(encode(tmp_path / 'a.mp4', [0, 1, 5])), look(tmp_path / 'missing.mp4')):
            assert VideoInfo.from_row(json.loads(json.dumps(info.row()))) == info
        with pytest.raises(ValueError, match='a row must hold'):
            VideoInfo.from_row([1])


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('windows')
    return [
        encode(folder / 'a.mp4', range(7, 27)), encode(folder / 'b.webm', [i * 33 for i in range(20)], 'libvpx'),
        encode(folder / 'c.mp4', [i * i for i in range(20)], time_base=Fraction(1, 90))]


class TestWindow:
    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture],
              derandomize=True)
    @given(which=st.integers(0, 2), start=st.integers(0, 40), length=st.integers(1, 40),
           kind=st.sampled_from([float, np.float32]))
    def test_it_is_read_clips(self, files, which, start, length, kind):
        path, begin, end = files[which], kind(start / 10), kind((start + length) / 10)
        info = look(path)
        try:
            wanted = read_clip(path, 20, begin, end).times
        except ValueError:
            with pytest.raises(ValueError, match='no frame lies in the window'):
                info.window(begin, end)
            return
        assert sorted(set(wanted)) == [float(info.times[i]) for i in info.window(begin, end)]

    def test_no_bounds(self, files):
        info = look(files[0])
        assert info.window() == info.window(0) == info.window(0, 99) == range(20)
        assert info.window(end=.1) == range(1) and info.window(.1) == range(1, 20)

    def test_wrong_windows(self, files, tmp_path):
        info = look(files[0])
        for start, end, message in (
                (2, 1, 'end must be later than start=2, got 1'), (-1, None, 'start must be a number of seconds'),
                (0, float('nan'), 'end must be a number'), (99, None, r'the 20 frames begin at 0 s .* at 1\.900 s')):
            with pytest.raises(ValueError, match=message):
                info.window(start, end)
        with pytest.raises(ValueError, match=r'cannot be read has no frames.*missing'):
            look(tmp_path / 'missing.mp4').window()


class TestBroken:
    def test_all_kinds_are_named(self, tmp_path, videos, cache):
        empty, text, hollow = tmp_path / 'empty.mp4', tmp_path / 'text.mp4', tmp_path / 'hollow.mp4'
        empty.touch()
        text.write_text('this is no video')
        data = bytearray(open(videos[0], 'rb').read())
        begin = data.index(b'mdat') + 4
        size = int.from_bytes(data[begin - 8:begin - 4], 'big') - 8
        data[begin:begin + size] = bytes(size)
        hollow.write_bytes(data)
        (tmp_path / 'folder').mkdir()
        os.mkfifo(tmp_path / 'pipe.mp4')
        bad = [*map(str, (empty, text, hollow)), *(str(tmp_path / name) for name in ('folder', 'pipe.mp4', 'none.mp4'))]
        with pytest.warns(UserWarning, match=r'6 of 9 videos cannot be read, for example .*empty\.mp4'):
            index = index_videos([*videos[:2], *bad, videos[2]], cache, 0, progress=False)
        assert list(index) == [*videos[:2], *bad, videos[2]] and list(index.broken) == bad
        for path, words in zip(bad, (
                'not a video', 'not a video', 'not a frame of it decodes', 'folder without pictures', 'but a pipe',
                'does not exist')):
            assert words in index.broken[path] and index[path].num_frames == 0
        assert str(index).startswith('9 videos, 12 frames, 0.00 hours\n6 of them cannot be read:\n')
        assert all(path in str(index) for path in bad)

    def test_a_truncated_file_is_what_is_left(self, tmp_path):
        path = encode(tmp_path / 'cut.mp4', range(N), options={'movflags': 'faststart'}, codec='mpeg4')
        whole = tmp_path / 'whole.mp4'
        with av.open(str(path)) as source, av.open(str(whole), 'w', options={'movflags': 'faststart'}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        at, *_ = packets(whole)[10]
        path.write_bytes(whole.read_bytes()[:at])
        index = index_videos([path], progress=False)
        info = index[str(path)]
        assert info.num_frames == 10 and info.error is None and list(index.damaged) == [str(path)]
        assert 'promises 24 frames and 10 decode' in info.damage
        assert '1 of them are damaged and read in part:' in str(index)

    @pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
    def test_no_permission(self, videos, cache):
        os.chmod(videos[0], 0)
        with pytest.warns(UserWarning, match='cannot be read'):
            assert 'Permission denied' in index_videos(videos, cache, 0, progress=False).broken[videos[0]]
        os.chmod(videos[0], 0o600)  # this changes no time of modification
        assert not index_videos(videos, cache, 0, progress=False).broken

    def test_long_lists_are_shortened(self, tmp_path):
        with pytest.warns(UserWarning, match='12 of 12'):
            index = index_videos([tmp_path / f'{i}.mp4' for i in range(12)], progress=False)
        assert len(str(index).splitlines()) == 13 and str(index).endswith('and 2 more')


class TestCache:
    def test_only_what_changed(self, videos, cache):
        first, looked = made_anew(videos, cache)
        assert looked == ['0.mp4', '1.mp4', '2.mp4'] and len(first) == 3
        assert made_anew(videos, cache) == (first, [])
        os.utime(videos[1], ns=(0, 10 ** 18))
        second, looked = made_anew(videos, cache)
        assert looked == ['1.mp4'] and second[videos[1]].mtime == 10 ** 18 and second[videos[0]] == first[videos[0]]
        time_of_0 = os.stat(videos[0]).st_mtime_ns
        shutil.copy(videos[2], videos[0])
        os.utime(videos[0], ns=(0, time_of_0))
        third, looked = made_anew(videos, cache)
        assert looked == ['0.mp4'] and third[videos[0]].num_frames == 5

    def test_nothing_is_looked_at_twice(self, videos, cache):
        index_videos(videos, cache, 0, progress=False)
        for path in videos:  # nothing in it any more, but size and time are the same
            before = os.stat(path)
            with open(path, 'r+b') as file:
                file.write(bytes(before.st_size))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not index_videos(videos, cache, 0, progress=False).broken

    def test_a_broken_file_is_remembered_and_a_missing_one_is_looked_for(self, tmp_path, videos, cache):
        (tmp_path / 'empty.mp4').touch()
        paths = [str(tmp_path / 'empty.mp4'), str(tmp_path / 'late.mp4')]
        with pytest.warns(UserWarning, match='2 of 2'):
            index_videos(paths, cache, 0, progress=False)
        shutil.copy(videos[0], paths[1])
        with pytest.warns(UserWarning, match='1 of 2'):
            assert list(index_videos(paths, cache, 0, progress=False).broken) == paths[:1]

    def test_two_lists_share_it(self, videos, cache):
        made_anew(videos[:2], cache)
        assert made_anew(videos[1:], cache)[1] == ['2.mp4']
        assert made_anew(videos, cache)[1] == []

    def test_it_moves_with_its_videos(self, tmp_path, videos, cache, monkeypatch):
        index_videos(videos, cache, 0, progress=False)
        (tmp_path / 'there').mkdir()
        for path in (*videos, cache):
            shutil.move(path, tmp_path / 'there')
        monkeypatch.chdir(tmp_path / 'there')
        names = [os.path.basename(path) for path in videos]
        index, looked = made_anew(names, tmp_path / 'there' / cache.name)
        assert looked == [] and list(index) == names

    def test_a_damaged_line_is_made_anew(self, videos, cache):
        first, _ = made_anew(videos, cache)
        good = cache.read_bytes()
        line = good.split(b'\n')[2]
        assert b'1.mp4' in line
        cache.write_bytes(good.replace(line, line.replace(b'64,48', b'64,49')))
        with pytest.warns(UserWarning, match=r'videos\.index.* is damaged'):
            assert made_anew(videos, cache) == (first, ['1.mp4'])
        for damage in (good[:-20], good[:len(good) // 2], good + b'\xff\x00', good.replace(b'\n', b'\r')):
            cache.write_bytes(damage)
            with pytest.warns(UserWarning, match=r'videos\.index'):
                index_videos(videos, cache, 0, progress=False)
            assert made_anew(videos, cache)[0] == first

    @pytest.mark.parametrize('content', [b'', b'{}\n', b'\x89PNG', b'{"cmr_layers video index": 0}\n'])
    def test_another_version_or_another_file(self, videos, cache, content):
        cache.write_bytes(content)
        with pytest.warns(UserWarning, match=r'videos\.index.* is no index of this version'):
            assert len(index_videos(videos, cache, 0, progress=False)) == 3
        assert made_anew(videos, cache)[1] == []

    def test_it_cannot_be_written(self, tmp_path, videos):
        (tmp_path / 'taken').mkdir()
        for cache, words in ((tmp_path / 'no folder' / 'videos.index', ['written']),
                             (tmp_path / 'taken', ['read', 'written'])):
            with pytest.warns(UserWarning) as caught:
                assert not index_videos(videos, cache, 0, progress=False).broken
            assert [f'{str(cache)!r} cannot be {word}' in str(w.message) for word, w in zip(words, caught)] == (
                [True] * len(words))
        assert sorted(os.listdir(tmp_path)) == ['0.mp4', '1.mp4', '2.mp4', 'taken']


def children():
    """The looking processes that this one started and that are left. Others may be of other tests."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            own = path.read_text().rpartition(')')[2].split()[1] == str(os.getpid())
            found += [path.parent.name] * (own and b'cmr_layers' in path.with_name('cmdline').read_bytes())
        except OSError:  # it has ended meanwhile
            pass
    return found


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='processes are found on Linux')
class TestProcesses:
    def test_they_give_the_same(self, tmp_path, videos, capfd):
        for i in range(3):
            Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / f'{i}.png')
        (tmp_path / 'new\nline \udcff.mp4').touch()
        paths = [*videos, str(tmp_path), str(tmp_path / 'new\nline \udcff.mp4')]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            alone, many = index_videos(paths, num_workers=1), index_videos(paths, num_workers=2)
        assert dict(many) == dict(alone) and list(many) == paths and list(many.broken) == paths[-1:]
        assert 'looking at videos' in capfd.readouterr().err

    def test_what_crashed_its_process_is_not_decoded_in_this_one(self, videos, cache, monkeypatch):
        crash = VideoInfo(error=f'source={videos[0]!r}: the process that decoded it ended with signal SIGSEGV')
        write_cache(str(cache), {videos[0]: pack(crash)})
        counts, look_at_all = [], module.look_at_all
        monkeypatch.setattr(module, 'look_at_all', lambda names, count: counts.append(count) or look_at_all(
            names, count))
        assert not index_videos(videos[:1], cache, progress=False).broken  # it decodes today
        assert not index_videos(videos[1:2], cache, progress=False).broken
        assert counts == [2, 1]  # two are processes of their own, and one is this one

    def test_one_that_dies_is_noted_and_replaced(self, videos):
        worker, rows = _Worker(), []
        thread = threading.Thread(target=lambda: rows.append(worker.look(videos[0])))
        thread.start()
        while worker._process is None:
            time.sleep(.01)
        worker._process.kill()  # it has not begun to look yet: it imports for a second
        thread.join()
        try:
            info = VideoInfo.from_row(json.loads(rows[0]))
            assert info.error == f'source={videos[0]!r}: the process that decoded it ended with signal SIGKILL'
            assert worker.look(videos[0]) == pack(look(videos[0]))
        finally:
            worker.kill()
        assert not children()

    @pytest.mark.parametrize('workers', [0, 2])
    def test_an_interrupt_keeps_what_was_looked_at_and_ends_them(self, tmp_path, videos, cache, workers):
        paths = [shutil.copy(videos[0], tmp_path / f'copy{i}.mp4') for i in range(60)]

        def interrupt(number, frame):
            while frame is not None and frame.f_code is not index_videos.__code__:
                frame = frame.f_back
            if frame is not None and len(frame.f_locals.get('rows', ())) > 5:
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, .001, .001)
            with pytest.raises(KeyboardInterrupt):
                index_videos(paths, cache, workers, progress=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert not children()
        kept = len(cache.read_bytes().splitlines()) - 1
        assert 5 < kept < 60
        index, looked = made_anew(paths, cache)
        assert len(looked) == 60 - kept and all(info.num_frames == 3 for info in index.values())


class TestIndex:
    def test_it_is_small_and_can_be_pickled(self, tmp_path, videos):
        row = pack(look(videos[0]))
        index = Index({f'some/folder/of/videos/video_number_{i:06}.mp4': row for i in range(1000)})
        data = pickle.dumps(index)
        assert dict(pickle.loads(data)) == dict(index) and len(data) < 300 * 1000
        assert repr(index) == '<Index of 1000 videos>'

    def test_a_path_twice_is_one_video(self, videos):
        assert list(index_videos([videos[1], videos[0], videos[1]], progress=False)) == [videos[1], videos[0]]
        with pytest.raises(KeyError):
            index_videos(videos, progress=False)['other.mp4']

    def test_no_videos(self):
        index = index_videos([])
        assert len(index) == 0 and str(index) == '0 videos, 0 frames, 0.00 hours'

    @pytest.mark.parametrize('value', [-1, 1.5, True, '2'])
    def test_wrong_number_of_workers(self, videos, value):
        with pytest.raises(ValueError, match='num_workers must be'):
            index_videos(videos, num_workers=value, progress=False)
