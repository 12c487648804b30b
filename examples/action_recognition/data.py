"""The lists, datasets and loaders of a run."""
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Tuple

import torch
from torch.utils.data import DataLoader

from cmr_layers.video.augment import EvalTransform, TrainTransform, flip_table, side_pairs
from cmr_layers.video.dataset import VideoDataset
from cmr_layers.video.index import Index, index_videos
from cmr_layers.video.lists import VideoList, read_videos
from cmr_layers.video.sampler import EpochSampler
from cmr_layers.video.shard_dataset import ShardDataset, Shards, read_shards

from .config import Config
from .processes import Processes

__all__ = [
    'batches_of', 'build_index', 'build_lists', 'eval_dataset', 'make_loader', 'read_any', 'train_dataset']

WORKER_ENDED = (
    'a process that reads videos has ended: {}; was it out of memory? The same command goes on from the last '
    'checkpoint')


def build_lists(
        config: Config, classes: Optional[Tuple[str, ...]] = None,
) -> Tuple[Optional[VideoList], Optional[VideoList]]:
    """The lists of training and validation, each None if there is none. The second has the classes of the first.

    Args:
        config: The configuration.
        classes: Names of a network's classes, for lists that have to fit it. None: ``config.classes``, or those of the
            training list.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: A list cannot be understood.
    """
    for option in ('train_list', 'val_list'):
        path = getattr(config, option)
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(
                f'{option}={path!r} does not exist; wanted a list, or the folder of the classes or shards')
    names: Any = config.classes if classes is None else classes
    train = None if config.train_list is None else read_any(config.layout, config.train_list, config.root, names)
    if names is None and train is not None:
        names = train.classes
    val = None if config.val_list is None else read_any(
        config.layout, config.val_list, config.val_root or config.root, names)
    return train, val


def read_any(layout: str, file: Optional[str], root: Optional[str] = None, classes: Any = None) -> VideoList:
    """A list of videos of any layout, or a folder of shards as layout ``'shards'``."""
    if layout != 'shards':
        return read_videos(layout, file, root, classes)
    if file is None or root is not None:
        raise ValueError(f"layout 'shards' wants the folder of the shards as the list and no root, got list={file!r} "
                         f'and root={root!r}')
    return read_shards(file, classes)


def build_index(videos: VideoList, processes: Processes, progress: bool = True) -> Index:
    """The index of a list, cached beside it. The first process of each machine looks at the videos, the others wait.

    Shards hold what was known when they were written.
    """
    if isinstance(videos, Shards):
        return videos.index
    file = videos.file
    cache = None if file is None else Path(file) / '.index' if os.path.isdir(file) else Path(f'{file}.index')
    with processes.first_of_machine():
        return index_videos(videos.paths, cache, progress=progress and processes.is_first)


def train_dataset(config: Config, videos: VideoList, index: Index) -> VideoDataset:
    """Clips for training."""
    flip = None
    if config.flip != 'none':
        flip = flip_table(videos.classes, side_pairs(videos.classes) if config.flip == 'labels' else None)
    transform = TrainTransform(config.size, config.short_side, config.scales, flip)
    return _dataset(
        videos, index, transform, num_frames=config.num_frames, train=True, span=config.span, seed=config.seed)


def eval_dataset(
        config: Config, videos: VideoList, index: Index, num_clips: int = 1, crops: int = 1,
        size: Optional[int] = None,
) -> VideoDataset:
    """All views of each video. ``size``: height and width of the crops, the training's by default."""
    transform = EvalTransform(size or config.size, config.short_side, crops)
    return _dataset(
        videos, index, transform, num_frames=config.num_frames, train=False, span=config.span, num_clips=num_clips)


def _dataset(videos: VideoList, index: Index, transform: Any, **kwargs: Any) -> VideoDataset:
    if isinstance(videos, Shards):
        return ShardDataset(videos, transform, **kwargs)
    return VideoDataset(videos, index, transform, **kwargs)


def make_loader(
        dataset: VideoDataset, batch_size: int, workers: int, processes: Processes, seed: int = 0, pin: bool = False,
) -> Tuple['DataLoader[Any]', EpochSampler]:
    """Batches of this process's share, and the sampler that chooses the epoch."""
    sampler = EpochSampler(
        len(dataset), train=dataset.train, seed=seed, rank=processes.rank, world_size=processes.world_size)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, drop_last=dataset.train, pin_memory=pin,
        persistent_workers=workers > 0 and dataset.train,
        # the loader draws a seed for its workers; from here it moves no other random number
        generator=torch.Generator().manual_seed(seed))
    return loader, sampler


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        ChildProcessError: One of its workers was killed.
    """
    try:
        yield from loader
    except (ConnectionError, EOFError, FileNotFoundError, RuntimeError) as error:
        # a killed worker shows as a lost connection, unless the loader notices it before; what a worker raised itself
        # comes as "Caught ..."
        if 'Caught ' in str(error) or (isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error)):
            raise
        raise ChildProcessError(WORKER_ENDED.format(error)) from error
