"""When each frame is shown, from what a file says about it."""
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
    """Seconds of each frame since the first, never descending, exact.

    A decoder returns frames in the order they are shown. Their time stamps may say otherwise:

    - AVI has none for the presentation, and what FFmpeg makes up for B-frames jumps back and forth. As FFmpeg's own
      ``best_effort_timestamp`` does, the time stamps of decoding are taken where they step back less often.
    - A clock that steps back has restarted, as where recordings are joined. The new one goes on where the old one
      ended, one period after its last frame.
    - A frame without a time stamp is shown one period after the one before.

    Args:
        pts: Time stamp of presentation of each frame.
        dts: Time stamp of decoding of the packet it came with.
        time_base: Seconds of a tick of both.
        period: Seconds from a frame to the next, where nothing else says it.

    Returns:
        As many times as frames, the first of them 0.

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
