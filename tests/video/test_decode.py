"""What decodes: damage, streams, limits, and what is said of the rest."""
import io
import os
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from videos import LEVEL, RATE, encode, grey, packets, read_levels, write_video

from cmr_layers.video import read_clip

av = pytest.importorskip('av')


def test_truncated_file_gives_what_is_left(tmp_path):
    path = write_video(tmp_path / 'cut.mkv', range(0, 30 * LEVEL, LEVEL), 'ffv1')
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    levels = read_levels(read_clip(path, 4))
    assert 0 < levels[0] < levels[-1] < 20


def test_damaged_packets_are_skipped(tmp_path):
    path = write_video(tmp_path / 'junk.avi', range(0, 30 * LEVEL, LEVEL), 'mjpeg', 'yuvj420p')
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third:2 * third] = bytes(third)
    path.write_bytes(data)
    clip = read_clip(path, 4)
    assert clip.frames.shape == (4, 3, 48, 64) and read_levels(clip)[0] < 10


def test_sound_without_pictures(tmp_path):
    path = tmp_path / 'sound.wav'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match='holds no video'):
        read_clip(path)


def test_a_container_without_a_frame_that_decodes(tmp_path, clip30):
    data = bytearray(clip30.read_bytes())
    begin = data.index(b'mdat') + 4
    size = int.from_bytes(data[begin - 8:begin - 4], 'big') - 8
    data[begin:begin + size] = bytes(size)
    path = tmp_path / 'hollow.mp4'
    path.write_bytes(data)
    with pytest.raises(ValueError, match='not a frame of it decodes'):
        read_clip(path)


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


def gif(width, height):
    """The smallest GIF of a size, of one pixel."""
    return (b'GIF89a' + struct.pack('<HH', width, height) + b'\x80\0\0\0\0\0\xff\xff\xff'
            + b'\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0\x3b')


def peak():
    """The most memory this process has had, in MB."""
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1024


class TestLimits:
    def test_a_small_gif_that_says_it_is_huge(self, folder):
        (folder / 'huge.gif').write_bytes(gif(12000, 12000))
        message = r'huge.gif.* has frames of 12000x12000 = 144000000 pixels; wanted at most max_pixels=33554432'
        with pytest.raises(ValueError, match=message):
            read_clip('huge.gif')
        (folder / 'small.gif').write_bytes(gif(12, 12))
        assert read_clip('small.gif', 1).frames.shape == (1, 3, 12, 12)

    @pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='measured on Linux')
    @pytest.mark.parametrize('name, codec', [
        ('huge.mp4', 'libx264'), ('huge.ts', 'libx264'), ('huge.flv', 'libx264'), ('huge.h264', 'libx264'),
        ('huge.mpg', 'mpeg2video'), ('huge.png', 'png'),
    ])
    def test_nothing_is_decoded_before(self, folder, name, codec):
        if codec == 'png':
            path = folder / name
            Image.new('L', (4000, 4000)).save(path)
        else:
            path = write_video(folder / name, [0], codec, size=(4000, 4000))
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # forget the peak
        before = peak()
        with pytest.raises(ValueError, match=r'(4000x4000|too large).* wanted at most max_pixels=65536'):
            read_clip(path, 1, max_pixels=2 ** 16)
        assert peak() - before < 12  # a frame of it is 24 MB
        assert read_clip(path, 1).frames.shape == (1, 3, 4000, 4000)

    def test_of_a_clip(self, folder):
        message = (r'num_frames=8 frames of 64x48 pixels, as .*secret.mp4.* has them, are 24576 pixels; wanted at most '
                   r'max_clip_pixels=24575')
        with pytest.raises(ValueError, match=message):
            read_clip('secret.mp4', 8, max_clip_pixels=8 * 64 * 48 - 1)
        assert read_clip('secret.mp4', 8, max_clip_pixels=8 * 64 * 48).frames.shape == (8, 3, 48, 64)
        with pytest.raises(ValueError, match='wanted at most max_clip_pixels=536870912'):
            read_clip('secret.mp4', 10 ** 9)  # 9 TB

    def test_of_a_frame(self, folder):
        with pytest.raises(ValueError, match='64x48 = 3072 pixels; wanted at most max_pixels=3071'):
            read_clip('secret.mp4', max_pixels=64 * 48 - 1)
        assert read_clip('secret.mp4', 1, max_pixels=64 * 48).frames.shape == (1, 3, 48, 64)
        Image.new('RGB', (64, 48)).save('1.png')
        with pytest.raises(ValueError, match='64x48 = 3072 pixels; wanted at most max_pixels=3071'):
            read_clip(folder, max_pixels=64 * 48 - 1)

    @pytest.mark.parametrize('size', [(256, 192), (2048, 2048)])
    def test_frames_that_grow_on_the_way(self, folder, size):
        """The second is above what FFmpeg itself allows, which is more: it rounds sizes up."""
        small = write_video(folder / 'small.ts', [0] * 3).read_bytes()
        large = write_video(folder / 'large.ts', [80] * 3, size=size).read_bytes()
        (folder / 'grows.ts').write_bytes(small + large)
        with pytest.raises(ValueError, match=rf'({size[0]}x{size[1]}|too large).* wanted at most max_pixels=4000'):
            read_clip('grows.ts', 4, max_pixels=4000)
        clip = read_clip('grows.ts', 4)
        assert clip.frames.shape == (4, 3, 48, 64) and clip.frames[-1].float().mean() == pytest.approx(80, abs=2)

    @pytest.mark.parametrize('name', ['max_pixels', 'max_clip_pixels'])
    @pytest.mark.parametrize('value', [0, -1, 2.5, True, None])
    def test_wrong_limits(self, folder, name, value):
        with pytest.raises(ValueError, match=f'{name} must be a positive int, got {value}'):
            read_clip('secret.mp4', **{name: value})

    def test_a_gif_that_loops_forever_has_its_frames_once(self, folder):
        images = [Image.new('L', (32, 32), i * 40) for i in range(5)]
        images[0].save('loop.gif', save_all=True, append_images=images[1:], loop=0, duration=100)
        images[0].save('loop.png', save_all=True, append_images=images[1:], loop=0, duration=100)
        for name in ('loop.gif', 'loop.png'):
            assert read_clip(name, 5).times == pytest.approx([0, .1, .2, .3, .4])


class TestReasons:
    def test_animated_webp(self, folder):
        images = [Image.new('RGB', (32, 32), (i * 40,) * 3) for i in range(3)]
        images[0].save('moves.webp', save_all=True, append_images=images[1:], duration=100)
        try:
            clip = read_clip('moves.webp', 3)
        except ValueError as error:  # FFmpeg before animated WebP
            assert 'unsupported chunk: ANIM' in str(error) and 'damaged or empty' not in str(error)
        else:
            assert clip.times == pytest.approx([0, .1, .2])

    @pytest.mark.parametrize('name, tag', [('unknown.mp4', b'avc1'), ('unknown.avi', b'H264')])
    def test_unknown_codec(self, folder, name, tag):
        path = write_video(folder / name, [0] * 3)
        path.write_bytes(path.read_bytes().replace(tag, b'zzz1'))
        with pytest.raises(ValueError, match='of a codec that FFmpeg does not know or has no decoder for'):
            read_clip(path)

    def test_what_ffmpeg_says_of_a_damaged_file(self, folder):
        data = bytearray((folder / 'secret.mp4').read_bytes())
        begin = data.index(b'mdat') + 4
        end = begin - 8 + int.from_bytes(data[begin - 8:begin - 4], 'big')
        data[begin:end] = bytes(end - begin)
        (folder / 'hollow.mp4').write_bytes(data)
        message = r'not a frame of it decodes; FFmpeg says: Invalid data found when processing input; \w+'
        with pytest.raises(ValueError, match=message) as caught:
            read_clip('hollow.mp4')
        assert 'whitelist' not in str(caught.value)

    def test_metadata_that_is_not_utf8(self, folder):
        data = io.BytesIO()
        with av.open(data, 'w', format='matroska') as container:
            container.metadata['title'] = 'XXXXXXXX'
            stream = container.add_stream('mpeg4', rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format='rgb24')
            frame.pts, frame.time_base = 0, Fraction(1, RATE)
            for packet in [*stream.encode(frame), *stream.encode()]:
                container.mux(packet)
        latin = data.getvalue().replace(b'XXXXXXXX', b'caf\xe9 \xff\xfe\xfd')
        assert latin != data.getvalue() and read_clip(io.BytesIO(latin), 1).frames.shape == (1, 3, 48, 64)
