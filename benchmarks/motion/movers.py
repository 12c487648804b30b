"""The procedural task: what does the bar do? See :mod:`.paths` for its classes and :mod:`.scene` for its clips."""
from collections.abc import Iterator
from functools import cache

from benchmarks.motion.paths import CLASSES, LEVELS
from benchmarks.motion.scene import Difficulty, Range, clips
from benchmarks.motion.task import Clips, Task, pairs

__all__ = ['SWEEPS', 'MOVERS', 'tests', 'train']

#: Values of each knob at which networks are tested; the other knobs are as in training.
SWEEPS: dict[str, tuple[float, ...]] = {
    'step': (.5, 1., 1.5, 2.5, 3.5, 5.), 'clutter': (0., .25, .5, .75, 1.), 'share': (.4, .6, .8, 1.)}
TRAIN, TEST, SWEEP = 1, 2, 3  # streams of random numbers


def train(seed: int, batch: int, num_frames: int, side: int, device: str) -> Iterator[Clips]:
    """Batches without end; no clip comes twice."""
    i = 0
    while True:
        yield clips(batch, (TRAIN, seed, i), 'train', num_frames, side, device=device)[:2]
        i += 1


@cache
def tests(count: int, num_frames: int, side: int, device: str) -> Clips:
    """Test clips, the same for all rows and seeds: of photographs that no training clip shows."""
    return clips(count, (TEST,), 'val', num_frames, side, device=device)[:2]


@cache
def sweep(knob: str, value: float, count: int, num_frames: int, side: int, device: str) -> Clips:
    """Test clips with one knob at a value."""
    difficulty = Difficulty()._replace(**{knob: Range(value, value)})
    stream = (SWEEP, list(SWEEPS).index(knob), SWEEPS[knob].index(value))
    return clips(count, stream, 'val', num_frames, side, difficulty, device=device)[:2]


MOVERS = Task('movers', CLASSES, pairs(len(CLASSES)), LEVELS, train, tests)
