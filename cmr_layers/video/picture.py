"""Turn a decoded frame into the picture that a player shows."""
from typing import Any, Optional, Tuple

import numpy as np

__all__ = ['picture']

# The numbers a, b, c, d of a display matrix: a point (x, y) of the frame is shown at (a x + c y, b x + d y)
Turn = Tuple[float, float, float, float]
UPRIGHT: Turn = (1, 0, 0, 1)


def picture(frame: Any, shape: Optional[Tuple[int, int]] = None) -> 'np.ndarray[Any, Any]':
    """A frame as RGB, turned and mirrored by its display matrix.

    Args:
        frame: A frame of PyAV.
        shape: Height and width to scale to. None keeps the size of the frame.

    Shapes:
        Returns uint8 (3, H, W), a view.
    """
    a, b, c, d = _turn(frame)
    across = abs(b) + abs(c) > abs(a) + abs(d)  # other angles are rounded to the nearest multiple of 90 degrees
    height, width = (None, None) if shape is None else shape[::-1] if across else shape
    image: np.ndarray[Any, Any] = frame.reformat(format='rgb24', height=height, width=width).to_ndarray()
    image = image.transpose(2, 1, 0) if across else image.transpose(2, 0, 1)
    down, right = (b, c) if across else (d, a)
    return image[:, ::-1 if down < 0 else 1, ::-1 if right < 0 else 1]


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
