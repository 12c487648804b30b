"""Read the lists of Kinetics."""
import os
from typing import Dict, List, Set

from .classes import Classes, read_classes
from .entries import Row, VideoList, build
from .listfile import Path, check_root, join, read_rows, seconds

__all__ = ['read_kinetics']

_NEEDED = ('label', 'youtube_id', 'time_start', 'time_end')


def read_kinetics(file: Path, root: Path, classes: Classes = None) -> VideoList:
    """Read a list of Kinetics: CSV with the columns ``label, youtube_id, time_start, time_end, split``.

    The columns are found by their names in the first line; others are ignored. A video is one of these, the first that
    exists, in root or in ``root/<label>``:

    - ``<youtube_id>_<time_start>_<time_end>.mp4``, cut already; times are whole seconds of six digits;
    - ``<youtube_id>.mp4``, the whole video; the times are the window.

    If none exists, the list has the first name, and the index reports the file.

    Args:
        file: The list, of one split.
        root: Folder of the videos.
        classes: Names by label; a file of them, one a line; or None: the labels that occur, in the order of the
            alphabet.

    Returns:
        The videos in the order of the list.

    Raises:
        OSError: A file or the root is missing or cannot be read.
        ValueError: A column is missing, the list mixes splits, a line is wrong, or a label is.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, 'train.csv')
        >>> _ = file.write_text('label,youtube_id,time_start,time_end,split\\nzumba,-0000000001,10,20,train\\n')
        >>> videos = read_kinetics(file, folder.name)
        >>> pathlib.Path(videos.entries[0].path).name, videos.classes
        ('-0000000001_000010_000020.mp4', ('zumba',))
        >>> folder.cleanup()
    """
    name, finder = os.fspath(file), _Finder(check_root(root))
    rows: List[Row] = []
    columns: List[str] = []
    split = None
    for where, fields in read_rows(name):
        if not columns:
            columns = fields
            missing = [column for column in _NEEDED if column not in columns]
            if missing:
                raise ValueError(f'{where}: the first line, {", ".join(columns)}, has no column {", ".join(missing)}; '
                                 f'wanted {", ".join(_NEEDED)}, split')
            continue
        if len(fields) != len(columns):
            raise ValueError(f'{where}: {len(fields)} columns, {", ".join(fields)}; wanted {len(columns)}: '
                             f'{", ".join(columns)}')
        row = dict(zip(columns, fields))
        split = row.get('split') if split is None else split
        if row.get('split') != split:
            raise ValueError(f'{where}: split {row["split"]!r} in a list of {split!r}; wanted a list of one split')
        rows.append(_row(row, where, finder))
    return build(name, rows, read_classes(classes))


def _row(row: Dict[str, str], where: str, finder: '_Finder') -> Row:
    for column in _NEEDED:
        if not row[column]:
            raise ValueError(f'{where}: {column} is empty; wanted {", ".join(_NEEDED)}')
    start, end = (seconds(column, row[column], where) or 0. for column in ('time_start', 'time_end'))
    if start >= end:
        raise ValueError(f'{where}: time_start={start:g} is not before time_end={end:g}; wanted seconds of the video')
    cut = f'{row["youtube_id"]}_{int(start):06d}_{int(end):06d}.mp4'
    whole = f'{row["youtube_id"]}.mp4'
    for folder in ('', row['label']):
        if finder.has(folder, cut):
            return Row(where, join(finder.root, os.path.join(folder, cut), where), row['label'])
        if finder.has(folder, whole):
            return Row(where, join(finder.root, os.path.join(folder, whole), where), row['label'], start, end)
    return Row(where, join(finder.root, cut, where), row['label'])


class _Finder:
    """Which files a folder has: each folder is read once, as a list has hundreds of thousands of lines."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: Dict[str, Set[str]] = {}

    def has(self, folder: str, name: str) -> bool:
        if folder not in self.names:
            path = os.path.join(self.root, folder)
            self.names[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        return name in self.names[folder]
