"""What theory says on the task of moving things, and that clips keep to it."""
import pytest
import torch

from benchmarks.motion.paths import CLASSES, LEVELS, MOTIONS, paths
from benchmarks.motion.scene import SIDE, Difficulty, Range, clips

ALL = torch.arange(len(CLASSES))
STEP = torch.full((len(CLASSES),), 2.5)
# the shares below are of this many clips: their standard error is at most 1.3 points
COUNT, NEIGHBOURS = 1500, 15


def states(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The actor's true states, with a start as clips have it, (count, T, 4): x, y, and the angle's cosine and sine."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    steps = torch.rand(count, generator=generator) + 2
    found = paths(labels, steps, 8)
    found += torch.rand(count, 1, 3, generator=generator) * torch.tensor([SIDE, SIDE, 2 * torch.pi])
    return torch.cat((found[..., :2] / SIDE, torch.stack((found[..., 2].cos(), found[..., 2].sin()), 2) / 6), 2), labels


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


def test_the_last_pairs_are_the_same_places_and_each_has_the_same_neighbours_both_ways():
    found = paths(ALL, STEP, 8)[8:, :, :2]
    places = [sorted(map(tuple, path.tolist())) for path in found]
    assert places[0] == places[1] == places[2] == places[3]
    steps = [sorted(zip(map(tuple, path[:-1].tolist()), map(tuple, path[1:].tolist()))) for path in found]
    assert steps[0] == steps[1]


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


def test_place_and_visibility_do_not_depend_on_the_class():
    made = clips(1200, (7,), difficulty=Difficulty(clutter=Range(0, 0)))
    seen = (made.actor > .5).float()
    area = seen.sum((2, 3))
    centre = seen.sum(2) * torch.exp(2j * torch.pi * torch.arange(SIDE) / SIDE)
    for label in range(len(CLASSES)):
        mine = made.labels == label
        assert abs(area[mine].mean() - area.mean()) < .12 * area.mean()
        # places on a torus: were they not uniform, their mean on the circle would be away from 0
        for frame in (0, 7):
            there = centre[mine, frame].sum(1)
            assert (there / there.abs().clamp(min=1)).mean().abs() < .3


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
