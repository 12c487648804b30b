"""Read lists of labelled videos: a plain list, a folder per class, and the formats of three data sets."""
import os
import warnings
from typing import List, Optional

from ..checks import check_choice
from .classes import Classes, read_classes
from .entries import Entry, Row, VideoList, build
from .kinetics import read_kinetics
from .listfile import Path, check_root, join, read_rows, seconds
from .something import read_something_v1, read_something_v2
from .source import PICTURES

__all__ = [
    'Entry', 'LAYOUTS', 'VideoList', 'read_folders', 'read_kinetics', 'read_list', 'read_something_v1',
    'read_something_v2', 'read_videos']

LAYOUTS = ('list', 'folders', 'sthv1', 'sthv2', 'kinetics')
VIDEOS = (
    '.3gp', '.asf', '.avi', '.flv', '.gif', '.m2ts', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.mts', '.nut',
    '.ogg', '.ogv', '.ts', '.vob', '.webm', '.wmv', '.y4m')
_COLUMNS = 'path, label or path, start, end, label'


def read_videos(
        layout: str,
        file: Optional[Path],
        root: Optional[Path] = None,
        classes: Classes = None,
) -> VideoList:
    """Read labelled videos of any layout.

    Args:
        layout: ``'list'`` (:func:`read_list`), ``'folders'`` (:func:`read_folders`), ``'sthv1'``
            (:func:`read_something_v1`), ``'sthv2'`` (:func:`read_something_v2`) or ``'kinetics'``
            (:func:`read_kinetics`).
        file: The list. For folders, either this or root is the folder.
        root: Folder that paths are relative to.
        classes: Names by label, a file of them, or None: those that occur.

    Returns:
        The videos.

    Raises:
        OSError: A file or folder is missing or cannot be read.
        ValueError: An argument that the layout needs is missing, or a line is wrong.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = pathlib.Path(folder.name, 'train.txt').write_text('100218 42 1\\n24413 36 0\\n')
        >>> videos = read_videos('sthv1', f'{folder.name}/train.txt', folder.name, ['jump', 'run'])
        >>> [(pathlib.Path(entry.path).name, entry.label) for entry in videos.entries]
        [('100218', 1), ('24413', 0)]
        >>> folder.cleanup()
    """
    check_choice('layout', layout, LAYOUTS)
    if layout == 'folders':
        if (file is None) == (root is None):
            raise ValueError(f'layout {layout!r} has no list; wanted one of file and root, the folder of the classes; '
                             f'got file={file!r} and root={root!r}')
        return read_folders(file if root is None else root, classes)  # type: ignore[arg-type]
    if file is None:
        raise ValueError(f'file must be the list of layout {layout!r}, got None')
    if layout == 'list':
        return read_list(file, root, classes)
    if root is None:
        raise ValueError(f'root must be the folder of the videos of layout {layout!r}, got None')
    if layout == 'sthv2':
        if classes is None:
            raise ValueError("classes must be the names of layout 'sthv2', such as its labels.json, got None")
        return read_something_v2(file, root, classes)
    return (read_something_v1 if layout == 'sthv1' else read_kinetics)(file, root, classes)


def read_list(file: Path, root: Optional[Path] = None, classes: Classes = None) -> VideoList:
    """Read a plain list: ``path, label`` or ``path, start, end, label`` on each line.

    It is CSV without a header, in UTF-8: a path with a comma stands in double quotes, blanks around a field do not
    count, and blank lines are skipped. There are no comments. ``start`` and ``end`` are seconds; empty means from the
    beginning, to the end.

    Labels are names of classes, or all are numbers from 0.

    Args:
        file: The list.
        root: Folder that paths are relative to. They must lie in it. None is the folder of the list, and paths may
            lead anywhere.
        classes: Names by label; a file of them, one a line; or None: the labels that occur. Names then count in the
            order of the alphabet, and of numbers every one from 0 must occur. Give a list for validation the classes
            of the one for training: ``read_list('val.csv', classes=training.classes)``.

    Returns:
        The videos in the order of the list.

    Raises:
        OSError: The list or the root is missing or cannot be read.
        ValueError: A line is wrong, or the labels are. The message names file, line and value.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, 'train.csv')
        >>> _ = file.write_text('a.mp4, run\\n"b, take 2.mp4", 2.5, 4, jump\\n')
        >>> videos = read_list(file)
        >>> videos.classes, videos.entries[1].label, videos.entries[1].start
        (('jump', 'run'), 0, 2.5)
        >>> folder.cleanup()
    """
    name = os.fspath(file)
    rows: List[Row] = []
    folder = os.path.dirname(name) if root is None else check_root(root)
    for where, fields in read_rows(name):
        if not rows and [field.lower() for field in (fields[0], fields[-1])] == ['path', 'label']:
            raise ValueError(f'{where}: a header, {", ".join(fields)}; wanted a video: the list has no header')
        if len(fields) not in (2, 4):
            hint = ' (columns are separated by commas; lines "path num_frames label" are read as layout sthv1)' \
                if len(fields) == 1 else ' (a path with a comma needs quotes)'
            raise ValueError(f'{where}: {len(fields)} columns, {", ".join(fields)}; wanted {_COLUMNS}{hint}')
        rows.append(_row(where, fields, folder, root is not None))
    return build(name, rows, read_classes(classes))


def _row(where: str, fields: List[str], folder: str, inside: bool) -> Row:
    path = join(folder, fields[0], where, inside)
    if not fields[-1]:
        raise ValueError(f'{where}: no label; wanted {_COLUMNS}')
    if len(fields) == 2:
        return Row(where, path, fields[1])
    start, end = seconds('start', fields[1], where), seconds('end', fields[2], where)
    if end is not None and not (start or 0) < end:
        raise ValueError(f'{where}: start={start or 0:g} is not before end={end:g}; wanted a window that holds frames')
    return Row(where, path, fields[3], start, end)


def read_folders(root: Path, classes: Classes = None) -> VideoList:
    """Read a folder per class: ``root/<class>/<video>``.

    A video is a file of a common format, or a folder with one picture per frame. Names that begin with a dot are
    ignored, and so are files beside the folders of the classes, unless they are videos. Other files among the videos
    are left out with a warning that counts them.

    Args:
        root: The folder.
        classes: Names by label, a file of them, or None: the names of the folders in the order of the alphabet. A
            class may have no folder here, but every folder must have a class.

    Returns:
        The videos, classes in the order of the alphabet, and in each the names in that order.

    Raises:
        OSError: A folder is missing or cannot be read.
        ValueError: There is no folder, one has no video or is no class, or a video lies in none.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ('jump', 'run'):
        ...     pathlib.Path(folder.name, name).mkdir()
        ...     pathlib.Path(folder.name, name, 'a.mp4').touch()
        >>> videos = read_folders(folder.name)
        >>> len(videos), videos.classes
        (2, ('jump', 'run'))
        >>> folder.cleanup()
    """
    top = check_root(root)
    rows: List[Row] = []
    others: List[str] = []
    for entry in _scan(top):
        if entry.is_dir():
            rows += _read_class(entry, others)
        elif entry.name.lower().endswith(VIDEOS):
            raise ValueError(f'{entry.path} lies in no folder of a class; wanted {top}/<class>/{entry.name}')
    if not rows:
        raise ValueError(f'{top} holds no folder; wanted a folder per class, with its videos')
    if others:
        warnings.warn(
            f'{len(others)} of the files under {top} are left out, as their names are not those of videos; the first '
            f'is {others[0]}', stacklevel=2)
    # a folder's name is the name of its class even if it is a number
    names = read_classes(classes) or tuple(sorted({row.label for row in rows}))
    return build(top, rows, names)


def _scan(folder: str) -> 'List[os.DirEntry[str]]':
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)


def _read_class(folder: 'os.DirEntry[str]', others: List[str]) -> List[Row]:
    """The videos of a class. Files that are none are added to others."""
    entries = _scan(folder.path)
    videos = [entry for entry in entries if entry.is_dir() or entry.name.lower().endswith(VIDEOS)]
    if not videos:
        hint = '; pictures are frames, and each video has a folder of them' \
            if any(entry.name.lower().endswith(PICTURES) for entry in entries) else ''
        raise ValueError(f'{folder.path} holds no video; wanted files such as *.mp4, or folders of pictures{hint}')
    for entry in videos:
        if entry.is_dir() and not any(inner.name.lower().endswith(PICTURES) for inner in _scan(entry.path)):
            raise ValueError(
                f'{entry.path} is a folder without pictures; wanted the videos of class {folder.name!r} in its folder, '
                f'not deeper')
    others += [entry.path for entry in entries if entry not in videos]
    return [Row(entry.path, os.path.normpath(entry.path), folder.name) for entry in videos]
