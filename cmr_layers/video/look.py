"""Look at one video: decode it in full, and find the key frames from which it decodes to the same pixels again."""
import os
from itertools import pairwise
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from .clock import presentation_times
from .decode import MAX_CLIP_PIXELS, MAX_PIXELS, Limits, Video, import_av
from .info import VideoInfo, pack_times
from .picture import convert, reformatter, rotation
from .seek import Lost, lands, seek
from .source import Reader, Source, list_pictures, open_source

__all__ = ['KEY_GAP', 'look', 'stamp']

#: Key frames that are nearer than this to the one before are passed over: to seek to them saves next to nothing.
KEY_GAP = 4


def stamp(source: Source) -> Tuple[int, int]:
    """Size and time of modification of what a video was looked at. (-1, 0) if there is none, or it is not on a disk."""
    try:
        status = os.stat(source)  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError):
        return -1, 0
    return status.st_size, status.st_mtime_ns


def look(source: Source) -> VideoInfo:
    """Decode a video in full, once, and note what it holds. A file that cannot be read is noted, too."""
    av = import_av()
    size, mtime = stamp(source)
    try:
        with open_source(source) as reader:
            if reader is None:
                return _look_at_folder(source, size, mtime)
            return _look_at_file(reader, size if size >= 0 else reader.size, mtime)
    except (OSError, MemoryError) as error:  # another time it may be there, permitted, or fit
        return VideoInfo(error=str(error) or type(error).__name__)
    except (ValueError, av.error.FFmpegError) as error:
        return VideoInfo(error=str(error), size=size, mtime=mtime)


def _look_at_folder(folder: Any, size: int, mtime: int) -> VideoInfo:
    paths, shape = list_pictures(folder), None
    for path in paths:
        with open_source(path) as reader:
            if reader is None:
                raise ValueError(f'source={path!r} is a folder; wanted a picture')
            video = Video(reader, Limits(MAX_PIXELS, MAX_CLIP_PIXELS, 1))
            frame = next(video.frames(), None)
            video.check_decoded(frame is not None)
            if shape is None:
                shape = convert(frame, reader.label).shape
    assert shape is not None
    return VideoInfo(
        len(paths), float(len(paths)), 1., width=shape[2], height=shape[1], steps=1, size=size, mtime=mtime)


class _Pass:
    """The first pass over a file: what its frames say, and fingerprints of those that a seek may return."""

    def __init__(self, video: Video) -> None:
        self.video = video
        self.pts: List[Optional[int]] = []
        self.dts: List[Optional[int]] = []
        self.keys: List[Tuple[int, Optional[int]]] = []  # time stamps of the packets of key frames
        self.prints: Dict[int, int] = {}
        self.ticks, self.width, self.height, self.rotation = 0, 0, 0, 0

    def run(self, container: Any, stream: Any) -> None:
        for frame in self.video.decode(stream, self._watch(self.video.packets(container, stream))):
            if not self.pts:
                _, self.height, self.width = convert(frame, self.video.reader.label).shape
                self.rotation = rotation(frame)
            elif len(self.keys) > 1:  # frames before the second key frame are never sought
                self.prints[len(self.pts)] = _fingerprint(frame)
            self.pts.append(frame.pts)
            self.dts.append(frame.dts)
            self.ticks = getattr(frame, 'duration', 0)

    def _watch(self, packets: Iterable[Any]) -> Iterator[Any]:
        for packet in packets:
            if packet is not None and packet.is_keyframe and packet.pts is not None:
                self.keys.append((packet.pts, packet.dts))
            yield packet

    def tells(self) -> bool:
        """Whether nothing is damaged and each frame is told by its time stamp."""
        if self.video.reason is not None or self.video.corrupt or any(pts is None for pts in self.pts):
            return False
        return all(a < b for a, b in pairwise(self.pts))  # type: ignore[operator]  # there is no None

    def candidates(self) -> List[Tuple[int, int, Optional[int]]]:
        """Index, pts and dts of key frames that are worth a seek."""
        place = {pts: i for i, pts in enumerate(self.pts)}
        found: List[Tuple[int, int, Optional[int]]] = []
        for index, pts, dts in sorted((place[pts], pts, dts) for pts, dts in self.keys if pts in place):
            if index - (found[-1][0] if found else 0) >= KEY_GAP and index in self.prints:
                found.append((index, pts, dts))
        return found


def _look_at_file(reader: Reader, size: int, mtime: int) -> VideoInfo:
    video = Video(reader, Limits(MAX_PIXELS, MAX_CLIP_PIXELS, 1))
    first = _Pass(video)
    with video.opened() as (container, stream):
        declared = stream.frames
        first.run(container, stream)
        reason, corrupt = video.reason, video.corrupt
        tells = first.tells()
        keys, targets = _verified(video, container, stream, first) if tells else ((0,), (0,))
    video.reason, video.corrupt = reason, corrupt
    video.check_decoded(bool(first.pts))
    times = presentation_times(first.pts, first.dts, video.time_base, video.period)
    duration = times[-1] + (first.ticks * video.time_base if first.ticks else video.period)
    unit, steps = pack_times(times, video.time_base)
    return VideoInfo(
        len(times), float(duration), float(len(times) / duration), first.width, first.height, first.rotation, keys,
        damage=_damage(reason, corrupt, declared, len(times)), unit=unit, steps=steps,
        first_pts=first.pts[0] if tells else None, targets=targets, size=size, mtime=mtime)


def _verified(video: Video, container: Any, stream: Any, first: _Pass) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """The key frames that a seek finds, and its targets; (0,) alone if anything decodes differently from one of them.

    Some containers are sought by pts, some by dts.
    """
    found = []
    for index, pts, dts in first.candidates():
        for target in (pts, dts):
            if target is not None and lands(video, container, stream, target, pts):
                found.append((index, pts, target))
                break
    for (index, pts, target), (end, *_) in pairwise([*found, (len(first.pts), 0, 0)]):
        try:
            frames = seek(video, container, stream, target, pts)
            same = all(
                frame is not None and frame.pts == first.pts[i] and _fingerprint(frame) == first.prints[i]
                for i, frame in ((i, next(frames, None)) for i in range(index, end)))
        except Lost:
            same = False
        if not same:
            return (0,), (0,)
    return (0, *(index for index, *_ in found)), (0, *(target for *_, target in found))


def _fingerprint(frame: Any) -> int:
    """A number that tells apart pictures within this process."""
    try:
        pixels = frame.to_ndarray()
    except (ValueError, AssertionError):  # PyAV has no array for frames of this format
        pixels = reformatter()(frame, format='rgb24').to_ndarray()
    return hash((
        pixels.tobytes(), frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range,
        rotation(frame)))


def _damage(reason: Optional[str], corrupt: int, declared: int, decoded: int) -> Optional[str]:
    found = [] if reason is None else [f'FFmpeg says: {reason}']
    if corrupt:
        found.append(f'{corrupt} frames are flagged as corrupt')
    if declared > decoded:
        found.append(f'its header promises {declared} frames and {decoded} decode')
    return '; '.join(found) or None
