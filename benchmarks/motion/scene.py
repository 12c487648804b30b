"""Clips of a bar that acts among things that move without meaning, over a photograph.

The picture is a torus: what leaves on one side comes in on the other. So there is no border that could tell where in
its path the actor is, and its place in any frame is uniform (see :mod:`.paths`). Each distractor plays a class of its
own, drawn without regard to the label.
"""
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.motion.paths import CLASSES, paths
from benchmarks.motion.photographs import windows
from examples.action_recognition.motion_videos import around

__all__ = ['ACTOR', 'SHAPES', 'Batch', 'Difficulty', 'Plan', 'Range', 'clips', 'plan', 'stills']

SIDE = 40  # pixels of the frames that all lengths are given for; in larger frames things are larger
DIAMETER = (12., 16.)  # of a thing
PIECE = 24  # pixels of a thing's texture and mask, before it is drawn
WINDOWS = 480  # of photographs, for each split


#: Corners in a square from -1 to 1. The first is the actor's; the others are of distractors.
SHAPES: dict[str, npt.ArrayLike] = {
    'bar': [(-.38, -1), (.38, -1), (.38, 1), (-.38, 1)],
    'cross': [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3),
              (-1, -.3), (-.3, -.3)],
    'disc': around(32),
    'ring': around(32),
    'star': around(10, .45),
    'triangle': around(3),
}
ACTOR = 0


class Range(NamedTuple):
    """A knob: uniform between two values, or one value."""
    low: float
    high: float


class Difficulty(NamedTuple):
    """The knobs.

    Attributes:
        step: Pixels that things move in an eighth of a clip, of 40 that a frame has.
        clutter: Opacity of the distractors, 0 to 1; the actor's is 1.
        share: Probability of each frame to show the actor.
    """
    step: Range = Range(1.5, 3.5)
    clutter: Range = Range(0., .8)
    share: Range = Range(.75, 1.)


USUAL = Difficulty()


class Plan(NamedTuple):
    """What is drawn of B clips with K things, the actor first.

    Attributes:
        labels: (B,).
        states: x and y in pixels, and the angle, (B, K, T, 3).
        shapes: Numbers of :data:`SHAPES`, (B, K).
        opacity: (B, K, T).
    """
    labels: Tensor
    states: Tensor
    shapes: Tensor
    opacity: Tensor


class Batch(NamedTuple):
    """uint8 clips (B, T, 3, S, S); labels (B,); what of each pixel the actor is, and things are, (B, T, S, S)."""
    clips: Tensor
    labels: Tensor
    actor: Tensor
    things: Tensor


@cache
def _masks() -> Tensor:
    """(shapes, PIECE, PIECE), smooth at their edges."""
    found = []
    for name, corners in SHAPES.items():
        big = Image.new('L', (4 * PIECE, 4 * PIECE))
        draw = ImageDraw.Draw(big)
        draw.polygon((2 * PIECE * (1 + .9 * np.asarray(corners))).flatten().tolist(), 255)
        if name == 'ring':
            draw.polygon((2 * PIECE * (1 + .45 * np.asarray(corners))).flatten().tolist(), 0)
        found.append(np.asarray(big.resize((PIECE, PIECE), Image.Resampling.BOX), np.float32) / 255)
    return torch.from_numpy(np.stack(found))


class _Random:
    """Random tensors on a device, from numpy's generator, whose streams are the same on all machines."""

    def __init__(self, seed: tuple[int, ...], device: str) -> None:
        self.numpy = np.random.default_rng(seed)
        self.device = device

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        return torch.from_numpy(self.numpy.uniform(low, high, size).astype(np.float32)).to(self.device)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        return torch.from_numpy(self.numpy.integers(low, high, size)).to(self.device)

    def states(self, side: int, *size: int) -> Tensor:
        """Place and angle, uniform."""
        return torch.stack((self.uniform(0, side, *size), self.uniform(0, side, *size),
                            self.uniform(-np.pi, np.pi, *size)), -1)


def clips(
        count: int, seed: tuple[int, ...], split: str = 'train', num_frames: int = 8, side: int = SIDE,
        difficulty: Difficulty = USUAL, distractors: int = 2, device: str = 'cpu',
) -> Batch:
    """A batch. Everything follows from the arguments.

    Args:
        count: Clips B.
        seed: Of all random numbers.
        split: 'train' or 'val', whose photographs to use.
        num_frames: Frames T of a clip, which has the same duration whatever T is.
        side: Pixels S of a frame's side.
        difficulty: Ranges of the knobs, drawn for each clip.
        distractors: Things beside the actor.
        device: Where to draw.

    Returns:
        The clips and what is known of them.
    """
    random = _Random(seed, device)
    return _draw(random, _plan(random, count, seed, num_frames, side, difficulty, distractors), split, side)


def plan(
        count: int, seed: tuple[int, ...], num_frames: int = 8, side: int = SIDE, difficulty: Difficulty = USUAL,
        distractors: int = 2,
) -> Plan:
    """What :func:`clips` draws for the same arguments."""
    return _plan(_Random(seed, 'cpu'), count, seed, num_frames, side, difficulty, distractors)


def _plan(
        random: _Random, count: int, seed: tuple[int, ...], num_frames: int, side: int, difficulty: Difficulty,
        distractors: int,
) -> Plan:
    B, T, K = count, num_frames, distractors + 1
    labels = random.integers(0, len(CLASSES), B)
    step, clutter, share = (random.uniform(*knob, B) for knob in difficulty)
    motions = torch.cat((labels[:, None], random.integers(0, len(CLASSES), B, distractors)), 1)
    states = paths(motions.flatten(), step.repeat_interleave(K), T).unflatten(0, (B, K))
    states[..., :2] *= side / SIDE
    states += random.states(side, B, K)[:, :, None]
    shapes = torch.cat((torch.full_like(labels[:, None], ACTOR), random.integers(1, len(SHAPES), B, distractors)), 1)
    opacity = torch.cat((torch.ones_like(clutter[:, None]), clutter[:, None].expand(-1, distractors)), 1)
    visible = opacity[:, :, None].repeat(1, 1, T)
    # of a stream of its own: all else is the same for any number of frames
    visible[:, 0] = (_Random((*seed, 0), random.device).uniform(0, 1, B, T) < share[:, None]).float()
    return Plan(labels, states, shapes, visible)


def stills(
        count: int, seed: tuple[int, ...], split: str = 'train', side: int = SIDE, things: int = 2,
        device: str = 'cpu',
) -> Batch:
    """Single frames of things that have one shape, which is the label: what an image network is trained on before."""
    random = _Random(seed, device)
    labels = random.integers(0, len(SHAPES), count)
    states = random.states(side, count, things)[:, :, None]
    visible = torch.ones_like(states[..., 0])
    return _draw(random, Plan(labels, states, labels[:, None].expand(-1, things), visible), split, side)


def _draw(random: _Random, plan: Plan, split: str, side: int) -> Batch:
    labels, states, shapes, opacity = plan
    B, K, T = states.shape[:3]
    device, scale = random.device, side / SIDE
    grounds = windows(split, WINDOWS, side, device=device)[random.integers(0, WINDOWS, B)]
    grounds = grounds * random.uniform(.25, .5, B, 1, 1, 1) * random.uniform(.8, 1.2, B, 3, 1, 1)
    textures = windows(split, WINDOWS, PIECE, 1, device)[random.integers(0, WINDOWS, B * K)].unflatten(0, (B, K))
    textures = (.3 + .7 * textures) * random.uniform(.8, 1.2, B, K, 3, 1, 1)
    pieces = torch.cat((textures, _masks().to(device)[shapes][:, :, None]), 2)
    diameter = scale * random.uniform(*DIAMETER, B, K, 1, 1)

    # Each thing is drawn into a square of pixels around its place. Where is each of them on the thing, turned back and
    # scaled to -1 ... 1, and where in the picture, a torus?
    square = torch.arange(int(scale * DIAMETER[1]) + 3, device=device)
    x, y, angle = states.unbind(3)
    left, top = ((place - square[-1] / 2).floor().long()[..., None] + square for place in (x, y))  # (B, K, T, side)
    dx, dy = (left + .5 - x[..., None])[..., None, :], (top + .5 - y[..., None])[..., None]
    cos, sin = (f(angle)[..., None, None] * 2 / diameter[..., None] for f in (torch.cos, torch.sin))
    grid = torch.stack((cos * dx + sin * dy, cos * dy - sin * dx), 5)  # (B, K, T, side, side, 2)
    drawn = F.grid_sample(pieces.flatten(0, 1), grid.flatten(0, 1).flatten(1, 2), align_corners=False)
    drawn = drawn.view(B, K, 4, T, -1)
    pixels = ((top % side)[..., None] * side + (left % side)[..., None, :]).flatten(3)  # (B, K, T, side * side)

    # channels: the picture's three, what is actor, what is thing
    frames = F.pad(grounds, (0, 0, 0, 0, 0, 2)).flatten(2)[:, :, None].repeat(1, 1, T, 1)
    ranks = random.uniform(0, 1, B, K).argsort(1)  # what lies over what
    clip = torch.arange(B, device=device)
    for k in ranks.unbind(1):
        alpha = (drawn[clip, k, 3] * opacity[clip, k, :, None])[:, None]
        marks = torch.ones_like(drawn[clip, k, :2])
        marks[:, 0] *= (k == ACTOR)[:, None, None]
        at = pixels[clip, k][:, None].expand(-1, 5, -1, -1)
        under = frames.gather(3, at)
        frames.scatter_(3, at, under + alpha * (torch.cat((drawn[clip, k, :3], marks), 1) - under))
    frames = frames.unflatten(3, (side, side)).transpose(1, 2)
    pictures = (frames[:, :, :3].clamp(0, 1) * 255).round().byte()
    return Batch(pictures, labels, frames[:, :, 3], frames[:, :, 4])
