"""Write a set of videos as WebDataset shards: ``python -m cmr_layers.video.shards``.

The format is WebDataset's: tar files, in which a sample is a few files in a row whose names differ in the extension.
``00000003.json`` holds label, class, window and what the index knows, ``00000003.mp4`` the bytes of the video as they
are. A folder of pictures is ``00000003.00001.jpg`` and so on. A further window of the same video has the JSON alone,
whose ``video`` names the sample with the bytes, and so has a video that cannot be read, whose ``error`` says why.

``index.json`` comes last. It says where in the tars each video lies, for :class:`ShardDataset`.
"""
import argparse
import json
import os
import re
import sys
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..checks import check_positive
from .entries import VideoList
from .frames import UnreadableVideo
from .index import Index, index_videos, progress_bar
from .info import VideoInfo
from .lists import LAYOUTS, read_videos
from .look import stamp
from .source import list_pictures, open_source

__all__ = ['FORMAT', 'INDEX', 'UNFINISHED', 'shard_name', 'write_shards']

FORMAT = 'cmr_layers video shards 1'
INDEX = 'index.json'
#: Lies in a folder whose writing has not come to its end. What is there may then be thrown away.
UNFINISHED = 'UNFINISHED'

_Path = Union[str, 'os.PathLike[str]']
_CHUNK = 2 ** 20
_UNITS = {'': 1, **{f'{letter}{i}b': (1024 if i else 1000) ** power
                    for power, letter in enumerate('kmgt', 1) for i in ('', 'i')}, 'b': 1}


def shard_name(number: int) -> str:
    """Name of a shard."""
    return f'{number:06d}.tar'


def write_shards(
        videos: VideoList,
        index: Index,
        folder: _Path,
        shard_bytes: int = 10 ** 9,
        progress: bool = True,
) -> Dict[str, str]:
    """Write videos as WebDataset shards.

    A video that cannot be read is kept without its bytes, since evaluation has to count it. Writing that was
    interrupted leaves no index file, and a later call begins it anew.

    Args:
        videos: The list.
        index: What :func:`index_videos` knows of its paths.
        folder: Folder for the shards: new, empty, or one whose writing was interrupted.
        shard_bytes: Bytes after which a shard is full.
        progress: Whether to show a progress bar.

    Returns:
        Path and reason of each video that cannot be read.

    Raises:
        FileExistsError: The folder holds something else.
        ImportError: tqdm is missing and progress is True.
        OSError: The folder cannot be written.
        ValueError: shard_bytes is no positive int, or the index lacks a path.

    Example:
        >>> write_shards(videos, index_videos(videos.paths), 'shards')  # doctest: +SKIP
        {}
    """
    check_positive('shard_bytes', shard_bytes)
    known = set(index)  # to ask the index itself for each would unpack what it knows
    missing = [path for path in videos.paths if path not in known]
    if missing:
        raise ValueError(f'index lacks {len(missing)} of the videos, such as {missing[0]}; wanted all of them')
    shown = progress_bar(len(videos), 'writing shards') if progress else nullcontext()
    out, names = _claim(os.fspath(folder)), _names(videos.paths)
    places: Dict[str, List[Any]] = {}
    samples: List[Any] = []
    unreadable: Dict[str, str] = {}
    with shown as bar, _Shards(out, shard_bytes) as shards:
        for key, entry in enumerate(videos.entries):
            name = names[entry.path]
            about = {'label': entry.label, 'class': videos.classes[entry.label], 'start': entry.start,
                     'end': entry.end, 'path': name}
            if name not in places:
                place, info = shards.add(key, entry.path, index[entry.path], about)
                places[name] = [*place, info.row()]
                if info.error is not None:
                    unreadable[entry.path] = info.error
            else:
                shards.refer(key, places[name], about)
            samples.append([name, entry.label, entry.start, entry.end])
            if bar is not None:
                bar.update()
    _write_whole(os.path.join(out, INDEX), {
        'format': FORMAT, 'classes': videos.classes, 'shards': shards.sizes, 'videos': places, 'samples': samples})
    os.remove(os.path.join(out, UNFINISHED))
    return unreadable


def _claim(out: str) -> str:
    """Take a folder that is new or empty, or throw away the shards of one whose writing was interrupted."""
    os.makedirs(out, exist_ok=True)
    held = sorted(os.listdir(out))
    if INDEX in held or (held and UNFINISHED not in held):
        raise FileExistsError(
            f'folder={out!r} holds {INDEX if INDEX in held else held[0]}; wanted a new or an empty folder')
    for name in held:
        if re.fullmatch(r'[0-9]{6,}\.tar', name):
            os.remove(os.path.join(out, name))
    with open(os.path.join(out, UNFINISHED), 'w'):
        return out


def _names(paths: Sequence[str]) -> Dict[str, str]:
    """Names of videos that do not say where the set lay: relative to the folder that holds all."""
    whole = {path: os.path.abspath(path) for path in paths}
    try:
        top = os.path.commonpath([os.path.dirname(path) for path in whole.values()])
    except ValueError:  # they lie on several drives of Windows
        return whole
    return {path: os.path.relpath(name, top).replace(os.sep, '/') for path, name in whole.items()}


def _write_whole(path: str, content: Any) -> None:
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        json.dump(content, file, separators=(',', ':'))
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.part', path)


class _Shards:
    """The tars, one after the other. They are not written with TarFile, which can't take back half a sample."""

    def __init__(self, folder: str, full: int) -> None:
        self.folder, self.full = folder, full
        self.sizes: List[int] = []
        self._tar: Any = None

    def __enter__(self) -> '_Shards':
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._tar is not None and error is None:
            self._end()
        elif self._tar is not None:
            self._tar.close()

    def add(self, key: int, path: str, info: VideoInfo, about: Dict[str, Any]) -> Tuple[List[Any], VideoInfo]:
        """Write a sample with its video. Returns key, shard, offset and size, or sizes of pictures, and the info."""
        tar = self._begin()
        start = tar.tell()
        if info.error is None:
            try:
                self._put_json(key, {**about, 'info': info.row()})
                offset = tar.tell()
                sizes = self._put_video(key, path, info)
                place = [key, len(self.sizes), offset, sizes]
            except UnreadableVideo as error:
                tar.seek(start)
                tar.truncate()
                info = replace(info, error=str(error))
        if info.error is not None:
            self._put_json(key, {**about, 'error': info.error})
            place = [key, len(self.sizes), start, []]
        self._end_sample()
        return place, info

    def refer(self, key: int, place: Sequence[Any], about: Dict[str, Any]) -> None:
        """Write a sample whose video an earlier one has."""
        self._begin()
        self._put_json(key, {**about, 'video': f'{place[0]:08d}'})
        self._end_sample()

    def _begin(self) -> Any:
        if self._tar is None:
            self._tar = open(os.path.join(self.folder, shard_name(len(self.sizes))), 'xb')
        return self._tar

    def _end_sample(self) -> None:
        if self._tar.tell() >= self.full:
            self._end()

    def _end(self) -> None:
        at = self._tar.tell() + 2 * tarfile.BLOCKSIZE
        self._tar.write(bytes(2 * tarfile.BLOCKSIZE + -at % tarfile.RECORDSIZE))
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self.sizes.append(self._tar.tell())
        self._tar.close()
        self._tar = None

    def _put_json(self, key: int, about: Dict[str, Any]) -> None:
        content = json.dumps(about).encode()
        self._put(f'{key:08d}.json', len(content), 0, [content])

    def _put_video(self, key: int, path: str, info: VideoInfo) -> Union[int, List[int]]:
        if stamp(path) != (info.size, info.mtime):
            raise UnreadableVideo(f'{path} has changed since it was looked at; make its index anew with index_videos')
        if not os.path.isdir(path):
            return self._put_file(f'{key:08d}{_kind(path)}', path)
        pictures = _pictures(path)
        if len(pictures) != info.num_frames:
            raise UnreadableVideo(f'{path} has {len(pictures)} pictures; it was {info.num_frames} at the look at it')
        return [self._put_file(f'{key:08d}.{i:05d}{_kind(picture)}', picture) for i, picture in enumerate(pictures, 1)]

    def _put_file(self, name: str, path: str) -> int:
        size, mtime = stamp(path)
        if size < 0:
            raise UnreadableVideo(f'{path} is gone')
        written = self._put(name, size, mtime // 10 ** 9, _chunks(path))
        if written != size or stamp(path) != (size, mtime):
            raise UnreadableVideo(f'{path} has changed while it was copied')
        return size

    def _put(self, name: str, size: int, mtime: int, content: Any) -> int:
        head = tarfile.TarInfo(name)
        head.size, head.mtime = size, mtime
        self._tar.write(head.tobuf(tarfile.GNU_FORMAT))
        written: int = sum(self._tar.write(chunk) for chunk in content)
        self._tar.write(bytes(-size % tarfile.BLOCKSIZE))
        return written


def _kind(path: str) -> str:
    """The extension in a shard. WebDataset tells the files of a sample by it, and needs one."""
    kind = os.path.splitext(path)[1].lower()
    return kind if re.fullmatch(r'\.[a-z0-9]{1,8}', kind) and kind != '.json' else '.video'


def _pictures(folder: str) -> List[str]:
    try:
        return list_pictures(folder)
    except (OSError, ValueError) as error:
        raise UnreadableVideo(str(error)) from error


def _chunks(path: str) -> Iterator[bytes]:
    # an error of the shard, such as a full disk, is raised where it is written, so it does not pass here
    try:
        with open_source(path) as reader:
            if reader is None:
                raise ValueError(f'{path} is a folder now')
            while chunk := reader.read(_CHUNK):
                yield chunk
            reader.check()
    except (OSError, ValueError) as error:
        raise UnreadableVideo(str(error)) from error


def _bytes(text: str) -> int:
    """Bytes of a size such as 1GB, 512MiB or 1000000."""
    found = re.fullmatch(r'([0-9]+(?:\.[0-9]+)?) *([a-z]*)', text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise argparse.ArgumentTypeError(f'wanted a size such as 1GB, 512MiB or 1000000, got {text!r}')
    return int(float(found[1]) * _UNITS[found[2]])


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Write the videos of a list as WebDataset shards."""
    parser = argparse.ArgumentParser('python -m cmr_layers.video.shards', description=main.__doc__)
    parser.add_argument('--layout', required=True, choices=LAYOUTS, help='how the list is written')
    parser.add_argument('--list', help='the list; none for a folder per class')
    parser.add_argument('--root', help='folder of the videos')
    parser.add_argument('--classes', help='file of the names of the classes')
    parser.add_argument('--out', required=True, help='new folder for the shards')
    parser.add_argument('--shard-size', type=_bytes, default='1GB', help='size at which a shard is full (default: 1GB)')
    args = parser.parse_args(arguments)
    try:
        videos = read_videos(args.layout, args.list, args.root, args.classes)
        file = str(videos.file)
        index = index_videos(videos.paths, os.path.join(file, '.index') if os.path.isdir(file) else f'{file}.index')
        unreadable = write_shards(videos, index, args.out, args.shard_size)
    except (ImportError, OSError, ValueError) as error:
        print(f'shards: {error}', file=sys.stderr)
        return 1
    print(f'{len(videos)} samples of {len(videos.paths)} videos written to {args.out}'
          + (f'; {len(unreadable)} videos cannot be read and are kept without their bytes:' if unreadable else ''))
    for path, reason in unreadable.items():
        print(f'  {path}: {reason}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
