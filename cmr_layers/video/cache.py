"""The file that keeps an index: a line of JSON for each video, with a checksum."""
import json
import os
import warnings
import zlib
from typing import Dict, Mapping, Tuple

from .decode import import_av

__all__ = ['read_cache', 'write_cache']

VERSION = 1


def _head() -> bytes:
    # another FFmpeg may decode other frames of damaged files
    return json.dumps({
        'cmr_layers video index': VERSION, 'libavcodec': import_av().library_versions['libavcodec'][0]}).encode()


def read_cache(file: str) -> Tuple[Dict[str, bytes], bool]:
    """Rows by absolute path, and whether the file is in order. Lines that are damaged are left out with a warning."""
    try:
        with open(file, 'rb') as stream:
            head, *lines = stream.read().split(b'\n')
    except FileNotFoundError:
        return {}, True
    except OSError as error:
        warnings.warn(
            f'cache={file!r} cannot be read: {error.strerror}; its videos are looked at anew', stacklevel=3)
        return {}, False
    if head != _head():
        warnings.warn(
            f'cache={file!r} is no index of this version and FFmpeg ({_head().decode()}); its videos are looked at '
            f'anew', stacklevel=3)
        return {}, False
    folder, rows, damaged = os.path.dirname(os.path.abspath(file)), {}, 0
    for line in lines[:-1]:
        try:
            path, row = _decode(line)
            rows[os.path.normpath(os.path.join(folder, path))] = row
        except ValueError:
            damaged += 1
    whole = not damaged and lines[-1:] == [b'']
    if not whole:
        warnings.warn(
            f'cache={file!r} is damaged; the videos of {max(damaged, 1)} of its lines are looked at anew',
            stacklevel=3)
    return rows, whole


def write_cache(file: str, rows: Mapping[str, bytes]) -> None:
    """Write rows by absolute path, as a whole or not at all. If that fails there is a warning."""
    folder, part = os.path.dirname(os.path.abspath(file)), f'{file}.{os.getpid()}.part'
    try:
        with open(part, 'wb') as stream:
            stream.write(_head() + b'\n')
            for path, row in rows.items():
                stream.write(_encode(_relative(path, folder), row))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        warnings.warn(
            f'cache={file!r} cannot be written: {error.strerror}; the videos are looked at again the next time',
            stacklevel=4)


def _relative(path: str, folder: str) -> str:
    """Relative to the cache, so that both can be moved together."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on another drive of Windows
        return path


def _encode(path: str, row: bytes) -> bytes:
    line = json.dumps(path).encode() + b'\t' + row
    return b'%08x %s\n' % (zlib.crc32(line), line)


def _decode(line: bytes) -> Tuple[str, bytes]:
    checksum, _, rest = line.partition(b' ')
    if int(checksum, 16) != zlib.crc32(rest):
        raise ValueError('checksum')
    path, _, row = rest.partition(b'\t')
    return str(json.loads(path)), row
