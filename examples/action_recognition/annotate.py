"""Write a video with a label and its score over the frames. Needs PyAV, Pillow and, for its font, matplotlib."""
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, Tuple

import numpy as np

from cmr_layers.video.decode import MAX_CLIP_PIXELS, MAX_PIXELS, Limits, Video, import_av
from cmr_layers.video.picture import picture, reformatter
from cmr_layers.video.source import list_pictures, open_source

__all__ = ['Writer', 'all_frames', 'with_label', 'writing']

Image = np.ndarray[Any, Any]  # uint8 (H, W, 3)

SMALLEST = 240  # shorter side below which frames are enlarged, as no label could be read on them
# Ticks per second of a film whose frames are not at multiples of a short time: as of MPEG
FINE = 90000


class Writer:
    """Writes frames at their times to an MP4 (H.264). :func:`writing` opens one.

    The shorter side of a frame is enlarged to at least 240 pixels, by a whole number. An odd height or width gets one
    more row or column, as H.264 has none: the last one twice.

    Attributes:
        count: Frames that were written.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.last = -1
        self.count = 0

    def write(self, image: Image, time: Fraction, label: str, score: float) -> None:
        """Add a frame with a label over it. Times ascend from 0; a frame at the time of another comes a tick later."""
        image = with_label(enlarged(image), label, score)
        height, width = image.shape[0] + image.shape[0] % 2, image.shape[1] + image.shape[1] % 2
        if self.last < 0:
            self.stream.height, self.stream.width = height, width
        elif (self.stream.height, self.stream.width) != (height, width):
            raise ValueError(f'image must be {self.stream.width}x{self.stream.height} pixels as those before, got '
                             f'{width}x{height}')
        image = np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), 'edge')
        frame = import_av().VideoFrame.from_ndarray(np.ascontiguousarray(image), format='rgb24')
        unit = self.stream.codec_context.time_base
        frame.time_base, frame.pts = unit, max(round(time / unit), self.last + 1)
        self.last = frame.pts
        self.count += 1
        self.container.mux(self.stream.encode(frame))


@contextmanager
def writing(path: Path, rate: Fraction, unit: Fraction = Fraction(1, FINE)) -> Iterator[Writer]:
    """Open an MP4 for writing.

    Args:
        path: A file that ends in .mp4.
        rate: Frames per second, on average.
        unit: Time of which all times are multiples. A longer clock of more than 90,000 ticks per second is not kept.
    """
    if unit < Fraction(1, FINE):
        unit = Fraction(1, FINE)
    # the rate is a 32-bit fraction in the file
    rate = Fraction(rate).limit_denominator(1001)
    with import_av().open(str(path), 'w') as container:
        stream = container.add_stream('h264', rate=rate)
        stream.pix_fmt = 'yuv420p'  # what every player shows
        stream.codec_context.time_base = unit
        writer = Writer(container, stream)
        yield writer
        if writer.last >= 0:
            container.mux(stream.encode())


def all_frames(path: str) -> Iterator[Image]:
    """All frames of a video file or a folder of pictures, in order, one at a time. All have the size of the first."""
    shape, reformat = None, reformatter()
    for frame in _decoded(path):
        image = picture(frame, shape, reformat)
        shape = image.shape[1], image.shape[2]
        yield image.transpose(1, 2, 0)


def _decoded(path: str) -> Iterator[Any]:
    limits = Limits(MAX_PIXELS, MAX_CLIP_PIXELS, 1)
    with open_source(path) as reader:
        if reader is not None:
            yield from Video(reader, limits).frames()
            return
    for name in list_pictures(path):
        with open_source(name) as reader:
            if reader is None:
                raise ValueError(f'{name!r} is a folder; wanted a picture')
            yield from Video(reader, limits).frames()


def enlarged(image: Image) -> Image:
    """An image whose shorter side has 240 pixels or more: each pixel is repeated as often as that takes."""
    times = -(-SMALLEST // min(image.shape[:2]))
    return image if times <= 1 else image.repeat(times, 0).repeat(times, 1)


def with_label(image: Image, label: str, score: float) -> Image:
    """A copy of an image with a strip at its top: a bar as long as the score in [0, 1], and the label on it."""
    height, width = image.shape[:2]
    strip, opacity = _strip(label, round(score, 3), width, max(18, height // 12))
    rows = min(strip.shape[0], height)
    result = image.copy()
    result[:rows] = image[:rows] * (1 - opacity[:rows]) + strip[:rows] * opacity[:rows]
    return result


@lru_cache(maxsize=8)
def _strip(label: str, score: float, width: int, height: int) -> Tuple[Image, Image]:
    """Colours and opacity of the strip."""
    try:
        from matplotlib import get_data_path
        from PIL import Image as Pillow
        from PIL import ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "cmr-layers[video]"') from error
    # a font that is there on every machine, and knows more than Latin letters
    font = ImageFont.truetype(str(Path(get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')), round(height * .62))
    canvas = Pillow.new('RGB', (width, height), (16, 16, 16))
    draw = ImageDraw.Draw(canvas)
    bar = round(width * score)
    if bar > 0:
        draw.rectangle((0, 0, bar - 1, height), (24, 110, 60))
    margin = height // 4
    number = f'{score:.0%}'
    room = width - 3 * margin - draw.textlength(number, font)
    if draw.textlength(label, font) > room:
        while label and draw.textlength(label + '…', font) > room:
            label = label[:-1]
        label += '…'
    draw.text((margin, height / 2), label, 'white', font, anchor='lm')
    draw.text((width - margin, height / 2), number, 'white', font, anchor='rm')
    strip = np.asarray(canvas).astype(np.float32)
    # the letters cover the picture, the strip lets it shine through
    return strip, np.where(strip.min(2, keepdims=True) > 120, 1, .72).astype(np.float32)
