"""read_clip as a whole: files of many formats, folders of pictures, wrong arguments, what it needs installed."""
import builtins
import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from videos import LEVEL, read_levels, write_video

import cmr_layers
from cmr_layers.video import read_clip
from cmr_layers.video.decode import Video

av = pytest.importorskip('av')


@pytest.mark.parametrize('name, codec, pix_fmt', [
    ('clip.mp4', 'libx264', 'yuv420p'),
    ('clip.mp4', 'mpeg4', 'yuv420p'),
    ('clip.ts', 'libx264', 'yuv420p'),
    ('clip.h264', 'libx264', 'yuv420p'),  # no container: no frame count, no duration
    ('clip.webm', 'libvpx-vp9', 'yuv420p'),
    ('clip.mkv', 'ffv1', 'yuv420p'),
    ('clip.avi', 'mjpeg', 'yuvj420p'),
    ('clip.gif', 'gif', 'rgb8'),
])
def test_formats(tmp_path, name, codec, pix_fmt):
    clip = read_clip(write_video(tmp_path / name, range(0, 30 * LEVEL, LEVEL), codec, pix_fmt), num_frames=5)
    assert clip.frames.shape == (5, 3, 48, 64) and clip.frames.dtype == torch.uint8 and clip.frames.is_contiguous()
    # 8 bits of palette are coarse
    assert np.allclose(read_levels(clip), [3, 9, 15, 21, 27], atol=1 if codec in ('gif', 'mpeg4') else 0)
    if name != 'clip.h264':
        assert clip.times == pytest.approx([.3, .9, 1.5, 2.1, 2.7], abs=.011)


@pytest.mark.parametrize('size', [(17, 31), (101, 2), (33, 64)])
def test_odd_sizes(tmp_path, size):
    clip = read_clip(write_video(tmp_path / 'odd.mkv', [0, 80, 160], 'ffv1', 'bgr0', size), num_frames=3)
    assert clip.frames.shape == (3, 3, size[1], size[0])
    assert clip.frames[:, :, 0, 0].tolist() == [[0] * 3, [80] * 3, [160] * 3]


def test_channels_are_rgb(tmp_path):
    def paint(image, index):
        image[:, :32] = (200, 100, 50)

    clip = read_clip(write_video(tmp_path / 'rgb.mkv', [0], 'ffv1', 'bgr0', paint=paint), num_frames=1)
    assert clip.frames[0, :, 5, 5].tolist() == [200, 100, 50] and clip.frames[0, :, 5, 40].tolist() == [0, 0, 0]


def test_a_video_that_decodes_to_less_the_second_time(clip30, monkeypatch):
    decode, passes = Video.frames, []

    def shorter(self):
        passes.append(self)
        frames = list(decode(self))
        return iter(frames if len(passes) == 1 else frames[:20])

    monkeypatch.setattr(Video, 'frames', shorter)
    with pytest.raises(ValueError, match='is damaged: it decodes to 30 frames first and to 20 next'):
        read_clip(clip30)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_frames=0), 'num_frames must be a positive int, got 0'),
    (dict(num_frames=2.), 'num_frames must be a positive int, got 2.0'),
    (dict(start=-1), 'start must be a number of seconds >= 0, got -1'),
    (dict(start='1'), "start must be a number of seconds >= 0, got '1'"),
    (dict(end=float('nan')), 'end must be a number of seconds >= 0, got nan'),
    (dict(start=2, end=1), 'end must be later than start=2, got 1'),
    (dict(end=0), 'end must be later than start=0, got 0'),
    (dict(start=5), 'lies in the window start=5 to end=inf: its 30 frames begin at 0 s and the last one at 2.900 s'),
])
def test_wrong_arguments(clip30, kwargs, message):
    with pytest.raises(ValueError, match=message):
        read_clip(clip30, **kwargs)


def test_without_pyav(clip30, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ImportError, match=r'pip install "cmr-layers\[video\]"'):
        read_clip(clip30)


def test_importing_needs_neither_pyav_nor_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split('.')[0] in ('av', 'matplotlib'):
            raise AssertionError(f'{name} imported')
        return real(name, *args, **kwargs)

    for name in ('video', 'visualize'):
        monkeypatch.setattr(cmr_layers, name, None, raising=False)  # both are put back afterwards
        for module in [m for m in sys.modules if m.startswith(f'cmr_layers.{name}')]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, '__import__', refuse)
    for name in ('video', 'visualize'):
        importlib.import_module(f'cmr_layers.{name}')


class TestFolder:
    @pytest.mark.parametrize('end', ['png', 'jpg', 'bmp', 'webp', 'tiff', 'ppm', 'JPEG'])
    def test_frames_in_the_order_of_their_numbers(self, folder, end):
        (folder / 'frames').mkdir()
        for i in range(12):
            Image.new('RGB', (64, 48), (i * LEVEL,) * 3).save(folder / f'frames/frame{i}.{end}')
        for name in ('Thumbs.db', '.hidden.png', 'list.txt'):
            (folder / 'frames' / name).write_text('no picture')
        clip = read_clip(folder / 'frames', 4)
        assert read_levels(clip) == [1, 4, 7, 10] and clip.times == [1, 4, 7, 10]
        assert clip.frames.shape == (4, 3, 48, 64)

    def test_rate(self, folder):
        for i in range(10):
            Image.new('RGB', (8, 8), (i * LEVEL,) * 3).save(folder / f'{i}.png')
        clip = read_clip(folder, 2, start=.5, end=.9, rate=10)
        assert read_levels(clip) == [6, 8] and clip.times == [.6, .8]
        assert read_clip(folder, 2, start=5, end=9, even='time').times == [6, 8]

    def test_pictures_of_other_sizes_are_scaled(self, folder):
        for i, size in enumerate([(64, 48), (32, 24)]):
            Image.new('RGB', size, (80,) * 3).save(folder / f'{i}.png')
        clip = read_clip(folder, 2)
        assert clip.frames.shape == (2, 3, 48, 64) and clip.frames.unique().tolist() == [80]

    def test_errors(self, folder):
        (folder / 'empty').mkdir()
        with pytest.raises(ValueError, match=r'empty.* is a folder without pictures; wanted a video file, or frames'):
            read_clip(folder / 'empty')
        (folder / 'empty/1.png').write_bytes(b'no picture')
        with pytest.raises(ValueError, match=r'1\.png.* is not a video'):
            read_clip(folder / 'empty')
        for rate in (0, -1, float('nan'), '1', True):
            with pytest.raises(ValueError, match=r'rate must be a number'):
                read_clip(folder / 'empty', rate=rate)
        with pytest.raises(ValueError, match='rate is for a folder of frames, got 5'):
            read_clip('secret.mp4', rate=5)

    def test_a_playlist_among_the_frames(self, folder):
        (folder / 'frames').mkdir()
        (folder / 'frames/1.png').write_text(f'ffconcat version 1.0\nfile {folder / "secret.mp4"}\n')
        with pytest.raises(ValueError, match='is not a video'):
            read_clip(folder / 'frames')
