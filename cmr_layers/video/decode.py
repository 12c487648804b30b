"""Frames of one file, decoded by FFmpeg through PyAV, with everything else that FFmpeg could open turned off."""
import errno
import os
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Iterator, List, Optional, Set

from ..clip import check_positive
from .movie import check_movie
from .source import Reader

__all__ = ['MAX_CLIP_PIXELS', 'MAX_PIXELS', 'Limits', 'Video', 'import_av']

#: Pixels of a frame, at most: 8K (7680x4320) has fewer.
MAX_PIXELS = 2 ** 25
#: Pixels of a clip, num_frames times those of a frame, at most: 1.6 GB as RGB, or 258 frames of 1080p.
MAX_CLIP_PIXELS = 2 ** 29

# A list of what is read, not of what is not: the next FFmpeg brings new playlists. All of these are one file with
# everything in it; HLS, DASH, concat, SDP, image sequences and the like are missing on purpose.
FORMATS = (
    # containers
    'mov', 'matroska', 'avi', 'mpegts', 'mpeg', 'flv', 'asf', 'ogg', 'nut', 'mxf', 'gxf', 'rm', 'wtv', 'dv', 'dhav',
    'ivf', 'nsv', 'nuv', 'swf', 'yuv4mpegpipe',
    # video without a container
    'h261', 'h263', 'h264', 'hevc', 'vvc', 'av1', 'obu', 'm4v', 'mpegvideo', 'vc1', 'dirac', 'cavsvideo', 'avs2',
    'avs3', 'dnxhd', 'mjpeg', 'mjpeg_2000', 'ingenient',
    # animations and pictures
    'gif', 'apng', 'webp', 'webp_anim', 'jpegxl_anim', 'bmp_pipe', 'gif_pipe', 'j2k_pipe', 'jpeg_pipe', 'jpegls_pipe',
    'jpegxl_pipe', 'pam_pipe', 'pbm_pipe', 'pgm_pipe', 'png_pipe', 'ppm_pipe', 'qoi_pipe', 'tiff_pipe', 'webp_pipe',
    # sound, to say that there is no video in it
    'aac', 'ac3', 'aiff', 'ape', 'flac', 'mp3', 'wav', 'w64', 'wv',
)

# What FFmpeg logs since codec_whitelist keeps it from decoding while it opens a file
OF_THE_WHITELIST = ('not on whitelist', 'avformat_find_stream_info', 'codec parameters', 'Consider increasing')


class Limits:
    """How large a frame and a clip may be.

    Args:
        max_pixels: Pixels of a frame, at most.
        max_clip_pixels: num_frames times the pixels of a frame, at most.
        num_frames: Frames T of a clip.

    Raises:
        ValueError: An argument is no positive int.
    """

    def __init__(self, max_pixels: int, max_clip_pixels: int, num_frames: int) -> None:
        self.max_pixels = check_positive('max_pixels', max_pixels)
        self.max_clip_pixels = check_positive('max_clip_pixels', max_clip_pixels)
        self.num_frames = check_positive('num_frames', num_frames)

    def check(self, label: str, width: int, height: int) -> None:
        """Raise a ValueError if a frame or a clip of this size is too large."""
        if width * height > self.max_pixels:
            raise ValueError(
                f'{label} has frames of {width}x{height} = {width * height} pixels; wanted at most '
                f'max_pixels={self.max_pixels}')
        if width * height * self.num_frames > self.max_clip_pixels:
            raise ValueError(
                f'num_frames={self.num_frames} frames of {width}x{height} pixels, as {label} has them, are '
                f'{width * height * self.num_frames} pixels; wanted at most max_clip_pixels={self.max_clip_pixels}')


class Video:
    """A file that can be decoded again and again, every time to the same frames.

    Args:
        reader: The file.
        limits: How large its frames may be.
        stream: Which of its video streams; None is the best.

    Attributes:
        reason: What FFmpeg said last of what does not decode; None if everything did.
        corrupt: How many frames were skipped since FFmpeg flags them or their packets.
        time_base: Seconds of a tick of the frames' time stamps.
        period: Seconds of a frame.
    """

    def __init__(self, reader: Reader, limits: Limits, stream: Optional[int] = None) -> None:
        self.av = import_av()
        check_movie(reader)
        self.reader, self.limits, self.stream = reader, limits, stream
        self.reason: Optional[str] = None
        self.corrupt = 0
        self.threads = min(os.cpu_count() or 1, 4)
        self.time_base, self.period = Fraction(1), Fraction(1, 25)

    def frames(self) -> Iterator[Any]:
        """Every frame that decodes and is not flagged as corrupt, in the order it is shown.

        Raises:
            ValueError: FFmpeg cannot read the file, it holds no video, or a frame is too large.
        """
        label, self.corrupt = self.reader.label, 0
        # Time stamps of MPEG are right only if FFmpeg decodes some frames while it opens the file, which it must not do
        # before their size is known: from headers and parsers
        with self._open(codec_whitelist='none') as container:
            self._choose(container)
        with self._open() as container:
            stream = self._choose(container)
            self.time_base = stream.time_base or Fraction(1)
            self.period = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
            # Threads by slice, not by frame: those lose frames next to damaged ones, and each has frames of its own
            stream.thread_type, stream.thread_count = 'SLICE', self.threads
            stream.codec_context.options = {
                'max_pixels': self._max_pixels,
                # H.264 that does not say how far its frames are out of order: wait for all there can be
                'strict': '1',
            }
            flagged: Set[int] = set()  # a packet that FFmpeg flags is decoded, for the sake of those predicted from it
            for packet in self._packets(container, stream):
                if packet is not None and packet.is_corrupt and packet.pts is not None:
                    flagged.add(packet.pts)
                try:
                    frames = stream.codec_context.decode(packet)
                except self.av.error.FFmpegError as error:
                    self.reason = error.strerror
                    continue
                for frame in frames:
                    self.limits.check(label, frame.width, frame.height)
                    if frame.is_corrupt or frame.pts in flagged:
                        flagged.discard(frame.pts)
                        self.corrupt += 1
                    else:
                        yield frame

    def complaints(self) -> List[str]:
        """What FFmpeg logs while it decodes the file: there it says why, in its errors only that."""
        logging = self.av.logging
        level, threads = logging.get_level(), self.threads
        self.threads = 1  # PyAV's log can wait forever for FFmpeg's threads, and they for it
        logging.set_level(logging.WARNING)
        try:
            with logging.Capture() as logs:
                for _ in self.frames():
                    pass
        finally:
            logging.set_level(level)
            self.threads = threads
        said = dict.fromkeys(message.strip() for _, _, message in logs)
        return [line for line in said if not any(words in line for words in OF_THE_WHITELIST)]

    @property
    def _max_pixels(self) -> str:
        """For what FFmpeg allocates before a frame is there to be checked. Coded sizes are rounded up."""
        return str(2 * self.limits.max_pixels + 2 ** 20)

    @contextmanager
    def _open(self, **options: str) -> Iterator[Any]:
        def refuse(url: str, *_: Any) -> None:
            raise ValueError(f'{label} names another file, {url!r}, which is not opened; wanted a video in one file')

        label = self.reader.label
        self.reader.seek(0)
        options = {'format_whitelist': ','.join(FORMATS), 'protocol_whitelist': 'none', **options}
        # PyAV 14.1 frees what is not its own when it gets options for streams that appear while FFmpeg looks for them
        codec_options = {'max_pixels': self._max_pixels} if int(self.av.__version__.split('.')[0]) >= 18 else None
        try:
            container = self.av.open(
                self.reader, options=codec_options, container_options=options, metadata_errors='replace',
                io_open=refuse)
        except self.av.error.FFmpegError as error:
            self.reader.check()
            if error.errno == errno.EINVAL:  # what the whitelist answers
                raise ValueError(
                    f'{label} is not a video that FFmpeg can read here: playlists, scripts and other formats that '
                    f'refer to more files are refused ({error.strerror}); wanted a video in one file') from error
            raise ValueError(
                f'{label} is not a video that FFmpeg can read: {error.strerror}; wanted a video file') from error
        with container:
            self.reader.check()
            yield container

    def _choose(self, container: Any) -> Any:
        """The stream asked for, or the best: no cover art, the default before others, the largest of those.

        Raises:
            ValueError: There is none, it cannot be decoded, or its frames are too large.
        """
        stream = self._best(container)
        if stream.codec_context is None:
            raise ValueError(
                f'{self.reader.label} holds video of a codec that FFmpeg does not know or has no decoder for; wanted a '
                f'video file that it decodes')
        self.limits.check(self.reader.label, stream.codec_context.width, stream.codec_context.height)
        return stream

    def _best(self, container: Any) -> Any:
        label, streams = self.reader.label, container.streams.video
        if not streams:
            raise ValueError(f'{label} holds no video ({container.format.long_name}); wanted a video file')
        if self.stream is not None:
            if self.stream >= len(streams):
                raise ValueError(
                    f'stream must be one of the {len(streams)} video streams of {label}, got {self.stream}')
            return streams[self.stream]
        flags = type(streams[0].disposition)
        films = [s for s in streams if not s.disposition & (flags.attached_pic | flags.timed_thumbnails)]
        if not films:
            raise ValueError(
                f'{label} holds no video but cover art ({container.format.long_name}); wanted a video file, or '
                f'stream=0 to read the cover')
        return max(films, key=lambda s: (bool(s.disposition & flags.default), _pixels(s), -s.index))

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """The packets of a stream, up to where the file can no longer be read, and the one that flushes the decoder."""
        try:
            yield from container.demux(stream)
        except self.av.error.FFmpegError as error:
            self.reason = error.strerror
            yield None
        self.reader.check()  # a disk that fails is no end of the file


def _pixels(stream: Any) -> int:
    context = stream.codec_context
    return 0 if context is None else int(context.width * context.height)


def import_av() -> Any:
    """PyAV, which is of an extra."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading a video needs PyAV: pip install "cmr-layers[video]"') from error
    return av


