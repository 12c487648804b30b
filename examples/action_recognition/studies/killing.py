"""Run a command, kill it with SIGKILL at a given update or moment, and run it again until it ends by itself."""
import csv
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

__all__ = ['KINDS', 'Kill', 'kill_and_resume', 'kill_once', 'losses', 'run_to_the_end', 'updates_done']

#: What is killed, and when.
KINDS = {
    'update': 'all processes, as soon as the log has the update',
    'moment': 'all processes, some seconds after the log has the update',
    'saving': 'all processes, while a checkpoint is written after the log has the update',
    'start': 'all processes, some seconds after the start',
    'main': 'the training process alone, as soon as the log has the update',
    'child': 'one of its child processes, as soon as the log has the update',
}


class Kill(NamedTuple):
    """A kill of one of the KINDS, at an update of the log, after some seconds."""
    update: int
    kind: str = 'update'
    seconds: float = 0.


class Killed(NamedTuple):
    """What was left: the update that the log had come to, and what the command had printed."""
    update: int
    output: str


def losses(run: Path) -> Dict[int, float]:
    """Loss by update, from the log of a run that writes each update."""
    with open(run / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    found = {int(row['update']): float(row['loss']) for row in rows}
    assert len(found) == len(rows), 'the log has an update twice'
    return found


def updates_done(run: Path) -> int:
    """The last update in the log, 0 if there is none yet."""
    try:
        lines = (run / 'log.csv').read_text().splitlines()
    except FileNotFoundError:
        return 0
    number = lines[-1].split(',')[0] if lines else ''
    return int(number) if number.isdigit() else 0


def kill_once(
        command: Sequence[str], run: Path, kill: Kill, env: Optional[Dict[str, str]] = None, timeout: float = 600,
) -> Killed:
    """Start a command and kill it once.

    Raises:
        RuntimeError: It ended by itself before, or it did not end after.
    """
    with tempfile.TemporaryFile('w+') as output, subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process:
        def read() -> str:
            output.seek(0)
            return output.read()
        end = time.monotonic() + timeout
        try:
            while not _is_time(kill, run):
                if process.poll() is not None:
                    raise RuntimeError(f'ended by itself with {process.returncode}: {read()[-2000:]}')
                if time.monotonic() > end:
                    raise RuntimeError(f'did not come to {kill} in {timeout} s')
                time.sleep(.001)
            time.sleep(kill.seconds)
            if process.poll() is not None:
                raise RuntimeError(f'ended by itself with {process.returncode} before {kill}: {read()[-2000:]}')
            if kill.kind == 'child':
                os.kill(random.choice(_children(process.pid)), signal.SIGKILL)
            elif kill.kind == 'main':
                os.kill(process.pid, signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)  # not torchrun's children: each has a session of its own
            process.wait(60)
            _wait_until_gone(process.pid)
        except BaseException:
            if _lives(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return Killed(updates_done(run), read())


def run_to_the_end(command: Sequence[str], env: Optional[Dict[str, str]] = None, timeout: float = 600) -> str:
    """Run a command that has to succeed. Returns what it printed."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f'ended with {done.returncode}: {done.stdout[-2000:]}')
    return done.stdout


def kill_and_resume(
        command: Sequence[str], run: Path, updates: Sequence[int], env: Optional[Dict[str, str]] = None,
        timeout: float = 600,
) -> List[int]:
    """Kill a training once at or after each of some updates, then let it end.

    Args:
        command: The command, which goes on where it was interrupted.
        run: Folder of the run.
        updates: Ascending updates.
        env: Its environment.
        timeout: Seconds for each start.

    Returns:
        The update that the log had reached at each kill.

    Raises:
        RuntimeError: The command failed by itself, or ended before it was killed.
    """
    killed = [kill_once(command, run, Kill(update), env, timeout).update for update in updates]
    run_to_the_end(command, env, timeout)
    return killed


def _is_time(kill: Kill, run: Path) -> bool:
    if kill.kind == 'start':
        return True
    if updates_done(run) < kill.update:
        return False
    return kill.kind != 'saving' or any(run.glob('*.pt.part'))


def _children(process: int) -> List[int]:
    return [int(child) for child in Path(f'/proc/{process}/task/{process}/children').read_text().split()]


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until_gone(group: int, seconds: float = 60) -> None:
    """Children whose parent was killed notice it within seconds."""
    end = time.monotonic() + seconds
    while _lives(group):
        if time.monotonic() > end:
            raise RuntimeError(f'processes of the group {group} still live {seconds} s after the kill')
        time.sleep(.05)
