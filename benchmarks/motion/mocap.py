"""Recorded human motion, drawn as figures: which action, forwards or backwards?

The package pybullet ships 15 takes of one person each (DeepMimic's format): these are true actions with true labels.
A clip is a window of a take, seen by a camera, drawn over a photograph. Test clips have other photographs and cameras,
but the same takes, so nothing is said on other persons. Only files of the package are read; it is not imported.
"""
import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.motion.paths import Levels
from benchmarks.motion.photographs import windows
from benchmarks.motion.scene import WINDOWS
from benchmarks.motion.task import DATA, Clips, make_task, pairs

__all__ = ['ACTIONS', 'MOCAP', 'joints', 'take', 'turned']

Array = npt.NDArray[np.float64]

#: The takes. 'spin' is one that lasts.
ACTIONS = ('walk', 'run', 'jump', 'kick', 'punch', 'cartwheel', 'backflip', 'crawl', 'roll', 'spin', 'spinkick',
           'dance_a', 'dance_b', 'getup_facedown', 'getup_faceup')
SECONDS = 1.  # of a clip

# Skeleton: parent, place in the parent's frame in metres, and how many numbers of a frame its rotation has.
_SKELETON: dict[str, tuple[str, tuple[float, float, float], int]] = {
    'chest': ('root', (0, .236151, 0), 4),
    'neck': ('chest', (0, .223894, 0), 4),
    'right hip': ('root', (0, 0, .084887), 4),
    'right knee': ('right hip', (0, -.421546, 0), 1),
    'right ankle': ('right knee', (0, -.40987, 0), 4),
    'right shoulder': ('chest', (-.02405, .2435, .18311), 4),
    'right elbow': ('right shoulder', (0, -.274788, 0), 1),
    'left hip': ('root', (0, 0, -.084887), 4),
    'left knee': ('left hip', (0, -.421546, 0), 1),
    'left ankle': ('left knee', (0, -.40987, 0), 4),
    'left shoulder': ('chest', (-.02405, .2435, -.18311), 4),
    'left elbow': ('left shoulder', (0, -.274788, 0), 1),
    # ends, which do not turn
    'head': ('neck', (0, .18, 0), 0),
    'right toe': ('right ankle', (.17, -.02, 0), 0),
    'left toe': ('left ankle', (.17, -.02, 0), 0),
    'right hand': ('right elbow', (0, -.26, 0), 0),
    'left hand': ('left elbow', (0, -.26, 0), 0),
}
_NAMES = ('root', *_SKELETON)
#: What is drawn: lines between two joints, and half their width, in parts of the picture.
_BONES = [(_NAMES.index(parent), _NAMES.index(name), .035 if parent == 'root' and name == 'chest' else .02)
          for name, (parent, _, _) in _SKELETON.items()]


def _rotation(q: Array) -> Array:
    """Quaternions (..., 4), w first, to matrices (..., 3, 3)."""
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    return np.stack([
        np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)], -2)


def joints(frames: Array) -> Array:
    """Where the joints are: frames (F, 43) of DeepMimic's format, without their durations, to (F, joints, 3)."""
    place, turn = {'root': frames[:, :3]}, {'root': _rotation(frames[:, 3:7])}
    at = 7
    for name, (parent, offset, numbers) in _SKELETON.items():
        place[name] = place[parent] + turn[parent] @ np.array(offset)
        if numbers == 4:
            turn[name] = turn[parent] @ _rotation(frames[:, at:at + 4])
        elif numbers == 1:  # knees and elbows turn about z
            half = frames[:, at] / 2
            zero = np.zeros_like(half)
            turn[name] = turn[parent] @ _rotation(np.stack([np.cos(half), zero, zero, np.sin(half)], -1))
        at += numbers
    return np.stack([place[name] for name in _NAMES], 1)


@cache
def take(action: str) -> tuple[Array, Array]:
    """Times in seconds, (F,), and joints, (F, joints, 3), of a take.

    Raises:
        FileNotFoundError: The package is missing.
    """
    spec = importlib.util.find_spec('pybullet_data')
    folder = Path(spec.origin).parent if spec and spec.origin else DATA / 'pybullet_data'
    file = folder / f'data/motions/humanoid3d_{action}.txt'
    if not file.exists():
        raise FileNotFoundError(
            f'the task mocap needs {file.name} of pybullet: pip install --no-deps --only-binary=:all: '
            f'--python-version 3.11 --target {DATA} pybullet')
    frames = np.array(json.loads(file.read_text())['Frames'])
    times = np.concatenate([[0], frames[:-1, 0].cumsum()])
    return times, joints(frames[:, 1:])


def turned(random: np.random.Generator, split: str) -> float:
    """Where a camera stands, in radians about the vertical: training has two opposite quarters, the test the others.

    A flat figure seen from behind, at an angle of pi more, is its mirror image, and so is a symmetric pose seen from
    the other side, at the opposite angle. A split has both, so no picture of the test is one of the training.
    """
    turn: float = random.uniform(-np.pi / 4, np.pi / 4) + np.pi * random.integers(2)
    return turn + (np.pi / 2 if split == 'val' else 0)


def clips(
        count: int, seed: tuple[int, ...], split: str, num_frames: int, side: int, device: str = 'cpu',
) -> Clips:
    """A batch, drawn as :func:`turned` cameras see it."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2 * len(ACTIONS), count)
    points = np.empty((count, num_frames, len(_NAMES), 2))
    for i, label in enumerate(labels):
        times, places = take(ACTIONS[label // 2])
        seconds = min(SECONDS * random.uniform(.8, 1.2), times[-1])
        begin = random.uniform(0, times[-1] - seconds)
        at = begin + seconds * np.linspace(0, 1, num_frames)
        moment = np.searchsorted(times, at, side='right').clip(1, len(times) - 1)
        part = ((at - times[moment - 1]) / (times[moment] - times[moment - 1]))[:, None, None]
        seen = places[moment - 1] * (1 - part) + places[moment] * part
        if label % 2:
            seen = seen[::-1]
        turn = turned(random, split)
        tilt = random.uniform(-.1, .4)
        x = np.cos(turn) * seen[..., 0] + np.sin(turn) * seen[..., 2]
        depth = np.cos(turn) * seen[..., 2] - np.sin(turn) * seen[..., 0]
        y = np.cos(tilt) * seen[..., 1] + np.sin(tilt) * depth
        flat = np.stack([x, -y], -1)
        middle = (flat.min((0, 1)) + flat.max((0, 1))) / 2  # the camera stands still and has all of the clip in view
        scale = random.uniform(.75, .9) * side / max(np.ptp(flat, axis=(0, 1)).max(), 1.2)
        points[i] = (flat - middle) * scale + side / 2 + random.uniform(-.05, .05, 2) * side
    made, known = _draw(random, labels, points, split, side)
    return made.to(device), known.to(device)


def _draw(random: np.random.Generator, labels: npt.NDArray[np.int64], points: Array, split: str, side: int) -> Clips:
    grounds = windows(split, WINDOWS, side)[torch.from_numpy(random.integers(0, WINDOWS, len(labels)))]
    grounds = grounds * torch.from_numpy(random.uniform(.2, .45, (len(labels), 3, 1, 1)).astype(np.float32))
    colour = torch.from_numpy(random.uniform(.6, 1, (len(labels), 1, 3, 1, 1)).astype(np.float32))
    where = torch.from_numpy(points.astype(np.float32))
    pixel = torch.arange(side) + .5
    mask = torch.zeros(*where.shape[:2], side, side)
    for a, b, thick in _BONES:
        x, y = where[:, :, a, :, None, None].unbind(2)
        wx, wy = (where[:, :, b] - where[:, :, a])[..., None, None].unbind(2)
        dx, dy = pixel - x, pixel[:, None] - y
        along = ((dx * wx + dy * wy) / (wx * wx + wy * wy).clamp(min=1e-6)).clamp(0, 1)
        distance = torch.hypot(dx - along * wx, dy - along * wy)
        mask = torch.maximum(mask, (thick * side + .5 - distance).clamp(0, 1))
    frames = grounds[:, None] * (1 - mask[:, :, None]) + colour * mask[:, :, None]
    pictures = (frames.clamp(0, 1) * 255).round().byte()
    return pictures, torch.from_numpy(labels)


CLASSES = tuple(f'{action}{way}' for action in ACTIONS for way in ('', ', backwards'))
MOCAP = make_task('mocap', CLASSES, pairs(len(CLASSES)), Levels(frame=1 / 2, frames=1 / 2), clips)
