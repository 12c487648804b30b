"""Watch a camera, through FFmpeg's own devices: Video4Linux, AVFoundation, DirectShow."""
import sys
from collections import deque
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Deque, Iterator, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from cmr_layers.video.decode import import_av
from cmr_layers.video.picture import picture, reformatter

__all__ = ['Moment', 'open_camera', 'watch']


class Moment(NamedTuple):
    """A frame of a camera.

    Attributes:
        time: Seconds since the first frame.
        image: The frame, uint8 (H, W, 3).
        window: All frames of the last seconds, uint8 (N, 3, h, w), when it is time to classify them. Else None.
    """
    time: Fraction
    image: 'np.ndarray[Any, Any]'
    window: Optional[Tensor]


def default_format(platform: str = sys.platform) -> str:
    """FFmpeg's name for the cameras of a system."""
    return {'darwin': 'avfoundation', 'win32': 'dshow'}.get(platform, 'v4l2')


@contextmanager
def open_camera(device: str, format: Optional[str] = None) -> Iterator[Any]:
    """Open a camera.

    Args:
        device: Its name: ``/dev/video0`` (Linux), ``0`` (macOS), ``video=Integrated Camera`` (Windows).
        format: FFmpeg's name for the kind of device. None takes the one of this system.

    Raises:
        OSError: There is no such device, or it cannot be opened.
        ValueError: This FFmpeg has no such devices, or there is no picture in it.
    """
    av = import_av()
    kind = format or default_format()
    try:
        container = av.open(device, format=kind)
    except av.error.FFmpegError as error:
        raise OSError(
            error.errno, f'camera {device!r} ({kind}) cannot be opened: {error.strerror}; wanted a camera such as '
            f'/dev/video0 (Linux), 0 (macOS) or "video=NAME" (Windows)') from error
    except ValueError as error:
        raise ValueError(f'this FFmpeg knows no devices of format {kind!r} ({error}); choose another with '
                         f'--camera-format') from error
    with container:
        if not container.streams.video:
            raise ValueError(f'camera {device!r} ({kind}) gives no pictures; wanted a camera')
        yield container


def watch(container: Any, seconds: float, every: float, short_side: int) -> Iterator[Moment]:
    """The frames of a camera, one by one, and from time to time all of the last seconds.

    Whoever takes longer for a window than the time to the next one falls behind, until the system drops frames. Times
    are the camera's, so that they stay right.

    Args:
        container: An open camera.
        seconds: Length of a window.
        every: Seconds from a window to the next.
        short_side: Shorter side of the frames of a window: smaller ones take less memory.
    """
    stream = container.streams.video[0]
    length, step = (Fraction(str(value)) for value in (seconds, every))  # the decimal numbers that were written
    recent: Deque[Tuple[Fraction, np.ndarray[Any, Any]]] = deque()
    begin: Optional[Fraction] = None
    whole, shrunk = reformatter(), reformatter()
    period = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    time, due = -period, length
    for frame in container.decode(stream):
        stamp = None if frame.pts is None else frame.pts * frame.time_base
        if begin is None and stamp is not None:
            begin = stamp
        time = time + period if stamp is None or begin is None else stamp - begin
        image = picture(frame, None, whole)
        _, height, width = image.shape
        # as integers round in read_frames
        short = min(height, width)
        recent.append((time, picture(frame, (height * short_side // short, width * short_side // short), shrunk)))
        while recent[0][0] <= time - length:
            recent.popleft()
        window = None
        if time + period >= due:
            window = torch.from_numpy(np.stack([small for _, small in recent]))
            while due <= time + period:
                due += step
        yield Moment(time, image.transpose(1, 2, 0), window)
