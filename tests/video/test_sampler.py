"""The order of an epoch, and how processes share it."""
import pytest

from cmr_layers.video.sampler import EpochSampler


def shares(size, world_size, train, epoch=0, start=0):
    samplers = [EpochSampler(size, train=train, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch, start)
    found = [list(sampler) for sampler in samplers]
    assert [len(share) for share in found] == [len(sampler) for sampler in samplers]
    return found


@pytest.mark.parametrize('size, world_size', [(1, 1), (7, 1), (7, 2), (8, 2), (3, 5), (100, 8)])
def test_evaluation_sees_each_video_once(size, world_size):
    found = shares(size, world_size, train=False)
    assert sorted(i for share in found for _, i in share) == list(range(size))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize('size, world_size', [(1, 1), (7, 1), (7, 2), (8, 2), (100, 8)])
def test_processes_train_on_equal_shares_of_one_permutation(size, world_size):
    found, (alone,) = shares(size, world_size, train=True, epoch=2), shares(size, 1, train=True, epoch=2)
    assert {len(share) for share in found} == {size // world_size}
    assert [at for step in zip(*found) for at in step] == alone[:size - size % world_size]
    assert sorted(i for _, i in alone) == list(range(size)) and {epoch for epoch, _ in alone} == {2}


def test_what_is_left_out_differs_from_epoch_to_epoch():
    left = [set(range(5)) - {i for share in shares(5, 2, True, epoch) for _, i in share} for epoch in range(50)]
    assert set.union(*left) == set(range(5)) and all(len(videos) == 1 for videos in left)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('start', [0, 1, 3, 4, 9])
def test_a_run_goes_on_within_an_epoch(start, train):
    for whole, rest in zip(shares(9, 2, train, 1), shares(9, 2, train, 1, start)):
        assert rest == whole[start:]


def test_epochs_and_seeds_give_other_orders():
    orders = set()
    for seed in (0, 1):
        sampler = EpochSampler(20, train=True, seed=seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            orders.add(tuple(i for _, i in sampler))
            assert list(sampler) == list(sampler)
    assert len(orders) == 10


def test_set_epoch_begins_at_the_first_video():
    sampler = EpochSampler(5, train=True)
    sampler.set_epoch(1, start=3)
    sampler.set_epoch(2)
    assert len(list(sampler)) == len(sampler) == 5


@pytest.mark.parametrize('kwargs, message', [
    ({'size': 0}, 'size'), ({'rank': 2, 'world_size': 2}, r'rank must be in \[0, world_size=2\), got 2'),
    ({'rank': -1}, 'rank'), ({'world_size': 0}, 'world_size'),
    ({'size': 1, 'world_size': 2}, r'size must be at least world_size=2 in training, got 1'),
])
def test_error_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{'size': 5, 'train': True, **kwargs})


def test_error_set_epoch():
    sampler = EpochSampler(5, train=True)
    with pytest.raises(ValueError, match='epoch must be an int >= 0, got -1'):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match='start must be an int >= 0, got -2'):
        sampler.set_epoch(0, -2)
