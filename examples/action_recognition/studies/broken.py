"""Train and evaluate on a list some of whose files are broken: known before, or only once they are read.

    python -m examples.action_recognition.studies.broken --out benchmarks/results/training-broken.json
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from benchmarks.machine import describe, result_file, write
from cmr_layers.video.index import index_videos
from cmr_layers.video.lists import read_list

from .killing import run_to_the_end
from .small import command, environment, flags, make_videos, table

MORE = (
    '--lr', '.01', '--dropout', '0', '--workers', '2', '--batch-size', '4', '--epochs', '3', '--milestones', '2')
#: Of the first videos of a list, what is done to each.
BREAK = {
    0: 'missing', 1: 'empty', 2: 'cut in the middle', 3: 'its last tenth cut off', 4: 'a text', 5: 'a folder',
    6: 'no permission', 7: 'zeros from a third on'}
#: Damaged after the index was made, with the size and the time of before.
LATER = (8, 9)


def damage(path: Path, how: str) -> None:
    """Break a file."""
    content = path.read_bytes()
    size = len(content)
    if how == 'missing':
        path.unlink()
    elif how == 'a folder':
        path.unlink()
        path.mkdir()
    elif how == 'no permission':
        path.chmod(0)
    else:
        path.write_bytes({
            'empty': b'', 'cut in the middle': content[:size // 2], 'its last tenth cut off': content[:-size // 10],
            'a text': b'This is no video.\n' * 50, 'zeros from a third on': content[:size // 3].ljust(size, b'\0'),
        }[how])


def study(out: Path) -> bool:
    """Do it. Returns whether training and evaluation counted what the files are."""
    results: Dict[str, Any] = {
        **describe('av', 'numpy'), 'flags': list(MORE), 'root': os.geteuid() == 0,
        'note': 'root reads a file without permission all the same' if os.geteuid() == 0 else ''}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lists = [make_videos(folder / part, 12) for part in ('train', 'val')]
        for file in lists:
            for i, how in BREAK.items():
                damage(file.parent / f'{i:03d}.mp4', how)
        reasons: List[Dict[str, str]] = []
        damaged: Dict[str, str] = {}
        for file in lists:
            videos = read_list(file)
            index = index_videos(videos.paths, f'{file}.index', progress=False)
            reasons.append({Path(path).name: reason.replace(f'{name}/', '') for path, reason in index.broken.items()})
            results['index'] = str(index).replace(f'{name}/', '')
            damaged = {Path(path).name: reason.replace(f'{name}/', '') for path, reason in index.damaged.items()}
            for i in LATER:
                _later(file.parent / f'{i:03d}.mp4')
        assert reasons[0].keys() == reasons[1].keys()
        results['files'] = [
            {'file': f'{i:03d}.mp4', 'what': how, 'broken': reasons[0].get(f'{i:03d}.mp4'),
             'damaged': damaged.get(f'{i:03d}.mp4')} for i, how in BREAK.items()]
        results['files'] += [{'file': f'{i:03d}.mp4', 'what': 'zeros from a third on, after the index was made'}
                             for i in LATER]
        write(out, results)
        output = run_to_the_end(command(flags(lists[0], lists[1], folder / 'run', *MORE)), environment())
        log, validation = (table(folder / 'run' / file) for file in ('log.csv', 'validation.csv'))
        left = 24 - len(reasons[0])
        results['training'] = {
            'videos': 24, 'left_out': len(reasons[0]), 'videos_of_an_epoch': left,
            'clips_trained': 4 * len(log), 'drawn_anew': int(log[-1]['failures']),
            'said': [line for line in output.splitlines() if ' cannot be read' in line and line[0].isdigit()],
            'last_line': [line for line in output.splitlines() if 'did not decode' in line][-1]}
        results['evaluation'] = {
            'denominator': int(validation[-1]['count']), 'unreadable': int(validation[-1]['unreadable'])}
    write(out, results)
    print(results['index'], results['training'], results['evaluation'], sep='\n')
    return bool(results['evaluation'] == {'denominator': 24, 'unreadable': len(reasons[0]) + len(LATER)})


def _later(path: Path) -> None:
    before = path.stat()
    damage(path, 'zeros from a third on')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    return 0 if study(parser.parse_args().out) else 1


if __name__ == '__main__':
    sys.exit(main())
