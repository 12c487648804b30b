"""Open the source of a video: one regular file, or a folder of pictures.

FFmpeg opens whatever a name or a file tells it to: ``http://...``, ``concat:...``, ``frame%d.jpg``, the entries of a
playlist. Here it never gets a name. It gets the bytes of one file of known size.
"""
import io
import os
import re
import stat
from contextlib import contextmanager
from typing import Any, BinaryIO, Iterator, List, Optional, Union

__all__ = ['Reader', 'Source', 'label', 'list_pictures', 'open_source']

Source = Union[str, bytes, 'os.PathLike[str]', 'os.PathLike[bytes]', BinaryIO]

PICTURES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


class Reader:
    """The file that FFmpeg reads. It has no name, and its size is the size at opening.

    An error ends the file for FFmpeg, as not every PyAV passes errors on. :meth:`check` raises it.

    Args:
        file: Binary file that can seek.
        label: Name of the file in errors.

    Raises:
        TypeError: The file returns no bytes.
        ValueError: It cannot seek.
    """

    error: Optional[Exception]

    def __init__(self, file: Any, label: str) -> None:
        self.file, self.label = file, label
        self.position, self.error = 0, None
        try:
            self.size = file.seek(0, os.SEEK_END)
            if self.size is None:
                self.size = file.tell()
            file.seek(0)
        except (AttributeError, OSError, ValueError) as error:
            raise ValueError(f'{label} must be a file that can seek from its end, since it is read twice') from error

    def read(self, size: int) -> bytes:
        size = min(size, max(self.size - self.position, 0))
        if size == 0 or self.error is not None:
            return b''
        try:
            data: Any = self.file.read(size)
            if not isinstance(data, bytes) or len(data) > size:  # PyAV copies all that it gets
                got = f'{len(data)} bytes' if isinstance(data, bytes) else type(data).__name__
                raise TypeError(f'{self.label} must be a binary file; read({size}) returned {got}')
        except Exception as error:
            self.error = error
            return b''
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position: int = offset + (0, self.position, self.size)[whence]
        if position < 0:
            return -1  # FFmpeg expects -1; damaged files point anywhere
        try:
            self.file.seek(min(position, self.size))  # a damaged file may point where no file can seek
        except Exception as error:
            self.error = error
            return -1
        self.position = position
        return position

    def check(self) -> None:
        """Raise the error that occurred in reading, if any."""
        if self.error is not None:
            raise self.error

    def tell(self) -> int:
        return self.position


def label(source: Any) -> str:
    """Name of a source in errors."""
    if isinstance(source, (str, bytes, os.PathLike)):
        return f'source={os.fspath(source)!r:.199}'
    name = getattr(source, 'name', None)
    return f'source=<{type(source).__name__}{"" if name is None else f" {name!r}"}>'


@contextmanager
def open_source(source: Any) -> Iterator[Optional[Reader]]:
    """Open a source for reading. Yields None for a folder.

    A file that the caller opened stays open, at the position that it had.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file cannot be opened.
        TypeError: source is neither a path nor a binary file.
        ValueError: It is no regular file, or cannot seek.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        if not hasattr(source, 'read') or isinstance(source, io.TextIOBase):
            raise TypeError(f'source must be a path or an open binary file, got {source!r:.99}')
        with _kept_place(source):
            yield Reader(source, label(source))
        return
    with _named_errors(label(source)):
        mode = os.stat(source).st_mode
    if stat.S_ISDIR(mode):
        yield None
        return
    _check_regular(mode, label(source))  # before opening, as opening can block or rewind a tape
    with _named_errors(label(source)):
        descriptor = os.open(source, sum(
            getattr(os, flag, 0) for flag in ('O_RDONLY', 'O_NONBLOCK', 'O_BINARY', 'O_CLOEXEC')))
    with open(descriptor, 'rb') as file:
        _check_regular(os.fstat(descriptor).st_mode, label(source))  # the file may have been replaced in between
        yield Reader(file, label(source))


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = ' (addresses are not opened: download it first)' if '://' in name else ''
        raise FileNotFoundError(f'{name} does not exist; wanted a video file{hint}') from error
    except OSError as error:
        # OSError makes an instance of the class that belongs to the number
        raise OSError(error.errno, f'{name} cannot be opened: {error.strerror}; wanted a video file') from error
    except ValueError as error:  # a null character in it
        raise ValueError(
            f'{name} is no path: {error}; wanted a video file (or io.BytesIO of the bytes of one)') from error


@contextmanager
def _kept_place(file: Any) -> Iterator[None]:
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError):  # BytesIO has none
        pass
    else:
        _check_regular(os.fstat(descriptor).st_mode, label(file))
    place = file.tell() if hasattr(file, 'tell') else None
    try:
        yield
    finally:
        if place is not None:
            file.seek(place)


def _check_regular(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in (
            (stat.S_ISDIR, 'a folder'), (stat.S_ISFIFO, 'a pipe'), (stat.S_ISSOCK, 'a socket'),
            (stat.S_ISCHR, 'a device'), (stat.S_ISBLK, 'a device')) if test(mode)), 'something else')
        raise ValueError(f'{name} is not a regular file but {kind}; wanted a video file')


def list_pictures(folder: Any) -> List[str]:
    """Paths of the pictures in a folder, frame 2 before frame 10.

    Raises:
        ValueError: There is no picture.
    """
    path = os.fsdecode(folder)
    names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES) and not name.startswith('.')]
    if not names:
        raise ValueError(
            f'{label(folder)} is a folder without pictures; wanted a video file, or frames '
            f'named *{", *".join(PICTURES)}')
    return [os.path.join(path, name) for name in sorted(names, key=_natural)]


def _natural(name: str) -> List[Any]:
    # digits are at odd places, so that numbers are compared with numbers; the name itself tells 1.png from 01.png
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'([0-9]+)', name.lower()))] + [name]
