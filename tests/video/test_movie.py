"""Movies that say what they should not: another file, more frames than there are."""
import io
import struct
from fractions import Fraction

import numpy as np
import pytest
from videos import LEVEL, RATE, read_levels

from cmr_layers.video import read_clip

av = pytest.importorskip('av')


def test_a_movie_that_refers_to_another_file(folder):
    """The data reference of an MP4 names another file, and the frames are not in this one."""
    data = bytearray((folder / 'secret.mp4').read_bytes())
    at = data.index(b'url \0\0\0\1') - 4
    alias = b'alis' + bytes(4) + bytes(150) + struct.pack('>hh', 2, 11) + b'/secret.mp4\0' + struct.pack('>hh', -1, 0)
    reference = struct.pack('>I', len(alias) + 4) + alias
    grown = len(reference) - 12
    data[at:at + 12] = reference
    for name in (b'dref', b'dinf', b'minf', b'mdia', b'trak', b'moov'):  # the boxes around it
        start = data.rindex(name, 0, at) - 4
        data[start:start + 4] = struct.pack('>I', struct.unpack('>I', data[start:start + 4])[0] + grown)
    media = data.index(b'mdat')
    data[media + 4:media + 400] = bytes(396)
    (folder / 'alias.mov').write_bytes(data)
    with pytest.raises(ValueError, match=r'source=.*alias\.mov'):
        read_clip(folder / 'alias.mov')


@pytest.mark.parametrize('count', [3000, 10 ** 7, 2 ** 32 - 1])
def test_a_small_movie_that_says_it_has_many_frames(folder, count):
    """FFmpeg would take 70 bytes for each."""
    data = bytearray((folder / 'secret.mp4').read_bytes())
    at = data.index(b'stsz') + 8
    data[at:at + 8] = struct.pack('>II', 1, count)
    (folder / 'many.mp4').write_bytes(data)
    message = rf'many.mp4.* is damaged: it declares {count} samples in {len(data)} bytes'
    assert len(data) < 3000
    with pytest.raises(ValueError, match=message):
        read_clip('many.mp4')


def test_a_fragment_that_says_it_has_many_frames(folder):
    fragmented = io.BytesIO()
    options = {'movflags': 'frag_keyframe+empty_moov+default_base_moof'}
    with av.open(fragmented, 'w', format='mp4', options=options) as container:
        stream = container.add_stream('libx264', rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), LEVEL * i, np.uint8), format='rgb24')
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read_levels(read_clip(fragmented, 5)) == [1, 3, 5, 7, 9]
    data = bytearray(fragmented.getvalue())
    at = data.index(b'trun') + 4
    data[at:at + 8] = struct.pack('>II', 1, 10 ** 7)
    with pytest.raises(ValueError, match='it declares 10000000 samples in'):
        read_clip(io.BytesIO(data))


@pytest.mark.timeout(20)
@pytest.mark.parametrize('data', [
    struct.pack('>I4s', 8, b'moov') * 2000,
    b''.join(struct.pack('>I4s', 8 * (2000 - i), b'moov') for i in range(2000)),
    struct.pack('>I4sQ', 1, b'moov', 0) * 20, struct.pack('>I4sQ', 1, b'moov', 2 ** 64 - 1) * 20,
    struct.pack('>I4s', 0, b'trak') * 20, struct.pack('>I4s', 24, b'stsz') + bytes(3),
])
def test_boxes_in_boxes(data):
    with pytest.raises(ValueError, match='is not a video'):
        read_clip(io.BytesIO(struct.pack('>I4s', 8, b'ftyp') + data))
