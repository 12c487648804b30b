"""Labelled videos as a map-style dataset: clips for training, or all views of a video for evaluation."""
import logging
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_positive
from .decode import MAX_CLIP_PIXELS
from .entries import Entry, VideoList
from .frames import UnreadableVideo, read_frames
from .index import Index
from .info import VideoInfo
from .random import generator_of
from .sample import sample_clips, sample_dense, sample_segments

__all__ = ['Sample', 'VideoDataset']

_LOG = logging.getLogger(__name__)
_TRIES = 10


class Sample(NamedTuple):
    """A video of a dataset. A ``DataLoader`` makes of several one whose attributes have a batch dimension.

    Attributes:
        clips: uint8. In training (T, 3, H, W); in evaluation (V, T, 3, H, W), V the views: num_clips times crops, the
            crops of a clip next to each other.
        label: Index of the class.
        index: Place of the video in the list.
        failures: In training, how many videos did not decode and were left for this one. In evaluation, 1 if this
            video does not decode; its clips are black then, and it has to count as wrong.
    """
    clips: Tensor
    label: int
    index: int  # type: ignore[assignment]  # of a tuple that nobody searches
    failures: int


class VideoDataset(Dataset[Sample]):
    """Videos of a list, sampled, decoded and cut.

    It takes (epoch, i), as :class:`EpochSampler` yields them, or i alone for epoch 0. What it returns follows from
    seed, epoch and i, whichever process or worker reads it and whatever was read before. So a run that goes on where
    it was interrupted sees what it would have seen.

    Nothing takes the place of a video that does not decode without a count. What the index knows to be unreadable, or
    to have no frame in its window, is in ``unreadable``: training leaves it out, evaluation keeps it as wrong. A video
    that fails later, too, is logged; training draws another one and says so in ``Sample.failures``.

    Args:
        videos: The list.
        index: What :func:`index_videos` knows of its paths.
        transform: In training a :class:`TrainTransform`, or what takes frames, label and generator like it. In
            evaluation an :class:`EvalTransform`, or what takes frames like it and has its ``size`` and ``crops``.
        num_frames: Frames T of a clip.
        train: Whether to draw clips at random, one of each video.
        span: Consecutive frames that a clip is taken from (:func:`sample_dense`). None takes it from the whole video
            (:func:`sample_segments`).
        num_clips: Clips of each video in evaluation.
        seed: Seed of all random numbers.

    Attributes:
        unreadable: Place in the list and reason of each video that is known to be unreadable.

    Raises:
        ValueError: An argument is out of its range, the index lacks a path, or training has no video left. When an item
            is read: i is out of range.
        RuntimeError: When an item is read in training: it and 9 others do not decode.

    Example:
        >>> videos = read_folders('videos/train')  # doctest: +SKIP
        >>> dataset = VideoDataset(videos, index_videos(videos.paths), TrainTransform(), train=True)  # doctest: +SKIP
        >>> dataset[0, 5].clips.shape  # doctest: +SKIP
        torch.Size([8, 3, 224, 224])
    """

    def __init__(
            self,
            videos: VideoList,
            index: Index,
            transform: Callable[..., Any],
            *,
            num_frames: int = 8,
            train: bool,
            span: Optional[int] = None,
            num_clips: int = 1,
            seed: int = 0,
    ) -> None:
        self.videos, self.index, self.transform, self.train, self.seed = videos, index, transform, train, seed
        self.num_frames, self.span = check_positive('num_frames', num_frames), span
        self.num_clips = check_positive('num_clips', num_clips)
        if train and num_clips != 1:
            raise ValueError(f'num_clips must be 1 in training, which draws one clip of a video, got {num_clips}')
        if span is not None and check_positive('span', span) < num_frames:
            raise ValueError(f'span must be at least num_frames={num_frames}, got {span}')
        if seed < 0:
            raise ValueError(f'seed must be an int >= 0, got {seed!r}')
        missing = [path for path in videos.paths if path not in index]
        if missing:
            raise ValueError(f'index lacks {len(missing)} of the videos, such as {missing[0]}; wanted all of them')
        self.unreadable: Dict[int, str] = dict(_unreadable(videos, index))
        self._places = [i for i in range(len(videos)) if not train or i not in self.unreadable]
        if not self._places:
            raise ValueError(f'videos has {len(videos)} videos and none is readable, such as: {self.unreadable[0]}')
        self._logged: Set[str] = set()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Union[int, Tuple[int, int]]) -> Sample:
        epoch, i = at if isinstance(at, tuple) else (0, at)
        if not 0 <= i < len(self):
            raise IndexError(f'index must be in [0, {len(self)}), got {i}')
        return self._drawn(generator_of(self.seed, epoch, i), i) if self.train else self._views(i)

    def _drawn(self, generator: torch.Generator, i: int) -> Sample:
        """A random clip of a video, or of another one if it does not decode."""
        failed: List[str] = []
        for _ in range(_TRIES):
            place = self._places[i]
            entry = self.videos.entries[place]
            try:
                clip = self._read(entry, lambda frames: [
                    sample_segments(frames, self.num_frames, generator) if self.span is None
                    else sample_dense(frames, self.num_frames, self.span, generator)])
            except (UnreadableVideo, OSError) as error:
                failed.append(self._log(entry, error))
                i = int(torch.randint(len(self), (), generator=generator))
                continue
            frames, label = self.transform(clip, entry.label, generator)
            return Sample(frames, label, place, len(failed))
        raise RuntimeError(f'{_TRIES} videos, drawn one after the other, do not decode: ' + '; '.join(failed))

    def _views(self, i: int) -> Sample:
        """All views of a video, black if it does not decode."""
        entry = self.videos.entries[i]
        if i not in self.unreadable:
            try:
                info = self.index[entry.path]
                # one pass over the file, or one for each clip if together they are too many pixels
                pixels = info.width * info.height * self.num_frames * self.num_clips
                parts = [slice(None)] if pixels <= MAX_CLIP_PIXELS else [slice(k, k + 1) for k in range(self.num_clips)]
                clips = [self.transform(clip) for part in parts for clip in self._clips(entry, part)]
                return Sample(torch.cat(clips), entry.label, i, 0)
            except (UnreadableVideo, OSError) as error:
                self._log(entry, error)
        cut: Any = self.transform
        views = self.num_clips * cut.crops
        black = torch.zeros(views, self.num_frames, 3, cut.size, cut.size, dtype=torch.uint8)
        return Sample(black, entry.label, i, 1)

    def _clips(self, entry: Entry, part: slice) -> Sequence[Tensor]:
        """Some of the clips of an evaluation."""
        frames = self._read(
            entry, lambda count: sample_clips(count, self.num_frames, self.num_clips, self.span)[part])
        clips: Sequence[Tensor] = frames.split(self.num_frames)
        return clips

    def _read(self, entry: Entry, sample: Callable[[int], List[List[int]]]) -> Tensor:
        """Frames of clips, one clip after the other, which are chosen by the number of frames that there are."""
        info = self.index[entry.path]
        window = info.window(entry.start, entry.end)
        return self._frames(entry.path, [window[j] for clip in sample(len(window)) for j in clip], info)

    def _frames(self, path: str, indices: List[int], info: VideoInfo) -> Tensor:
        """Frames of a video by their indices. Where videos are no files, this alone is another."""
        return read_frames(path, indices, info)

    def _log(self, entry: Entry, error: Exception) -> str:
        if entry.path not in self._logged:
            self._logged.add(entry.path)
            _LOG.warning('cannot be read now, but could when it was looked at: %s', error)
        return str(error)


def _unreadable(videos: VideoList, index: Index) -> Iterator[Tuple[int, str]]:
    """Places of videos without a frame to show, and why."""
    for i, entry in enumerate(videos.entries):
        if entry.path in index.broken:
            yield i, index.broken[entry.path]
        elif entry.start is not None or entry.end is not None:
            try:
                index[entry.path].window(entry.start, entry.end)
            except ValueError as error:
                yield i, f'{entry.path}: {error}'
