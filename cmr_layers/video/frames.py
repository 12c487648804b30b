"""Read frames of a video by their indices: seek where that is less work, and get what decoding from the start gives."""
import operator
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from .decode import MAX_CLIP_PIXELS, MAX_PIXELS, Limits, Video, import_av
from .info import VideoInfo
from .look import stamp
from .picture import convert, reformatter, shown_shape
from .seek import Lost, needed, seek
from .source import Reader, Source, label, list_pictures, open_source

__all__ = ['SEEK_FRAMES', 'UnreadableVideo', 'read_frames', 'read_pictures']

#: Frames that decode in the time of a seek. A seek has to save more than these.
SEEK_FRAMES = 4


class UnreadableVideo(ValueError):
    """A video that cannot be read: damaged, or not the one that was looked at."""


def read_frames(
        source: Source,
        indices: Iterable[int],
        info: Optional[VideoInfo] = None,
) -> Tensor:
    """Read frames of a video by their indices.

    Decodes from the key frame before a frame if that is less work than to decode on from the frame before, and returns
    bit for bit what decoding from the start returns: only key frames from which this was verified are used, frames are
    told by their time stamps, and where anything is unsure the file is decoded from its start. Frames count as
    :func:`read_clip` counts them, which skips those that do not decode.

    Memory stays at the frames that are asked for. A worker of a ``DataLoader`` decodes with one thread, as PyTorch's
    number of threads is 1 there; elsewhere up to 4 threads decode.

    Args:
        source: Path of a video file or of a folder of pictures, or a binary file, as for :func:`read_clip`.
        indices: Indices of frames from 0, in any order, repeated or not.
        info: What :func:`index_videos` knows of this file. None decodes from the start.

    Returns:
        uint8 RGB of shape (len(indices), 3, H, W), with the channels last in memory. Frames are turned and mirrored as
        the file says. If the video changes its size, all are scaled to the size of its first frame.

    Raises:
        ImportError: PyAV is missing.
        OSError: The file does not exist or cannot be opened.
        TypeError: source is no path and no binary file.
        UnreadableVideo: The file does not decode, or is not the one that was looked at. A ValueError.
        ValueError: An index is out of range, or the result would exceed :data:`MAX_CLIP_PIXELS`.

    Example:
        >>> info = index_videos(['video.mp4'])['video.mp4']  # doctest: +SKIP
        >>> read_frames('video.mp4', [70, 10, 10], info).shape  # doctest: +SKIP
        torch.Size([3, 3, 272, 640])
    """
    result = _Result(source, indices, info)
    with _unreadable(), open_source(source) as reader:
        if info is not None:
            _check_unchanged(source, info, reader)
        if reader is None:
            _read_folder(list_pictures(source), result)
        else:
            _read_file(Video(reader, Limits(MAX_PIXELS, MAX_CLIP_PIXELS, 1)), result)
    return result.tensor()


def read_pictures(
        pictures: Sequence[Source],
        indices: Iterable[int],
        info: Optional[VideoInfo] = None,
        name: str = 'pictures',
) -> Tensor:
    """Read frames of a video that has one picture per frame, as :func:`read_frames` reads those of a folder.

    Args:
        pictures: Paths or binary files, in the order of the frames.
        indices: As for :func:`read_frames`.
        info: What :func:`index_videos` knows of the folder that they come from.
        name: Name of the video in errors.

    Returns:
        As :func:`read_frames`.

    Raises:
        UnreadableVideo: A picture does not decode, or there are more or fewer than were looked at. A ValueError.
        ValueError: An index is out of range, or the result would exceed :data:`MAX_CLIP_PIXELS`.

    Example:
        >>> read_pictures(['1.jpg', '2.jpg'], [1, 0]).shape  # doctest: +SKIP
        torch.Size([2, 3, 100, 176])
    """
    result = _Result(name, indices, info)
    with _unreadable():
        _read_folder(pictures, result)
    return result.tensor()


class _Request(ValueError):
    """An argument does not fit a video that is in order."""


@contextmanager
def _unreadable() -> Iterator[None]:
    """Make the errors of a file an UnreadableVideo."""
    try:
        yield
    except (OSError, UnreadableVideo, _Request):
        raise
    except (ValueError, import_av().error.FFmpegError) as error:
        raise UnreadableVideo(str(error)) from error


def _check_unchanged(source: Any, info: VideoInfo, reader: Optional[Reader]) -> None:
    now = stamp(source)
    if now[0] < 0 and reader is not None:
        now = reader.size, info.mtime
    if now != (info.size, info.mtime):
        raise UnreadableVideo(
            f'{label(source)} has changed since it was looked at: {now[0]} bytes, time of modification {now[1]} ns; '
            f'wanted {info.size} bytes, {info.mtime} ns; make its index anew with index_videos')


class _Result:
    """The frames that are asked for, and their pixels."""

    def __init__(self, source: Any, indices: Iterable[int], info: Optional[VideoInfo]) -> None:
        self.name, self.info, self.reformat = label(source), info, reformatter()
        self.wanted = _check_indices(indices)
        self.places: Dict[int, List[int]] = {}
        for place, index in enumerate(self.wanted):
            self.places.setdefault(index, []).append(place)
        self.order = sorted(self.places)
        self.pixels: Optional[np.ndarray[Any, Any]] = None
        if info is not None:
            if info.error is not None:
                raise UnreadableVideo(f'{self.name} could not be read when it was looked at: {info.error}')
            self.check_range(info.num_frames)
            self.shape(info.height, info.width)

    def check_range(self, num_frames: int) -> None:
        """Raise a ValueError if a frame is asked for that the video does not have."""
        if self.order[-1] >= num_frames:
            raise _Request(f'indices must be less than the {num_frames} frames of {self.name}, got {self.order[-1]}')

    def shape(self, height: int, width: int) -> None:
        """Make room for frames of a video of this size."""
        if len(self.wanted) * height * width > MAX_CLIP_PIXELS:
            raise _Request(
                f'{len(self.wanted)} frames of {width}x{height} pixels, as indices ask for of {self.name}, are too '
                f'large; wanted at most {MAX_CLIP_PIXELS} pixels')
        self.pixels = np.empty((len(self.wanted), height, width, 3), np.uint8)

    def put(self, index: int, frame: Any) -> None:
        """Keep a frame if it is asked for."""
        if self.pixels is None:
            self.shape(*shown_shape(frame))
        assert self.pixels is not None
        if index in self.places:
            first, *others = self.places[index]
            image = convert(frame, self.name, self.pixels.shape[1:3], self.reformat)
            self.pixels[first] = image.transpose(1, 2, 0)
            self.pixels[others] = self.pixels[first]

    def tensor(self) -> Tensor:
        assert self.pixels is not None
        return torch.from_numpy(self.pixels).permute(0, 3, 1, 2)


def _check_indices(indices: Iterable[int]) -> List[int]:
    try:
        wanted = [operator.index(i) for i in indices]
    except TypeError as error:
        raise ValueError(f'indices must be ints >= 0, got {indices!r:.99}') from error
    if not wanted or min(wanted) < 0:
        raise ValueError(f'indices must be at least one int >= 0, got {wanted!r:.99}')
    return wanted


def _read_file(video: Video, result: _Result) -> None:
    info = result.info
    if info is not None and info.first_pts is not None:
        try:
            return _read_by_stamps(video, result, info)
        except Lost:
            pass  # every frame is found from the start of the file
    count = 0
    with video.opened(known=info is not None) as (container, stream):
        for frame in video.decode(stream, video.packets(container, stream)):
            result.put(count, frame)
            count += 1
            if count > result.order[-1]:
                return
    video.check_decoded(count > 0)
    if info is not None:
        raise UnreadableVideo(f'{result.name} decodes to {count} frames; it was {info.num_frames} at the look at it')
    result.check_range(count)


def _read_by_stamps(video: Video, result: _Result, info: VideoInfo) -> None:
    """Seek where that saves work, skip what no other frame needs. Raises Lost where a frame is not where it was."""
    assert info.first_pts is not None
    stamps, key_stamps = (info.ticks[result.order] + info.first_pts).tolist(), info.key_stamps
    with video.opened(known=True) as (container, stream):
        packets = needed(stream, video.packets(container, stream), stamps)
        at, frames = 0, video.decode(stream, packets)
        for index, pts in zip(result.order, stamps):
            key = info.key(index)
            if info.keys[key] - at > SEEK_FRAMES:
                frames = seek(video, container, stream, info.targets[key], key_stamps[key], stamps)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= pts), None)
            if frame is None or frame.pts != pts:
                raise Lost(f'{result.name} has no frame at {pts} where it had at the look at it')
            result.put(index, frame)
            at = index + 1


def _read_folder(pictures: Sequence[Source], result: _Result) -> None:
    if result.info is not None and len(pictures) != result.info.num_frames:
        raise UnreadableVideo(
            f'{result.name} holds {len(pictures)} pictures; it was {result.info.num_frames} at the look at it')
    result.check_range(len(pictures))
    for index in [0, *result.order] if result.pixels is None else result.order:
        with open_source(pictures[index]) as reader:
            if reader is None:
                raise UnreadableVideo(f'source={pictures[index]!r} is a folder; wanted a picture')
            video = Video(reader, Limits(MAX_PIXELS, MAX_CLIP_PIXELS, 1))
            frame = next(video.frames(), None)
            video.check_decoded(frame is not None)
            result.put(index, frame)
