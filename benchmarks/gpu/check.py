"""The tests of the kernels, with the GPU instead of Triton's interpreter.

Each test is written down as it ends, so a run that is cut off goes on where it was. What failed is tried once more: a
kernel that writes where it must not fails all tests behind it in its process.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import outcomes
from benchmarks.machine import read_json, result_file, write
from benchmarks.runtime.results import environment

TESTS = ('tests/ops', 'tests/test_deploy.py')
ATTEMPTS = 2
PROCESSES = 6
ONE = 60  # seconds of one test, most of them a compiler's


def check(out: Path, seconds: float, tests: list[str]) -> dict[str, Any]:
    """Run what is left of the tests, and say how all of them ended."""
    log, done = out.with_suffix('.jsonl'), out.with_suffix('.done')
    before = outcomes.read(log)
    done.write_text('\n'.join(name for name, entry in before.items() if entry['outcome'] != 'failed'))
    command = [
        sys.executable, '-m', 'pytest', '-q', '-p', 'benchmarks.gpu.outcomes', '-p', 'no:cacheprovider', '-m', '', '-n',
        str(PROCESSES), '-o', f'timeout={ONE}', '-o', 'timeout_method=thread', *tests]
    process = subprocess.Popen(command, env={**os.environ, outcomes.LOG: str(log), outcomes.DONE: str(done)})
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:  # processes of its own that hang are ended by who started this one
        status = None
        process.kill()
    done.unlink()
    return summary(out, log, status, tests)


def summary(out: Path, log: Path, status: int | None, tests: list[str]) -> dict[str, Any]:
    """How the tests ended, and whether any of them are left; statuses are pytest's: 5 is that none was collected."""
    entries = outcomes.read(log).values()
    ended = status in (0, 1) or (status == 5 and bool(entries))
    failed = [entry for entry in entries if entry['outcome'] == 'failed']
    attempts = (read_json(out) or {'attempts': 0})['attempts'] + ended
    return {
        **environment(), 'tests': list(tests), 'status': status, 'attempts': attempts,
        'complete': ended and (not failed or attempts >= ATTEMPTS),
        **{outcome: sum(entry['outcome'] == outcome for entry in entries)
           for outcome in ('passed', 'failed', 'skipped')},
        'seconds': round(sum(entry['seconds'] for entry in entries), 1),
        'failures': [{'test': entry['test'], 'reason': entry.get('reason', '')} for entry in failed]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True)
    parser.add_argument('--seconds', type=float, required=True, help='what has not ended by then is left to a next run')
    parser.add_argument('tests', nargs='*', default=list(TESTS))
    args = parser.parse_args()
    found = check(args.out, args.seconds, args.tests)
    write(args.out, found)
    print({key: found[key] for key in ('status', 'complete', 'passed', 'failed', 'skipped')})
    return 0 if found['status'] in (None, 0, 1, 5) else 1  # a test that failed is a result


if __name__ == '__main__':
    sys.exit(main())
