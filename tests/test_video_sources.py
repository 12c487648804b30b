"""What read_clip opens and what it refuses: files of every kind, names that mean something to FFmpeg, limits."""
import http.server
import io
import os
import socket
import struct
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from test_video import LEVEL, RATE, read_levels, write_video

from cmr_layers.video import read_clip
from cmr_layers.video.source import Reader

av = pytest.importorskip('av')

FFCONCAT = 'ffconcat version 1.0\nfile {path}\n'
HLS = '#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{path}\n'
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT3S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{path}</BaseURL>'
    '</Representation></AdaptationSet></Period></MPD>')
SDP = 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n'
SCRIPTS = {
    'ffconcat': FFCONCAT,
    'm3u8': HLS + '#EXT-X-ENDLIST\n',
    'endless m3u8': HLS,
    'm3u8 of itself': HLS.format(path='{own}') + '#EXT-X-ENDLIST\n',
    'ffconcat of itself': FFCONCAT.format(path='{own}'),
    'dash': DASH,
    'sdp': SDP,
    'xspf': '<?xml version="1.0"?><playlist version="1"><trackList><track><location>{path}</location></track>'
            '</trackList></playlist>',
    'asx': '<asx version="3.0"><entry><ref href="{path}"/></entry></asx>',
    'avisynth': 'AviSource("{path}")\n',
    'quicktime text reference': '<?xml version="1.0"?><?quicktime type="application/x-quicktime-media-link"?>'
                                '<embed src="{path}" />',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with secret.mp4 in it."""
    monkeypatch.chdir(tmp_path)
    return write_video(tmp_path / 'secret.mp4', range(0, 10 * LEVEL, LEVEL)).parent


@pytest.fixture
def server():
    """A web server on this machine, and the requests it got."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    requests = []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(.01,))
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}', requests
        running.shutdown()
        thread.join()


@pytest.fixture
def opened(monkeypatch):
    """Paths that Python opens. What FFmpeg opens by itself is seen by its access time or its frames only."""
    paths, active = [], [True]

    def hook(event, args):
        if active[0] and event == 'open':
            paths.append(args[0])

    sys.addaudithook(hook)
    yield paths
    active[0] = False


@pytest.mark.timeout(20)
@pytest.mark.parametrize('end', ['mp4', 'm3u8', 'ffconcat', 'txt'])
@pytest.mark.parametrize('kind', SCRIPTS)
def test_playlists_and_scripts_open_nothing(folder, server, kind, end):
    address, requests = server
    for target in (folder / 'secret.mp4', 'secret.mp4', f'file:{folder / "secret.mp4"}', f'{address}/a.mp4'):
        path = folder / f'list.{end}'
        path.write_text(SCRIPTS[kind].format(path=target, own=path))
        with pytest.raises(ValueError, match=r'source=.*list\..* is not a video that FFmpeg can read'):
            read_clip(path, 2)
    assert requests == []


def test_a_script_says_what_is_refused(folder):
    (folder / 'x.mp4').write_text(FFCONCAT.format(path=folder / 'secret.mp4'))
    with pytest.raises(ValueError, match='playlists, scripts and other formats that refer to more files are refused'):
        read_clip(folder / 'x.mp4')


@pytest.mark.parametrize('name', [
    'file:secret.mp4', 'concat:secret.mp4|secret.mp4', '{address}/a.mp4', 'tcp://127.0.0.1:1', 'frame%d.png', '-',
    'pipe:0', 'data:video/mp4;base64,AAAA', 'lavfi:color', 'subfile,,start,0,end,0,,:secret.mp4', 'async:secret.mp4',
])
def test_a_name_is_no_address(folder, server, name):
    address, requests = server
    Image.new('RGB', (8, 8)).save(folder / 'frame1.png')
    with pytest.raises(FileNotFoundError, match=r'source=.* does not exist; wanted a video file'):
        read_clip(name.format(address=address))
    assert requests == []


@pytest.mark.parametrize('name', [
    'a:b.mp4', 'file:x', 'http:x.mp4', 'frame%d.mp4', 'concat:a|b', '-', 'clip', 'é\u4e2d.mp4'])
def test_relative_names_that_mean_something_to_ffmpeg(folder, name):
    (folder / name).write_bytes((folder / 'secret.mp4').read_bytes())
    assert read_levels(read_clip(name, 5)) == [1, 3, 5, 7, 9]
    assert read_levels(read_clip(os.fsencode(name), 5)) == [1, 3, 5, 7, 9]


def test_a_file_is_opened_once_and_no_other(folder, opened):
    opened.clear()
    read_clip('secret.mp4', 2)
    assert opened.count('secret.mp4') == 1 and not any('secret' in str(path) for path in opened if path != 'secret.mp4')


def test_a_movie_that_refers_to_another_file(folder):
    """The data reference of an MP4 names another file, and the frames are not in this one."""
    data = bytearray((folder / 'secret.mp4').read_bytes())
    at = data.index(b'url \0\0\0\1') - 4
    alias = b'alis' + bytes(4) + bytes(150) + struct.pack('>hh', 2, 11) + b'/secret.mp4\0' + struct.pack('>hh', -1, 0)
    reference = struct.pack('>I', len(alias) + 4) + alias
    grown = len(reference) - 12
    data[at:at + 12] = reference
    for name in (b'dref', b'dinf', b'minf', b'mdia', b'trak', b'moov'):  # the boxes around it
        start = data.rindex(name, 0, at) - 4
        data[start:start + 4] = struct.pack('>I', struct.unpack('>I', data[start:start + 4])[0] + grown)
    media = data.index(b'mdat')
    data[media + 4:media + 400] = bytes(396)
    (folder / 'alias.mov').write_bytes(data)
    with pytest.raises(ValueError, match=r'source=.*alias\.mov'):
        read_clip(folder / 'alias.mov')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no FIFOs here')
@pytest.mark.timeout(20)
def test_what_is_no_regular_file(folder):
    os.mkfifo('fifo.mp4')
    os.symlink('fifo.mp4', 'link.mp4')
    for name in ('fifo.mp4', 'link.mp4'):
        with pytest.raises(ValueError, match=rf'source=.{name}. is not a regular file but a pipe'):
            read_clip(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind('socket.mp4')
        with pytest.raises(ValueError, match='is not a regular file but a socket'):
            read_clip('socket.mp4')
    with pytest.raises(ValueError, match='is not a regular file but a device'):
        read_clip('/dev/zero')
    with open('/dev/zero', 'rb') as file, pytest.raises(ValueError, match="zero'> is not a regular file but a device"):
        read_clip(file)
    reading, writing = os.pipe()
    with open(reading, 'rb') as file, open(writing, 'wb'):
        with pytest.raises(ValueError, match='is not a regular file but a pipe'):
            read_clip(file)


def test_a_link_to_a_file(folder):
    os.symlink('secret.mp4', 'link.mp4')
    assert read_levels(read_clip('link.mp4', 2)) == [2, 7]


@pytest.mark.parametrize('source, error, message', [
    ('no/such.mp4', FileNotFoundError, 'does not exist'),
    ('secret.mp4/x.mp4', FileNotFoundError, 'does not exist'),
    ('', FileNotFoundError, "source='' does not exist"),
    ('a\0b', ValueError, 'is no path: embedded null'),
    ('x' * 5000, OSError, 'cannot be opened: File name too long'),
    (7, TypeError, 'source must be a path or an open binary file, got 7'),
    (None, TypeError, 'source must be a path or an open binary file, got None'),
    (io.StringIO('x'), TypeError, 'source must be a path or an open binary file'),
])
def test_wrong_sources(folder, source, error, message):
    with pytest.raises(error, match=message):
        read_clip(source)


def test_open_files_and_bytes(folder):
    data = (folder / 'secret.mp4').read_bytes()
    memory = io.BytesIO(data)
    memory.seek(7)
    with open('secret.mp4', 'rb') as file, open('secret.mp4', 'rb', buffering=0) as raw:
        for source in (memory, file, raw):
            place = source.tell()
            clip = read_clip(source, 5, start=.2)
            assert read_levels(clip) == [2, 4, 6, 7, 9] and clip.times == pytest.approx([.2, .4, .6, .7, .9])
            assert not source.closed and source.tell() == place
    with pytest.raises(ValueError, match='source=<BytesIO> is not a video'):
        read_clip(io.BytesIO(b'no video'))
    with pytest.raises(ValueError, match='source=<BytesIO> is not a video'):
        read_clip(io.BytesIO())


class Odd(io.BytesIO):
    """A file that is none."""
    def read(self, size=-1):
        return super().read(size) + b'more'


class Text(io.BytesIO):
    def read(self, size=-1):
        return 'x'


class Stream(io.BytesIO):
    def seek(self, *args):
        raise io.UnsupportedOperation('seek')


@pytest.mark.parametrize('kind, error, message', [
    (Odd, TypeError, r'source=<Odd> must be a binary file; read\(\d+\) returned \d+ bytes'),  # PyAV would copy them all
    (Text, TypeError, r'source=<Text> must be a binary file; read\(\d+\) returned str'),
])
def test_files_that_are_none(folder, kind, error, message):
    with pytest.raises(error, match=message):
        read_clip(kind((folder / 'secret.mp4').read_bytes()))


def test_a_file_that_cannot_seek(folder):
    with pytest.raises(ValueError, match='source=<Stream> must be a file that can seek'):
        Reader(Stream(b'x'), 'source=<Stream>')


def test_a_file_that_grows(folder):
    """The size is that at the time of opening: a file that is written to while it is read has an end."""
    with open('grows', 'w+b') as file:
        file.write(b'0123')
        reader = Reader(file, 'source')
        file.seek(0, os.SEEK_END)
        file.write(b'4567')
        reader.seek(0)
        assert reader.read(100) == b'0123' and reader.read(100) == b''
        assert reader.seek(-1) == -1 and reader.seek(-1, os.SEEK_END) == 3 and reader.seek(-1, os.SEEK_CUR) == 2


def test_a_disk_that_fails_is_no_damaged_video(folder):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 100_000:
                raise OSError(5, 'Input/output error')
            return super().read(size)

    with pytest.raises(OSError, match='Input/output error'):
        read_clip(Broken(write_video(folder / 'long.mkv', [0] * 200, 'rawvideo').read_bytes()))


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
        (folder / 'frames/1.png').write_text(FFCONCAT.format(path=folder / 'secret.mp4'))
        with pytest.raises(ValueError, match='is not a video'):
            read_clip(folder / 'frames')


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

    @pytest.mark.parametrize('count', [3000, 10 ** 7, 2 ** 32 - 1])
    def test_a_small_movie_that_says_it_has_many_frames(self, folder, count):
        """FFmpeg would take 70 bytes for each."""
        data = bytearray((folder / 'secret.mp4').read_bytes())
        at = data.index(b'stsz') + 8
        data[at:at + 8] = struct.pack('>II', 1, count)
        (folder / 'many.mp4').write_bytes(data)
        message = rf'many.mp4.* is damaged: it declares {count} samples in {len(data)} bytes'
        assert len(data) < 3000
        with pytest.raises(ValueError, match=message):
            read_clip('many.mp4')

    def test_a_fragment_that_says_it_has_many_frames(self, folder):
        fragmented = io.BytesIO()
        options = {'movflags': 'frag_keyframe+empty_moov+default_base_moof'}
        with av.open(fragmented, 'w', format='mp4', options=options) as container:
            stream = container.add_stream('libx264', rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            for i in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), LEVEL * i, np.uint8), format='rgb24')
                frame.pts, frame.time_base = i, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert read_levels(read_clip(fragmented, 5)) == [1, 3, 5, 7, 9]
        data = bytearray(fragmented.getvalue())
        at = data.index(b'trun') + 4
        data[at:at + 8] = struct.pack('>II', 1, 10 ** 7)
        with pytest.raises(ValueError, match='it declares 10000000 samples in'):
            read_clip(io.BytesIO(data))

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize('data', [
        struct.pack('>I4s', 8, b'moov') * 2000,
        b''.join(struct.pack('>I4s', 8 * (2000 - i), b'moov') for i in range(2000)),
        struct.pack('>I4sQ', 1, b'moov', 0) * 20, struct.pack('>I4sQ', 1, b'moov', 2 ** 64 - 1) * 20,
        struct.pack('>I4s', 0, b'trak') * 20, struct.pack('>I4s', 24, b'stsz') + bytes(3),
    ])
    def test_boxes_in_boxes(self, data):
        with pytest.raises(ValueError, match='is not a video'):
            read_clip(io.BytesIO(struct.pack('>I4s', 8, b'ftyp') + data))

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
