"""Turn a decoded frame into the picture that a player shows."""
from functools import partial
from typing import Any, Callable, Optional, Tuple

import numpy as np

from .decode import import_av

__all__ = ['convert', 'picture', 'reformatter', 'rotation', 'shown_shape']

# The numbers a, b, c, d of a display matrix: a point (x, y) of the frame is shown at (a x + c y, b x + d y)
Turn = Tuple[float, float, float, float]
UPRIGHT: Turn = (1, 0, 0, 1)


def picture(
        frame: Any,
        shape: Optional[Tuple[int, int]] = None,
        reformat: Optional[Callable[..., Any]] = None,
) -> 'np.ndarray[Any, Any]':
    """A frame as RGB, turned and mirrored by its display matrix.

    Args:
        frame: A frame of PyAV.
        shape: Height and width to scale to. None keeps the size of the frame.
        reformat: What :func:`reformatter` returns. None makes anew what FFmpeg needs to convert a frame.

    Shapes:
        Returns uint8 (3, H, W), a view.
    """
    a, b, c, d = _turn(frame)
    across = _across(a, b, c, d)
    height, width = (None, None) if shape is None else shape[::-1] if across else shape
    make = reformatter() if reformat is None else reformat
    image: np.ndarray[Any, Any] = make(frame, format='rgb24', height=height, width=width).to_ndarray()
    image = image.transpose(2, 1, 0) if across else image.transpose(2, 0, 1)
    down, right = (b, c) if across else (d, a)
    return image[:, ::-1 if down < 0 else 1, ::-1 if right < 0 else 1]


def reformatter() -> Callable[..., Any]:
    """Converts one frame after the other with one thread, and keeps FFmpeg's tables in between."""
    av = import_av()
    # Since 17, PyAV starts as many threads for each frame as there are cores. A process that is forked later, and
    # collects the frame, would wait for them forever.
    threads = {'threads': 1} if int(av.__version__.split('.')[0]) >= 17 else {}
    return partial(av.video.reformatter.VideoReformatter().reformat, **threads)


def convert(
        frame: Any,
        name: str,
        shape: Optional[Tuple[int, int]] = None,
        reformat: Optional[Callable[..., Any]] = None,
) -> 'np.ndarray[Any, Any]':
    """:func:`picture`, with an error that names the file.

    Raises:
        ValueError: FFmpeg does not turn frames of this format into RGB.
    """
    try:
        return picture(frame, shape, reformat)
    except import_av().error.FFmpegError as error:
        if isinstance(error, OSError):  # such as no memory or no threads
            raise
        raise ValueError(
            f'{name} has frames of format {frame.format.name}, which FFmpeg does not turn into RGB: '
            f'{error.strerror}') from error


def shown_shape(frame: Any) -> Tuple[int, int]:
    """Height and width of a frame as it is shown."""
    return (frame.width, frame.height) if _across(*_turn(frame)) else (frame.height, frame.width)


def rotation(frame: Any) -> int:
    """Degrees by which a frame is turned clockwise to be shown, after it is mirrored: 0, 90, 180 or 270."""
    a, b, c, d = _turn(frame)
    if _across(a, b, c, d):
        return 90 if c < 0 else 270
    return 180 if d < 0 else 0


def _across(a: float, b: float, c: float, d: float) -> bool:
    """Whether rows are shown as columns. Angles are rounded to the nearest multiple of 90 degrees."""
    return abs(b) + abs(c) > abs(a) + abs(d)


def _turn(frame: Any) -> Turn:
    try:
        matrix = frame.side_data.get('DISPLAYMATRIX')
    except ValueError:  # PyAV lists all side data and does not know the newest kinds
        return _rotation(frame.rotation)
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def _rotation(degrees: int) -> Turn:
    """The matrix of a rotation counterclockwise, in quarter turns."""
    return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(degrees / 90) % 4]
