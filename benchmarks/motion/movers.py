"""The procedural task: what does the bar do? See :mod:`.paths` for its classes and :mod:`.scene` for its clips."""
from functools import lru_cache

from benchmarks.motion.paths import CLASSES, LEVELS
from benchmarks.motion.scene import Difficulty, Range, clips
from benchmarks.motion.task import Clips, make_task, pairs

__all__ = ['MOVERS', 'SWEEPS', 'sweep']

#: Values of each knob at which networks are tested; the other knobs are as in training.
SWEEPS: dict[str, tuple[float, ...]] = {
    'step': (.5, 1., 1.5, 2.5, 3.5, 5.), 'clutter': (0., .25, .5, .75, 1.), 'share': (.4, .6, .8, 1.)}
SWEEP = 2  # a stream of random numbers; the task has 0 and 1


def _make(count: int, seed: tuple[int, ...], split: str, num_frames: int, side: int, device: str) -> Clips:
    return clips(count, seed, split, num_frames, side, device=device)[:2]


@lru_cache(maxsize=sum(map(len, SWEEPS.values())))
def sweep(knob: str, value: float, seed: int, count: int, num_frames: int, side: int, device: str) -> Clips:
    """Test clips with one knob at a value."""
    difficulty = Difficulty()._replace(**{knob: Range(value, value)})
    stream = (SWEEP, seed, list(SWEEPS).index(knob), SWEEPS[knob].index(value))
    return clips(count, stream, 'val', num_frames, side, difficulty, device=device)[:2]


MOVERS = make_task('movers', CLASSES, pairs(len(CLASSES)), LEVELS, _make)
