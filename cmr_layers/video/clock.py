"""The time at which each frame is shown, from the time stamps in the file."""
from fractions import Fraction
from itertools import pairwise
from typing import List, Optional, Sequence

__all__ = ['presentation_times']


def presentation_times(
        pts: Sequence[Optional[int]],
        dts: Sequence[Optional[int]],
        time_base: Fraction,
        period: Fraction,
) -> List[Fraction]:
    """Exact seconds of each frame since the first one, never descending.

    A decoder returns frames in the order in which they are shown. Their time stamps may disagree:

    - AVI has no time stamps of presentation, and those that FFmpeg invents for B-frames jump back and forth. If the
      time stamps of decoding step back less often, they are used instead, as in FFmpeg's own ``best_effort_timestamp``.
    - A clock that steps back has restarted, for example where recordings were joined. The new clock goes on one period
      after the last frame of the old one.
    - A frame without a time stamp is shown one period after the frame before it.

    Args:
        pts: Time stamp of presentation of each frame.
        dts: Time stamp of decoding of the packet of each frame.
        time_base: Seconds per tick of both.
        period: Seconds from a frame to the next, used where the time stamps do not tell.

    Returns:
        One time per frame. The first is 0.

    Example:
        >>> seconds = presentation_times([7, 8, 0, 1], [None] * 4, time_base=Fraction(1, 2), period=Fraction(1, 2))
        >>> [float(time) for time in seconds]
        [0.0, 0.5, 1.0, 1.5]
    """
    stamps = dts if _steps_back(dts) < _steps_back(pts) and any(stamp is not None for stamp in dts) else pts
    times: List[Fraction] = []
    shift: Optional[Fraction] = None
    for stamp in stamps:
        next_time = times[-1] + period if times else Fraction(0)
        if stamp is None:
            times.append(next_time)
            continue
        seconds = stamp * time_base
        if shift is None or seconds + shift < times[-1]:
            shift = next_time - seconds
        times.append(seconds + shift)
    return times


def _steps_back(stamps: Sequence[Optional[int]]) -> int:
    known = [stamp for stamp in stamps if stamp is not None]
    return sum(b < a for a, b in pairwise(known))
