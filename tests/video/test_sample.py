"""Which frames of a video are a clip: as many as there are, in windows, of even and of other clocks."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from videos import LEVEL, RATE, encode, read_levels, write_video

from cmr_layers.video import read_clip, sample_indices
from cmr_layers.video.sample import check_seconds, in_window, sample_times

av = pytest.importorskip('av')


@pytest.mark.parametrize('n, t, expected', [
    (80, 8, [5, 15, 25, 35, 45, 55, 65, 75]),
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    (9, 2, [2, 6]),
    (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
    (1, 4, [0, 0, 0, 0]),
])
def test_sample_indices(n, t, expected):
    assert sample_indices(n, t) == expected


def test_sample_indices_are_those_of_tsm():
    for n in range(1, 60):
        for t in (1, 3, 8, 16):
            tick = n / t
            assert sample_indices(n, t) == [int(tick / 2 + tick * x) for x in range(t)]


@pytest.mark.parametrize('count, expected', [(1, [0] * 8), (3, [0, 0, 0, 1, 1, 2, 2, 2]), (8, list(range(8)))])
def test_few_frames(tmp_path, count, expected):
    path = write_video(tmp_path / 'short.mp4', range(0, count * LEVEL, LEVEL))
    assert read_levels(read_clip(path, num_frames=8)) == expected


@pytest.mark.parametrize('start, end, expected', [
    (1., 2., [12, 17]),  # frames 10 to 19: the end is not included
    (None, 1., [2, 7]),
    (2., None, [22, 27]),
    (1.45, 1.55, [15, 15]),
    (0, 100, [7, 22]),
])
def test_window(clip30, start, end, expected):
    clip = read_clip(clip30, 2, start, end)
    assert read_levels(clip) == expected
    assert clip.times == pytest.approx([i / RATE for i in expected])


class TestWindow:
    @pytest.mark.parametrize('kind', [float, np.float64, np.float32, np.float16, Fraction])
    def test_kinds_of_numbers(self, tmp_path, kind):
        path = encode(tmp_path / 'clip.mp4', range(20))
        for k in (0, 1, 3, 7, 11):
            start, end = ((Fraction(i, 10) if kind is Fraction else kind(i / 10)) for i in (k, k + 2))
            assert read_levels(read_clip(path, 2, start, end)) == [k, k + 1]

    @pytest.mark.parametrize('value', [
        1, np.int64(1), np.uint8(1), np.float32(1), Fraction(1), torch.tensor(1), np.array(1.)])
    def test_whole_seconds(self, tmp_path, value):
        path = encode(tmp_path / 'clip.mp4', range(20))
        assert read_levels(read_clip(path, 2, start=value)) == [12, 17]
        assert read_levels(read_clip(path, 2, end=value)) == [2, 7]

    @pytest.mark.parametrize('value', [
        True, np.True_, '1', b'1', 1j, np.complex64(1), -1, -.1, float('nan'), float('inf'), np.float32('nan'),
        np.float32('inf'), [1], np.array([1., 2.]), 10 ** 400, torch.tensor([1., 2.]), object(),
    ])
    def test_what_is_no_number_of_seconds(self, value):
        with pytest.raises(ValueError, match='start must be a number of seconds >= 0, got '):
            read_clip('no.mp4', start=value)

    def test_bounds(self):
        tenth = Fraction(1, 10)
        assert in_window(tenth, check_seconds('start', .1), .2) and not in_window(tenth, 0., .1)
        assert in_window(tenth, np.float32(.1), np.float32(.2)) and not in_window(tenth, 0., np.float32(.1))
        assert in_window(Fraction(5, 3), 5 / 3, 2.) and not in_window(Fraction(5, 3), 0., 5 / 3)


class TestEven:
    STAMPS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 18, 28, 38)  # 8 frames in 0.8 s, then one a second

    @pytest.mark.parametrize('name', ['vary.mkv', 'vary.mp4', 'vary.nut'])
    def test_variable_rate(self, tmp_path, name):
        path = encode(tmp_path / name, self.STAMPS)
        frames, time = read_clip(path, 4), read_clip(path, 4, even='time')
        assert read_levels(frames) == [1, 4, 7, 10] and frames.times == pytest.approx([.1, .4, .7, 2.8])
        assert read_levels(time) == [4, 8, 9, 10]  # at .49, 1.46, 2.44 and 3.41 s of 3.9
        assert time.times == pytest.approx([.4, .8, 1.8, 2.8])

    def test_window(self, tmp_path):
        path = encode(tmp_path / 'vary.mkv', self.STAMPS)
        assert read_levels(read_clip(path, 2, start=.5, end=2.8, even='time')) == [8, 9]  # at 1.075 and 2.225 s
        assert read_levels(read_clip(path, 2, start=.5, end=.9, even='time')) == [6, 8]  # .6 and .8, not 1.4

    def test_a_gif_with_pauses(self, tmp_path):
        """The pause of the last frame counts."""
        images = [Image.new('L', (32, 32), i * LEVEL) for i in range(3)]
        images[0].save(tmp_path / 'pause.gif', save_all=True, append_images=images[1:], duration=[100, 100, 800])
        assert read_levels(read_clip(tmp_path / 'pause.gif', 5)) == [0, 0, 1, 2, 2]
        assert read_levels(read_clip(tmp_path / 'pause.gif', 5, even='time')) == [1, 2, 2, 2, 2]

    def test_at_a_constant_rate_both_are_the_same(self, tmp_path):
        for n in range(1, 30):
            times = [Fraction(i, 7) for i in range(n)]
            for t in (1, 3, 8):
                assert sample_times(times, Fraction(n, 7), t) == sample_indices(n, t)
        path = encode(tmp_path / 'clip.mp4', range(20))
        assert read_clip(path, 7, even='time').times == read_clip(path, 7).times

    def test_wrong_even(self):
        with pytest.raises(ValueError, match="even must be one of 'frames', 'time', got 'seconds'"):
            read_clip('no.mp4', even='seconds')
