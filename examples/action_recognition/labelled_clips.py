"""Clips and labels for what is done with a network after its training."""
from dataclasses import replace
from typing import Iterable, Iterator, NamedTuple, Optional

from torch import Tensor
from torch.utils.data import DataLoader

from cmr_layers.video.lists import VideoList

from .config import Config
from .data import build_index, eval_dataset
from .processes import Processes

__all__ = ['Labelled', 'labelled_clips', 'readable', 'spread']


class Labelled(NamedTuple):
    """One clip of each of B videos: uint8 (B, T, 3, H, W), labels (B,), and whether the video is unreadable (B,)."""
    clips: Tensor
    label: Tensor
    unreadable: Tensor


def labelled_clips(videos: VideoList, config: Config, batch_size: int = 8, num_workers: int = 0) -> Iterator[Labelled]:
    """The centre of one clip of each video, sampled as in the training's validation, in the order of the list.

    Args:
        videos: The list. What is known of its videos is kept beside it.
        config: The training's.
        batch_size: Videos of a batch.
        num_workers: Processes that decode.
    """
    dataset = eval_dataset(config, videos, build_index(videos, Processes('cpu')))
    for batch in DataLoader(dataset, batch_size, num_workers=num_workers):
        yield Labelled(batch.clips[:, 0], batch.label, batch.failures > 0)


def readable(batches: Iterable[Labelled]) -> Iterator[Tensor]:
    """The clips alone, without those of unreadable videos."""
    for batch in batches:
        clips = batch.clips[~batch.unreadable]
        if len(clips):
            yield clips


def spread(videos: VideoList, at_most: Optional[int]) -> VideoList:
    """Some of the videos, evenly from the list, as lists are often sorted by class."""
    count = len(videos)
    if at_most is None or count <= at_most:
        return videos
    return replace(videos, entries=tuple(videos.entries[i * count // at_most] for i in range(at_most)))
