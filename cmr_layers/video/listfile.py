"""Read the files that list videos: text, CSV and JSON, with errors that name the file and the line."""
import csv
import io
import json
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

__all__ = ['Path', 'check_root', 'join', 'load_json', 'read_rows', 'read_text', 'seconds']

Path = Union[str, 'os.PathLike[str]']


def read_text(file: str) -> str:
    """Text of a file in UTF-8, lines ending in a line feed. Errors name the file, and the line of a wrong byte."""
    try:
        with open(file, 'rb') as opened:
            data = opened.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{file} does not exist; wanted a list') from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f'{file} is a folder; wanted a list') from error
    except OSError as error:
        raise OSError(error.errno, f'{file} cannot be read: {error.strerror}; wanted a list') from error
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        kind = 'it looks like UTF-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else f'byte {data[error.start]:#x}'
        raise ValueError(f'{file}, line {line}: no UTF-8 ({kind}); wanted a list saved as UTF-8') from error
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise ValueError(f'{file}, line {line}: a null character; wanted a list saved as text in UTF-8')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def read_rows(file: str, delimiter: str = ',') -> Iterator[Tuple[str, List[str]]]:
    """Place and stripped fields of each line of a CSV file that is not blank."""
    reader = csv.reader(
        io.StringIO(read_text(file), newline=''), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                yield f'{file}, line {reader.line_num}', fields
    except csv.Error as error:
        raise ValueError(f'{file}, line {reader.line_num}: {error}; wanted quotes that close, as CSV has them, and '
                         f'"" for a quote within') from error


def load_json(file: str) -> Any:
    """What a JSON file holds. A key twice in one object is an error."""
    def pairs(items: List[Tuple[str, Any]]) -> Dict[str, Any]:
        loaded = dict(items)
        if len(loaded) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f'{file} has two of the name {twice!r} in one object; wanted different names')
        return loaded

    try:
        return json.loads(read_text(file), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f'{file}, line {error.lineno}: no JSON: {error.msg}') from error


def seconds(name: str, text: str, where: str) -> Optional[float]:
    """A number of seconds, or None of an empty text."""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float('inf'):
        raise ValueError(f'{where}: {name} must be a number of seconds >= 0, or empty, got {text!r}')
    return number


def check_root(root: Path) -> str:
    """Path of a folder that exists."""
    folder = os.fspath(root)
    if not os.path.isdir(folder):
        kind = 'is no folder' if os.path.exists(folder) else 'does not exist'
        raise NotADirectoryError(f'root={folder!r} {kind}; wanted the folder of the videos')
    return folder


def join(root: str, path: str, where: str, inside: bool = True) -> str:
    """A path of a list, from the folder that it is relative to. ``inside``: it must not lead out of that folder."""
    if not path:
        raise ValueError(f'{where}: no path; wanted that of a video')
    joined = os.path.normpath(os.path.join(root, path))
    # a path that neither begins at the top nor steps up stays inside
    if inside and (os.path.isabs(path) or os.pardir in path):
        top = os.path.abspath(root)
        if os.path.commonpath([top, os.path.abspath(joined)]) != top:
            raise ValueError(f'{where}: path {path!r} lies outside root={root!r}; wanted one in it, or no root')
    return joined
