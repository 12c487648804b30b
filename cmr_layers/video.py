"""A clip from a video file: sample frames with PyAV, resize and normalise them for a model.

Needs the extra: ``pip install "cmr-layers[video]"``.
"""
import math
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from .clip import check_positive
from .clip_model import ClipModel

__all__ = ['Clip', 'ClipTransform', 'read_clip', 'sample_indices']


class Clip(NamedTuple):
    """What :func:`read_clip` returns.

    Attributes:
        frames: uint8 RGB, (T, 3, H, W), as torchvision's transforms take a video.
        times: Seconds of each frame since the first frame of the video, T of them.
    """
    frames: Tensor
    times: List[float]


def sample_indices(num_available: int, num_frames: int = 8) -> List[int]:
    """Indices of T frames spread over N: the middle of each of T equal segments, floor((t + 1/2) N / T).

    This is how TSN and TSM sample for testing. With N < T an index repeats.

    Args:
        num_available: Frames N that there are.
        num_frames: Frames T of a clip.

    Returns:
        T indices in [0, N), ascending.

    Raises:
        ValueError: An argument is no positive int.

    Example:
        >>> sample_indices(80, 8), sample_indices(3, 8)
        ([5, 15, 25, 35, 45, 55, 65, 75], [0, 0, 0, 1, 1, 2, 2, 2])
    """
    n, t = check_positive('num_available', num_available), check_positive('num_frames', num_frames)
    return [(2 * i + 1) * n // (2 * t) for i in range(t)]


def read_clip(
        path: Union[str, 'os.PathLike[str]'],
        num_frames: int = 8,
        start: Optional[float] = None,
        end: Optional[float] = None,
) -> Clip:
    """Sample a clip from a video file, evenly over the video or a window of it (see :func:`sample_indices`).

    The file is decoded twice. Containers are often wrong about their number of frames, so the first pass counts what
    really decodes and the second keeps the frames of the clip: memory stays at T frames however long the video is.
    Damaged frames are skipped, like the missing end of a truncated file.

    Args:
        path: Video file of any format that FFmpeg decodes.
        num_frames: Frames T of a clip. Of a video with fewer, frames repeat.
        start: Begin of the window in seconds since the video's first frame; None is 0.
        end: End of the window, not included; None is the video's end.

    Returns:
        The clip's frames, turned upright if the file says how, and their times.

    Raises:
        ImportError: PyAV is missing.
        FileNotFoundError: There is no such file.
        ValueError: The file is no video, not a frame of it decodes, no frame lies in the window, or an argument is
            out of its range.

    Example:
        >>> clip = read_clip('video.mp4', num_frames=8, start=1.5, end=4)  # doctest: +SKIP
        >>> clip.frames.shape, clip.frames.dtype  # doctest: +SKIP
        (torch.Size([8, 3, 272, 640]), torch.uint8)
    """
    check_positive('num_frames', num_frames)
    begin = 0. if start is None else _check_seconds('start', start)
    stop = math.inf if end is None else _check_seconds('end', end)
    if stop <= begin:
        raise ValueError(f'end must be later than start={begin:g}, got {stop:g}')
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'path={path!r} does not exist; wanted a video file')
    if not os.path.isfile(path):
        raise ValueError(f'path={path!r} is not a file; wanted a video file')

    times = [time for _, time in _decode(path)]
    if not times:
        raise ValueError(f'path={path!r} is damaged or empty: not a frame of it decodes; wanted a video file')
    window = [i for i, time in enumerate(times) if begin <= time < stop]
    if not window:
        raise ValueError(
            f'no frame of path={path!r} lies in the window start={begin:g} to end={stop:g}: its {len(times)} frames '
            f'begin at 0 s and the last one at {times[-1]:.3f} s'
        )
    wanted = [window[i] for i in sample_indices(len(window), num_frames)]
    images: Dict[int, np.ndarray[Any, Any]] = {}
    for i, (frame, _) in enumerate(_decode(path)):
        if i in wanted:
            images[i] = _upright(frame, images[wanted[0]].shape if images else None)
        if i == wanted[-1]:
            break
    if wanted[-1] not in images:
        raise ValueError(f'path={path!r} is damaged: it decodes to {len(times)} frames first and to {i + 1} next')
    frames = torch.from_numpy(np.stack([images[i] for i in wanted])).permute(0, 3, 1, 2).contiguous()
    return Clip(frames, [times[i] for i in wanted])


class ClipTransform:
    """Frames of a video to the clip that a model takes, as the paper tests: short side to 256, centre crop of 224.

    Args:
        model: The model; its mean and standard deviation are used where timm knows them, ImageNet's otherwise.
        size: Height and width of the crop. The short side is resized to 256/224 of it.
        mean: Mean of each channel of an image in [0, 1], if not the model's.
        std: Standard deviation likewise.

    Shapes:
        uint8 (T, 3, H, W) to float32 (1, T, 3, size, size).

    Raises:
        ValueError: size is no positive int; at call time, frames are not uint8 (T, 3, H, W).

    Example:
        >>> import timm, cmr_layers
        >>> transform = ClipTransform(timm.create_model('cmr_resnet18', num_frames=4))
        >>> transform(torch.zeros(4, 3, 120, 160, dtype=torch.uint8)).shape
        torch.Size([1, 4, 3, 224, 224])
    """

    def __init__(
            self,
            model: Optional[nn.Module] = None,
            size: int = 224,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
    ) -> None:
        from torchvision.transforms import InterpolationMode, v2

        check_positive('size', size)
        # timm takes None for what is not given
        config = resolve_data_config(
            {'mean': mean, 'std': std}, model=model.model if isinstance(model, ClipModel) else model)
        self.size, self.mean, self.std = size, config['mean'], config['std']
        self._crop = v2.Compose([
            v2.Resize(round(size * 256 / 224), InterpolationMode(config['interpolation']), antialias=True),
            v2.CenterCrop(size),
        ])
        self._normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)])

    def crop(self, frames: Tensor) -> Tensor:
        """What the model will see, as an image: uint8 (T, 3, H, W) to uint8 (T, 3, size, size)."""
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            got = f'{frames.dtype} {list(frames.shape)}' if isinstance(frames, Tensor) else type(frames).__name__
            raise ValueError(f'frames must be uint8 of shape (T, 3, H, W), got {got}')
        cropped: Tensor = self._crop(frames)
        return cropped

    def __call__(self, frames: Tensor) -> Tensor:
        clip: Tensor = self._normalise(self.crop(frames))
        return clip.unsqueeze(0)


def _check_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f'{name} must be a number of seconds >= 0, got {value!r}')
    return float(value)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading a video needs PyAV: pip install "cmr-layers[video]"') from error
    return av


def _decode(path: str) -> Iterator[Tuple[Any, float]]:
    """Every frame that decodes, in the order it is shown, with its seconds since the first."""
    av = _import_av()
    try:
        container = av.open(path)
    except (av.error.FFmpegError, UnicodeError) as error:
        raise ValueError(f'path={path!r} is not a video that FFmpeg can read: {error}') from error
    with container:
        # FFmpeg would draw any text file as a video of a terminal
        if not container.streams.video or container.format.name == 'tty':
            raise ValueError(f'path={path!r} holds no video ({container.format.long_name}); wanted a video file')
        stream = container.streams.video[0]
        stream.thread_type = 'AUTO'
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        first, shown = None, 0
        for packet in _packets(container, stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in frames:
                time = shown / rate if frame.time is None else frame.time
                first = time if first is None else first
                yield frame, time - first
                shown += 1


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream, up to where the file can no longer be read."""
    try:
        yield from container.demux(stream)
    except _import_av().error.FFmpegError:
        return


def _upright(frame: Any, shape: Optional[Tuple[int, ...]]) -> 'np.ndarray[Any, Any]':
    """A frame as RGB (H, W, 3), turned as a player would, and scaled to shape if the video changes its size."""
    turns = round(frame.rotation / 90) % 4
    height, width = (None, None) if shape is None else shape[:2] if turns % 2 == 0 else (shape[1], shape[0])
    image = frame.reformat(format='rgb24', height=height, width=width).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, turns))
