"""The clips of training and evaluation: where they are cut, that a clip's frames are alike, and what a flip does."""
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from cmr_layers.video import (
    ClipTransform,
    EvalTransform,
    TrainTransform,
    flip_table,
    normalize,
    read_clip,
    side_pairs,
)

av = pytest.importorskip('av')

SIDES = ['push left', 'wave', 'push right']
TABLE = (2, 1, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ramps(height, width, frames=2, step=1):
    """Frames whose channels are the row, the column and both, divided by step."""
    y, x = torch.meshgrid(torch.arange(height) // step, torch.arange(width) // step, indexing='ij')
    return torch.stack([y, x, (x + y) // 2]).to(torch.uint8).expand(frames, 3, height, width).contiguous()


def noise(height, width, frames=2):
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=seeded())


def box(clip, step=1):
    """Top, left, bottom and right of what a clip of ramps shows."""
    rows, columns = clip[0, 0, :, 0].tolist(), clip[0, 1, 0].tolist()
    return rows[0] * step, columns[0] * step, rows[-1] * step, columns[-1] * step


class TestTrainTransform:
    @pytest.mark.parametrize('shape, room', [((256, 272), (8, 12)), ((272, 256), (12, 8)), ((256, 256), (8, 8))])
    def test_13_places(self, shape, room):
        frames, transform, generator = ramps(*shape, step=2), TrainTransform(scales=(.875,)), seeded()
        found = Counter(box(transform(frames, 0, generator)[0], 2)[:2] for _ in range(1300))
        corners = {(i * room[0], j * room[1]) for i in range(5) for j in range(5) if (i + j) % 2 == 0}
        assert set(found) == {(2 * (top // 2), 2 * (left // 2)) for top, left in corners} and len(found) == 13
        assert all(60 < count < 150 for count in found.values())

    def test_10_sizes(self):
        frames, generator = ramps(256, 256), seeded()
        sides = torch.tensor([256, 224, 192, 168])
        found = Counter()
        for _ in range(400):
            top, left, bottom, right = box(TrainTransform()(frames, 0, generator)[0])
            found[tuple(int((sides - length - 1).abs().argmin()) for length in (bottom - top, right - left))] += 1
        assert set(found) == {(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1}
        assert all(15 < count < 75 for count in found.values())

    @pytest.mark.parametrize('shape', [(120, 300), (300, 120), (120, 120)])
    def test_the_aspect_is_kept(self, shape):
        """A square crop shows a square part, whatever the shape of the frames is."""
        frames, generator = ramps(*shape, step=2), seeded()
        for _ in range(20):
            top, left, bottom, right = box(TrainTransform(scales=(1,))(frames, 0, generator)[0], 2)
            assert abs(bottom - top - 119) <= 2 and abs(right - left - 119) <= 2

    @pytest.mark.parametrize('shape', [(5, 7), (300, 40), (224, 224), (1, 1), (100, 90), (257, 600)])
    def test_any_size(self, shape):
        for seed in range(5):
            clip, label = TrainTransform(64, 72)(noise(*shape), 3, seeded(seed))
            assert clip.shape == (2, 3, 64, 64) and clip.dtype == torch.uint8 and clip.is_contiguous() and label == 3

    def test_the_frames_of_a_clip_are_alike(self):
        frames, generator = noise(60, 80, 1).expand(5, 3, 60, 80), seeded()
        transform = TrainTransform(56, 64, flip=TABLE)
        for _ in range(20):
            clip, _ = transform(frames, 0, generator)
            assert all(torch.equal(clip[0], frame) for frame in clip)

    def test_a_frame_does_not_depend_on_the_others(self):
        frames, transform = noise(60, 80, 4), TrainTransform(56, 64)
        whole = transform(frames, 0, seeded(1))[0]
        assert all(torch.equal(transform(frames[i:i + 1], 0, seeded(1))[0][0], whole[i]) for i in range(4))

    def test_only_the_generator_decides(self):
        frames, transform, generator = noise(60, 80), TrainTransform(56, 64, flip=TABLE), seeded(3)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        first, second = transform(frames, 0, generator), transform(frames, 0, generator)
        again = pickle.loads(pickle.dumps(transform))(frames, 0, seeded(3))
        assert torch.equal(first[0], again[0]) and first[1] == again[1] and not torch.equal(first[0], second[0])
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())

    def test_flip(self):
        frames, plain, transform = noise(60, 80), TrainTransform(56, 64), TrainTransform(56, 64, flip=TABLE)
        mirrored = 0
        for seed in range(200):
            straight = plain(frames, 0, seeded(seed))
            clip, label = transform(frames, 0, seeded(seed))
            assert straight[1] == 0 and label in (0, 2)
            assert torch.equal(clip, straight[0] if label == 0 else straight[0].flip(-1))
            mirrored += label == 2
        assert 70 < mirrored < 130
        assert {transform(frames, 1, seeded(seed))[1] for seed in range(20)} == {1}

    def test_a_decoded_clip(self, clip30):
        frames = read_clip(clip30, 4).frames
        clip, _ = TrainTransform(32)(frames, 0, seeded())
        assert clip.shape == (4, 3, 32, 32)
        assert torch.equal(clip[..., 5, 5], frames[..., 5, 5])  # each of its frames is of one grey

    @pytest.mark.parametrize('arguments, message', [
        ({'size': 0}, 'size must be a positive int, got 0'),
        ({'short_side': 2.5}, 'short_side must be a positive int, got 2.5'),
        ({'scales': ()}, r'scales must be numbers in \(0, 1\], of a pixel or more of short_side=256, got \(\)'),
        ({'scales': (1.1,)}, r'scales must be numbers in \(0, 1\].* got \(1\.1,\)'),
        ({'scales': (1, .001)}, r'scales must be numbers in \(0, 1\].* got \(1, 0\.001\)'),
        ({'interpolation': 'cubic'}, "interpolation must be one of 'bilinear', 'bicubic', got 'cubic'"),
        ({'flip': (1, 2, 0)}, r'flip must be a table that two flips undo, got \(1, 2, 0\); wanted the table of flip_t'),
        ({'flip': (0, 2)}, r'flip must be a table that two flips undo, got \(0, 2\)'),
    ])
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TrainTransform(**arguments)

    @pytest.mark.parametrize('flip', [True, .5, ('push left', 'push right'), [(0, 1)]])
    def test_what_is_no_table(self, flip):
        with pytest.raises(TypeError, match=r'flip must be a table of labels, got .*; wanted the table of flip_table'):
            TrainTransform(flip=flip)

    @pytest.mark.parametrize('generator', [None, 0, random.Random(0)])
    def test_what_is_no_generator(self, generator):
        with pytest.raises(TypeError, match=r'generator must be a torch\.Generator, got'):
            TrainTransform()(noise(60, 80), 0, generator)

    @pytest.mark.parametrize('label', [3, -1])
    def test_a_label_without_an_entry(self, label):
        with pytest.raises(ValueError, match=f'label must be one of the 3 of the table of the flip, got {label}'):
            TrainTransform(flip=TABLE)(noise(60, 80), label, seeded())


class TestEvalTransform:
    def test_the_centre(self):
        clip = EvalTransform()(ramps(256, 352, step=2))
        assert clip.shape == (1, 2, 3, 224, 224) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert box(clip[0], 2) == (16, 64, 238, 286)

    @pytest.mark.parametrize('shape', [(120, 160), (161, 120), (256, 341), (480, 641), (57, 57), (8, 300)])
    def test_the_centre_is_that_of_one_clip(self, shape):
        frames = noise(*shape)
        assert torch.equal(EvalTransform(interpolation='bicubic')(frames)[0], ClipTransform().crop(frames))

    @pytest.mark.parametrize('shape, boxes', [
        ((256, 352), [(0, 0, 254, 254), (0, 48, 254, 302), (0, 96, 254, 350)]),
        ((352, 256), [(0, 0, 254, 254), (48, 0, 302, 254), (96, 0, 350, 254)]),
        ((256, 256), [(0, 0, 254, 254)] * 3),
    ])
    def test_three_crops(self, shape, boxes):
        clips = EvalTransform(256, crops=3)(ramps(*shape, step=2))
        assert clips.shape == (3, 2, 3, 256, 256) and [box(clip, 2) for clip in clips] == boxes

    def test_three_smaller_crops(self):
        clips = EvalTransform(224, crops=3)(ramps(256, 352, step=2))
        assert [box(clip, 2)[:2] for clip in clips] == [(16, 0), (16, 64), (16, 128)]
        frames = noise(60, 80)
        assert torch.equal(EvalTransform(56, 64, crops=3)(frames)[1], EvalTransform(56, 64)(frames)[0])

    @pytest.mark.parametrize('shape', [(5, 7), (300, 40), (1, 1)])
    def test_any_size(self, shape):
        assert EvalTransform(64, 72, crops=3)(noise(*shape)).shape == (3, 2, 3, 64, 64)

    @pytest.mark.parametrize('arguments, message', [
        ({'size': 257}, 'size must be at most short_side=256, got 257'), ({'crops': 2}, 'crops must be 1 or 3, got 2'),
        ({'size': -1}, 'size must be a positive int, got -1'),
        ({'interpolation': 'area'}, "interpolation must be one of 'bilinear', 'bicubic', got 'area'"),
    ])
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            EvalTransform(**arguments)


@pytest.mark.parametrize('frames, got', [
    (torch.zeros(2, 3, 8, 8), r'torch\.float32 \[2, 3, 8, 8\]'),
    (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r'torch\.uint8 \[2, 8, 8, 3\]'),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), r'torch\.uint8 \[3, 8, 8\]'),
    (np.zeros((2, 3, 8, 8), np.uint8), 'ndarray'),
])
def test_wrong_frames(frames, got):
    message = rf'frames must be uint8 of shape \(T, 3, H, W\), got {got}'
    with pytest.raises(ValueError, match=message):
        TrainTransform()(frames, 0, seeded())
    with pytest.raises(ValueError, match=message):
        EvalTransform()(frames)


@pytest.mark.parametrize('shape', [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_no_frames(shape):
    for call in (lambda x: TrainTransform()(x, 0, seeded()), EvalTransform(), ClipTransform()):
        with pytest.raises(ValueError, match='frames must not be empty, got shape'):
            call(torch.zeros(shape, dtype=torch.uint8))


def test_a_clip_is_not_its_frames(clip30):
    with pytest.raises(ValueError, match='got Clip; pass its frames'):
        EvalTransform()(read_clip(clip30, 2))


class TestNormalize:
    def test_it_is_that_of_one_clip(self):
        frames, one = noise(60, 80), ClipTransform(size=32)
        assert torch.equal(normalize(one.crop(frames)[None], one.mean, one.std), one(frames))

    def test_more_dimensions(self):
        clips, mean, std = noise(4, 4, 6).view(2, 3, 3, 4, 4), (.1, .2, .3), (1, 2, 4)
        result = normalize(clips, mean, std)
        expected = (clips.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert result.dtype == torch.float32 and torch.allclose(result.double(), expected, atol=1e-6)
        assert torch.equal(normalize(clips, torch.tensor(mean), torch.tensor(std)), result)

    def test_clips_stay_as_they_are(self):
        clips = noise(4, 4)
        before = clips.clone()
        normalize(clips, (.5,) * 3, (.5,) * 3)
        assert torch.equal(clips, before)

    @pytest.mark.parametrize('clips', [torch.zeros(2, 3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8), np.zeros(3)])
    def test_wrong_clips(self, clips):
        with pytest.raises(ValueError, match=r'clips must be uint8 of shape \(\.\.\., 3, H, W\), got'):
            normalize(clips, (.5,) * 3, (.5,) * 3)

    @pytest.mark.parametrize('mean, std', [((.5,), (.5,) * 3), ((.5,) * 3, (.5,) * 4), (.5, (.5,) * 3)])
    def test_wrong_statistics(self, mean, std):
        with pytest.raises(ValueError, match=r'(mean|std) must hold 3 numbers, one a channel, got'):
            normalize(noise(4, 4), mean, std)

    def test_no_deviation(self):
        with pytest.raises(ValueError, match='std evaluated to zero'):
            normalize(noise(4, 4), (.5,) * 3, (1, 0, 1))


# names of Something-Something
TURNS = ['Turning the camera left while filming something', 'Turning the camera right while filming something']
PULLS = ['Pulling something from left to right', 'Pulling something from right to left']
OUT = 'Plugging something into something but pulling it right out as you remove your hand'
UPRIGHT = 'Putting something upright on the table'


class TestFlipTable:
    def test_names_without_sides(self):
        assert flip_table(['jump', UPRIGHT, OUT, 'lefty', 'brighten', 'downright']) == tuple(range(6))

    @pytest.mark.parametrize('name', [
        PULLS[0], TURNS[1], 'push_left', 'PushLeft', 'Swiping Right', 'TURN RIGHT', 'left-hand serve', 'step leftwards',
        'Turning Hand Clockwise', 'turn counter-clockwise', 'turn anticlockwise'])
    def test_names_with_sides(self, name):
        with pytest.raises(ValueError) as error:
            flip_table(['wave', name, 'jump'])
        assert str(error.value) == (
            f"1 of 3 classes name a side and are in no pair: {name!r}; wanted the pairs that take each other's place: "
            f"flip_table(classes, pairs=[({name!r}, 'its name in the mirror')]), or pairs=side_pairs(classes) to find "
            f'them; a class that stays the same is a pair with itself')

    def test_pairs(self):
        assert flip_table(SIDES, [('push left', 'push right')]) == TABLE
        assert flip_table(SIDES, [('push right', 'push left'), ('wave', 'wave')]) == TABLE
        assert flip_table(['both, left and right', 'wave'], [('both, left and right',) * 2]) == (0, 1)
        assert flip_table(['open', 'close'], [('open', 'close')]) == (1, 0)

    def test_numbers_tell_nothing(self):
        with pytest.raises(ValueError, match=r"numbers \('0', '1', '2', '3' and 2 more\), which do not tell"):
            flip_table([str(i) for i in range(6)])
        assert flip_table(['0', '1', '2'], []) == (0, 1, 2)
        assert flip_table(['0', '1', '2'], [('0', '2')]) == (2, 1, 0)

    @pytest.mark.parametrize('classes, pairs, message', [
        (SIDES, [('push left', 'push up')], "has 'push up', which is no class; wanted names of classes, such as"),
        (SIDES, [('push left', 'wave'), ('wave', 'push right')], "pairs has 'wave' twice, in .* and in .*; wanted one"),
        (SIDES, [], "2 of 3 classes name a side and are in no pair: 'push left', 'push right'; add them to pairs"),
        (SIDES, ['ab'], "pairs must hold pairs of names of classes, got 'ab'"),
        (SIDES, [('a', 'b', 'c')], 'pairs must hold pairs of names of classes, got'),
        (SIDES, [(0, 2)], 'has 0, which is no class'),
        ([*SIDES, 'wave'], None, "classes has two of the name 'wave'; wanted different names"),
        ('push left', None, "classes must be names, got 'push left'"),
    ])
    def test_wrong_pairs(self, classes, pairs, message):
        with pytest.raises(ValueError, match=message):
            flip_table(classes, pairs)

    def test_side_pairs(self):
        names = [OUT, *PULLS, UPRIGHT, *TURNS]
        assert side_pairs(names) == [tuple(PULLS), tuple(TURNS)]
        assert flip_table(names, side_pairs(names)) == (0, 2, 1, 3, 5, 4)
        assert side_pairs(['wave']) == []

    @pytest.mark.parametrize('a, b', [
        ('Swiping Left', 'Swiping Right'), ('push_left', 'push_right'), ('PushLeft', 'pushRight'),
        ('Turning Hand Clockwise', 'Turning Hand Counterclockwise'), ('turn clockwise', 'turn anti-clockwise'),
        ('step leftwards', 'step rightwards'), ('left hand, left foot', 'right hand, right foot')])
    def test_spellings(self, a, b):
        assert side_pairs([b, 'wave', a]) == [(b, a)]

    @pytest.mark.parametrize('names', [
        ['push left', 'wave'], ['push left to right', 'push right'], ['step leftward', 'step rightwards']])
    def test_a_side_without_the_other(self, names):
        with pytest.raises(ValueError, match=f"'{names[0]}' names a side, but no class has its mirrored name; wanted"):
            side_pairs(names)


def test_error_numbers_do_not_tell_sides():
    with pytest.raises(ValueError, match=r'classes are numbers .* which do not tell whether a class means a side'):
        side_pairs(['0', '1', '2'])


def test_compounds_of_sides_are_sides():
    for a, b in (('leftmost', 'rightmost'), ('left-handed', 'right-handed'), ('lefthanded', 'righthanded')):
        assert side_pairs([f'wave {a}', f'wave {b}']) == [(f'wave {a}', f'wave {b}')]
