"""Runs side by side, and what an interruption does to them."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.motion import search
from benchmarks.motion.processes import processes

ROOT = Path(__file__).parents[3]


def within(seconds, holds):
    """Whether something holds before the time is over."""
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(.1)
    return found


def gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def begun(folder, module):
    """A study of minutes, as the leader of its own group of processes."""
    command = subprocess.Popen(
        [sys.executable, '-m', module, '--out', 'motion.json'], cwd=folder, text=True, stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, start_new_session=True)
    assert within(60, (folder / 'motion-study-cpu').is_dir)
    return command


@pytest.mark.parametrize('module, send, seconds', [
    ('benchmarks.motion', os.kill, 1), ('benchmarks.motion', os.killpg, 8), ('benchmarks.motion.search', os.killpg, 1)])
def test_an_interruption_ends_at_once_and_leaves_no_process(tmp_path, module, send, seconds):
    """A terminal's Ctrl-C goes to all processes, while they import or while they run."""
    command = begun(tmp_path, module)
    time.sleep(seconds)
    send(command.pid, signal.SIGINT)
    errors = command.communicate(timeout=20)[1]
    assert command.returncode == 130
    assert errors == f'{module.split(".")[-1]}: interrupted; the same command goes on\n'
    assert within(10, lambda: gone(command.pid))


@pytest.mark.parametrize('number, seconds', [(signal.SIGKILL, .5), (signal.SIGTERM, 8)])
def test_the_end_of_a_command_ends_its_processes(tmp_path, number, seconds):
    command = begun(tmp_path, 'benchmarks.motion')
    time.sleep(seconds)
    command.send_signal(number)
    command.communicate(timeout=20)  # also reads until the last process has closed its end
    assert command.returncode == -number
    assert within(20, lambda: gone(command.pid))


def test_an_error_in_one_does_not_wait_for_another():
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError), processes(2) as pool:
        pool.submit(time.sleep, 600)
        pool.submit(divmod, 1, 0).result()
    assert time.monotonic() - begin < 60


def test_the_search_sees_as_many_clips_as_a_run_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'search.json'
    assert search.main(['--out', str(out), '--size', 'smoke']) == 0
    first = out.read_text()
    found = json.loads(first)['trials']
    assert {(run['batch'], run['lr'], run['seed']) for run in found} == {
        (*trial, seed) for trial in search.TRIALS for seed in search.SEEDS}
    assert {run['curve'][-1][0] for run in found} == {16}
    assert search.main(['--out', str(out), '--size', 'smoke']) == 0
    assert out.read_text() == first
    with pytest.raises(SystemExit):
        search.main(['--out', str(out)])
    assert "must be a new file or one of size 'cpu', got one of 'smoke'" in capsys.readouterr().err
