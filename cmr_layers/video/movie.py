"""Check the tables of an MP4 before FFmpeg believes them.

FFmpeg allocates some 70 bytes for every sample that the tables of an MP4 declare. A table of samples of one size is 20
bytes long and can declare any number of them. A file of 3 KB could take 7 GB.
"""
import struct
from typing import Iterator, Tuple

from .source import Reader

__all__ = ['check_movie']

CONTAINERS = (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'moof', b'traf')
DEPTH = 10  # FFmpeg looks as deep


def check_movie(reader: Reader) -> None:
    """Raise a ValueError if an MP4 declares more samples than it has bytes. Other formats have no such boxes."""
    samples = _samples(reader, 0, reader.size, DEPTH)
    reader.check()
    if samples > reader.size:
        raise ValueError(
            f'{reader.label} is damaged: it declares {samples} samples in {reader.size} bytes; wanted a video file')


def _samples(reader: Reader, begin: int, end: int, depth: int) -> int:
    total = 0
    for kind, start, stop in _boxes(reader, begin, end):
        if kind in CONTAINERS and depth > 0:
            total += _samples(reader, start, stop, depth - 1)
        elif kind in (b'stsz', b'trun') and start + 12 <= stop:
            reader.seek(start)
            _, first, second = struct.unpack('>3I', reader.read(12).ljust(12, b'\0'))
            total += second if kind == b'stsz' else first
    return total


def _boxes(reader: Reader, at: int, end: int) -> Iterator[Tuple[bytes, int, int]]:
    """Kind, start and end of the content of each box."""
    while at + 16 <= end:
        reader.seek(at)
        size, kind, long_size = struct.unpack('>I4sQ', reader.read(16).ljust(16, b'\0'))  # short if reading fails
        head = 8
        if size == 1:
            size, head = long_size, 16
        elif size == 0:
            size = end - at
        if size < head:
            return
        yield kind, at + head, min(at + size, end)
        at += size
