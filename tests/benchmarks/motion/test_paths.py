"""What theory says on the task of moving things, and that clips keep to it."""
import pytest
import torch

from benchmarks.motion.paths import CLASSES, LEVELS, MOTIONS, paths
from benchmarks.motion.scene import SIDE, Difficulty, Range, clips, plan

ALL = torch.arange(len(CLASSES))
STEP = torch.full((len(CLASSES),), 2.5)
# the shares below are of this many clips: their standard error is at most 1.3 points
COUNT, NEIGHBOURS = 1500, 15


def states(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The actor's true states in clips, (count, T, 4): x and y, and the angle's cosine and sine."""
    made = plan(count, (seed,), difficulty=Difficulty(step=Range(2, 3)))
    found = made.states[:, 0]
    return torch.cat((
        found[..., :2] / SIDE, torch.stack((found[..., 2].cos(), found[..., 2].sin()), 2) / 6), 2), made.labels


def relative(found: torch.Tensor) -> torch.Tensor:
    """States from the middle of the clip, which no class depends on."""
    return found - found.mean(1, keepdim=True)


def nearest(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """Shares of clips whose class, and whose motion, most of the nearest training clips have."""
    order = torch.cdist(test.flatten(1), train.flatten(1)).topk(NEIGHBOURS, largest=False).indices
    votes = torch.nn.functional.one_hot(labels[order], len(CLASSES)).sum(1)
    motion = votes.unflatten(1, (-1, 2)).sum(2).argmax(1)
    return (votes.argmax(1) == true).double().mean().item(), (motion == true // 2).double().mean().item()


def by_place(found: torch.Tensor) -> torch.Tensor:
    """The frames of each clip in an order that only depends on their set."""
    rank = (found * torch.tensor([1., 1.37, .71, .53])).sum(2)
    return torch.gather(found, 1, rank.argsort(1)[..., None].expand_as(found))


def test_classes_of_a_pair_are_the_same_states_in_the_opposite_order():
    found = paths(ALL, STEP, 8)
    torch.testing.assert_close(found[0::2], found[1::2].flip(1), rtol=0, atol=0)
    assert len({tuple(path.flatten().tolist()) for path in found}) == len(CLASSES)


def test_the_last_motions_show_the_same_places_and_once_has_the_same_neighbours_both_ways():
    found = paths(ALL, STEP, 8)[8:, :, :2]
    places = [sorted(map(tuple, path.tolist())) for path in found]
    assert places[0] == places[1] == places[2] == places[3]
    once = [sorted(zip(map(tuple, path[:-1].tolist()), map(tuple, path[1:].tolist()))) for path in found[:2]]
    assert once[0] == once[1]


@pytest.mark.parametrize('num_frames', [8, 16])
def test_place_and_angle_are_uniform_in_every_frame_of_every_class(num_frames):
    """The characteristic numbers of a uniform distribution on a circle are zero; their standard error is known."""
    made = plan(6000, (3,), num_frames)
    angles = made.states[:, 0] * 2 * torch.pi / torch.tensor([SIDE, SIDE, 2 * torch.pi])
    for label in range(len(CLASSES)):
        mine = angles[made.labels == label]
        for harmonic in (1, 2):
            mean = torch.exp(1j * harmonic * mine).mean(0).abs()
            assert (mean < 4 / len(mine) ** .5).all()


def test_visibility_and_shapes_do_not_depend_on_the_class():
    made = plan(6000, (4,))
    assert (made.shapes[:, 0] == 0).all() and (made.shapes[:, 1:] > 0).all()
    seen, labels = made.opacity[:, 0].mean(1), made.labels
    for label in range(len(CLASSES)):
        mine = labels == label
        assert abs(seen[mine].mean() - seen.mean()) < 4 * seen.std() / mine.sum() ** .5


def test_distractors_know_nothing_of_the_label():
    """What they do is told by their displacement over the clip; it is as likely with each class."""
    made = plan(6000, (5,))
    way = (made.states[:, 1, -1] - made.states[:, 1, 0])[:, :2]
    right = (way[:, 0] > 5).float()
    for label in range(len(CLASSES)):
        mine = made.labels == label
        assert abs(right[mine].mean() - right.mean()) < 4 * right.std() / mine.sum() ** .5


@pytest.mark.parametrize('frame', [0, 3, 7])
def test_one_frame_says_nothing_even_if_its_time_is_known(frame):
    train, labels = states(COUNT, 0)
    test, true = states(COUNT, 1)
    # on the torus: a coordinate as a point on a circle
    circle = [torch.cat(((x[:, frame, :2] * 2 * torch.pi).cos(), (x[:, frame, :2] * 2 * torch.pi).sin(),
                         x[:, frame, 2:]), 1) for x in (train, test)]
    right, _ = nearest(circle[0], labels, circle[1], true)
    assert abs(right - LEVELS.frame) < .035


def test_an_ideal_classifier_of_the_frame_set_reaches_the_level_of_theory_and_no_more():
    train, labels = states(COUNT, 0)
    test, true = states(COUNT, 1)
    right, motion = nearest(by_place(relative(train)), labels, by_place(relative(test)), true)
    assert motion > .7  # it is no weak classifier: it knows the motion by its frames
    assert abs(right - motion * LEVELS.frames) < .05  # which class of the pair is a coin's toss
    ordered, _ = nearest(relative(train), labels, relative(test), true)
    assert ordered > .9  # and the order is all that was missing


def test_clips_follow_from_their_arguments():
    one, again, other = (clips(4, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one.clips, again.clips) and torch.equal(one.labels, again.labels)
    assert not torch.equal(one.clips, other.clips)


def test_what_is_drawn_is_what_was_planned():
    """The middle of the actor's mask is its place, if nothing lies over it."""
    alone = Difficulty(clutter=Range(0, 0), share=Range(1, 1))
    made, planned = clips(20, (6,), difficulty=alone), plan(20, (6,), difficulty=alone)
    assert torch.equal(made.labels, planned.labels)
    wave = torch.exp(2j * torch.pi * (torch.arange(SIDE) + .5) / SIDE)
    for axis, line in ((0, made.actor.sum(2)), (1, made.actor.sum(3))):
        place = (line * wave).sum(2).angle() * SIDE / (2 * torch.pi)
        error = (place - planned.states[:, 0, :, axis] + SIDE / 2) % SIDE - SIDE / 2
        assert error.abs().max() < .3


def test_16_frames_show_the_same_clip():
    eight, sixteen = plan(5, (8,)), plan(5, (8,), 16)
    assert torch.equal(eight.labels, sixteen.labels) and torch.equal(eight.shapes, sixteen.shapes)
    every = Difficulty(share=Range(1, 1))
    few, many = clips(5, (8,), difficulty=every), clips(5, (8,), num_frames=16, difficulty=every)
    ground = (few.things[:, 0] == 0) & (many.things[:, 0] == 0)
    assert ground.float().mean() > .3
    assert torch.equal(few.clips[:, 0].movedim(1, -1)[ground], many.clips[:, 0].movedim(1, -1)[ground])


@pytest.mark.parametrize('side', [40, 56])
def test_a_larger_picture_shows_the_same(side):
    small, large = clips(3, (5,), side=40), clips(3, (5,), side=side)
    assert large.clips.shape == (3, 8, 3, side, side) and torch.equal(small.labels, large.labels)
    for a, b in ((small.actor, large.actor), (small.things, large.things)):
        assert abs(a.mean() - b.mean()) < .02


def test_the_masks_are_where_the_things_are():
    made = clips(6, (9,), difficulty=Difficulty(clutter=Range(1, 1), share=Range(1, 1)))
    assert (made.actor <= made.things + 1e-6).all()
    empty = clips(6, (9,), difficulty=Difficulty(clutter=Range(0, 0), share=Range(0, 0)))
    assert empty.actor.sum() == 0 and empty.things.sum() == 0
    # the same ground: pixels differ where the mask of things says so
    changed = (made.clips.float() - empty.clips.float()).abs().amax(2) > 6
    assert (changed & (made.things == 0)).sum() == 0


def test_motions_and_classes_are_named():
    assert len(CLASSES) == 2 * len(MOTIONS) == len(set(CLASSES))
