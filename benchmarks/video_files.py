"""Read some 400 files of every kind, whole, damaged and hostile, each under a limit of time and memory.

    python -m benchmarks.video_files --out benchmarks/results/video_files.json

It makes the files itself. Each is read by ``read_clip`` in another process, which has SECONDS and may grow by
MEGABYTES; more of either, a crash, a wrong frame or an exception other than a ValueError or an OSError is a failure.
"""
import argparse
import collections
import io
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.machine import describe, result_file

SECONDS = 10
MEGABYTES = 192
FRAMES, LEVEL, SIZE = 20, 10, (64, 48)  # frame i of a video is grey of level LEVEL * i
READ, REFUSED, EITHER = 'read', 'refused', 'either'

VIDEOS = [
    ('libx264', 'yuv420p', 'mp4 mov mkv avi ts flv nut h264 m2ts 3gp'), ('libx265', 'yuv420p', 'mp4 mkv ts hevc'),
    ('mpeg4', 'yuv420p', 'mp4 avi mkv m4v'), ('mpeg2video', 'yuv420p', 'mpg ts mkv m2v vob'),
    ('mpeg1video', 'yuv420p', 'mpg'),
    ('libvpx', 'yuv420p', 'webm ivf'), ('libvpx-vp9', 'yuv420p', 'webm mp4 ivf'), ('libaom-av1', 'yuv420p', 'mkv'),
    ('libsvtav1', 'yuv420p', 'mp4'), ('mjpeg', 'yuvj420p', 'avi mov mjpeg'), ('ffv1', 'yuv420p', 'mkv avi'),
    ('huffyuv', 'yuv422p', 'avi'), ('rawvideo', 'yuv420p', 'avi nut'), ('wmv2', 'yuv420p', 'asf wmv'),
    ('flv', 'yuv420p', 'flv'), ('prores_ks', 'yuv422p10le', 'mov'), ('qtrle', 'rgb24', 'mov'), ('png', 'rgb24', 'mov'),
    ('gif', 'gray', 'gif'), ('apng', 'rgb24', 'apng'), ('wrapped_avframe', 'yuv420p', 'y4m'),
    ('libtheora', 'yuv420p', 'ogv'),
]
SCRIPTS = {
    'ffconcat': 'ffconcat version 1.0\nfile {}\n',
    'm3u8': '#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n',
    'endless': '#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n',
    'mpd': '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
           'mediaPresentationDuration="PT3S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
           'bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    'sdp': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns={}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n'
           'a=rtpmap:96 H264/90000\n',
    'xspf': '<?xml version="1.0"?><playlist><trackList><track><location>{}</location></track></trackList></playlist>',
}


class Case(NamedTuple):
    """A file, what kind of file, and whether it has to be read, to be refused, or may be either."""
    kind: str
    path: Path
    wanted: str
    frames: int = FRAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=result_file, help='JSON file to write')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    with tempfile.TemporaryDirectory() as folder:
        results = run(list(make(Path(folder))))
    results = {**describe('av', 'numpy', 'pillow'), **results}
    for kind, counts in results['kinds'].items():
        print(f'{kind:24}', ', '.join(f'{count} {outcome}' for outcome, count in counts.items()))
    print(f'{results["files"]} files, at most {results["seconds, at most"]} s and {results["megabytes, at most"]} MB')
    for failure in results['failures']:
        print('FAILED', failure)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + '\n')
    sys.exit(bool(results['failures']))


def run(cases: list[Case]) -> dict[str, Any]:
    """Read every file in another process, and count what becomes of it."""
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures, seconds, megabytes = [], 0., 0.
    worker = Worker()
    for case in cases:
        answer = worker.read(case.path)
        if answer is None:
            worker.kill()
            worker = Worker()
            answer = {'outcome': 'crash or hang', 'seconds': SECONDS, 'megabytes': 0}
        outcome = answer['outcome']
        good = outcome in {READ: (READ,), REFUSED: (REFUSED,), EITHER: (READ, REFUSED)}[case.wanted]
        if case.wanted == READ and outcome == READ:
            good = all(abs(level - i * LEVEL) < 6 for level, i in zip(answer['levels'], expected(case.frames)))
        elif case.kind == 'cut' and outcome == READ:  # what is left, in its order
            good = answer['levels'] == sorted(answer['levels'])
        good = good and answer['megabytes'] < MEGABYTES
        kinds[case.kind][outcome] += 1
        seconds, megabytes = max(seconds, answer['seconds']), max(megabytes, answer['megabytes'])
        if not good:
            failures.append({'file': case.path.name, 'kind': case.kind, 'wanted': case.wanted, **answer})
    worker.kill()
    return {
        'files': len(cases), 'limits': {'seconds': SECONDS, 'megabytes': MEGABYTES},
        'seconds, at most': round(seconds, 2), 'megabytes, at most': round(megabytes), 'failures': failures,
        'kinds': {kind: dict(sorted(counts.items())) for kind, counts in kinds.items()},
    }


def expected(frames: int) -> list[int]:
    """The frames of a clip of 4."""
    return [(2 * i + 1) * frames // 8 for i in range(4)]


class Worker:
    """A process that reads one file after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.video_files', '--worker'], cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it has imported everything

    def read(self, path: Path) -> dict[str, Any] | None:
        """What the process says; None if it dies or takes too long."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(os.fsencode(path) + b'\n')
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else b''
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def work() -> None:
    """Read the files whose names come in, and say what became of each."""
    import resource

    from cmr_layers.video import read_clip

    # beyond what it needs now, so that a file cannot take the machine down
    limit = status('VmSize') + 8192
    resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20))
    print('ready', flush=True)
    for line in sys.stdin.buffer:
        Path('/proc/self/clear_refs').write_text('5')  # the peak begins here
        before, began = status('VmRSS'), time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            clip = read_clip(line.rstrip(b'\n'), 4)
            answer = {'outcome': READ, 'levels': clip.frames.float().mean((1, 2, 3)).tolist()}
        except (ValueError, OSError) as error:
            answer = {'outcome': REFUSED, 'says': str(error).replace(str(Path(os.fsdecode(line)).parent), '...')}
        except Exception as error:
            answer = {'outcome': type(error).__name__, 'says': str(error)}
        answer['seconds'], answer['megabytes'] = time.perf_counter() - began, status('VmHWM') - before
        print(json.dumps(answer), flush=True)


def status(name: str) -> int:
    """Megabytes of this process, as Linux counts them."""
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name + ':'))


def make(folder: Path) -> Iterator[Case]:
    """All files, made in a folder."""
    videos = list(make_videos(folder))
    yield from (Case('whole', path, READ) for path in videos)
    for i, path in enumerate(videos[::3]):
        copy = folder / f'renamed-{path.stem}-{path.suffix[1:]}.{("mp4", "txt", "m3u8", "jpg", "ffconcat")[i % 5]}'
        copy.write_bytes(path.read_bytes())
        yield Case('renamed', copy, READ)
    yield from damaged(folder, videos)
    yield from refused(folder, videos[0])
    yield from pictures(folder)
    yield from large(folder, videos[0])
    yield from counts(folder, videos[0])


def grey(i: int) -> 'np.ndarray[Any, Any]':
    return np.full((SIZE[1], SIZE[0], 3), LEVEL * i, np.uint8)


def make_videos(folder: Path) -> Iterator[Path]:
    """One per container and codec that this PyAV has an encoder for."""
    import av

    for codec, pix_fmt, ends in VIDEOS:
        for end in ends.split():
            path = folder / f'{codec}.{end}'
            try:
                with av.open(str(path), 'w', format={'y4m': 'yuv4mpegpipe', 'wmv': 'asf'}.get(end)) as container:
                    stream: Any = container.add_stream(codec, rate=25)
                    stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
                    for i in range(FRAMES):
                        frame = av.VideoFrame.from_ndarray(grey(i), format='rgb24')
                        frame.pts, frame.time_base = i, Fraction(1, 25)
                        container.mux(stream.encode(frame))
                    container.mux(stream.encode())
            except (av.error.FFmpegError, ValueError):
                continue  # not in this build
            yield path


def damaged(folder: Path, videos: list[Path]) -> Iterator[Case]:
    """Cut, with bits flipped, with a hole, with a piece twice."""
    chance = random.Random(0)
    for i, path in enumerate(videos):
        whole = path.read_bytes()
        for what in ('cut', 'flipped', 'hole', 'twice', 'head'):
            data = bytearray(whole)
            at = chance.randrange(len(data))
            if what == 'cut':
                del data[at:]
            elif what == 'flipped':
                for _ in range(1 + len(data) // 400):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            elif what == 'hole':
                data[at:at + 200] = bytes(min(200, len(data) - at))
            elif what == 'twice':
                data[at:at] = data[:at]
            elif i % 2:  # only where a file says what it is
                data[chance.randrange(min(200, len(data)))] = 255
            else:
                data[:chance.randrange(1, 64)] = b''
            copy = folder / f'{what}-{path.name}'
            copy.write_bytes(data)
            yield Case(what, copy, EITHER)


def refused(folder: Path, video: Path) -> Iterator[Case]:
    """What is no video: playlists in disguise, texts, sound, what is no file."""
    import av

    for kind, text in SCRIPTS.items():
        for end in (kind, 'mp4'):
            for i, target in enumerate(
                    ['http://127.0.0.1:9/a.mp4', video, video.name, f'file:{video}', f'concat:{video}|{video}', None]):
                path = folder / f'script-{kind}-{i}.{end}'
                path.write_text(text.format(target or path))  # itself
                yield Case('playlists', path, REFUSED)
    contents = {
        'empty.mp4': b'', 'byte.mp4': b'\0', 'text.mp4': b'no video\n' * 99, 'page.mp4': b'<html><body>404</html>',
        'zeros.mp4': bytes(100_000), 'noise.mp4': random.Random(1).randbytes(100_000), 'zip.mp4': b'PK\3\4',
        'box.mp4': b'\0\0\0\x18ftypmp42' + bytes(500), 'riff.avi': b'RIFF\xff\xff\xff\x7fAVI LIST' + bytes(99),
        'ebml.mkv': b'\x1aE\xdf\xa3' + b'\xff' * 99, 'script.py': b'import this\n', 'list.json': b'[{"a": 1}]',
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield Case('no video', folder / name, REFUSED)
    sound = folder / 'sound.wav'
    with av.open(str(sound), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    yield Case('no video', sound, REFUSED)
    os.mkfifo(folder / 'fifo.mp4')
    os.symlink('loop.mp4', folder / 'loop.mp4')
    os.symlink('nowhere', folder / 'broken.mp4')
    (folder / 'folder.mp4').mkdir()
    for name in ('fifo.mp4', 'loop.mp4', 'broken.mp4', 'folder.mp4', 'missing.mp4', 'file:empty.mp4', 'a' * 300):
        yield Case('no file', folder / name, REFUSED)
    yield Case('no file', Path('/dev/zero'), REFUSED)


def pictures(folder: Path) -> Iterator[Case]:
    """Pictures, animations and folders of pictures."""
    for end in ('png', 'jpg', 'bmp', 'webp', 'tiff', 'ppm', 'gif', 'jp2'):
        path = folder / f'picture.{end}'
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(path)
        yield Case('pictures', path, READ, frames=1)
        many = folder / f'frames-{end}'
        many.mkdir()
        for i in range(FRAMES):
            Image.fromarray(grey(i)).save(many / f'{i}.{end}')
        yield Case('folders', many, REFUSED if end in ('gif', 'jp2') else READ)
    images = [Image.fromarray(grey(i)) for i in range(FRAMES)]
    for end in ('gif', 'png', 'webp'):
        path = folder / f'moves.{end}'
        images[0].save(path, save_all=True, append_images=images[1:], loop=0, duration=40)
        yield Case('animations', path, EITHER if end == 'webp' else READ)  # not every FFmpeg moves WebP


def large(folder: Path, video: Path) -> Iterator[Case]:
    """Small files that say that their frames are huge."""
    for width, height in ((12000, 12000), (65535, 65535), (65535, 600)):
        sized = struct.pack('<HH', width, height)
        gif = (b'GIF89a' + sized + b'\x80\0\0\0\0\0\xff\xff\xff\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0\x3b')
        bmp = b'BM' + struct.pack('<IIIIiiHHIIIIII', 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(45)
        png = io.BytesIO()
        Image.new('L', (8, 8)).save(png, 'png')
        patched = bytearray(png.getvalue())
        patched[16:24] = struct.pack('>II', width, height)
        movie = bytearray(video.read_bytes())
        at = movie.index(b'avc1') + 28
        movie[at:at + 4] = struct.pack('>HH', width, height)
        for end, data in (('gif', gif), ('bmp', bmp), ('png', patched), ('mp4', movie)):
            path = folder / f'large-{width}x{height}.{end}'
            path.write_bytes(data)
            # the header of an MP4 is corrected by the size that H.264 itself has
            yield Case('large', path, EITHER if end == 'mp4' else REFUSED)


def counts(folder: Path, video: Path) -> Iterator[Case]:
    """Small movies that say that they have very many frames."""
    import av

    whole, fragmented = video.read_bytes(), io.BytesIO()
    options = {'movflags': 'frag_keyframe+empty_moov+default_base_moof'}
    with av.open(str(video)) as source, av.open(fragmented, 'w', format='mp4', options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    for count in (10 ** 7, 2 ** 31 - 1):
        movie = bytearray(whole)
        for name, values in (('stsz', (1, count)), ('stts', (1, count, 512)), ('stsc', (1, 1, count, 1))):
            at = movie.index(name.encode()) + 8
            movie[at:at + 4 * len(values)] = struct.pack(f'>{len(values)}I', *values)
        times = bytearray(whole)
        at = times.index(b'stts') + 12
        times[at:at + 4] = struct.pack('>I', count)
        run = bytearray(fragmented.getvalue())
        at = run.index(b'trun') + 4
        run[at:at + 8] = struct.pack('>II', 1, count)
        for name, data, wanted in (('sizes', movie, REFUSED), ('times', times, EITHER), ('run', run, REFUSED)):
            path = folder / f'count-{name}-{count}.mp4'
            path.write_bytes(data)
            yield Case('counts', path, wanted)


if __name__ == '__main__':
    main()
