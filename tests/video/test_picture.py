"""How a frame is shown: rotation and display matrices."""
import struct

import pytest
from videos import write_video

from cmr_layers.video import read_clip

av = pytest.importorskip('av')


def test_rotation(tmp_path):
    def paint(image, index):
        image[:8, :8] = 255  # the upper left corner

    path = write_video(tmp_path / 'phone.mp4', [0] * 3, paint=paint)
    assert read_clip(path, 1).frames.shape[2:] == (48, 64)
    data = bytearray(path.read_bytes())
    one = (1 << 16).to_bytes(4, 'big')
    zero, minus = bytes(4), (-(1 << 16)).to_bytes(4, 'big', signed=True)
    unit = one + zero * 3 + one + zero * 3 + (1 << 30).to_bytes(4, 'big')
    at = data.index(unit, data.index(b'tkhd'))
    # a player turns it by 90 degrees clockwise, as of a telephone held upright
    data[at:at + 36] = zero + one + zero + minus + zero * 4 + (1 << 30).to_bytes(4, 'big')
    path.write_bytes(data)
    frame = read_clip(path, 1).frames[0].float().mean(0)
    assert frame.shape == (64, 48)
    assert frame[:6, -6:].mean() > 240 and frame[:, :30].mean() < 10  # the upper right corner


# Numbers a, b, c, d of a display matrix, and where it shows the upper left corner
MATRICES = {
    'upright': ((1, 0, 0, 1), 'upper left'),
    'clockwise': ((0, 1, -1, 0), 'upper right'),
    'upside down': ((-1, 0, 0, -1), 'lower right'),
    'counterclockwise': ((0, -1, 1, 0), 'lower left'),
    'mirrored': ((-1, 0, 0, 1), 'upper right'),
    'flipped': ((1, 0, 0, -1), 'lower left'),
    'transposed': ((0, 1, 1, 0), 'upper left'),
    'transposed the other way': ((0, -1, -1, 0), 'lower right'),
    'by 10 degrees': ((.985, .174, -.174, .985), 'upper left'),
    'by 80 degrees': ((.174, .985, -.985, .174), 'upper right'),
    'nonsense': ((0, 0, 0, 0), 'upper left'),
}


def with_matrix(path, matrix):
    """Write a display matrix into an MP4's track header."""
    data = bytearray(path.read_bytes())
    unit = struct.pack('>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(unit, data.index(b'tkhd'))
    a, b, c, d = (round(number * (1 << 16)) for number in matrix)
    data[at:at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('name', MATRICES)
def test_display_matrix(tmp_path, name):
    def paint(image, index):
        image[:8, :8] = 255
        image[:4, 32:] = 128  # a bar beside it: the right end of the upper edge is no mirror of itself

    matrix, corner = MATRICES[name]
    path = with_matrix(write_video(tmp_path / 'phone.mp4', [0] * 3, paint=paint), matrix)
    frame = read_clip(path, 1).frames[0].float().mean(0).numpy()
    across = abs(matrix[1]) > abs(matrix[0])
    assert frame.shape == ((64, 48) if across else (48, 64))
    vertical, horizontal = corner.split()
    rows = slice(0, 6) if vertical == 'upper' else slice(-6, None)
    columns = slice(0, 6) if horizontal == 'left' else slice(-6, None)
    assert frame[rows, columns].mean() > 240
    # put back: pixel (y, x) of the file is shown where the matrix sends it
    back = frame.T if across else frame
    if (matrix[1] if across else matrix[0]) < 0:
        back = back[:, ::-1]
    if (matrix[2] if across else matrix[3]) < 0:
        back = back[::-1]
    assert back[:6, :6].mean() > 240 and 100 < back[:2, 40:].mean() < 150 and back[20:].mean() < 10


def test_a_video_that_turns_and_changes_its_size_keeps_the_clips(tmp_path):
    small = write_video(tmp_path / 'small.ts', [80] * 4, size=(64, 48))
    large = write_video(tmp_path / 'large.ts', [160] * 4, size=(128, 160))
    path = tmp_path / 'both.ts'
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read_clip(path, 4)
    assert clip.frames.shape == (4, 3, 48, 64) and clip.frames.is_contiguous()
    assert clip.frames.float().mean((1, 2, 3)).tolist() == pytest.approx([80, 80, 160, 160], abs=2)
