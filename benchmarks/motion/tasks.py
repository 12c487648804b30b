"""All tasks, by name."""
from benchmarks.motion.ego import EGO
from benchmarks.motion.mocap import MOCAP
from benchmarks.motion.movers import MOVERS
from benchmarks.motion.playback import PLAYBACK
from benchmarks.motion.task import Task

__all__ = ['TASKS']

TASKS: dict[str, Task] = {task.name: task for task in (MOVERS, PLAYBACK, EGO, MOCAP)}
