"""Choose the frames of a clip: evenly or at random, over the frames of a window or over its time."""
import math
from bisect import bisect_right
from fractions import Fraction
from numbers import Complex, Real
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from ..checks import check_positive

__all__ = [
    'check_seconds', 'in_window', 'sample_clips', 'sample_dense', 'sample_indices', 'sample_segments', 'sample_times']

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


def sample_segments(
        num_available: int,
        num_frames: int = 8,
        generator: Optional[torch.Generator] = None,
) -> List[int]:
    """Indices of T frames out of N, one of each of T equal segments: the paper's for Something-Something, and TSN's.

    Segment t spans the frames from t N / T to (t + 1) N / T, which need not be whole numbers. Training draws a point of
    each segment, evenly; evaluation takes its middle. So every frame can be drawn and all are drawn equally often. If
    N < T, indices repeat and stay in order.

    The authors' code draws from segments of floor(N / T) frames instead, so that it never draws the last
    N - T floor(N / T) frames. Without a generator both are the same.

    Args:
        num_available: Number N of frames to choose from.
        num_frames: Frames T of a clip.
        generator: Draws the frames. None takes the middles, as :func:`sample_indices` does.

    Returns:
        T indices in [0, N), none less than the one before it.

    Raises:
        ValueError: An argument is no positive int.

    Example:
        >>> sample_segments(80, 8)
        [5, 15, 25, 35, 45, 55, 65, 75]
        >>> random = sample_segments(80, 8, torch.Generator().manual_seed(0))
        >>> [index // 10 for index in random]
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if generator is None:
        return sample_indices(num_available, num_frames)
    n, t = check_positive('num_available', num_available), check_positive('num_frames', num_frames)
    # the bounds are multiples of 1/T, so N points at that distance meet each frame as often as the segment covers it
    points: List[int] = torch.randint(n, (t,), generator=generator).tolist()
    return [(i * n + point) // t for i, point in enumerate(points)]


def sample_dense(
        num_available: int,
        num_frames: int = 8,
        span: int = 64,
        generator: Optional[torch.Generator] = None,
) -> List[int]:
    """Indices of T frames at an even distance out of N: the paper's sampling for Kinetics, T of 64 consecutive frames.

    The frames are floor(span / T) apart. Training draws the first one, evenly over all places where the clip fits, so
    that every frame can be drawn; evaluation puts the clip in the middle of the video.

    If the video is shorter than the clip, :func:`sample_segments` spreads the T frames over all of it. The authors'
    code goes on at the first frame instead, which puts a cut into the clip. It also counts the frames between the
    clip's last one and the next as part of the clip, so that it never draws the last ones of the video.

    Args:
        num_available: Number N of frames to choose from.
        num_frames: Frames T of a clip.
        span: Consecutive frames that the clip is taken from, at least T.
        generator: Draws the first frame. None takes the middle.

    Returns:
        T indices in [0, N), none less than the one before it.

    Raises:
        ValueError: An argument is no positive int, or span < num_frames.

    Example:
        >>> sample_dense(300, 8), sample_dense(16, 8)
        ([121, 129, 137, 145, 153, 161, 169, 177], [1, 3, 5, 7, 9, 11, 13, 15])
    """
    distance, places = _dense(num_available, num_frames, span)
    if places < 1:
        return sample_segments(num_available, num_frames, generator)
    begin = (places - 1) // 2 if generator is None else int(torch.randint(places, (), generator=generator))
    return [begin + i * distance for i in range(num_frames)]


def sample_clips(
        num_available: int,
        num_frames: int = 8,
        num_clips: int = 2,
        span: Optional[int] = None,
) -> List[List[int]]:
    """Indices of the frames of M clips out of N frames, the same at each call: the paper's tests with more clips.

    Without a span each clip covers the video. There are M T equal segments, and clip m takes the middle frame of
    segments m, m + M, m + 2 M and so on, so that no two clips hold the same frame unless N < M T. One clip is that of
    :func:`sample_indices`. The paper says "uniformly sample N clips"; the authors' code draws the second clip and those
    after it at random.

    With a span each clip is one of :func:`sample_dense`. The first begins at the first frame, the last one ends at the
    last frame, and the others lie evenly between. One clip lies in the middle. In a video shorter than a clip, the
    clips are those without a span.

    Args:
        num_available: Number N of frames to choose from.
        num_frames: Frames T of a clip.
        num_clips: Number M of clips.
        span: Consecutive frames that each clip is taken from, at least T. None takes each from the whole video.

    Returns:
        M lists of T indices in [0, N). In each list none is less than the one before it.

    Raises:
        ValueError: An argument is no positive int, or span < num_frames.

    Example:
        >>> sample_clips(80, 4, 2)
        [[5, 25, 45, 65], [15, 35, 55, 75]]
        >>> sample_clips(100, 4, 3, span=16)
        [[0, 4, 8, 12], [43, 47, 51, 55], [87, 91, 95, 99]]
    """
    m = check_positive('num_clips', num_clips)
    if span is not None:
        distance, places = _dense(num_available, num_frames, span)
        if m == 1 and places >= 1:
            return [sample_dense(num_available, num_frames, span)]
        if places >= 1:
            begins = [i * (places - 1) // (m - 1) for i in range(m)]
            return [[begin + i * distance for i in range(num_frames)] for begin in begins]
    indices = sample_indices(num_available, check_positive('num_frames', num_frames) * m)
    return [indices[i::m] for i in range(m)]


def _dense(num_available: int, num_frames: int, span: int) -> Tuple[int, int]:
    """Distance of the frames of a dense clip, and number of places where it fits, below 1 if it does not."""
    n, t = check_positive('num_available', num_available), check_positive('num_frames', num_frames)
    if check_positive('span', span) < t:
        raise ValueError(f'span must be at least num_frames={t}, got {span}')
    distance = span // t
    return distance, n - (t - 1) * distance


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
