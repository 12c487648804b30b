"""Read the lists of Something-Something V1 and V2, and those that TSM and the paper's authors made of them."""
import os
import re
from typing import List

from .classes import Classes, read_classes
from .entries import Row, VideoList, build
from .listfile import Path, check_root, join, load_json, read_rows, read_text

__all__ = ['read_something_v1', 'read_something_v2']


def read_something_v1(file: Path, root: Path, classes: Classes = None) -> VideoList:
    """Read a list of Something-Something V1, or one that TSM's and the authors' scripts write.

    The data set's own lists are ``something-something-v1-train.csv`` and ``-validation.csv``, with lines
    ``id;label``. The list of the test set has no labels and is an error. A video is the folder ``root/id`` of JPEG
    files.

    The scripts' lists have lines ``path num_frames label``, with a number for the label. The path is that of a folder
    of pictures or of a video file; the number of frames is not used, as the index counts them.

    Args:
        file: The list.
        root: Folder that ids and paths are relative to.
        classes: Names by label, or a file of them, such as ``something-something-v1-labels.csv``, one a line. The file
            says no numbers: they count its names in the order of the alphabet, as in TSM's scripts. None: the labels
            that occur.

    Returns:
        The videos in the order of the list.

    Raises:
        OSError: A file or the root is missing or cannot be read.
        ValueError: A line is wrong, or the labels are; or the labels are numbers and the file of classes is not in the
            order of the alphabet, so that it is not clear what they count.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, 'train.csv')
        >>> _ = file.write_text('100218;Turning something upside down\\n24413;Holding something\\n')
        >>> videos = read_something_v1(file, folder.name)
        >>> [entry.label for entry in videos.entries], videos.classes
        ([1, 0], ('Holding something', 'Turning something upside down'))
        >>> folder.cleanup()
    """
    name, folder, names = os.fspath(file), check_root(root), read_classes(classes)
    in_order = None if names is None else tuple(sorted(names))
    from_file = isinstance(classes, (str, os.PathLike))
    first = next((line for line in read_text(name).split('\n') if line.strip()), '')
    if ';' in first:
        return build(name, _official(name, folder), in_order if from_file else names)
    if from_file and names != in_order:
        raise ValueError(
            f'classes={classes!r} is not in the order of the alphabet, in which the labels of {name} count if a script '
            f'of TSM made it; wanted a sorted file, or a list of the names in the order of the labels')
    return build(name, _scripted(name, folder), names)


def _official(file: str, root: str) -> List[Row]:
    rows = []
    for where, fields in read_rows(file, ';'):
        if len(fields) != 2 or not all(fields):
            raise ValueError(f'{where}: {len(fields)} columns, {"; ".join(fields)}; wanted id;label')
        rows.append(Row(where, join(root, fields[0], where), fields[1]))
    return rows


def _scripted(file: str, root: str) -> List[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split('\n'), 1):
        if not line.strip():
            continue
        where, match = f'{file}, line {number}', re.fullmatch(r'\s*(\S.*?)\s+([0-9]+)\s+(-?[0-9]+)\s*', line)
        if match is None:
            hint = '; the list of the test set has no labels' if re.fullmatch(r'\s*[0-9]+\s*', line) else ''
            raise ValueError(
                f'{where}: {line.strip()!r}; wanted id;label, or path num_frames label with blanks between and a '
                f'number for the label{hint}')
        rows.append(Row(where, join(root, match[1], where), match[3]))
    return rows


def read_something_v2(file: Path, root: Path, classes: Classes) -> VideoList:
    """Read a list of Something-Something V2.

    The data set's lists are ``something-something-v2-train.json`` and ``-validation.json``: each video has an ``id``
    and a ``template``, such as "Holding [something] next to [something]", which is the name of its class in
    ``something-something-v2-labels.json`` but for the brackets. The list of the test set has no templates and is an
    error. A video is the file ``root/id.webm``.

    Args:
        file: The list.
        root: Folder of the videos.
        classes: Names by label, or a file of them, such as ``something-something-v2-labels.json``, which says the
            number of each.

    Returns:
        The videos in the order of the list.

    Raises:
        OSError: A file or the root is missing or cannot be read.
        ValueError: An entry is wrong, or the classes are.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, 'train.json')
        >>> _ = file.write_text('[{"id": "42326", "template": "Holding [something]"}]')
        >>> videos = read_something_v2(file, folder.name, ['Closing something', 'Holding something'])
        >>> pathlib.Path(videos.entries[0].path).name, videos.entries[0].label
        ('42326.webm', 1)
        >>> folder.cleanup()
    """
    name, folder = os.fspath(file), check_root(root)
    names = read_classes(classes)
    if names is None:
        raise ValueError('classes must be names or a file, such as something-something-v2-labels.json, got None')
    entries = load_json(name)
    if not isinstance(entries, list):
        raise ValueError(f'{name} holds {type(entries).__name__}; wanted a list, [{{"id": ..., "template": ...}}]')
    rows = []
    for i, entry in enumerate(entries):
        where = f'{name}, entry {i}'
        if not isinstance(entry, dict) or not isinstance(entry.get('id'), (str, int)):
            raise ValueError(f'{where}: {entry!r:.99}; wanted {{"id": ..., "template": ...}}')
        if not isinstance(entry.get('template'), str):
            raise ValueError(f'{where}: id {entry["id"]} has no template, {entry!r:.99}; wanted the name of its class, '
                             f'which the list of the test set does not have')
        label = entry['template'].replace('[', '').replace(']', '')
        rows.append(Row(f'{where} (id {entry["id"]})', join(folder, f'{entry["id"]}.webm', where), label))
    return build(name, rows, names)
