"""Which frames of a video are a clip, and how they are shown: clocks, windows, streams, display matrices, damage."""
import io
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from test_video import LEVEL, RATE, read_levels, write_video

from cmr_layers.video import read_clip
from cmr_layers.video.clock import presentation_times
from cmr_layers.video.sample import check_seconds, in_window, sample_indices, sample_times

av = pytest.importorskip('av')


def grey(level, size=(64, 48)):
    return av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format='rgb24')


def encode(path, stamps, codec='libx264', time_base=Fraction(1, RATE), options=None, paint=grey):
    """A video whose frame i is grey of level LEVEL * i and shown at stamps[i] ticks."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        stream.codec_context.time_base = time_base
        for i, stamp in enumerate(stamps):
            frame = paint(LEVEL * i)
            frame.pts, frame.time_base = stamp, time_base
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


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


def write_streams(path, streams):
    """A file with streams (codec, level, size, disposition, number of frames) or the sound 'aac'."""
    with av.open(str(path), 'w') as container:
        made = []
        for spec in streams:
            if spec == 'aac':
                made.append(container.add_stream('aac', rate=8000, layout='mono'))
                continue
            codec, _, size, disposition, _ = spec
            stream = container.add_stream(codec, rate=RATE)
            stream.width, stream.height = size
            stream.pix_fmt = {'mjpeg': 'yuvj420p', 'png': 'rgb24'}.get(codec, 'yuv420p')
            stream.disposition = disposition
            made.append(stream)
        packets = []
        for stream, spec in zip(made, streams):
            if spec == 'aac':
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format='fltp', layout='mono')
                frame.sample_rate = 8000
                packets += [*stream.encode(frame), *stream.encode()]
                continue
            _, level, size, _, count = spec
            for i in range(count):
                frame = grey(level, size)
                frame.pts, frame.time_base = i, Fraction(1, RATE)
                packets += stream.encode(frame)
            packets += stream.encode()
        for packet in packets:
            container.mux(packet)
    return path


class TestStreams:
    COVER = ('mjpeg', 200, (160, 160), 1 << 10, 1)
    FILM = ('libx264', 80, (64, 48), 0, 10)

    @pytest.mark.parametrize('first', [True, False])
    def test_a_cover_is_not_the_film(self, tmp_path, first):
        path = write_streams(
            tmp_path / 'film.mp4', [self.COVER, self.FILM, 'aac'] if first else [self.FILM, 'aac', self.COVER])
        clip = read_clip(path, 4)
        assert clip.frames.shape == (4, 3, 48, 64) and clip.frames.float().mean() == pytest.approx(80, abs=2)
        with av.open(str(path)) as container:
            order = [stream.width for stream in container.streams.video]
        cover = read_clip(path, 1, stream=order.index(160))
        assert cover.frames.shape == (1, 3, 160, 160) and cover.frames.float().mean() == pytest.approx(200, abs=2)

    def test_an_attachment_is_a_cover(self, tmp_path):
        """Matroska has covers as attachments, which FFmpeg lists as streams."""
        cover, path = io.BytesIO(), tmp_path / 'film.mkv'
        Image.new('RGB', (160, 160), (200,) * 3).save(cover, 'jpeg')
        with av.open(str(path), 'w') as container:
            if not hasattr(container, 'add_attachment'):
                pytest.skip('this PyAV attaches nothing')
            container.add_attachment('cover.jpg', 'image/jpeg', cover.getvalue())
            stream = container.add_stream('libx264', rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            frame = grey(80)
            frame.pts, frame.time_base = 0, Fraction(1, RATE)
            container.mux([*stream.encode(frame), *stream.encode()])
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 2
        clip = read_clip(path, 1)
        assert clip.frames.shape == (1, 3, 48, 64) and clip.frames.float().mean() == pytest.approx(80, abs=2)

    def test_a_picture_that_is_not_flagged_is_not_the_default_film(self, tmp_path):
        path = write_streams(tmp_path / 'film.mkv', [
            ('mjpeg', 200, (160, 160), 0, 1), ('libx264', 80, (64, 48), 1, 10)])
        assert read_clip(path, 2).frames.shape == (2, 3, 48, 64)

    def test_a_song_with_a_cover(self, tmp_path):
        path = write_streams(tmp_path / 'song.mp4', ['aac', self.COVER])
        with pytest.raises(ValueError, match=r'song.mp4.* holds no video but cover art .*; wanted .* or stream=0'):
            read_clip(path)
        assert read_clip(path, 1, stream=0).frames.shape == (1, 3, 160, 160)

    def test_the_largest_of_several(self, tmp_path):
        path = write_streams(tmp_path / 'many.ts', [
            ('mpeg2video', 40, (64, 48), 0, 5), ('mpeg2video', 80, (128, 96), 0, 5),
            ('mpeg2video', 120, (32, 32), 0, 5)])
        assert read_clip(path, 2).frames.shape == (2, 3, 96, 128)
        for i, size in enumerate([(48, 64), (96, 128), (32, 32)]):
            clip = read_clip(path, 2, stream=i)
            assert clip.frames.shape[2:] == size and clip.frames.float().mean() == pytest.approx(40 * (i + 1), abs=2)

    def test_the_default_before_the_largest(self, tmp_path):
        path = write_streams(tmp_path / 'many.mkv', [
            ('libx264', 40, (128, 96), 0, 5), ('libx264', 80, (64, 48), 1, 5)])
        assert read_clip(path, 2).frames.shape == (2, 3, 48, 64)

    def test_wrong_stream(self, tmp_path):
        path = write_streams(tmp_path / 'one.mp4', [self.FILM])
        with pytest.raises(ValueError, match=r'stream must be one of the 1 video streams of .*one\.mp4.*, got 1'):
            read_clip(path, stream=1)
        for value in (-1, True, 0., '0'):
            with pytest.raises(ValueError, match='stream must be an int >= 0, got'):
                read_clip(path, stream=value)


# Numbers a, b, c, d of a display matrix, and where it shows the upper left corner
MATRICES = {
    'upright': ((1, 0, 0, 1), 'upper left'),
    'clockwise': ((0, 1, -1, 0), 'upper right'),
    'upside down': ((-1, 0, 0, -1), 'lower right'),
    'counterclockwise': ((0, -1, 1, 0), 'lower left'),
    'mirrored': ((-1, 0, 0, 1), 'upper right'),
    'flipped': ((1, 0, 0, -1), 'lower left'),
    'transposed': ((0, 1, 1, 0), 'upper left'),
    'transposed the other way': ((0, -1, -1, 0), 'lower right'),
    'by 10 degrees': ((.985, .174, -.174, .985), 'upper left'),
    'by 80 degrees': ((.174, .985, -.985, .174), 'upper right'),
    'nonsense': ((0, 0, 0, 0), 'upper left'),
}


def with_matrix(path, matrix):
    """Write a display matrix into an MP4's track header."""
    data = bytearray(path.read_bytes())
    unit = struct.pack('>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(unit, data.index(b'tkhd'))
    a, b, c, d = (round(number * (1 << 16)) for number in matrix)
    data[at:at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('name', MATRICES)
def test_display_matrix(tmp_path, name):
    def paint(image, index):
        image[:8, :8] = 255
        image[:4, 32:] = 128  # a bar beside it: the right end of the upper edge is no mirror of itself

    matrix, corner = MATRICES[name]
    path = with_matrix(write_video(tmp_path / 'phone.mp4', [0] * 3, paint=paint), matrix)
    frame = read_clip(path, 1).frames[0].float().mean(0).numpy()
    across = abs(matrix[1]) > abs(matrix[0])
    assert frame.shape == ((64, 48) if across else (48, 64))
    vertical, horizontal = corner.split()
    rows = slice(0, 6) if vertical == 'upper' else slice(-6, None)
    columns = slice(0, 6) if horizontal == 'left' else slice(-6, None)
    assert frame[rows, columns].mean() > 240
    # put back: pixel (y, x) of the file is shown where the matrix sends it
    back = frame.T if across else frame
    if (matrix[1] if across else matrix[0]) < 0:
        back = back[:, ::-1]
    if (matrix[2] if across else matrix[3]) < 0:
        back = back[::-1]
    assert back[:6, :6].mean() > 240 and 100 < back[:2, 40:].mean() < 150 and back[20:].mean() < 10


def test_a_video_that_turns_and_changes_its_size_keeps_the_clips(tmp_path):
    small = write_video(tmp_path / 'small.ts', [80] * 4, size=(64, 48))
    large = write_video(tmp_path / 'large.ts', [160] * 4, size=(128, 160))
    path = tmp_path / 'both.ts'
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read_clip(path, 4)
    assert clip.frames.shape == (4, 3, 48, 64) and clip.frames.is_contiguous()
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([80, 80, 160, 160], abs=2)


def packets(path):
    """Place, size and flag of each packet."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size, packet.is_corrupt) for packet in container.demux(video=0) if packet.size]


class TestDamage:
    @staticmethod
    def noisy(level):
        """So much noise that a frame takes many packets of TS, and a mean that tells which it is."""
        noise = np.random.default_rng(level).integers(-8, 8, (48, 64, 3))
        return av.VideoFrame.from_ndarray(np.clip(level + noise, 0, 255).astype(np.uint8), format='rgb24')

    def noisy_video(self, path, **options):
        return encode(path, range(2, 22), 'mpeg2video', options={'qmin': '1', 'qmax': '1', **options}, paint=self.noisy)

    def test_frames_flagged_as_corrupt_are_skipped(self, tmp_path):
        path = self.noisy_video(tmp_path / 'noise.avi', g='1')
        data = bytearray(path.read_bytes())
        for at, size, _ in packets(path)[5:12:3]:
            data[at + size // 2:at + size] = bytes(size - size // 2)
        path.write_bytes(data)
        with av.open(str(path)) as container:
            flags = [frame.is_corrupt for frame in container.decode(video=0)]
        assert [i for i, corrupt in enumerate(flags) if corrupt] == [5, 8, 11]
        good = [i for i in range(20) if i not in (5, 8, 11)]
        clip = read_clip(path, 17)
        assert clip.times == pytest.approx([i / RATE for i in good])
        assert read_levels(clip) == good

    def test_packets_flagged_as_corrupt_are_skipped(self, tmp_path):
        """A packet of TS that is missing, as its counter tells."""
        path = self.noisy_video(tmp_path / 'hole.ts', g='1')
        data, (at, *_) = path.read_bytes(), packets(path)[7]
        path.write_bytes(data[:at + 188 * 2] + data[at + 188 * 3:])
        flagged = [i for i, (_, _, corrupt) in enumerate(packets(path)) if corrupt]
        assert flagged == [6]  # FFmpeg's parser flags the packet before
        clip = read_clip(path, 18)
        assert read_levels(clip) == [i for i in range(20) if i not in (6, 7)]  # 7 is flagged by the decoder

    def test_nothing_but_corrupt_packets(self, tmp_path):
        path = self.noisy_video(tmp_path / 'holes.ts', g='1')
        data = bytearray(path.read_bytes())
        for at, *_ in reversed(packets(path)):
            del data[at + 188 * 2:at + 188 * 3]
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r'not a frame of it decodes \(20 are flagged as corrupt\); FFmpeg says'):
            read_clip(path)

    @pytest.mark.parametrize('whole', [6, 12, 27])
    def test_frames_before_a_cut_are_all_there(self, tmp_path, whole):
        """Those too that the decoder still holds where the file ends."""
        path = encode(tmp_path / 'cut.mkv', range(30), options={'bf': '3', 'b-adapt': '0', 'g': '10'})
        at, *_ = packets(path)[whole]
        path.write_bytes(path.read_bytes()[:at])
        assert len(set(read_clip(path, 30).times)) == whole
