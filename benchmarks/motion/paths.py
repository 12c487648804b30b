"""What the actor does: six motions, each played forwards or backwards. That is all that the classes differ in.

A path is a state for each frame: place, as an offset in pixels, and angle, in radians. The second class of a pair has
the states of the first in the opposite order. The actor's first place is uniform on a torus and its first angle
uniform on the circle, so in every frame, whichever class it is, its place and angle are uniform too:

- one frame, even one whose time is known, says nothing on the class;
- the frames without their order say nothing on which class of its pair it is.

In the last two motions the actor is displaced sideways in a quarter of the frames, down in a quarter, and at rest in
half of them. The two orders of "once" have the same pairs of neighbouring frames, too. So what tells them apart is
either several frames apart, or a place in time, which a network knows from the padding at both ends of a clip.
"""
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['CLASSES', 'LEVELS', 'MOTIONS', 'Levels', 'paths']

#: The motions; class 2 m is motion m forwards, class 2 m + 1 backwards.
MOTIONS = ('sideways', 'upright', 'orbit', 'spin', 'once', 'twice')
CLASSES = ('right', 'left', 'down', 'up', 'orbit clockwise', 'orbit counter-clockwise', 'spin clockwise',
           'spin counter-clockwise', 'sideways, then down', 'down, then sideways', 'sideways twice, then down',
           'down, then sideways twice')
RADIUS = 6.  # pixels: of an orbit, and of the circle on which a spin's step is measured


class Levels(NamedTuple):
    """Shares of right answers that no classifier exceeds, on average, if this is all that it sees of a clip."""
    frame: float
    frames: float


#: One frame; all frames, without their order: exact for what the actor does. Were there no distractors, whose motion is
#: a clock that tells the order of all frames but not its sense, the last four classes could not be told apart, and the
#: second would be 5/12.
LEVELS = Levels(frame=1 / len(CLASSES), frames=1 / 2)


def paths(labels: Tensor, steps: Tensor, num_frames: int) -> Tensor:
    """The states of clips.

    Args:
        labels: Classes, (N,).
        steps: Pixels that the actor moves in an eighth of a clip, (N,).
        num_frames: Frames T.

    Returns:
        x and y in pixels and the angle in radians, (N, T, 3), each relative to where the clip starts.
    """
    time = (torch.arange(num_frames, device=labels.device) + .5) * 8 / num_frames
    way = steps[:, None] * (time - time[0])
    rest = torch.zeros_like(way)

    def displaced(*parts: tuple[int, int]) -> Tensor:
        return 2 * steps[:, None] * sum((time >= begin) & (time < end) for begin, end in parts)

    motions = torch.stack([torch.stack(state, 2) for state in (
        (way, rest, rest),
        (rest, way, rest),
        (RADIUS * (way / RADIUS).cos(), RADIUS * (way / RADIUS).sin(), rest),
        (rest, rest, way / RADIUS),
        (displaced((1, 3)), displaced((5, 7)), rest),
        (displaced((1, 2), (3, 4)), displaced((5, 7)), rest))])
    forwards = motions[labels // 2, torch.arange(len(labels), device=labels.device)]
    return torch.where((labels % 2 == 0)[:, None, None], forwards, forwards.flip(1))
