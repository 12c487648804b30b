"""Read the shards that :func:`write_shards` wrote, with the samples and the guarantees of :class:`VideoDataset`.

WebDataset's own pipeline, whose package reads these shards, too, is a stream: it shuffles within a buffer, whose
content is lost when a run is interrupted, so a run can't go on within an epoch with the samples that it would have
seen. Here the index file says where each video lies. So videos are found by their place in the list, as if they were
files, and :class:`EpochSampler` shuffles all of them, shares them among processes and goes on within an epoch.
"""
import json
import os
import tarfile
import warnings
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

from torch import Tensor

from .classes import Classes, read_classes
from .dataset import VideoDataset
from .entries import Row, VideoList, build
from .frames import UnreadableVideo, read_frames, read_pictures
from .index import Index
from .info import VideoInfo
from .shards import FORMAT, INDEX, UNFINISHED, shard_name

__all__ = ['ShardDataset', 'Shards', 'read_shards']

_Path = Union[str, 'os.PathLike[str]']


@dataclass(frozen=True, kw_only=True)
class Shards(VideoList):
    """The list of a folder of shards. Paths are names of videos in it, and ``file`` is the folder.

    Attributes:
        index: What was known of the videos when they were written.
        places: Where each lies, as JSON: number of its sample and of its shard, offset, and size, or sizes of pictures.
    """
    index: Index
    places: Mapping[str, bytes]


def read_shards(folder: _Path, classes: Classes = None) -> Shards:
    """Read what a folder of shards holds. Shards that are missing are named in a warning.

    Args:
        folder: What :func:`write_shards` wrote. It may have been moved.
        classes: Names by label, or a file of them; None: those that the shards were written with. A label follows its
            name.

    Returns:
        The list.

    Raises:
        OSError: The index file cannot be read.
        ValueError: The folder holds no shards, or not all of them, or one has a class that is not one of classes.

    Example:
        >>> shards = read_shards('shards')  # doctest: +SKIP
        >>> len(shards), shards.classes  # doctest: +SKIP
        (2, ('jump', 'run'))
    """
    out = os.fspath(folder)
    known = _read_index(out)
    sizes: List[int] = known['shards']
    wrong = [shard_name(i) for i, size in enumerate(sizes) if _size(os.path.join(out, shard_name(i))) != size]
    if wrong:
        warnings.warn(
            f'{len(wrong)} of the {len(sizes)} shards in {out} are missing or have another size, such as {wrong[0]}; '
            f'what they lack counts as unreadable', stacklevel=2)
    names = tuple(known['classes'])
    rows = [Row(f'{out}, sample {i}', path, names[label], start, end)
            for i, (path, label, start, end) in enumerate(known['samples'])]
    videos = build(out, rows, read_classes(classes) or names)
    # packed, as for hundreds of thousands of videos each worker holds them
    infos = {path: json.dumps(place[-1]).encode() for path, place in known['videos'].items()}
    places = {path: json.dumps(place[:-1]).encode() for path, place in known['videos'].items()}
    return Shards(videos.entries, videos.classes, out, index=Index(infos), places=places)


def _read_index(folder: str) -> Dict[str, Any]:
    try:
        with open(os.path.join(folder, INDEX), encoding='utf-8') as file:
            known = json.load(file)
    except FileNotFoundError as error:
        reason = 'their writing was interrupted; the same command begins it anew' \
            if os.path.exists(os.path.join(folder, UNFINISHED)) else 'wanted what cmr_layers.video.shards wrote'
        raise ValueError(f'folder={folder!r} holds no {INDEX} of shards: {reason}') from error
    except ValueError as error:
        raise ValueError(f'{os.path.join(folder, INDEX)} is damaged: {error}') from error
    if not isinstance(known, dict) or known.get('format') != FORMAT:
        raise ValueError(f'{os.path.join(folder, INDEX)} is no index of shards of this version, {FORMAT!r}')
    return known


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


class ShardDataset(VideoDataset):
    """The videos of a folder of shards, with the same samples as a :class:`VideoDataset` of the files.

    Only what is decoded is read. A shard is opened for each sample, so nothing is shared among workers.

    Args:
        shards: What :func:`read_shards` read.
        transform: As for :class:`VideoDataset`.
        kwargs: Its other arguments.

    Raises:
        ValueError: As :class:`VideoDataset`.

    Example:
        >>> dataset = ShardDataset(read_shards('shards'), TrainTransform(), train=True)  # doctest: +SKIP
        >>> dataset[0, 5].clips.shape  # doctest: +SKIP
        torch.Size([8, 3, 224, 224])
    """

    def __init__(self, shards: Shards, transform: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(shards, shards.index, transform, **kwargs)
        self.shards = shards

    def _frames(self, path: str, indices: List[int], info: VideoInfo) -> Tensor:
        key, shard, offset, sizes = json.loads(self.shards.places[path])
        tar = os.path.join(str(self.shards.file), shard_name(shard))
        with open(tar, 'rb') as file:
            members = _Members(file, f'{path} in {tar}', f'{key:08d}.', offset, sizes)
            if isinstance(sizes, int):
                return read_frames(members[0], indices, info)
            return read_pictures(members, indices, info, members.label)


class _Members(Sequence[Any]):
    """The files of a video in a tar. One is looked up when it is asked for."""

    def __init__(self, file: Any, label: str, key: str, offset: int, sizes: Union[int, List[int]]) -> None:
        self.file, self.label, self.key = file, label, key
        self.sizes = [sizes] if isinstance(sizes, int) else sizes
        block = tarfile.BLOCKSIZE
        self.offsets = list(accumulate((block + size + -size % block for size in self.sizes), initial=offset))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: Any) -> Any:
        offset, size = self.offsets[i], self.sizes[i]
        self.file.seek(offset)
        try:
            head = tarfile.TarInfo.frombuf(self.file.read(tarfile.BLOCKSIZE), 'utf-8', 'surrogateescape')
        except tarfile.TarError as error:
            raise UnreadableVideo(f'{self.label} is not at byte {offset}, where it was written: {error}') from error
        if head.size != size or not head.name.startswith(self.key):
            raise UnreadableVideo(
                f'{self.label} is not at byte {offset}, where it was written: {head.name} of {head.size} bytes is; '
                f'wanted {self.key}* of {size} bytes')
        start = offset + tarfile.BLOCKSIZE
        if os.fstat(self.file.fileno()).st_size < start + size:
            raise UnreadableVideo(f'{self.label} is cut off: the shard ends before byte {start + size}')
        return _Member(self.file, self.label, start, size)


class _Member:
    """A file in a tar, as a binary file. It has no descriptor, which would be that of the tar."""

    def __init__(self, file: Any, name: str, start: int, size: int) -> None:
        self.file, self.name, self.start, self.size, self.position = file, name, start, size, 0

    def read(self, size: Optional[int] = None) -> bytes:
        left = max(self.size - self.position, 0)
        self.file.seek(self.start + self.position)
        content: bytes = self.file.read(left if size is None or size < 0 else min(size, left))
        self.position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position
