"""Videos that the tests write, and which of their frames a clip holds."""
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip('av')

RATE = 10
LEVEL = 8  # frame i is grey of level LEVEL * i


def write_video(path, levels, codec='libx264', pix_fmt='yuv420p', size=(64, 48), paint=None, first_pts=0):
    """A video whose frames are grey of the given levels, or painted by paint(image, index)."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        for i, level in enumerate(levels):
            image = np.full((size[1], size[0], 3), level, np.uint8)
            if paint is not None:
                paint(image, i)
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            add(container, stream, frame, first_pts + i, Fraction(1, RATE))
        container.mux(stream.encode())
    return path


def add(container, stream, frame, pts, time_base):
    """Encode a frame that is shown at pts ticks."""
    frame.pts, frame.time_base = pts, time_base
    container.mux(stream.encode(frame))


def read_levels(clip):
    """Indices of the frames that a clip holds."""
    return (clip.frames.float().mean((1, 2, 3)) / LEVEL).round().int().tolist()


def grey(level, size=(64, 48)):
    return av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format='rgb24')


def encode(path, stamps, codec='libx264', time_base=Fraction(1, RATE), options=None, paint=grey):
    """A video whose frame i is grey of level LEVEL * i and shown at stamps[i] ticks."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        stream.codec_context.time_base = time_base
        for i, stamp in enumerate(stamps):
            add(container, stream, paint(LEVEL * i), stamp, time_base)
        container.mux(stream.encode())
    return path


def packets(path):
    """Place, size and flag of each packet."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size, packet.is_corrupt) for packet in container.demux(video=0) if packet.size]


def look(path):
    """Rate, exact times and pictures of a film."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return stream.average_rate, [frame.pts * frame.time_base for frame in frames], [
            frame.to_ndarray(format='rgb24') for frame in frames]
