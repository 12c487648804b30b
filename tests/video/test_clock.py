"""When a frame is shown, by clocks of all kinds."""
from fractions import Fraction

import pytest
from videos import LEVEL, RATE, encode, grey, read_levels, write_video

from cmr_layers.video import read_clip
from cmr_layers.video.clock import presentation_times

av = pytest.importorskip('av')


def test_a_video_that_does_not_begin_at_zero(tmp_path):
    path = write_video(tmp_path / 'late.mkv', range(0, 30 * LEVEL, LEVEL), first_pts=7 * RATE)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).time == pytest.approx(7)
    clip = read_clip(path, 2, start=1., end=2.)
    assert read_levels(clip) == [12, 17] and clip.times == pytest.approx([1.2, 1.7], abs=.002)


class TestClock:
    @pytest.mark.parametrize('frames_between', [0, 1, 2, 3])
    @pytest.mark.parametrize('name', ['b.avi', 'b.mkv', 'b.mp4', 'b.ts', 'b.flv', 'b.nut', 'b.h264'])
    def test_b_frames(self, tmp_path, name, frames_between):
        path = encode(tmp_path / name, range(20), options={'bf': str(frames_between), 'b-adapt': '0'})
        clip = read_clip(path, 20)
        assert read_levels(clip) == list(range(20))
        rate = 25 if name == 'b.h264' else RATE  # which says nothing of its rate
        assert clip.times == pytest.approx([i / rate for i in range(20)], abs=.0011)

    def test_times_are_those_of_decoding_where_they_step_back_less(self):
        tenth = Fraction(1, 10)
        # what FFmpeg says of H.264 with 2 B-frames in AVI
        times = presentation_times([1, 3, 4, 2, 6, 7, 5], [2, 3, 4, 5, 6, None, None], tenth, tenth)
        assert times == [i * tenth for i in range(7)]

    @pytest.mark.parametrize('pts, expected', [
        ([5, 6, 7], [0, 1, 2]),
        ([-3, -1, 4], [0, 2, 7]),
        ([0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]),
        ([90, 91, 10, 12, 0, 1], [0, 1, 2, 4, 5, 6]),
        ([0, 0, 1, 1], [0, 0, 1, 1]),  # two at a time do not step back
        ([None] * 4, [0, 1, 2, 3]),
        ([4, None, 6, None, None], [0, 1, 2, 3, 4]),
        ([None, 7, 8], [0, 1, 2]),
    ])
    def test_presentation_times(self, pts, expected):
        times = presentation_times(pts, [None] * len(pts), Fraction(1, 3), Fraction(1, 3))
        assert times == [Fraction(t, 3) for t in expected]

    @pytest.mark.parametrize('end', ['ts', 'mpg'])
    def test_joined_recordings(self, tmp_path, end):
        """The clock begins anew. Of TS, FFmpeg flags a packet before the joint as corrupt, frame 18."""
        rate = 25  # of those that MPEG has
        path = tmp_path / f'one.{end}'
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('mpeg2video', rate=rate, options={'bf': '0', 'qscale': '1'})
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            for i in range(20):
                frame = grey(LEVEL * i)
                frame.pts, frame.time_base = i, Fraction(1, rate)
                for packet in stream.encode(frame):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        alone = read_clip(path, 20)
        assert read_levels(alone) == list(range(20))
        joined = tmp_path / f'two.{end}'
        joined.write_bytes(path.read_bytes() * 2)
        shown = [i for i in range(40) if (end, i) != ('ts', 18)]
        clip = read_clip(joined, len(shown))
        assert read_levels(clip) == [i % 20 for i in shown]
        assert clip.times == [i / rate for i in shown]
        late = read_clip(joined, 4, start=1.2, end=1.36)
        assert all(1.2 <= time < 1.36 for time in late.times) and len(set(late.times)) == 4

    @pytest.mark.parametrize('name', ['late.mkv', 'late.ts', 'late.mp4', 'late.nut'])
    @pytest.mark.parametrize('first', [7, 10 ** 6 + 1])
    def test_a_first_frame_that_is_not_at_0(self, tmp_path, name, first):
        """0.7 s to 1.0 s are frames 7, 8 and 9, also where 7.7 - 7.0 is not 0.7."""
        path = encode(tmp_path / name, range(first, first + 30), options={'bf': '0'})
        for k in range(0, 27):
            clip = read_clip(path, 3, start=k / 10, end=(k + 3) / 10)
            assert read_levels(clip) == [k, k + 1, k + 2]
            assert clip.times == [k / 10, (k + 1) / 10, (k + 2) / 10]

    def test_thirds(self, tmp_path):
        path = encode(tmp_path / 'thirds.mp4', range(20), time_base=Fraction(1, 3))
        for k in range(17):
            clip = read_clip(path, 3, start=k / 3, end=(k + 3) / 3)
            assert read_levels(clip) == [k, k + 1, k + 2] and clip.times == [k / 3, (k + 1) / 3, (k + 2) / 3]
