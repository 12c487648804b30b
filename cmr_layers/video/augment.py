"""Cut the clips of training and evaluation out of frames: uint8 in and out, every frame of a clip alike."""
from typing import Any, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..checks import check_choice, check_positive
from .flip import FlipTable, check_table, flip_table, side_pairs
from .transform import check_frames

__all__ = ['EvalTransform', 'FlipTable', 'TrainTransform', 'flip_table', 'normalize', 'side_pairs']


class TrainTransform:
    """Cuts a random clip for training: short side to 256, multi-scale corner crop, resized to 224; a flip if asked.

    TSN's augmentation, which the paper takes. A crop has one of the sides 256 s, s of ``scales``, and its height and
    width are at most one scale apart, so 10 sizes by default. It lies at one of 13 places: the corners, the centre, the
    middles of the edges, and the middles between centre and corners. The authors' code first resizes to 256 x 340,
    whatever the aspect ratio is; this keeps it, as the paper says.

    All random numbers come from the generator of the call, two or three of them, and the frames of a clip share them.

    Args:
        size: Height and width of the clip.
        short_side: Length to which the short side of the frames is resized, larger or smaller, before the crop.
        scales: Sides of the crops, as parts of short_side.
        flip: Table of labels from :func:`flip_table`; half of the clips are mirrored and take its label. None mirrors
            nothing.
        interpolation: ``'bilinear'`` or ``'bicubic'``, both with antialiasing.

    Shapes:
        uint8 (T, 3, H, W) and a label to uint8 (T, 3, size, size) and a label.

    Raises:
        ValueError: An argument is out of its range. At call time: frames are not uint8 (T, 3, H, W), or label is not in
            the table.
        TypeError: flip is no table. At call time: generator is no torch.Generator.

    Example:
        >>> transform = TrainTransform(flip=flip_table(['push left', 'push right'], [('push left', 'push right')]))
        >>> frames = torch.zeros(8, 3, 120, 160, dtype=torch.uint8)
        >>> clip, label = transform(frames, 0, torch.Generator().manual_seed(2))
        >>> clip.shape, label
        (torch.Size([8, 3, 224, 224]), 1)
    """

    def __init__(
            self,
            size: int = 224,
            short_side: int = 256,
            scales: Sequence[float] = (1, .875, .75, .66),
            flip: Optional[FlipTable] = None,
            interpolation: str = 'bilinear',
    ) -> None:
        self.size, self.short_side = check_positive('size', size), check_positive('short_side', short_side)
        self.scales = tuple(scales)
        if not self.scales or not all(0 < scale <= 1 and int(short_side * scale) > 0 for scale in self.scales):
            raise ValueError(
                f'scales must be numbers in (0, 1], of a pixel or more of short_side={short_side}, got {scales!r}')
        self.flip = None if flip is None else check_table(flip)
        self.interpolation = _check_interpolation(interpolation)

    def __call__(self, frames: Tensor, label: int, generator: torch.Generator) -> Tuple[Tensor, int]:
        check_frames(frames)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f'generator must be a torch.Generator, got {generator!r:.99}')
        if self.flip is not None and not 0 <= label < len(self.flip):
            raise ValueError(f'label must be one of the {len(self.flip)} of the table of the flip, got {label!r}')
        frames = _short_side(frames, self.short_side, self.interpolation)
        top, left, height, width = self._box(frames.shape[-2], frames.shape[-1], generator)
        clip = frames[..., top:top + height, left:left + width]
        clip = _resize(clip, (self.size, self.size), self.interpolation)
        if self.flip is not None and _draw(2, generator):
            return clip.flip(-1), self.flip[label]
        return clip.contiguous(), label

    def _box(self, height: int, width: int, generator: torch.Generator) -> Tuple[int, int, int, int]:
        """Top, left, height and width of a crop."""
        sides = [int(self.short_side * scale) for scale in self.scales]
        pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
        h, w = pairs[_draw(len(pairs), generator)]
        # in quarters of the room that the crop leaves
        places = [(i, j) for i in range(5) for j in range(5) if i % 2 == j % 2]
        i, j = places[_draw(len(places), generator)]
        return i * ((height - h) // 4), j * ((width - w) // 4), h, w


class EvalTransform:
    """Cuts the clips of an evaluation: short side to 256, then the centre of 224 or three crops, as in the paper.

    Three crops lie at the left, the middle and the right; of frames that are higher than wide, at the top, the middle
    and the bottom. Across, they are centred. They meet every part of the frame if size is short_side and the long side
    is at most 3 times that.

    Args:
        size: Height and width of the clip, at most short_side.
        short_side: Length to which the short side of the frames is resized, larger or smaller, before the crop.
        crops: 1 or 3.
        interpolation: ``'bilinear'`` or ``'bicubic'``, both with antialiasing.

    Shapes:
        uint8 (T, 3, H, W) to uint8 (crops, T, 3, size, size).

    Raises:
        ValueError: An argument is out of its range. At call time: frames are not uint8 (T, 3, H, W).

    Example:
        >>> EvalTransform(size=256, crops=3)(torch.zeros(8, 3, 120, 160, dtype=torch.uint8)).shape
        torch.Size([3, 8, 3, 256, 256])
    """

    def __init__(
            self,
            size: int = 224,
            short_side: int = 256,
            crops: int = 1,
            interpolation: str = 'bilinear',
    ) -> None:
        self.size, self.short_side = check_positive('size', size), check_positive('short_side', short_side)
        if size > short_side:
            raise ValueError(f'size must be at most short_side={short_side}, got {size}')
        if crops not in (1, 3):
            raise ValueError(f'crops must be 1 or 3, got {crops!r}')
        self.crops, self.interpolation = crops, _check_interpolation(interpolation)

    def __call__(self, frames: Tensor) -> Tensor:
        check_frames(frames)
        frames = _short_side(frames, self.short_side, self.interpolation)
        room = frames.shape[-2] - self.size, frames.shape[-1] - self.size
        tops, lefts = ([round(r / 2)] * self.crops for r in room)  # to the even one, as torchvision's centre crop
        if self.crops == 3 and room[0] > room[1]:
            tops = [0, tops[1], room[0]]
        elif self.crops == 3:
            lefts = [0, lefts[1], room[1]]
        return torch.stack([
            frames[..., top:top + self.size, left:left + self.size] for top, left in zip(tops, lefts)])


def normalize(clips: Tensor, mean: Union[Sequence[float], Tensor], std: Union[Sequence[float], Tensor]) -> Tensor:
    """Turn uint8 clips into the float32 input of a model, on the device they are on.

    A loader that hands out uint8 moves a quarter of the bytes.

    Args:
        clips: uint8 (..., 3, H, W).
        mean: Mean of each channel of an image in [0, 1], also as a tensor on the device of clips.
        std: Standard deviation, likewise.

    Returns:
        float32 of the shape of clips.

    Raises:
        ValueError: clips are not uint8 (..., 3, H, W), mean or std are not 3 numbers, or a standard deviation is 0.

    Example:
        >>> normalize(torch.full((1, 8, 3, 4, 4), 255, dtype=torch.uint8), (.5, .5, .5), (.5, .5, .5)).unique()
        tensor([1.])
    """
    if not isinstance(clips, Tensor) or clips.dtype != torch.uint8 or clips.ndim < 3 or clips.shape[-3] != 3:
        got = f'{clips.dtype} {list(clips.shape)}' if isinstance(clips, Tensor) else type(clips).__name__
        raise ValueError(f'clips must be uint8 of shape (..., 3, H, W), got {got}')
    for name, values in (('mean', mean), ('std', std)):
        if not hasattr(values, '__len__') or len(values) != 3:
            raise ValueError(f'{name} must hold 3 numbers, one a channel, got {values!r}')
    functional = _functional()
    scaled = functional.to_dtype(clips, torch.float32, scale=True)
    normal: Tensor = functional.normalize(scaled, mean, std, inplace=True)
    return normal


def _functional() -> Any:
    from torchvision.transforms.v2 import functional
    return functional


def _check_interpolation(value: str) -> str:
    return check_choice('interpolation', value, ('bilinear', 'bicubic'))


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _short_side(frames: Tensor, length: int, interpolation: str) -> Tensor:
    height, width = frames.shape[-2:]
    longer = length * max(height, width) // min(height, width)
    return _resize(frames, (longer, length) if height > width else (length, longer), interpolation)


def _resize(frames: Tensor, size: Tuple[int, int], interpolation: str) -> Tensor:
    from torchvision.transforms import InterpolationMode
    # the same size is no work for torchvision
    resized: Tensor = _functional().resize(frames, list(size), InterpolationMode(interpolation), antialias=True)
    return resized
