"""Apply a trained network to videos: whole ones, or windows that slide over a long one."""
from bisect import bisect_left
from fractions import Fraction
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmr_layers.video.augment import EvalTransform, normalize
from cmr_layers.video.dataset import VideoDataset
from cmr_layers.video.index import Index, VideoInfo
from cmr_layers.video.lists import Entry, VideoList
from cmr_layers.video.sample import sample_clips

from .checkpoint import Loaded
from .metrics import mean_std, score_clips

__all__ = ['Classifier', 'Window', 'nearest', 'slide']


class Window(NamedTuple):
    """A part of a video, in seconds. None is its start or its end."""
    start: Optional[float] = None
    end: Optional[float] = None


class Classifier:
    """A trained network, with the clip length, crop and sampling that it was trained with.

    Args:
        loaded: The network, with the names of its classes and its configuration.
        device: Where to compute. The network is moved there.
        num_clips: Clips over each video or window.
        crops: 1, the centre, or 3 of each clip.
        average: ``'scores'`` or ``'logits'``, see :func:`metrics.evaluate`.
    """

    def __init__(
            self,
            loaded: Loaded,
            device: Any = 'cpu',
            num_clips: int = 1,
            crops: int = 1,
            average: str = 'scores',
    ) -> None:
        self.model, self.classes, self.config = loaded.model.to(device).eval(), loaded.classes, loaded.config
        self.device, self.num_clips, self.average = device, num_clips, average
        self.transform = EvalTransform(self.config.size, self.config.short_side, crops)

    def scores(self, index: Index, path: str, windows: Sequence[Window] = (Window(),)) -> Iterator[Tensor]:
        """Probability of each class, (K,), for windows of a video, one after the other.

        Raises:
            ValueError: The video cannot be read.
        """
        for clips in self._clips(index, path, windows, self.transform, self.num_clips):
            yield self._score(clips)

    def scores_of_frames(self, frames: Tensor) -> Tensor:
        """Probability of each class, (K,), for all frames of a window: uint8 (N, 3, H, W)."""
        samples = sample_clips(len(frames), self.config.num_frames, self.num_clips, self.config.span)
        return self._score(torch.cat([self.transform(frames[sample]) for sample in samples]))

    def centre(self, index: Index, path: str) -> Tuple[Tensor, Tensor, List[float]]:
        """One clip over a video, in the middle of its frames.

        Returns:
            The clip as the network takes it, (1, T, 3, H, W), as images, uint8 (T, 3, H, W), and T times in seconds.
        """
        transform = EvalTransform(self.config.size, self.config.short_side, 1)
        frames = next(self._clips(index, path, (Window(),), transform, 1))
        mean, std = mean_std(self.model)
        info = index[path]
        sample = sample_clips(info.num_frames, self.config.num_frames, 1, self.config.span)[0]
        times = info.times
        return normalize(frames.to(self.device), mean, std), frames[0], [float(times[i]) for i in sample]

    def _clips(self, index: Index, path: str, windows: Sequence[Window], transform: Any, num_clips: int,
               ) -> Iterator[Tensor]:
        """The views of each window as evaluation takes them: uint8 (V, T, 3, H, W)."""
        reason = index[path].error
        if reason is not None:
            raise ValueError(f'{path} cannot be read: {reason}')
        videos = VideoList(tuple(Entry(path, 0, *window) for window in windows), self.classes)
        dataset = VideoDataset(
            videos, index, transform, num_frames=self.config.num_frames, train=False, span=self.config.span,
            num_clips=num_clips)
        for sample in DataLoader(dataset, batch_size=1):
            if sample.failures.any():
                raise ValueError(f'{path} cannot be read any more, or has changed since it was looked at')
            yield sample.clips[0]

    @torch.no_grad()
    def _score(self, clips: Tensor) -> Tensor:
        return score_clips(self.model, clips[None], self.device, len(self.classes), self.average, clips_per_pass=8)[0]


def slide(info: VideoInfo, length: float, step: float) -> List[Window]:
    """Windows of a length in seconds that begin a step apart, and a last one that ends where the video does.

    A video that is no longer than that is one window. Windows without a frame are left out.

    Example:
        >>> info = VideoInfo(num_frames=50, duration=5., rate=10., unit=Fraction(1, 10), steps=1)
        >>> [tuple(window) for window in slide(info, 2, 1.25)]
        [(0.0, 2.0), (1.25, 3.25), (2.5, 4.5), (3.0, None)]
    """
    if info.duration <= length:
        return [Window()]
    begins = [0.]
    while begins[-1] + length < info.duration:
        begins.append(step * len(begins))
    begins[-1] = info.duration - length
    windows = [Window(begin, begin + length) for begin in begins[:-1]] + [Window(begins[-1])]
    times = [float(time) for time in info.times]

    def place(time: Optional[float], missing: int) -> int:
        return missing if time is None else bisect_left(times, time)

    return [w for w in windows if place(w.start, 0) < place(w.end, len(times))]


def nearest(windows: Sequence[Window], times: Sequence[Fraction], duration: float) -> List[int]:
    """For each time, the window whose middle is nearest. Windows and times ascend.

    Example:
        >>> nearest([Window(0, 2), Window(1, 3), Window(2)], [Fraction(i, 2) for i in range(8)], 4.)
        [0, 0, 0, 0, 1, 1, 2, 2]
    """
    middles = [((w.start or 0) + (duration if w.end is None else w.end)) / 2 for w in windows]
    found = []
    at = 0
    for time in times:
        while at + 1 < len(middles) and abs(middles[at + 1] - time) < abs(middles[at] - time):
            at += 1
        found.append(at)
    return found
