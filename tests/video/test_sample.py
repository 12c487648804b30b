"""Which frames of a video are a clip: as many as there are, in windows, of even and of other clocks, and at random."""
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from videos import LEVEL, RATE, encode, read_levels, write_video

from cmr_layers.video import read_clip, sample_clips, sample_dense, sample_indices, sample_segments
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def is_clip(indices, n, t):
    return len(indices) == t and indices == sorted(indices) and indices[0] >= 0 and indices[-1] < n


class TestSegments:
    @given(n=st.integers(1, 300), t=st.integers(1, 40), seed=st.integers(0, 99))
    def test_one_frame_of_each_segment(self, n, t, seed):
        indices = sample_segments(n, t, seeded(seed))
        assert is_clip(indices, n, t)
        for k, index in enumerate(indices):  # the frame [index, index + 1) meets the segment
            assert Fraction(k * n, t) < index + 1 and index < Fraction((k + 1) * n, t)

    def test_without_a_generator_the_middles(self):
        assert all(sample_segments(n, t) == sample_indices(n, t) for n in range(1, 60) for t in (1, 3, 8, 16))

    @pytest.mark.parametrize('n', [3, 8, 13, 45])
    def test_every_frame_is_drawn_as_often(self, n):
        """The authors' code never draws the last 5 of 45 frames, nor the last 5 of 13."""
        generator, rounds = seeded(), 4000
        counts = Counter(index for _ in range(rounds) for index in sample_segments(n, 8, generator))
        expected = rounds * 8 / n
        assert all(abs(counts[i] - expected) < 5 * expected ** .5 for i in range(n)), counts

    def test_segments_are_independent(self):
        generator = seeded()
        pairs = Counter(tuple(sample_segments(16, 8, generator)[2:4]) for _ in range(4000))
        assert sorted(pairs) == [(4, 6), (4, 7), (5, 6), (5, 7)] and all(850 < count < 1150 for count in pairs.values())

    def test_few_frames_repeat(self):
        drawn = {tuple(sample_segments(3, 8, seeded(seed))) for seed in range(50)}
        assert len(drawn) > 3 and all(set(indices) == {0, 1, 2} for indices in drawn)
        assert sample_segments(1, 8, seeded()) == [0] * 8


class TestDense:
    @given(n=st.integers(1, 300), t=st.integers(1, 20), more=st.integers(0, 80), seed=st.integers(0, 99))
    def test_a_clip_of_even_distance(self, n, t, more, seed):
        for indices in (sample_dense(n, t, t + more), sample_dense(n, t, t + more, seeded(seed))):
            assert is_clip(indices, n, t)
            if n >= t + more:
                assert {b - a for a, b in pairwise(indices)} <= {(t + more) // t}

    @pytest.mark.parametrize('n, t, span, expected', [
        (300, 8, 64, list(range(121, 178, 8))),  # 57 frames from the first to the last one, and 243 others
        (57, 8, 64, list(range(0, 57, 8))),
        (64, 16, 64, list(range(1, 62, 4))),
        (20, 3, 10, [6, 9, 12]),
        (9, 4, 4, [2, 3, 4, 5]),
    ])
    def test_the_middle(self, n, t, span, expected):
        assert sample_dense(n, t, span) == expected
        assert abs(expected[0] - (n - 1 - expected[-1])) <= 1

    def test_every_place_is_drawn_as_often(self):
        generator, rounds = seeded(), 8000
        starts = Counter(sample_dense(64, 8, 64, generator)[0] for _ in range(rounds))
        assert sorted(starts) == list(range(8)) and all(abs(count - 1000) < 150 for count in starts.values())

    def test_every_frame_can_be_drawn(self):
        generator = seeded()
        assert {i for _ in range(2000) for i in sample_dense(100, 8, 64, generator)} == set(range(100))

    def test_a_video_shorter_than_a_clip(self):
        assert sample_dense(56, 8, 64) == sample_indices(56, 8)
        assert sample_dense(56, 8, 64, seeded(3)) == sample_segments(56, 8, seeded(3))
        assert sample_dense(2, 4, 64) == [0, 0, 1, 1]

    def test_wrong_span(self):
        with pytest.raises(ValueError, match='span must be at least num_frames=8, got 7'):
            sample_dense(100, 8, 7)


class TestClips:
    @given(n=st.integers(1, 300), t=st.integers(1, 20), m=st.integers(1, 12), more=st.none() | st.integers(0, 80))
    def test_are_clips(self, n, t, m, more):
        clips = sample_clips(n, t, m, None if more is None else t + more)
        assert len(clips) == m and all(is_clip(indices, n, t) for indices in clips)

    def test_one_clip_is_the_middle(self):
        for n in (1, 5, 60, 64, 300):
            assert sample_clips(n, 8, 1) == [sample_indices(n, 8)]
            assert sample_clips(n, 8, 1, span=64) == [sample_dense(n, 8, 64)]

    def test_clips_share_no_frame(self):
        for n in (16, 17, 45):
            first, second = sample_clips(n, 8, 2)
            assert not set(first) & set(second)
            assert all(a < b for a, b in zip(first, second)) and all(b < a for a, b in zip(first[1:], second))
        assert sorted(i for indices in sample_clips(16, 8, 2) for i in indices) == list(range(16))

    def test_dense_clips_go_from_end_to_end(self):
        clips = sample_clips(300, 8, 10, span=64)
        starts = [indices[0] for indices in clips]
        assert starts == [0, 27, 54, 81, 108, 135, 162, 189, 216, 243] and clips[-1][-1] == 299
        assert all(indices == list(range(start, start + 57, 8)) for start, indices in zip(starts, clips))

    def test_dense_clips_of_a_short_video(self):
        assert sample_clips(20, 8, 3, span=64) == sample_clips(20, 8, 3)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match='num_clips must be a positive int, got 0'):
            sample_clips(100, 8, 0)
        with pytest.raises(ValueError, match='num_frames must be a positive int, got -8'):
            sample_clips(100, -8, 2)
        with pytest.raises(ValueError, match='span must be at least num_frames=8, got 7'):
            sample_clips(100, 8, 2, span=7)


@pytest.mark.parametrize('sample', [
    lambda n, generator: sample_segments(n, 8, generator), lambda n, generator: sample_dense(n, 8, 64, generator)])
def test_only_the_generator_decides(sample):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generator = seeded(5)
    first, second = sample(300, generator), sample(300, generator)
    assert first != second and [sample(300, seeded(5)), sample(300, seeded(5))] == [first, first]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize('sample', [sample_indices, sample_segments, sample_dense, sample_clips])
@pytest.mark.parametrize('arguments, message', [
    ((0, 8), 'num_available must be a positive int, got 0'), ((9, 0), 'num_frames must be a positive int, got 0'),
    ((2.5, 8), 'num_available must be a positive int, got 2.5'),
    ((9, True), 'num_frames must be a positive int, got True')])
def test_wrong_numbers(sample, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(*arguments)
    if sample in (sample_segments, sample_dense):
        with pytest.raises(ValueError, match=message):
            sample(*arguments, generator=seeded())
