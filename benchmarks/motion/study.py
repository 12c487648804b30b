"""Which runs there are, side by side on a machine, and the file of their results."""
import json
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, read_json, results_at, write
from benchmarks.motion.processes import processes
from benchmarks.motion.results import KEYS, right
from benchmarks.motion.rows import ROWS
from benchmarks.motion.run import image_weights, run
from benchmarks.motion.size import SIZES
from benchmarks.motion.tasks import TASKS

__all__ = ['Key', 'save', 'study']

Key = tuple[str, str, int]  # task, row, seed


def _prepare(task: str, size: str) -> None:
    """Record or decode what a task has."""
    chosen = SIZES[size]
    next(TASKS[task].train(0, 1, 8, chosen.side, chosen.device))
    TASKS[task].test(0, 1, 8, chosen.side, chosen.device)


def _image(folder: Path, kind: str, seed: int, size: str) -> None:
    image_weights(folder, kind, SIZES[size], seed)


def _within(results: dict[str, Any], left: list[Key], jobs: int, minutes: float) -> int:
    """How many runs can begin within the time, by the longest so far."""
    longest = max((found['seconds'] for found in results['runs']), default=0.)
    return len(left) if minutes == float('inf') else max(1, int(jobs * 60 * minutes / max(longest, 30)))


def _run(folder: Path, key: Key, size: str) -> dict[str, Any]:
    task, row, seed = key
    return {**run(folder, row, seed, SIZES[size], TASKS[task]), **_where(size)}


def _where(size: str) -> dict[str, Any]:
    about = describe()
    return {'machine': about['machine'] if SIZES[size].device == 'cpu' else about['gpu'], 'date': about['date'][:10],
            'torch': about['versions']['torch']}


def as_dict(value: Any) -> Any:
    """A named tuple, and those in it, by name."""
    return {name: as_dict(part) for name, part in value._asdict().items()} if hasattr(value, '_asdict') else value


def key_of(found: dict[str, Any]) -> Key:
    return found['task'], found['row'], found['seed']


def save(path: Path, results: dict[str, Any]) -> None:
    """The result file, a line for each run."""
    write(path, {**results, 'runs': sorted(results['runs'], key=key_of)}, lines='runs')


def _check(results: dict[str, Any], left: list[Key]) -> None:
    """Rows of a seed are compared, so they have to be of one machine: another one rounds otherwise."""
    here, seeds = _where(results['size']), {seed for *_, seed in left}
    for found in results['runs']:
        there = {name: found[name] for name in ('machine', 'torch')}
        if found['seed'] in seeds and there != {name: here[name] for name in there}:
            raise ValueError(f'--seeds must be such as have no runs of another machine or PyTorch, got '
                             f'{found["seed"]}, which has runs of {there["machine"]!r} with {there["torch"]}; this is '
                             f'{here["machine"]!r} with {here["torch"]}')


def _append(results: dict[str, Any], made: dict[str, Any]) -> None:
    """Add a run, if it can be compared with those of its seed: they began with one image network, and saw one test."""
    row = ROWS[made['row']]
    for found in results['runs']:
        if found['seed'] != made['seed']:
            continue
        other = ROWS[found['row']]
        same = {'start': other.image == row.image,
                'clips': (found['task'], other.num_frames) == (made['task'], row.num_frames)}
        for name, wanted in (('start', '--folder must have the image network that other runs began with'),
                             ('clips', '--out must have runs of the same test clips')):
            if same[name] and len({found.get(name), made.get(name)} - {None}) > 1:  # older runs have none
                raise ValueError(f'{wanted}, but of seed {made["seed"]} row {found["row"]} has {found[name]} and row '
                                 f'{made["row"]} has {made[name]}')
    results['runs'].append(made)


def _merge(results: dict[str, Any], written: dict[str, Any] | None) -> None:
    """Add the runs and commands that a file has and these results have not."""
    mine = {key_of(found) for found in results['runs']}
    for found in (written or {'runs': []})['runs']:
        if key_of(found) not in mine:
            _append(results, found)
    results['commands'] += [
        each for each in (written or {}).get('commands', []) if each not in results['commands']]


def study(
        out: Path, folder: Path, keys: Iterable[Key], size: str, jobs: int = 1, minutes: float = float('inf'),
) -> list[Key]:
    """Do the runs that ``out`` does not have, and write each there when it ends.

    Args:
        out: Result file.
        folder: For image networks and trained networks.
        keys: The runs, in the order in which they are begun.
        size: Its name.
        jobs: Runs side by side, each on one thread.
        minutes: No run begins that would end later, as long as the longest so far took.

    Returns:
        The runs that are left.

    Raises:
        ValueError: ``out`` is no result file of a study, or one of another size, or has runs of one of the seeds that
            can't be compared with those that are made here.
    """
    settings = json.loads(json.dumps(as_dict(SIZES[size])))
    now = {**describe('numpy', 'scikit-image'), 'size': size, 'settings': settings, 'runs': []}
    try:
        results = results_at(out, *KEYS) or now
    except ValueError as error:
        raise ValueError(f'--out {error}') from None
    if results['settings'] != settings:
        other = {name: value for name, value in results['settings'].items() if value != settings.get(name)}
        wanted = {name: settings[name] for name in other if name in settings}
        raise ValueError(f'--out must be a new file or one of size {size!r}, with {wanted}, got {str(out)!r}, which is '
                         f'of size {results["size"]!r}, with {other}')
    done = {key_of(found) for found in results['runs']}
    left = [key for key in dict.fromkeys(keys) if key not in done]
    _check(results, left)
    if left and now['command'] not in results.setdefault('commands', [results['command']]):
        results['commands'].append(now['command'])
    folder.mkdir(parents=True, exist_ok=True)
    begin, longest = time.monotonic(), max((found['seconds'] for found in results['runs']), default=0.)
    running: dict[Future[dict[str, Any]], tuple[Key, float]] = {}
    if left:
        print(f'{len(left)} runs, {jobs} side by side; what they share comes first', flush=True)
    with processes(jobs) as pool:
        # what several runs share is there before them
        for ended in [pool.submit(_prepare, task, size) for task in dict.fromkeys(key[0] for key in left)]:
            ended.result()
        for ended in [pool.submit(_image, folder, *image, size) for image in dict.fromkeys(
                (ROWS[row].image, seed) for _, row, seed in left[:_within(results, left, jobs, minutes)])]:
            ended.result()
        while left or running:
            while left and len(running) < jobs and time.monotonic() - begin + longest < 60 * minutes:
                key = left.pop(0)
                running[pool.submit(_run, folder, key, size)] = key, time.monotonic()
            if not running:
                break
            for over in wait(running, return_when=FIRST_COMPLETED).done:
                key, since = running.pop(over)
                made = over.result()
                _append(results, made)
                longest = max(longest, time.monotonic() - since)
                _merge(results, read_json(out))  # another command may have written there
                save(out, results)
                print(*key, f'{right(made):.1%} right, {time.monotonic() - since:.0f} s', flush=True)
    return left
