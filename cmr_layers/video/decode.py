"""Decode the frames of one file with FFmpeg through PyAV, and keep FFmpeg from opening anything else."""
import errno
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Iterable, Iterator, List, Optional, Set, Tuple

import torch

from ..checks import check_positive
from .movie import check_movie
from .source import Reader

__all__ = ['MAX_CLIP_PIXELS', 'MAX_PIXELS', 'Limits', 'Video', 'import_av']

#: Limit for the pixels of a frame. 8K (7680x4320) has fewer.
MAX_PIXELS = 2 ** 25
#: Limit for the pixels of a clip, num_frames times the pixels of a frame: 1.6 GB as RGB, or 258 frames of 1080p.
MAX_CLIP_PIXELS = 2 ** 29

# The list names the formats that are read, as the next FFmpeg may bring new playlists. Each is one file with everything
# in it. HLS, DASH, concat, SDP, image sequences and the like are left out on purpose.
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

# FFmpeg logs these lines because codec_whitelist keeps it from decoding while it opens a file
OF_THE_WHITELIST = ('not on whitelist', 'avformat_find_stream_info', 'codec parameters', 'Consider increasing')


class Limits:
    """Limits for the size of a frame and of a clip.

    Args:
        max_pixels: Limit for the pixels of a frame.
        max_clip_pixels: Limit for num_frames times the pixels of a frame.
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
    """A file that can be decoded several times, always to the same frames.

    Args:
        reader: The file.
        limits: Limits for the size of its frames.
        stream: Index of a video stream. None takes the best.

    Attributes:
        reason: FFmpeg's last error of decoding. None if there was none.
        corrupt: Number of frames that were skipped because FFmpeg flags them or their packets.
        time_base: Seconds per tick of the frames' time stamps.
        period: Seconds per frame.
    """

    def __init__(self, reader: Reader, limits: Limits, stream: Optional[int] = None) -> None:
        self.av = import_av()
        check_movie(reader)
        self.reader, self.limits, self.stream = reader, limits, stream
        self.reason: Optional[str] = None
        self.corrupt = 0
        self.threads = min(torch.get_num_threads(), 4)  # 1 in a worker of a DataLoader
        self.time_base, self.period = Fraction(1), Fraction(1, 25)

    def frames(self) -> Iterator[Any]:
        """Every frame that decodes and is not flagged as corrupt, in the order in which they are shown.

        Raises:
            ValueError: FFmpeg cannot read the file, it holds no video, or a frame is too large.
        """
        with self.opened() as (container, stream):
            yield from self.decode(stream, self.packets(container, stream))

    @contextmanager
    def opened(self, known: bool = False) -> Iterator[Tuple[Any, Any]]:
        """Open the file to decode one of its streams. Yields the container and the stream.

        Args:
            known: Whether the size of its frames is known to be within the limits.

        Raises:
            ValueError: FFmpeg cannot read the file, it holds no video, or a frame is too large.
        """
        if not known:
            # Time stamps of MPEG are right only if FFmpeg decodes some frames while it opens the file. It must not do
            # so before the size is known. So the size is read first, from headers and parsers.
            with self._open(codec_whitelist='none') as container:
                self._choose(container)
        with self._open() as container:
            stream = self._choose(container)
            self.time_base = stream.time_base or Fraction(1)
            self.period = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
            # threads by slice: threads by frame lose frames next to damaged ones, and each holds frames of its own
            stream.thread_type, stream.thread_count = 'SLICE', self.threads
            stream.codec_context.options = {
                'max_pixels': self._max_pixels,
                # if H.264 does not say how far its frames are out of order, wait for the largest distance
                'strict': '1',
            }
            yield container, stream

    def decode(self, stream: Any, packets: Iterable[Any]) -> Iterator[Any]:
        """The frames of some packets, but for those that are flagged as corrupt."""
        self.corrupt = 0
        flagged: Set[int] = set()  # a flagged packet is decoded all the same, as others are predicted from it
        for packet in packets:
            if packet is not None and packet.is_corrupt and packet.pts is not None:
                flagged.add(packet.pts)
            try:
                frames = stream.codec_context.decode(packet)
            except self.av.error.FFmpegError as error:
                self.reason = error.strerror
                continue
            for frame in frames:
                self.limits.check(self.reader.label, frame.width, frame.height)
                if frame.is_corrupt or frame.pts in flagged:
                    flagged.discard(frame.pts)
                    self.corrupt += 1
                else:
                    yield frame

    def packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """The packets of a stream, as far as the file can be read, and then the one that flushes the decoder."""
        try:
            yield from container.demux(stream)
        except self.av.error.FFmpegError as error:
            self.reason = error.strerror
            yield None
        self.reader.check()  # a failing disk is not the end of the file

    def complaints(self) -> List[str]:
        """The lines that FFmpeg logs while it decodes the file. They name the reason, which its errors do not."""
        logging = self.av.logging
        level, threads = logging.get_level(), self.threads
        self.threads = 1  # with more, PyAV's log and FFmpeg's threads can wait for each other forever
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

    def check_decoded(self, anything: bool) -> None:
        """Raise a ValueError with the reason if nothing decoded, or if FFmpeg refused a frame for its size."""
        if anything and self.reason is None:
            return
        said, name = self.complaints(), self.reader.label
        sizes = [line for line in said if 'max pixel count' in line]
        if sizes:
            raise ValueError(
                f'{name} has frames that are too large ({sizes[0]}); wanted at most '
                f'max_pixels={self.limits.max_pixels} pixels in a frame')
        if not anything:
            reasons = ([] if self.reason is None else [self.reason]) + said[:4]
            flagged = f' ({self.corrupt} are flagged as corrupt)' if self.corrupt else ''
            raise ValueError(
                f'{name}: not a frame of it decodes{flagged}; FFmpeg says: {"; ".join(reasons) or "nothing"}; wanted a '
                f'video file that it decodes')

    @property
    def _max_pixels(self) -> str:
        """Limit for FFmpeg's own allocations, before a frame can be checked. FFmpeg rounds coded sizes up."""
        return str(2 * self.limits.max_pixels + 2 ** 20)

    @contextmanager
    def _open(self, **options: str) -> Iterator[Any]:
        def refuse(url: str, *_: Any) -> None:
            raise ValueError(f'{label} names another file, {url!r}, which is not opened; wanted a video in one file')

        label = self.reader.label
        self.reader.seek(0)
        options = {'format_whitelist': ','.join(FORMATS), 'protocol_whitelist': 'none', **options}
        # PyAV 14.1 frees memory that is not its own if it has options for streams that FFmpeg finds later
        codec_options = {'max_pixels': self._max_pixels} if int(self.av.__version__.split('.')[0]) >= 18 else None
        try:
            container = self.av.open(
                self.reader, options=codec_options, container_options=options, metadata_errors='replace',
                io_open=refuse)
        except self.av.error.FFmpegError as error:
            self.reader.check()
            if error.errno == errno.EINVAL:  # the answer of the whitelist
                raise ValueError(
                    f'{label} is not a video that FFmpeg can read here: playlists, scripts and other formats that '
                    f'refer to more files are refused ({error.strerror}); wanted a video in one file') from error
            raise ValueError(
                f'{label} is not a video that FFmpeg can read: {error.strerror}; wanted a video file') from error
        with container:
            self.reader.check()
            yield container

    def _choose(self, container: Any) -> Any:
        """The stream asked for, or the best one: no cover art, default streams first, then the largest.

        Raises:
            ValueError: There is no such stream, it cannot be decoded, or its frames are too large.
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


def _pixels(stream: Any) -> int:
    context = stream.codec_context
    return 0 if context is None else int(context.width * context.height)


def import_av() -> Any:
    """Import PyAV, which comes with the extra ``[video]``."""
    try:
        import av
    except ImportError as error:
        raise ImportError('reading a video needs PyAV: pip install "cmr-layers[video]"') from error
    return av


