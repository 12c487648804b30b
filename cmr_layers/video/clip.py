"""Read a clip: T frames of a video file or of a folder of pictures, and their times."""
import operator
from fractions import Fraction
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice
from .clock import presentation_times
from .decode import MAX_CLIP_PIXELS, MAX_PIXELS, Limits, Video
from .picture import convert
from .sample import Seconds, check_seconds, in_window, sample_indices, sample_times
from .source import Source, label, list_pictures, open_source

__all__ = ['Clip', 'read_clip']


class Clip(NamedTuple):
    """A clip that :func:`read_clip` read.

    Attributes:
        frames: uint8 RGB, (T, 3, H, W), as torchvision's transforms take a video.
        times: T times in seconds, counted from the first frame of the video.
    """
    frames: Tensor
    times: List[float]


class _Window(NamedTuple):
    """The frames that are asked for."""
    begin: Seconds
    end: Seconds
    even: str
    num_frames: int

    def sample(self, name: str, times: List[Fraction], last: Fraction) -> List[int]:
        """Indices of the frames of a clip. The video ends at ``last``."""
        inside = [i for i, time in enumerate(times) if in_window(time, self.begin, self.end)]
        if not inside:
            raise ValueError(
                f'no frame of {name} lies in the window start={self.begin:g} to end={self.end:g}: its {len(times)} '
                f'frames begin at 0 s and the last one at {float(times[-1]):.3f} s'
            )
        if self.even == 'frames':
            return [inside[i] for i in sample_indices(len(inside), self.num_frames)]
        end = times[inside[-1] + 1] if inside[-1] + 1 < len(times) else last
        if self.end < end:
            end = Fraction(float(self.end))
        return [inside[i] for i in sample_times([times[i] for i in inside], end, self.num_frames)]


def read_clip(
        source: Source,
        num_frames: int = 8,
        start: Optional[float] = None,
        end: Optional[float] = None,
        *,
        even: str = 'frames',
        rate: Optional[float] = None,
        stream: Optional[int] = None,
        max_pixels: int = MAX_PIXELS,
        max_clip_pixels: int = MAX_CLIP_PIXELS,
) -> Clip:
    """Sample a clip from a video, evenly over it or a window of it (see :func:`sample_indices`).

    A file is decoded twice, as containers are often wrong about their number of frames. The first pass counts the
    frames that decode. The second pass keeps the frames of the clip, so memory stays at T frames for a video of any
    length. Frames that do not decode, or that FFmpeg flags as corrupt, are skipped. So is the missing end of a
    truncated file.

    FFmpeg gets the bytes of this one file and nothing else: no name, no network, no other file. Playlists and other
    formats that refer to more files are refused. So is everything but regular files.

    Times count from the first frame and are exact until they are returned. If the clock of a file steps back, for
    example where recordings were joined, it goes on one frame after the last. ``start`` and ``end`` mean the decimal
    numbers that you write: ``start=0.1`` includes a frame at 1/10 s.

    Args:
        source: Path of a video file of any common format; path of a folder with one picture per frame, in the order of
            the numbers in their names; or a binary file, such as ``BytesIO``. A binary file is read from its beginning
            and stays open, at the position that it had.
        num_frames: Frames T of a clip. If the video has fewer, frames repeat.
        start: Start of the window in seconds since the video's first frame. None is 0.
        end: End of the window, not included. None is the end of the video.
        even: ``'frames'`` takes the middle frame of T segments of equal length in frames, as TSN does. ``'time'`` takes
            the frame that is shown in the middle of T equal spans of time. They differ if the frame rate varies.
        rate: Frames per second of a folder. None is 1, so that times are indices.
        stream: Index of a video stream of the file, from 0. None prefers a stream flagged as default, then the largest.
            It never takes cover art.
        max_pixels: Limit for the pixels of a frame. A larger frame is not decoded.
        max_clip_pixels: Limit for num_frames times the pixels of a frame.

    Returns:
        The frames, turned and mirrored as the file says, and their times. If the video changes its size, its frames are
        scaled to the size of the clip's first frame. Angles are rounded to 90 degrees.

    Raises:
        ImportError: PyAV is missing.
        FileNotFoundError: There is no such file.
        OSError: The file cannot be opened.
        TypeError: source is no path and no binary file.
        ValueError: The file is no video, none of its frames decodes, no frame lies in the window, a limit is exceeded,
            or an argument is out of its range.

    Example:
        >>> clip = read_clip('video.mp4', num_frames=8, start=1.5, end=4)  # doctest: +SKIP
        >>> clip.frames.shape, clip.frames.dtype  # doctest: +SKIP
        (torch.Size([8, 3, 272, 640]), torch.uint8)
    """
    limits = Limits(max_pixels, max_clip_pixels, num_frames)
    begin = 0. if start is None else check_seconds('start', start)
    stop = float('inf') if end is None else check_seconds('end', end)
    if stop <= begin:
        raise ValueError(f'end must be later than start={begin:g}, got {stop:g}')
    window = _Window(begin, stop, check_choice('even', even, ('frames', 'time')), limits.num_frames)
    if stream is not None:
        stream = _check_index('stream', stream)
    with open_source(source) as reader:
        if reader is None:
            return _read_folder(source, window, limits, rate)
        if rate is not None:
            raise ValueError(f'rate is for a folder of frames, got {rate!r} with the file {reader.label}')
        return _read_file(Video(reader, limits, stream), window)


def _read_file(video: Video, window: _Window) -> Clip:
    name, pts, dts, ticks = video.reader.label, [], [], 0
    for frame in video.frames():
        pts.append(frame.pts)
        dts.append(frame.dts)
        ticks = getattr(frame, 'duration', 0)
    video.check_decoded(bool(pts))
    times = presentation_times(pts, dts, video.time_base, video.period)
    wanted = window.sample(name, times, times[-1] + (ticks * video.time_base if ticks else video.period))
    keep, count, result = set(wanted), 0, _Result(video.limits, name)
    for frame in video.frames():
        if count in keep:
            result.put(frame, [at for at, i in enumerate(wanted) if i == count])
        count += 1
        if count > wanted[-1]:
            return Clip(result.tensor(), [float(times[i]) for i in wanted])
    raise ValueError(f'{name} is damaged: it decodes to {len(times)} frames first and to {count} next')


def _read_folder(source: Any, window: _Window, limits: Limits, rate: Optional[float]) -> Clip:
    """Read a folder: one frame per picture. Only the pictures of the clip are read, and a damaged one is an error."""
    period = 1 / _check_rate(rate)
    paths = list_pictures(source)
    times = [i * period for i in range(len(paths))]
    wanted = window.sample(label(source), times, len(paths) * period)
    result = _Result(limits, label(source))
    for i in sorted(set(wanted)):
        with open_source(paths[i]) as reader:
            if reader is None:
                raise ValueError(f'source={paths[i]!r} is a folder; wanted a picture')
            video = Video(reader, limits)
            frame = next(video.frames(), None)
            video.check_decoded(frame is not None)
            result.put(frame, [at for at, j in enumerate(wanted) if j == i])
    return Clip(result.tensor(), [float(times[i]) for i in wanted])


class _Result:
    """The pixels of a clip, allocated when the size of its first frame is known."""

    def __init__(self, limits: Limits, name: str) -> None:
        self.limits, self.name = limits, name
        self.pixels: Optional[np.ndarray[Any, Any]] = None

    def put(self, frame: Any, at: Iterable[int]) -> None:
        """Keep a frame at some places of the clip."""
        image = convert(frame, self.name, None if self.pixels is None else self._size())
        if self.pixels is None:
            self.limits.check(self.name, image.shape[2], image.shape[1])
            self.pixels = np.empty((self.limits.num_frames, *image.shape), np.uint8)
        for i in at:
            self.pixels[i] = image

    def _size(self) -> Tuple[int, int]:
        assert self.pixels is not None
        return self.pixels.shape[2], self.pixels.shape[3]

    def tensor(self) -> Tensor:
        assert self.pixels is not None
        return torch.from_numpy(self.pixels)


def _check_index(name: str, value: Any) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f'{name} must be an int >= 0, got {value!r}')
    return number


def _check_rate(rate: Any) -> Fraction:
    if rate is None:
        return Fraction(1)
    if check_seconds('rate', rate) == 0:
        raise ValueError(f'rate must be a number of frames per second > 0, got {rate!r}')
    return Fraction(rate) if isinstance(rate, (int, Fraction)) else Fraction(str(float(rate)))
