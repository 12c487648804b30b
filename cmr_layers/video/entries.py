"""What a list of videos is, and how its labels get their numbers."""
import operator
import os
import re
import unicodedata
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from .classes import check_classes
from .listfile import Path

__all__ = ['Entry', 'Row', 'VideoList', 'build']


class Entry(NamedTuple):
    """A video of a list, or a window of one.

    Attributes:
        path: A video file, or a folder with one picture per frame.
        label: Index of its class.
        start: Start of the window in seconds. None is 0.
        end: End of the window, not included. None is the end of the video.
    """
    path: str
    label: int
    start: Optional[float] = None
    end: Optional[float] = None


@dataclass(frozen=True)
class VideoList:
    """Labelled videos. Whether the files exist and decode is the index's business.

    Attributes:
        entries: The videos.
        classes: Names of the classes, by label.
        file: The list that they were read from, if any. The index is cached beside it.

    Raises:
        ValueError: There is no entry or no class, two classes have one name, or an entry has a label that is no class
            or a window that is empty.

    Example:
        >>> videos = VideoList((Entry('a.mp4', 0), Entry('b.mp4', 1, 0, 2.5), Entry('b.mp4', 0, 2.5)), ('jump', 'run'))
        >>> len(videos), videos.paths
        (3, ('a.mp4', 'b.mp4'))
    """
    entries: Tuple[Entry, ...]
    classes: Tuple[str, ...]
    file: Optional[str] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, 'entries', tuple(_check_entry(*entry) for entry in self.entries))
        object.__setattr__(self, 'classes', check_classes(self.classes, 'classes'))
        if not self.entries:
            raise ValueError('entries is empty; wanted at least one video')
        for i, entry in enumerate(self.entries):
            if not 0 <= entry.label < len(self.classes):
                raise ValueError(
                    f'entry {i} ({entry.path}) has label {entry.label!r}; wanted one of 0 to {len(self.classes) - 1}')
            if entry.start is not None or entry.end is not None:
                _check_window(entry.start, entry.end, f'entry {i} ({entry.path})')

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def paths(self) -> Tuple[str, ...]:
        """Each path once, in the order of the list."""
        return tuple(dict.fromkeys(entry.path for entry in self.entries))


def _check_entry(path: Path, label: int, start: Optional[float] = None, end: Optional[float] = None) -> Entry:
    try:
        return Entry(os.fspath(path), operator.index(label), start, end)
    except TypeError as error:
        raise TypeError(f'entries must be Entry(path, label), got {(path, label)!r:.199}') from error


def _check_window(start: Optional[float], end: Optional[float], where: str) -> None:
    """Raise a ValueError if no time lies in the window."""
    begin = 0. if start is None else start
    if not 0 <= begin < float('inf') or (end is not None and not begin < end):
        raise ValueError(f'{where}: the window from start={start} to end={end} is empty; wanted 0 <= start < end')


class Row(NamedTuple):
    """A line of a list before its label has a number."""
    where: str
    path: str
    label: str
    start: Optional[float] = None
    end: Optional[float] = None


def build(file: str, rows: Sequence[Row], classes: Optional[Tuple[str, ...]]) -> VideoList:
    """Give the labels their numbers, and check that no video has two.

    Labels are names of classes, or numbers from 0 if all are numbers. Without classes they come from the labels: names
    in the order of the alphabet, and numbers as names.
    """
    if not rows:
        raise ValueError(f'{file} lists no video; wanted at least one')
    labels, names = _number(file, rows, classes)
    entries: List[Entry] = []
    seen: Dict[Tuple[object, ...], Tuple[int, Row]] = {}
    for row, label in zip(rows, labels):
        entry = Entry(row.path, label, row.start, row.end)
        before = seen.setdefault((row.path, row.start or 0, row.end), (label, row))
        if before[0] != label:
            raise ValueError(
                f'{row.where}: {row.path} has label {row.label!r}, but in {before[1].where} label '
                f'{before[1].label!r}; wanted one label, or windows that differ')
        entries.append(entry)
    return VideoList(tuple(entries), names, file)


def _number(
        file: str,
        rows: Sequence[Row],
        classes: Optional[Tuple[str, ...]],
) -> Tuple[List[int], Tuple[str, ...]]:
    numbers = all(re.fullmatch(r'[+-]?[0-9]+', row.label) for row in rows)
    if classes is None and numbers:
        return _count(file, rows)
    names = _infer(rows) if classes is None else classes
    index = {name: i for i, name in enumerate(names)}
    if numbers and not all(row.label in index for row in rows) and _count_from_0(names):
        return [_check_number(row, rows, len(names)) for row in rows], names
    for row in rows:
        if row.label not in index:
            close = get_close_matches(row.label, names, 3) or names[:3]
            raise ValueError(
                f'{row.where}: label {row.label!r} is not one of the {len(names)} classes; wanted a name such as '
                f'{", ".join(map(repr, close))}')
    return [index[row.label] for row in rows], names


def _count_from_0(names: Tuple[str, ...]) -> bool:
    """Whether a number can be the place of a name: not where the names are other numbers."""
    return not all(name.isdecimal() for name in names) or names == tuple(map(str, range(len(names))))


def _check_number(row: Row, rows: Sequence[Row], count: int) -> int:
    label = int(row.label)
    if 0 <= label < count:
        return label
    values = {int(row.label) for row in rows}
    hint = '; labels seem to start at 1' if (min(values), max(values)) == (1, count) else ''
    raise ValueError(
        f'{row.where}: label {row.label} is not one of the {count} classes; wanted a number from 0 to {count - 1}, or '
        f'the name of a class{hint}')


def _count(file: str, rows: Sequence[Row]) -> Tuple[List[int], Tuple[str, ...]]:
    """Labels that are numbers and have no names: all from 0 to the largest one."""
    labels = [int(row.label) for row in rows]
    for row, label in zip(rows, labels):
        if label < 0:
            raise ValueError(f'{row.where}: label {row.label} is negative; wanted numbers from 0')
    present, hint = set(labels), 'or give classes, the names by number'
    if 0 not in present:
        raise ValueError(
            f'{file}: labels start at {min(present)}; wanted numbers from 0, with no class left out: subtract '
            f'{min(present)} from each, {hint}')
    if len(present) <= max(present):
        missing = next(i for i in range(len(labels) + 1) if i not in present)
        raise ValueError(
            f'{file}: labels go from 0 to {max(present)}, but {max(present) + 1 - len(present)} of them do not occur, '
            f'first {missing}; wanted every number, {hint}')
    return labels, tuple(str(i) for i in range(len(present)))


def _infer(rows: Sequence[Row]) -> Tuple[str, ...]:
    """Names of classes in the order of the alphabet. Two that a reader would take for one are an error."""
    spelled: Dict[str, Row] = {}
    for row in rows:
        key = ' '.join(unicodedata.normalize('NFC', row.label).casefold().split())
        before = spelled.setdefault(key, row)
        if before.label != row.label:
            raise ValueError(
                f'{row.where}: label {row.label!r} is spelled {before.label!r} in {before.where}; wanted one '
                f'spelling, or classes that has both')
    return tuple(sorted({row.label for row in spelled.values()}))
