"""Make video files of actions that only motion tells apart.

    python -m examples.action_recognition.motion_videos videos

Each is an H.264 file: a thing, cut from one photograph, moves over another one, to one of four sides, towards the
camera or away from it. scikit-image ships the photographs. No photograph of a training video is in a validation video.
``train-things.csv`` and ``val-things.csv`` list the same videos by the shape of the thing, which any frame shows.

A frame says nothing on the class. Place and size of the piece have the same distribution in all classes: a coordinate
that rests has the value that it would have at a random time of a clip in which it moves. Two opposite classes are, for
the same random numbers, the same frames in reverse, before they are encoded.
"""
import argparse
import importlib
import os
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageOps

__all__ = [
    'CLASSES', 'PHOTOGRAPHS', 'THINGS', 'around', 'main', 'make_videos', 'needs', 'path_of', 'photograph', 'render',
    'write_video']

Array = npt.NDArray[np.float64]

SIDE, PIECE, FRAMES, RATE = 128, 64, 24, 12


def around(corners: int, inner: float = 1.) -> Array:
    """Corners on a circle; every second one at ``inner`` of its radius."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1)
    return np.stack((radii * np.sin(angles), -radii * np.cos(angles)), 1)


#: Name of a class: the coordinate that changes (x, y or size), and whether it grows.
CLASSES: Dict[str, Tuple[int, bool]] = {
    'moving something to the left': (0, False),
    'moving something to the right': (0, True),
    'moving something up': (1, False),
    'moving something down': (1, True),
    'moving something away from the camera': (2, False),
    'moving something towards the camera': (2, True),
}
#: Shapes of things: corners in a square from -1 to 1.
THINGS: Dict[str, Array] = {
    'bar': np.array([(-.35, -1), (.35, -1), (.35, 1), (-.35, 1)]),
    'cross': np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3),
                       (-1, .3), (-1, -.3), (-.3, -.3)]),
    'disc': around(32),
    'half': np.array([(-1, 0), *around(32)[8:25], (1, 0)]),
    'square': around(4),
    'star': around(10, .4),
    'triangle': around(3),
}
#: Photographs by split.
PHOTOGRAPHS: Dict[str, Tuple[str, ...]] = {
    'train': ('astronaut.png', 'brick.png', 'camera.png', 'grass.png', 'hubble_deep_field.jpg', 'ihc.png',
              'motorcycle_left.png', 'rocket.jpg'),
    'val': ('chelsea.png', 'coffee.png', 'coins.png', 'gravel.png', 'moon.png'),
}


def path_of(label: str, random: np.random.Generator, frames: int = FRAMES) -> Array:
    """Place and size of the piece in each frame: (frames, 3) of x, y and diameter, in parts of the picture's side."""
    axis, grows = CLASSES[label]
    lengths = random.uniform((.3, .3, np.log(1.7)), (.5, .5, np.log(2.3)))
    low = np.array((.22, .22, np.log(.2)))
    high = np.array((.78, .78, np.log(.46)))
    begin = random.uniform(low, high - lengths)
    times = np.linspace(0, 1, frames)
    rest = random.integers(0, frames, 3)
    path = np.tile(begin + lengths * times[rest], (frames, 1))
    path[:, axis] = begin[axis] + lengths[axis] * (times if grows else times[::-1])
    path[:, 2] = np.exp(path[:, 2])
    return path


def render(label: str, thing: str, split: str, random: np.random.Generator) -> List[Image.Image]:
    """The frames of one video."""
    ground, source = random.choice(PHOTOGRAPHS[split], 2, replace=False)
    picture = _window(photograph(ground), SIDE, random.uniform(.25, .5), random).convert('RGBA')
    piece = _window(photograph(source), PIECE, 1, random)
    piece = ImageOps.autocontrast(piece).point([80 + level * 175 // 255 for level in range(256)] * 3)
    piece.putalpha(_mask(thing, random.uniform(-20, 20)))
    frames = []
    for x, y, diameter in path_of(label, random):
        scale = PIECE / (diameter * SIDE)
        matrix = (scale, 0, PIECE / 2 - x * SIDE * scale, 0, scale, PIECE / 2 - y * SIDE * scale)
        moved = piece.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        frames.append(Image.alpha_composite(picture, moved).convert('RGB'))
    return frames


@cache
def photograph(name: str) -> Image.Image:
    """One of :data:`PHOTOGRAPHS`, as RGB."""
    skimage = needs('skimage')
    with Image.open(Path(skimage.__file__).parent / 'data' / name) as photograph:
        return photograph.convert('RGB')


def needs(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'making the videos needs {name}: pip install "cmr-layers[example]"') from error


def _window(photograph: Image.Image, side: int, light: float, random: np.random.Generator) -> Image.Image:
    """A square of a photograph, of at least a third of its height, in another light."""
    width, height = photograph.size
    part = random.uniform(.35, .9) * min(width, height)
    left, top = random.uniform(0, width - part), random.uniform(0, height - part)
    window = photograph.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + part, top + part))
    factors = light * random.uniform(.8, 1.2, 3)
    return window.point([min(255, round(level * factor)) for factor in factors for level in range(256)])


def _mask(thing: str, degrees: float) -> Image.Image:
    mask = Image.new('L', (PIECE, PIECE))
    corners = PIECE / 2 * (1 + .92 * THINGS[thing])
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in corners.tolist()], 255)
    return mask.rotate(degrees, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(1))


def write_video(frames: List[Image.Image], file: Path) -> None:
    """Encode frames as H.264. A file that is there is a whole one."""
    av = needs('av')
    part = file.with_name(f'{file.stem}.part.mp4')
    with av.open(str(part), 'w') as container:
        stream = container.add_stream('libx264', rate=RATE, options={'crf': '23', 'preset': 'veryfast'})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.thread_count = 'yuv420p', 1
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format='rgb24')
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(part, file)


def make_videos(
        folder: Path, train: int = 200, val: int = 50, seed: int = 0, say: Optional[Callable[[str], None]] = None,
) -> int:
    """Write ``folder/train/CLASS/0000.mp4`` and so on, and the lists of things. Videos that are there are left alone.

    Args:
        folder: Where to.
        train: Training videos of each class.
        val: Validation videos of each class.
        seed: The videos follow from it. Each one has random numbers of its own.
        say: Prints a line.

    Returns:
        Number of videos that were written.
    """
    written, things = 0, list(THINGS)
    for part, (split, count) in enumerate((('train', train), ('val', val))):
        lines = []
        for number, label in enumerate(CLASSES):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                # the thing goes round with i and begins anew in each class: it says nothing on the motion
                file, thing = folder / split / label / f'{i:04}.mp4', things[i % len(things)]
                if not file.exists():
                    write_video(render(label, thing, split, np.random.default_rng((seed, part, number, i))), file)
                    written += 1
                lines.append(f'{split}/{label}/{file.name}, {thing}\n')
        (folder / f'{split}-things.csv').write_text(''.join(lines))
        if say is not None:
            say(f'{folder / split}: {len(CLASSES)} classes of {count} videos')
    return written


def main(arguments: Optional[List[str]] = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog='motion_videos', description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('folder', type=Path, help='where to; files that are there stay')
    parser.add_argument('--train', type=int, default=200, help='training videos of each class (200)')
    parser.add_argument('--val', type=int, default=50, help='validation videos of each class (50)')
    parser.add_argument('--seed', type=int, default=0, help='seed of all random numbers (0)')
    args = parser.parse_args(arguments)
    for name in ('train', 'val', 'seed'):
        if getattr(args, name) < 0:
            parser.error(f'--{name} must be at least 0, got {getattr(args, name)}')
    try:
        written = make_videos(args.folder, args.train, args.val, args.seed, print)
    except (OSError, ImportError) as error:
        print(f'motion_videos: {error}', file=sys.stderr)
        return 1
    print(f'{written} files written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
