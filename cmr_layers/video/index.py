"""Look at a list of videos once: in parallel, with a progress bar, and with a cache beside the list."""
import json
import os
import warnings
from contextlib import closing, nullcontext
from functools import cached_property
from typing import Any, Dict, Generator, Iterable, Iterator, Mapping, Optional, Tuple, Union

from ..checks import check_positive
from .cache import read_cache, write_cache
from .decode import import_av
from .info import COLUMNS, VideoInfo
from .look import look, stamp
from .worker import look_at_all, pack

__all__ = ['Index', 'VideoInfo', 'index_videos']

_Path = Union[str, 'os.PathLike[str]']

#: Bytes of video for which one more process pays: it takes seconds to start.
_BYTES_PER_PROCESS = 2 ** 25
#: Looks after which the cache is written in between.
_SAVE_EVERY = 5000


class Index(Mapping[str, VideoInfo]):
    """What is known of each video of a list. :func:`index_videos` makes it.

    A mapping from path to :class:`VideoInfo`. Videos that cannot be read are in it, too, with their error. It is small
    and can be pickled: each video is held as some 150 bytes and unpacked when it is asked for.

    Args:
        rows: For each path its :meth:`VideoInfo.row` as JSON.

    Example:
        >>> index = index_videos(['a.mp4', 'b.mp4'], cache='videos.index')  # doctest: +SKIP
        >>> index['a.mp4'].num_frames, index.broken  # doctest: +SKIP
        (250, {'b.mp4': "source='b.mp4' does not exist; wanted a video file"})
    """

    def __init__(self, rows: Mapping[str, bytes]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, path: str) -> VideoInfo:
        return VideoInfo.from_row(json.loads(self._rows[path]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def broken(self) -> Dict[str, str]:
        """Path and reason of each video that cannot be read."""
        return self._column('error')

    @cached_property
    def damaged(self) -> Dict[str, str]:
        """Path and damage of each video that can be read in part."""
        return self._column('damage')

    def _column(self, name: str) -> Dict[str, str]:
        at = COLUMNS.index(name)  # a whole VideoInfo for each of 200,000 videos would take long
        values = ((path, json.loads(row)[at]) for path, row in self._rows.items())
        return {path: value for path, value in values if value is not None}

    def __str__(self) -> str:
        frames, seconds = 0, 0.
        for info in self.values():
            frames, seconds = frames + info.num_frames, seconds + info.duration
        lines = [f'{len(self)} videos, {frames} frames, {seconds / 3600:.2f} hours']
        for kind, found in (('cannot be read', self.broken), ('are damaged and read in part', self.damaged)):
            if found:
                lines.append(f'{len(found)} of them {kind}:')
                lines += [f'  {path}: {reason}' for path, reason in list(found.items())[:10]]
                if len(found) > 10:
                    lines.append(f'  and {len(found) - 10} more')
        return '\n'.join(lines)

    def __repr__(self) -> str:
        return f'<Index of {len(self)} videos>'


def index_videos(
        paths: Iterable[_Path],
        cache: Optional[_Path] = None,
        num_workers: Optional[int] = None,
        progress: bool = True,
) -> Index:
    """Look at videos: decode each in full, once, to know its frames, their times, and whether it decodes at all.

    Headers lie about all of these. A second pass verifies key frames: from each of them the file has to decode to the
    same pixels as from its start, or it is never sought.

    A video that cannot be read is noted with its reason and never raises: see :attr:`Index.broken`. A truncated file
    whose first frames decode is a video of these frames; ``VideoInfo.damage`` says so.

    Args:
        paths: Video files and folders of pictures.
        cache: File that keeps what is known, so that only new and changed files are looked at the next time: those
            whose size or time of modification is another. (A folder's changes when pictures are added or removed.) It
            is written as a whole or not at all, and when the look is interrupted, too. It may be shared by lists; what
            it knows of other videos stays in it. If it is damaged, or was made by another FFmpeg, the videos are
            looked at anew. If it cannot be written there is a warning. None keeps nothing.
        num_workers: Processes that decode. None takes one per core, and fewer for little data; 0 and 1 decode in this
            process. A file that makes its process crash is noted as broken.
        progress: Whether to show a progress bar.

    Returns:
        The index, in the order of paths.

    Raises:
        ImportError: PyAV is missing, or tqdm is and progress is True.
        ValueError: num_workers is no int >= 0.

    Example:
        >>> index = index_videos(['a.mp4', 'b.mp4'], cache='videos.index')  # doctest: +SKIP
        >>> print(index)  # doctest: +SKIP
        2 videos, 250 frames, 0.00 hours
        1 of them cannot be read:
          b.mp4: source='b.mp4' does not exist; wanted a video file
    """
    import_av()
    if num_workers != 0 and num_workers is not None:
        check_positive('num_workers', num_workers)
    names = list(dict.fromkeys(os.fspath(path) for path in paths))
    known, whole = ({}, True) if cache is None else read_cache(os.fspath(cache))
    rows: Dict[str, bytes] = {}
    todo: Dict[str, int] = {}
    crashed = False
    for name in names:
        size, mtime = stamp(name)
        row = known.get(os.path.abspath(name))
        if size < 0:  # there is nothing to decode
            rows[name] = pack(look(name))
        elif row is not None and _fits(row, size, mtime):
            rows[name] = row
        else:
            todo[name] = size
            crashed = crashed or (row is not None and _fits(row, -1, 0))
    try:
        with closing(_looked_at(todo, num_workers, progress, crashed)) as looks:
            for name, row in looks:
                rows[name] = row
                if cache is not None and len(rows) % _SAVE_EVERY == 0:
                    _save(os.fspath(cache), known, rows)
    finally:
        if cache is not None and (todo or not whole):
            _save(os.fspath(cache), known, rows)
    index = Index({name: rows[name] for name in names})
    if index.broken:
        path, reason = next(iter(index.broken.items()))
        warnings.warn(
            f'{len(index.broken)} of {len(index)} videos cannot be read, for example {path!r}: {reason}. All are in '
            f'the broken of the index.', stacklevel=2)
    return index


def _looked_at(
        todo: Mapping[str, int],
        num_workers: Optional[int],
        progress: bool,
        crashed: bool,
) -> Generator[Tuple[str, bytes], None, None]:
    """Path and row of videos whose sizes are given. What made its process crash before is not decoded in this one."""
    if not todo:
        return
    count = _num_workers(todo.values()) if num_workers is None else min(num_workers, len(todo))
    if crashed and num_workers is None:
        count = max(count, 2)
    shown = progress_bar(len(todo), 'looking at videos') if progress else nullcontext()
    with shown as bar, closing(look_at_all(list(todo), count)) as looks:
        for item in looks:
            yield item
            if bar is not None:
                bar.update()


def _fits(row: bytes, size: int, mtime: int) -> bool:
    values = dict(zip(COLUMNS, json.loads(row)))
    return (values.get('size'), values.get('mtime')) == (size, mtime)


def _save(cache: str, known: Mapping[str, bytes], rows: Mapping[str, bytes]) -> None:
    write_cache(cache, {**known, **{os.path.abspath(name): row for name, row in rows.items()}})


def _num_workers(sizes: Iterable[int]) -> int:
    sizes = list(sizes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, len(sizes), 1 + sum(sizes) // _BYTES_PER_PROCESS)


def progress_bar(total: int, what: str) -> Any:
    """A bar of tqdm that counts videos."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'a progress bar needs tqdm: pip install "cmr-layers[video]", or pass progress=False') from error
    return tqdm(total=total, desc=what, unit='video', smoothing=.05)
