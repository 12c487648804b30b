"""Names of classes in the order of their labels."""
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from .listfile import Path, load_json, read_text

__all__ = ['Classes', 'check_classes', 'read_classes']

Classes = Union[Path, Sequence[str], None]


def read_classes(classes: Classes) -> Optional[Tuple[str, ...]]:
    """Names of classes in the order of their labels: as given, or of a file.

    A file has one name a line, also quoted as in CSV. A ``.json`` file has the number of each name, as
    Something-Something V2's: ``{"Closing something": "5"}``.
    """
    if classes is None:
        return None
    if not isinstance(classes, (str, os.PathLike)):
        return check_classes(classes, 'classes')
    file = os.fspath(classes)
    if file.lower().endswith('.json'):
        return _numbered(load_json(file), file)
    names: List[str] = []
    lines = read_text(file).rstrip().split('\n')
    for i, line in enumerate(lines, 1):
        line = line.strip()
        if len(line) > 1 and line[0] == line[-1] == '"':
            line = line[1:-1].replace('""', '"').strip()
        if not line:
            raise ValueError(f'{file}, line {i}: no name; wanted the name of class {i - 1}')
        names.append(line)
    return check_classes(names, file)


def _numbered(table: Any, file: str) -> Tuple[str, ...]:
    if not isinstance(table, dict) or not table:
        raise ValueError(f'{file} holds {type(table).__name__}; wanted the number of each name: {{"a name": "0"}}')
    names: Dict[int, str] = {}
    for name, number in table.items():
        if isinstance(number, bool) or not re.fullmatch('[0-9]+', str(number)):
            raise ValueError(f'{file}: class {name!r} has number {number!r}; wanted a number from 0')
        if int(number) in names:
            raise ValueError(
                f'{file}: classes {names[int(number)]!r} and {name!r} have the same number {number}; wanted one each')
        names[int(number)] = name
    missing = [i for i in range(len(names)) if i not in names]
    if missing:
        starts = f'start at {min(names)}' if missing[0] == 0 else f'leave out {missing[0]}'
        raise ValueError(f'{file}: numbers of the {len(names)} classes {starts}; wanted 0 to {len(names) - 1}')
    return check_classes([names[i] for i in range(len(names))], file)


def check_classes(classes: Any, where: str) -> Tuple[str, ...]:
    """Names of classes, or a ValueError if there is none or one twice."""
    if isinstance(classes, (str, bytes)) or not all(isinstance(name, str) and name.strip() for name in classes):
        raise ValueError(f'{where} must hold names of classes, got {classes!r:.199}')
    names: Tuple[str, ...] = tuple(classes)
    if not names:
        raise ValueError(f'{where} holds no name of a class; wanted at least one')
    first: Dict[str, int] = {}
    for label, name in enumerate(names):
        if first.setdefault(name, label) != label:
            raise ValueError(f'{where} has two classes of the name {name!r}, {first[name]} and {label} counted from 0; '
                             f'wanted different names')
    return names
