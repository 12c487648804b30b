"""Choose the frames of a clip, evenly over the frames of a window or over its time."""
import math
from bisect import bisect_right
from fractions import Fraction
from numbers import Complex, Real
from typing import Any, List, Sequence, Union

import numpy as np

from ..checks import check_positive

__all__ = ['check_seconds', 'in_window', 'sample_indices', 'sample_times']

Seconds = Union[float, 'np.floating[Any]']


def sample_indices(num_available: int, num_frames: int = 8) -> List[int]:
    """Indices of T frames out of N: the middle of each of T equal segments, floor((t + 1/2) N / T).

    TSN and TSM sample like this for testing. If N < T, indices repeat.

    Args:
        num_available: Number N of frames to choose from.
        num_frames: Frames T of a clip.

    Returns:
        T ascending indices in [0, N).

    Raises:
        ValueError: An argument is no positive int.

    Example:
        >>> sample_indices(80, 8), sample_indices(3, 8)
        ([5, 15, 25, 35, 45, 55, 65, 75], [0, 0, 0, 1, 1, 2, 2, 2])
    """
    n, t = check_positive('num_available', num_available), check_positive('num_frames', num_frames)
    return [(2 * i + 1) * n // (2 * t) for i in range(t)]


def sample_times(times: Sequence[Fraction], end: Fraction, num_frames: int) -> List[int]:
    """Indices of the frames that are shown in the middle of T equal spans of time, from times[0] to end.

    At a constant rate :func:`sample_indices` gives the same.

    Args:
        times: Times at which the frames appear, ascending.
        end: Time at which the last frame disappears.
        num_frames: Frames T of a clip.

    Returns:
        T ascending indices.

    Example:
        >>> seconds = [Fraction(0), Fraction(1), Fraction(2), Fraction(9)]  # the third stays for 7 seconds
        >>> sample_times(seconds, Fraction(10), 5)
        [1, 2, 2, 2, 3]
    """
    span = end - times[0]
    return [
        max(bisect_right(times, times[0] + span * (2 * i + 1) / (2 * num_frames)) - 1, 0) for i in range(num_frames)]


def check_seconds(name: str, value: Any) -> Seconds:
    """Return value as a float or a numpy float, or raise a ValueError that names the argument."""
    number = math.nan
    real = isinstance(value, Real) or not isinstance(value, Complex)
    if real and not isinstance(value, (bool, np.bool_)) and hasattr(type(value), '__float__'):
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError, RuntimeError):  # 10**999, and arrays of several numbers
            pass
    if not 0 <= number < math.inf:
        raise ValueError(f'{name} must be a number of seconds >= 0, got {value!r}')
    return value if isinstance(value, np.floating) else number


def in_window(time: Fraction, begin: Seconds, end: Seconds) -> bool:
    """Whether begin <= time < end, with the time rounded to the type of the bounds.

    A frame at 1/10 s is at 0.1 s, although the float 0.1 is a little more than a tenth. It is also at
    ``np.float32(0.1)``.
    """
    seconds = float(time)
    return bool(type(begin)(seconds) >= begin and type(end)(seconds) < end)
