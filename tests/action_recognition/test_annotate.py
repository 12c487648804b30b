"""Annotated videos and a camera's windows: really encoded, decoded again, and watched as they come."""
import itertools
from fractions import Fraction

import numpy as np
import pytest
from videos import LEVEL, encode, look, write_video

from examples.action_recognition.annotate import all_frames, with_label, writing
from examples.action_recognition.camera import default_format, open_camera, watch

av = pytest.importorskip('av')


def film(path, images, times, rate, unit):
    with writing(path, rate, unit) as writer:
        for image, time in zip(images, times):
            writer.write(image, time, 'left', .5)
    return look(path)


@pytest.mark.parametrize('rate', [Fraction(10), Fraction(30000, 1001), Fraction(24000, 1001)])
def test_rate_and_times_are_kept(tmp_path, rate):
    times = [i / rate for i in range(20)]
    images = [np.full((240, 320, 3), 10 * i, np.uint8) for i in range(20)]
    found_rate, found_times, found = film(tmp_path / 'a.mp4', images, times, rate, 1 / rate)
    assert found_rate == rate and found_times == times
    assert [round(image[120:].mean() / 10) for image in found] == list(range(20))


def test_uneven_times_are_kept(tmp_path):
    times = [Fraction(i, 1000) for i in (0, 40, 100, 101, 350, 1200)]
    _, found, _ = film(tmp_path / 'a.mp4', [np.zeros((240, 240, 3), np.uint8)] * 6, times, Fraction(5),
                       Fraction(1, 1000))
    assert found == times


def test_two_frames_of_one_time(tmp_path):
    _, times, _ = film(tmp_path / 'a.mp4', [np.zeros((240, 240, 3), np.uint8)] * 3, [Fraction(0)] * 3, Fraction(5),
                       Fraction(1, 5))
    assert times == [0, Fraction(1, 5), Fraction(2, 5)]


def test_odd_sizes_get_a_row_and_a_column(tmp_path):
    _, _, (image,) = film(tmp_path / 'a.mp4', [np.full((241, 301, 3), 100, np.uint8)], [Fraction(0)], Fraction(5),
                          Fraction(1, 5))
    assert image.shape == (242, 302, 3)
    assert abs(image[-1].mean() - 100) < 3 and abs(image[60:, -1].mean() - 100) < 3


def test_small_frames_are_enlarged(tmp_path):
    """A label over 48 rows could not be read."""
    small = np.zeros((48, 64, 3), np.uint8)
    small[24:] = 200
    _, _, (image,) = film(tmp_path / 'a.mp4', [small], [Fraction(0)], Fraction(5), Fraction(1, 5))
    assert image.shape == (240, 320, 3)
    assert abs(image[130:].mean() - 200) < 3 and image[40:110].mean() < 3


def test_frames_of_another_size(tmp_path):
    with writing(tmp_path / 'a.mp4', Fraction(5)) as writer:
        writer.write(np.zeros((240, 320, 3), np.uint8), Fraction(0), 'left', .5)
        with pytest.raises(ValueError, match='image must be 320x240 pixels as those before, got 240x320'):
            writer.write(np.zeros((320, 240, 3), np.uint8), Fraction(1), 'left', .5)


def test_label_is_over_the_picture():
    grey = np.full((240, 320, 3), 128, np.uint8)
    half, whole = with_label(grey, 'left', .5), with_label(grey, 'left', 1.)
    rows = (half != grey).any((1, 2)).nonzero()[0]
    assert rows.tolist() == list(range(20))  # a strip at the top, and nothing else
    assert (half[:20, :60] > 200).all(2).sum() > 20  # letters
    bar = whole[1].astype(int)
    assert (bar[:, 1] > bar[:, 0] + 20).all()  # a green bar over all of the width
    bar = half[1].astype(int)
    assert (bar[:160, 1] > bar[:160, 0] + 20).all() and (bar[160:, 1] == bar[160:, 0]).all()
    assert (grey == 128).all()
    assert (with_label(grey, 'right', .5) != half).any()


def test_long_label_ends_before_the_number():
    grey = np.zeros((240, 320, 3), np.uint8)
    short, long = (with_label(grey, 'pushing' + ' something' * n, .5) for n in (0, 20))
    assert (short[:20, -40:] == long[:20, -40:]).all() and (short != long).any()


def test_all_frames_of_a_file_and_a_folder(tmp_path):
    path = write_video(tmp_path / 'a.mp4', [LEVEL * i for i in range(12)])
    found = list(all_frames(str(path)))
    assert [round(image.mean() / LEVEL) for image in found] == list(range(12))
    assert found[0].shape == (48, 64, 3)
    folder = tmp_path / 'frames'
    folder.mkdir()
    for i, image in enumerate(found):
        av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format='rgb24').to_image().save(folder / f'{i}.png')
    for a, b in itertools.zip_longest(found, all_frames(str(folder))):
        assert abs(a.astype(int) - b).max() <= 1


def test_all_frames_that_do_not_begin_at_0(tmp_path):
    path = encode(tmp_path / 'a.mkv', [50 + i for i in range(8)])
    assert [round(image.mean() / LEVEL) for image in all_frames(str(path))] == list(range(8))


def test_windows_of_a_live_source():
    """FFmpeg's test pattern comes through its devices as a camera does: without an end, and in real time."""
    with open_camera('testsrc=size=64x48:rate=50,realtime', 'lavfi') as container:
        moments = list(itertools.islice(watch(container, seconds=.4, every=.2, short_side=24), 50))
    assert [moment.time for moment in moments] == [Fraction(i, 50) for i in range(50)]
    windows = [(float(m.time), tuple(m.window.shape)) for m in moments if m.window is not None]
    assert [shape for _, shape in windows] == [(20, 3, 24, 32)] * len(windows)  # 0.4 s, at 24 rows
    assert [time for time, _ in windows] == pytest.approx([.38, .58, .78, .98], abs=.021)
    assert moments[0].image.shape == (48, 64, 3)
    last = next(m for m in reversed(moments) if m.window is not None)
    assert abs(last.window[-1].float().mean() - last.image.mean()) < 2  # the newest frame is its last


def test_no_such_camera():
    with pytest.raises(OSError, match=r"camera '/dev/video99' .* cannot be opened: .*; wanted a camera such as"):
        with open_camera('/dev/video99'):
            pass


def test_no_such_kind_of_device():
    with pytest.raises(ValueError, match="this FFmpeg knows no devices of format 'webcam'"):
        with open_camera('0', 'webcam'):
            pass


def test_device_without_pictures():
    with pytest.raises(ValueError, match=r"camera 'anullsrc' .* gives no pictures"):
        with open_camera('anullsrc', 'lavfi'):
            pass


def test_formats_of_the_systems():
    assert [default_format(name) for name in ('linux', 'darwin', 'win32')] == ['v4l2', 'avfoundation', 'dshow']
