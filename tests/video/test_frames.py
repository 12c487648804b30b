"""Frames by their indices: bit for bit those of decoding from the start, whatever is sought or skipped on the way."""
import dataclasses
import io
import os
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from videos import LEVEL, encode, packets, write_video

from cmr_layers.video import read_clip
from cmr_layers.video.frames import UnreadableVideo, read_frames
from cmr_layers.video.look import look

av = pytest.importorskip('av')

N = 30
OPEN = {'x264-params': 'open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0'}
CLOSED = {'x264-params': 'keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal'}
VARYING = [i * 3 + i * i // 5 for i in range(N)]


def moving(level):
    """A noisy square that moves over a grey of the given level, so that frames are predicted from others."""
    i, noise = level // LEVEL, np.random.default_rng(level)
    image = np.full((48, 64, 3), level, np.uint8)
    y, x = i * 3 % 36, i * 5 % 52
    image[y:y + 12, x:x + 12] = noise.integers(0, 255, (12, 12, 3))
    return av.VideoFrame.from_ndarray(image, format='rgb24')


# codec, time stamps, ticks per second, options; and whether a key frame can be sought
FILES = {
    'closed.mp4': ('libx264', range(N), 10, CLOSED, True),
    'open.mp4': ('libx264', range(N), 10, OPEN, True),
    'open.mkv': ('libx264', range(N), 10, OPEN, True),
    'open.ts': ('libx264', range(N), 10, OPEN, True),
    'late.mp4': ('libx264', range(77, 77 + N), 10, CLOSED, True),  # time stamps do not begin at 0
    'late.ts': ('libx264', range(77, 77 + N), 10, CLOSED, True),
    'varying.mp4': ('libx264', VARYING, 90, CLOSED, True),
    'varying.webm': ('libvpx-vp9', VARYING, 90, {'g': '10'}, True),
    'closed.flv': ('libx264', [100 * i for i in range(N)], 1000, CLOSED, True),
    'vp9.webm': ('libvpx-vp9', range(N), 10, {'g': '10', 'auto-alt-ref': '1', 'lag-in-frames': '8'}, True),
    'vp8.webm': ('libvpx', range(N), 10, {'g': '10'}, True),
    'hevc.mp4': ('libx265', range(N), 10, {'x265-params': 'keyint=10:min-keyint=10:log-level=none'}, True),
    'mpeg4.avi': ('mpeg4', range(N), 10, {'g': '10'}, True),
    'mpeg2.ts': ('mpeg2video', range(N), 10, {'g': '10', 'bf': '2'}, True),
    'mpeg2.mpg': ('mpeg2video', range(N), 10, {'g': '10', 'bf': '2'}, False),
    'b.avi': ('libx264', range(N), 10, CLOSED, False),  # AVI does not say when B-frames are shown
    'bare.h264': ('libx264', range(N), 10, CLOSED, False),
    # a little of each frame is renewed: FFmpeg calls frames key frames that are not
    'refresh.mp4': ('libx264', range(N), 10, {'x264-params': 'intra-refresh=1:keyint=10:scenecut=0'}, False),
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Path, what is known of it, and all frames as read_clip decodes them from the start, by name."""
    folder, known = tmp_path_factory.mktemp('frames'), {}

    def get(name):
        if name not in known:
            codec, stamps, ticks, options, _ = FILES[name]
            path = str(encode(folder / name, stamps, codec, Fraction(1, ticks), options, moving))
            known[name] = path, look(path), read_clip(path, N).frames
        return known[name]

    return get


@pytest.mark.parametrize('name', FILES)
def test_every_frame_and_every_pair_of_far_frames(made, name):
    path, info, frames = made(name)
    assert info.num_frames == N and info.error is None and info.damage is None
    assert (len(info.keys) > 1) == FILES[name][-1]
    for wanted in [[i] for i in range(N)] + [[i, j] for i in (0, 8, 13) for j in range(i + 1, N, 3)]:
        assert torch.equal(read_frames(path, wanted, info), frames[wanted]), wanted


@pytest.mark.parametrize('name', ['closed.mp4', 'open.mkv', 'vp9.webm', 'varying.mp4', 'late.ts', 'mpeg2.mpg'])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(wanted=st.lists(st.integers(0, N - 1), min_size=1, max_size=12))
def test_any_indices_in_any_order(made, name, wanted):
    path, info, frames = made(name)
    got = read_frames(path, wanted, info)
    assert got.dtype == torch.uint8 and torch.equal(got, frames[wanted])
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_without_an_index(made):
    path, _, frames = made('open.mp4')
    assert torch.equal(read_frames(path, [28, 3, 3]), frames[[28, 3, 3]])
    with pytest.raises(ValueError, match=r'indices must be less than the 30 frames of .*open\.mp4.*, got 30'):
        read_frames(path, [30])


class Counting(io.BytesIO):
    """A file that counts the bytes that are read of it."""
    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


def large(level):
    noise = np.random.default_rng(level)
    return av.VideoFrame.from_ndarray(noise.integers(0, 255, (48, 64, 3), np.uint8), format='rgb24')


@pytest.mark.parametrize('name, codec', [('large.mp4', 'libx264'), ('large.webm', 'libvpx-vp9')])
def test_a_seek_reads_little(tmp_path, name, codec):
    data = encode(tmp_path / name, range(100), codec, options={'g': '10', 'crf': '5'}, paint=large).read_bytes()
    info, frames = look(Counting(data)), read_clip(io.BytesIO(data), 100).frames
    few, all_of_it = Counting(data), Counting(data)
    assert torch.equal(read_frames(few, [95], info), frames[[95]])
    assert torch.equal(read_frames(all_of_it, [95]), frames[[95]])
    assert few.count < all_of_it.count / 2


def test_a_near_frame_is_not_sought(made):
    path, info, frames = made('closed.mp4')
    wrong = dataclasses.replace(info, targets=(0, -10 ** 9, -10 ** 9))  # whoever seeks to these gets lost
    assert torch.equal(read_frames(path, [8, 10, 12, 18, 21], wrong), frames[[8, 10, 12, 18, 21]])


@pytest.mark.parametrize('targets', [(0, 0, 0), (0, 10 ** 9, 10 ** 9), (0, 10 ** 18, -10 ** 18)])
@pytest.mark.parametrize('name', ['closed.mp4', 'open.ts', 'vp9.webm'])
def test_a_seek_that_goes_wrong_is_noticed(made, name, targets):
    path, info, frames = made(name)
    wrong = dataclasses.replace(info, targets=targets)
    assert torch.equal(read_frames(path, [25, 0, 29], wrong), frames[[25, 0, 29]])


def test_frames_that_are_called_key_frames_and_are_not(tmp_path):
    options = {'g': '10', 'sc_threshold': '1000000000'}
    path = encode(tmp_path / 'wrong.mp4', range(N), 'mpeg4', options=options, paint=moving)
    data = bytearray(path.read_bytes())
    at = data.index(b'stss') + 12
    assert struct.unpack_from('>3I', data, at) == (1, 11, 21)
    struct.pack_into('>3I', data, at, 1, 15, 25)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe] == [0, 14, 24]
    info, frames = look(path), read_clip(path, N).frames
    assert info.num_frames == N and info.keys == (0,)
    for i in range(N):
        assert torch.equal(read_frames(path, [i], info), frames[[i]])


def test_a_header_that_promises_more_frames(tmp_path):
    """As that of box.mp4 of OpenCV's documentation."""
    path = encode(tmp_path / 'cut.avi', range(N), 'mpeg4', options={'g': '10'}, paint=moving)
    at, *_ = packets(path)[22]
    path.write_bytes(path.read_bytes()[:at - 8])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == N
    info = look(path)
    assert info.num_frames == 22 and 'promises 30 frames and 22 decode' in info.damage
    assert torch.equal(read_frames(path, range(22), info), read_clip(path, 22).frames)
    with pytest.raises(ValueError, match='indices must be less than the 22 frames'):
        read_frames(path, [22], info)


def test_rotation(tmp_path):
    path = encode(tmp_path / 'phone.mp4', range(N), options=CLOSED, paint=moving)
    data = bytearray(path.read_bytes())
    one, zero, minus = (1 << 16).to_bytes(4, 'big'), bytes(4), (-(1 << 16)).to_bytes(4, 'big', signed=True)
    at = data.index(one + zero * 3 + one, data.index(b'tkhd'))
    data[at:at + 20] = zero + one + zero + minus + zero  # clockwise
    path.write_bytes(data)
    info, frames = look(path), read_clip(path, N).frames
    assert (info.rotation, info.width, info.height) == (90, 48, 64) and len(info.keys) > 1
    wanted = [29, 11, 20]
    got = read_frames(path, wanted, info)
    assert got.shape == (3, 3, 64, 48) and torch.equal(got, frames[wanted])


def test_sizes_that_change_and_clocks_that_restart(tmp_path):
    path = tmp_path / 'both.ts'
    path.write_bytes(b''.join(
        write_video(tmp_path / f'{size[0]}.ts', range(0, 80, LEVEL), size=size).read_bytes()
        for size in ((64, 48), (128, 160))))
    info = look(path)
    assert info.num_frames > 16 and (info.width, info.height) == (64, 48)
    wanted, frames = [info.num_frames - 1, 2], read_clip(path, info.num_frames).frames
    assert torch.equal(read_frames(path, wanted, info), frames[wanted])
    assert read_frames(path, wanted[:1], info).shape == read_frames(path, wanted[:1]).shape == (1, 3, 48, 64)


def test_corrupt_frames_do_not_count(tmp_path):
    path = encode(tmp_path / 'noise.avi', range(2, 22), 'mpeg2video', paint=large, options={'g': '1'})
    data = bytearray(path.read_bytes())
    for at, size, _ in packets(path)[5:12:3]:
        data[at + size // 2:at + size] = bytes(size - size // 2)
    path.write_bytes(data)
    info = look(path)
    assert info.num_frames == 17 and info.keys == (0,) and '3 frames are flagged as corrupt' in info.damage
    assert torch.equal(read_frames(path, range(17), info), read_clip(path, 17).frames)


class TestChange:
    def test_another_size_or_time(self, made, tmp_path):
        path = tmp_path / 'file.mp4'
        path.write_bytes(open(made('closed.mp4')[0], 'rb').read())
        info = look(path)
        os.utime(path, ns=(0, info.mtime + 1))
        with pytest.raises(UnreadableVideo, match=r'file\.mp4.* has changed since it was looked at.*index_videos'):
            read_frames(path, [0], info)
        path.write_bytes(path.read_bytes() + b'\0')
        os.utime(path, ns=(0, info.mtime))
        with pytest.raises(UnreadableVideo, match='has changed since'):
            read_frames(path, [0], info)

    def test_no_file_any_more(self, made, tmp_path):
        path = tmp_path / 'file.mp4'
        path.write_bytes(open(made('closed.mp4')[0], 'rb').read())
        info = look(path)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r'file\.mp4.* does not exist'):
            read_frames(path, [0], info)
        path.mkdir()
        with pytest.raises(UnreadableVideo, match='has changed since'):
            read_frames(path, [0], info)

    def test_another_file_of_the_same_size_and_time(self, made, tmp_path):
        path = encode(tmp_path / 'file.mp4', range(12), options=CLOSED, paint=moving)
        other = look(path)
        info = dataclasses.replace(made('closed.mp4')[1], size=other.size, mtime=other.mtime)
        with pytest.raises(UnreadableVideo, match='decodes to 12 frames; it was 30'):
            read_frames(path, [29], info)

    def test_a_video_that_was_broken(self, tmp_path):
        path = tmp_path / 'empty.mp4'
        path.touch()
        for info in (look(path), None):
            with pytest.raises(UnreadableVideo, match=r'empty\.mp4'):
                read_frames(path, [0], info)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(12):
            Image.fromarray(np.full((48, 64, 3), i * LEVEL, np.uint8)).save(tmp_path / f'img_{i:05}.jpg')
        return tmp_path

    def test_pictures(self, folder):
        info, frames = look(folder), read_clip(folder, 12).frames
        assert (info.num_frames, info.width, info.height, info.duration) == (12, 64, 48, 12.)
        for known in (info, None):
            assert torch.equal(read_frames(folder, [11, 0, 11, 5], known), frames[[11, 0, 11, 5]])
            with pytest.raises(ValueError, match='indices must be less than the 12 frames'):
                read_frames(folder, [12], known)

    def test_one_does_not_decode(self, folder):
        (folder / 'img_00007.jpg').write_bytes(b'nothing')
        assert 'img_00007.jpg' in look(folder).error
        assert read_frames(folder, [0, 11]).shape == (2, 3, 48, 64)
        with pytest.raises(UnreadableVideo, match='img_00007'):
            read_frames(folder, [7])

    def test_one_is_missing(self, folder):
        info = look(folder)
        (folder / 'img_00003.jpg').unlink()
        with pytest.raises(UnreadableVideo, match='has changed since'):
            read_frames(folder, [0], info)
        os.utime(folder, ns=(0, info.mtime))
        with pytest.raises(UnreadableVideo, match='holds 11 pictures; it was 12'):
            read_frames(folder, [0], dataclasses.replace(info, size=os.stat(folder).st_size))


@pytest.mark.parametrize('indices', [[], [-1], [1.5], ['a'], 3, None])
def test_wrong_indices(made, indices):
    with pytest.raises(ValueError, match='indices must be'):
        read_frames(made('closed.mp4')[0], indices)


def test_too_many_frames(made):
    path, info, _ = made('closed.mp4')
    for known in (info, None):
        with pytest.raises(ValueError, match=r'200000 frames of 64x48 pixels.* are too large') as caught:
            read_frames(path, [0] * 200000, known)
        assert not isinstance(caught.value, UnreadableVideo)


class Videos(torch.utils.data.Dataset):
    def __init__(self, path, info):
        self.path, self.info = path, info

    def __len__(self):
        return N

    def __getitem__(self, i):
        return read_frames(self.path, [N - 1, i], self.info), torch.get_num_threads()


def test_in_a_worker(made):
    path, info, frames = made('open.mp4')
    for i, (got, threads) in enumerate(DataLoader(Videos(path, info), num_workers=1)):
        assert torch.equal(got[0], frames[[N - 1, i]]) and threads == 1
