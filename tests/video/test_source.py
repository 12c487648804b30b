"""What read_clip opens and what it refuses: files of every kind, names that mean something to FFmpeg."""
import io
import os
import socket

import pytest
from PIL import Image
from videos import read_levels, write_video

from cmr_layers.video import read_clip
from cmr_layers.video.source import Reader

av = pytest.importorskip('av')


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'source=.*nowhere\.mp4.* does not exist; wanted a video file'):
        read_clip(tmp_path / 'nowhere.mp4')


@pytest.mark.parametrize('name, content', [
    ('empty.mp4', b''),
    ('noise.mp4', bytes(range(256)) * 40),
    ('text.mp4', b'not a video\n' * 50),
    ('text.txt', b'not a video\n' * 50),  # FFmpeg would show it
    ('code.py', b'import this\n'),
])
def test_not_a_video(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'source=.*{name}.* is not a video') as caught:
        read_clip(path)
    assert type(caught.value) is ValueError


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
