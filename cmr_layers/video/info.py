"""What is known of one video after a look at it: its frames, their exact times, and where decoding may begin."""
import base64
import math
import zlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np

from .sample import check_seconds, in_window

__all__ = ['COLUMNS', 'VideoInfo', 'pack_times']


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video file, or of a folder of pictures, that was decoded in full once.

    Attributes:
        num_frames: Frames that decode. 0 if there is an error.
        duration: Seconds from the first frame to the end of the last one.
        rate: Frames per second, on average. 1 for a folder.
        width: Width of the first frame as it is shown.
        height: Its height.
        rotation: Degrees by which frames are turned clockwise to be shown: 0, 90, 180 or 270.
        keys: Indices of frames at which decoding may begin, ascending. Always 0, and those key frames from which all
            frames were seen to decode to the same pixels as from the start of the file.
        error: Why the file cannot be read. None if it decodes.
        damage: What is missing of it, for example the end of a truncated file. The frames that are left count. None if
            it is whole.
        unit: Seconds per tick of the frames' times.
        steps: Ticks from each frame to the next: one number if all are alike, else packed.
        first_pts: Time stamp of the first frame in the file. None if frames are not told apart by their time stamps;
            then decoding begins at the start.
        targets: Time stamp to seek to for each of the keys.
        size: Bytes of the file when it was looked at. -1 if there was none.
        mtime: Its time of modification then, in nanoseconds.
    """
    num_frames: int = 0
    duration: float = 0.
    rate: float = 0.
    width: int = 0
    height: int = 0
    rotation: int = 0
    keys: Tuple[int, ...] = (0,)
    error: Optional[str] = None
    damage: Optional[str] = None
    unit: Fraction = Fraction(1)
    steps: Union[int, bytes] = 0
    first_pts: Optional[int] = None
    targets: Tuple[int, ...] = (0,)
    size: int = -1
    mtime: int = 0

    @property
    def ticks(self) -> 'np.ndarray[Any, Any]':
        """Ticks from the first frame to each frame, int64, ascending."""
        if isinstance(self.steps, int):
            return np.arange(self.num_frames, dtype=np.int64) * self.steps
        steps = np.frombuffer(zlib.decompressobj().decompress(self.steps, 8 * self.num_frames), '<i8')
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(steps, dtype=np.int64)])

    @property
    def times(self) -> List[Fraction]:
        """The exact time of each frame in seconds since the first one."""
        return [tick * self.unit for tick in self.ticks.tolist()]

    @property
    def key_stamps(self) -> List[int]:
        """The time stamp of each of the keys, if frames have one."""
        ticks: List[int] = self.ticks[list(self.keys)].tolist()
        return [tick + (self.first_pts or 0) for tick in ticks]

    def key(self, index: int) -> int:
        """Place in ``keys`` of the last one at or before a frame."""
        return bisect_right(self.keys, index) - 1

    def window(self, start: Optional[float] = None, end: Optional[float] = None) -> range:
        """Indices of the frames whose times lie in [start, end), as :func:`read_clip` chooses them.

        Args:
            start: Start of the window in seconds since the first frame. None is 0.
            end: End of the window, not included. None is the end of the video.

        Returns:
            A range with at least one index.

        Raises:
            ValueError: A bound is no number of seconds, the window is empty, or the video cannot be read.

        Example:
            >>> VideoInfo(num_frames=50, duration=5., unit=Fraction(1, 10), steps=1).window(.5, 2)
            range(5, 20)
        """
        if self.error is not None:
            raise ValueError(f'a video that cannot be read has no frames in a window: {self.error}')
        begin = 0. if start is None else check_seconds('start', start)
        stop = float('inf') if end is None else check_seconds('end', end)
        if stop <= begin:
            raise ValueError(f'end must be later than start={begin:g}, got {stop:g}')
        ticks, never = self.ticks.tolist(), float('inf')
        low = bisect_left(ticks, True, key=lambda tick: in_window(tick * self.unit, begin, never))
        high = bisect_left(ticks, True, key=lambda tick: not in_window(tick * self.unit, 0., stop))
        if low >= high:
            raise ValueError(
                f'no frame lies in the window start={begin:g} to end={stop:g}: the {self.num_frames} frames begin at '
                f'0 s and the last one at {float(ticks[-1] * self.unit):.3f} s')
        return range(low, high)

    def row(self) -> List[Any]:
        """What JSON can hold."""
        return [_plain(getattr(self, name)) for name in COLUMNS]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> 'VideoInfo':
        """The opposite of :meth:`row`. A row of another kind raises a TypeError or a ValueError."""
        if len(row) != len(COLUMNS):
            raise ValueError(f'a row must hold {len(COLUMNS)} values, got {len(row)}')
        values = dict(zip(COLUMNS, row))
        values['unit'] = Fraction(*values['unit'])
        values['keys'], values['targets'] = tuple(values['keys']), tuple(values['targets'])
        if isinstance(values['steps'], str):
            values['steps'] = base64.b64decode(values['steps'], validate=True)
        return cls(**values)


#: What the places of a row are.
COLUMNS = tuple(field.name for field in fields(VideoInfo))


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return [value.numerator, value.denominator]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def pack_times(times: Sequence[Fraction], time_base: Fraction) -> Tuple[Fraction, Union[int, bytes]]:
    """The ``unit`` and the ``steps`` of some times: exact, and small. The unit is the time base where that fits."""
    unit = time_base
    if any((time / unit).denominator > 1 for time in times):  # the clock stepped back and went on after a period
        unit = Fraction(1, math.lcm(*(time.denominator for time in times)))
    ticks = [int(time / unit) for time in times]
    steps = {b - a for a, b in pairwise(ticks)}
    if len(steps) < 2:
        return unit, next(iter(steps), 0)
    return unit, zlib.compress(np.diff(np.array(ticks, np.int64)).astype('<i8').tobytes(), 9)
