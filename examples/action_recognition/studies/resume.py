"""Kill a training at random moments, and compare it with one that nobody killed.

    python -m examples.action_recognition.studies.resume --kills 20 --out benchmarks/results/training-resume.json

The training has all that a resumed run could lose: AdamW, dropout, a warm-up, accumulated gradients, averaged weights,
random crops and flips, processes that read videos, and checkpoints within an epoch.
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from benchmarks.machine import describe, positive, result_file, write

from ..checkpoint import LAST, load
from .killing import KINDS, Kill, kill_once, losses, run_to_the_end
from .small import command, difference, environment, flags, make_videos, table

MORE = (
    '--optimizer', 'adamw', '--lr', '.003', '--dropout', '.5', '--warmup-epochs', '1.5', '--schedule', 'cosine',
    '--accumulate', '2', '--batch-size', '2', '--ema', '.9', '--flip', 'same', '--label-smoothing', '.1',
    '--workers', '2', '--save-every', '2', '--epochs', '10', '--val-every', '5')
VIDEOS, UPDATES = 12, 60  # of a class; of the run


def plan(count: int, seed: int) -> List[Kill]:
    """Kills in the order of their updates, each kind about as often as the others."""
    draw = random.Random(seed)
    updates = sorted(draw.randint(1, UPDATES - 10) for _ in range(count))
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(count)]
    draw.shuffle(kinds)
    seconds = {'moment': .5, 'start': 8.}
    return [Kill(update, kind, round(draw.uniform(0, seconds.get(kind, 0.)), 3))
            for update, kind in zip(updates, kinds)]


def study(count: int, seed: int, out: Path) -> bool:
    """Do it, and write what comes of it as it comes. Returns whether all was equal."""
    results: Dict[str, Any] = {
        **describe('av', 'numpy'), 'seed': seed, 'updates': UPDATES, 'flags': list(MORE), 'kinds': KINDS, 'kills': []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lists = make_videos(folder / 'train', VIDEOS), make_videos(folder / 'val', 3)
        whole, killed = folder / 'whole', folder / 'killed'
        run_to_the_end(command(flags(*lists, whole, *MORE)), environment())
        want = losses(whole)
        assert list(want) == list(range(1, UPDATES + 1))
        write(out, results)
        again = command(flags(*lists, killed, *MORE))
        for kill in plan(count, seed):
            left = kill_once(again, killed, kill, environment())
            found = losses(killed) if (killed / 'log.csv').exists() else {}
            results['kills'].append({
                **kill._asdict(), 'killed_at': left.update,
                'checkpoint': load(killed / LAST)['progress']['update'] if (killed / LAST).exists() else None,
                'part_file_left': any(killed.glob('*.part')),
                'equal': found == {update: want[update] for update in found}})
            if kill.kind == 'child':
                results['kills'][-1]['said'] = left.output.splitlines()[-1]
            write(out, results)
            print(results['kills'][-1], flush=True)
        run_to_the_end(again, environment())
        results['equal'] = {
            'losses': losses(killed) == want,
            'validation': table(killed / 'validation.csv') == table(whole / 'validation.csv'),
            **{file: difference(killed / file, whole / file) is None for file in (LAST, 'best.pt')}}
        results['differs_at'] = difference(killed / LAST, whole / LAST)
        results['last_loss'] = want[UPDATES]
        results['part_files_left_at_the_end'] = any(killed.glob('*.part'))
    write(out, results)
    print(results['equal'])
    return all(results['equal'].values()) and all(kill['equal'] for kill in results['kills'])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--kills', type=positive, default=20, help='how often the training is killed (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    args = parser.parse_args()
    return 0 if study(args.kills, args.seed, args.out) else 1


if __name__ == '__main__':
    sys.exit(main())
