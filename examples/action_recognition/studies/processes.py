"""Train in two processes as in one of the same batch, and kill one of the two.

    python -m examples.action_recognition.studies.processes --out benchmarks/results/training-processes.json

The processes talk by gloo, on the CPU. Without dropout all runs draw the same numbers. The order of sums differs,
and training makes small differences larger. How much of that is to be expected, a control tells: one process whose
tensors lie in another memory format, which changes nothing but the order of sums either.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

from benchmarks.machine import describe, result_file, write

from ..checkpoint import LAST, load
from .killing import Kill, kill_once, losses, run_to_the_end
from .small import command, difference, environment, flags, make_videos, table

MORE = (
    '--sync-bn', '--lr', '.001', '--dropout', '0', '--milestones', '2', '--workers', '1', '--save-every', '2',
    '--epochs', '3', '--val-every', '3')
UPDATES, KILL = 18, Kill(9, 'child')
BATCH = 4  # clips of an update, of all processes
RUNS: List[Tuple[str, int, List[str]]] = [('one', 1, []), ('control', 1, ['--no-channels-last']), ('two', 2, [])]


def study(out: Path) -> bool:
    """Do it, and write what comes of it as it comes. Returns whether the killed run equals the other of its kind."""
    results: Dict[str, Any] = {
        **describe('av', 'numpy'), 'flags': list(MORE), 'batch': BATCH,
        'control': 'one process, no channels_last'}
    found: Dict[str, Dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lists = make_videos(folder / 'train', 12), make_videos(folder / 'val', 3)
        for run, count, more in RUNS:
            again = command(flags(*lists, folder / run, *MORE, '--batch-size', str(BATCH // count), *more), count)
            run_to_the_end(again, environment())
            found[run] = losses(folder / run)
            assert list(found[run]) == list(range(1, UPDATES + 1))
        results['losses'] = [
            {'update': update, **{run: found[run][update] for run in found}} for update in range(1, UPDATES + 1)]
        results['largest_relative_difference'] = {
            run: {'loss': max(abs(found[run][update] / loss - 1) for update, loss in found['one'].items()),
                  'weights': _distance(folder / 'one' / LAST, folder / run / LAST)} for run in ('control', 'two')}
        results['validation'] = {run: table(folder / run / 'validation.csv') for run in found}
        write(out, results)
        print(results['largest_relative_difference'], flush=True)
        again = command(flags(*lists, folder / 'killed', *MORE, '--batch-size', str(BATCH // 2)), 2)
        left = kill_once(again, folder / 'killed', KILL, environment())
        output = run_to_the_end(again, environment())
        results['killed'] = {
            'what': 'one of the two processes',
            'at_update': left.update,
            'went_on': next(line for line in output.splitlines() if line.startswith('goes on')),
            'losses_equal': losses(folder / 'killed') == found['two'],
            'weights_equal': difference(folder / 'killed' / LAST, folder / 'two' / LAST) is None}
    write(out, results)
    print(results['killed'])
    return bool(results['killed']['losses_equal'] and results['killed']['weights_equal'])


def _distance(*files: Path) -> float:
    """Norm of the difference of all weights of two checkpoints, relative to the norm of the weights."""
    one, two = (load(file)['state_dict'] for file in files)
    apart = sum(float((two[key].double() - one[key]).square().sum()) for key in one)
    return float((apart / sum(float(value.double().square().sum()) for value in one.values())) ** .5)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    return 0 if study(parser.parse_args().out) else 1


if __name__ == '__main__':
    sys.exit(main())
