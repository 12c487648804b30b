"""The command ``python -m benchmarks.gpu``: a rehearsal of all of it, and what becomes of steps that go wrong."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from benchmarks import machine, report
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import check as checking
from benchmarks.gpu import outcomes, process, steps
from benchmarks.gpu.steps import Step

ROOT = Path(__file__).parents[2]


def rehearse(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / 'tests/fake_cuda.py'), '-m', *map(str, args)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def load(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize('names', [
    pytest.param(('about', 'small', 'kernels', 'training'), id='few'),
    pytest.param(tuple(step.name for step in steps.STEPS), id='all', marks=[
        pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_the_rehearsal_runs_every_step_and_a_second_call_has_nothing_left_to_do(names, tmp_path):
    """The command, step by step in processes of their own, on a GPU that is none."""
    out, tests = tmp_path / 'out', tmp_path / 'test_it.py'
    out.mkdir()
    tests.write_text('import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip("not here")\n')
    args = ['benchmarks.gpu', '--size', 64, '--frames', 2, '--rounds', 2, '--number', 1, '--tests', tests, '--out', out,
            '--steps', *names]
    done = rehearse(*args)
    logs = {path.name: path.read_text()[-2000:] for path in (out / 'gpu/logs').glob('*.log')}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    lines = done.stdout.splitlines()
    assert [line.partition(':')[0] for line in lines[:len(names)]] == list(names)
    assert all(': ok in ' in line for line in lines[:len(names)]) and lines[-1] == 'nothing is left to do'
    assert 'were left as they are' in lines[len(names)]
    written = {path.relative_to(out).as_posix(): load(path) for path in out.rglob('*.json')}
    everything = len(names) == len(steps.STEPS)
    assert {name for name in written if 'ahead' not in name} == {
        'runtime-cuda.json', 'gpu/about.json', 'gpu/small.json', 'gpu/kernels.json', 'gpu/state.json',
        *(['runtime-cuda-bf16.json', 'gpu/check.json'] if everything else [])}
    # each says what it is, and what to run
    for name, results in written.items():
        assert name == 'gpu/state.json' or (
            results['rehearsal'] and 'rehearsal' in results['gpu']
            and results['command'] == 'python -m benchmarks.gpu')
    assert written['gpu/about.json']['capability'] == [9, 0] and written['gpu/small.json']['complete']
    kernels = written['gpu/kernels.json']
    assert {row['kernel'] for row in kernels['kernels']} >= {'_pool_kernel', '_gate_kernel', '_mix_kernel'}
    assert kernels['done'] == ['cme_tim 64, batch 1, fp16'] and not kernels['failed']
    assert all(0 < row['floor_us'] and 0 < row['cached_us'] for row in kernels['kernels'])
    entries = [entry for name in written if name.startswith('runtime') for unit in written[name]['units']
               for entry in unit['entries']]
    assert entries and not [entry for entry in entries if 'missing' in entry]
    if everything:
        assert [written['gpu/check.json'][key] for key in ('passed', 'failed', 'skipped')] == [1, 0, 1]
        assert len(entries) > 60 and {entry['dtype'] for entry in entries} == {'fp16', 'bf16', 'fp32', 'tf32'}
        assert {entry['mode'] for entry in entries if entry['batch'] == 8} >= {'unfolded', 'graph', 'compiled-graph'}
    assert not list(out.glob('*.journal'))
    # again
    before = {path: path.read_bytes() for path in out.rglob('*.json')}
    again = rehearse(*args)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == 'nothing is left to do'
    assert not [line for line in again.stdout.splitlines() if ' in ' in line]
    assert before == {path: path.read_bytes() for path in out.rglob('*.json')}
    # no page shows it
    results = tmp_path / 'tree/benchmarks/results'
    results.mkdir(parents=True)
    (results / 'runtime-cuda.json').write_bytes((out / 'runtime-cuda.json').read_bytes())
    with pytest.raises(ValueError, match=r"runtime-cuda\.json is a rehearsal's: it measured nothing"):
        report.pages(tmp_path / 'tree')


def test_a_rehearsal_may_not_write_to_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['gpu', '--minutes', '.1'])
    with fake_cuda(), pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert 'argument --out: a rehearsal measures nothing, and may not write to results' in capsys.readouterr().err


# Steps that go wrong: made up, so that they are quick

def step(name, code, seconds=20., done=None):
    """A step that runs some Python; it is done when its file is there."""
    def jobs(place, seconds):
        command = [sys.executable, '-c', code.replace('DONE', repr(str(place.folder / name)))]
        return [process.Job(name, command, seconds)]
    return Step(name, seconds, jobs, lambda place: not (place.folder / name).exists())


GOOD = 'open(DONE, "w").close()'
BAD = 'raise SystemExit(3)'
HANGS = 'import time; time.sleep(60)'
# what it started has to end as well
STUBBORN = ('import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '
            'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); '
            'open(DONE + ".pid", "w").write(str(child.pid)); time.sleep(60)')


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(process, 'GRACE', .2)
    monkeypatch.setattr(command, 'GRACE', 0)
    monkeypatch.setattr(command, 'LEAST', 1)
    monkeypatch.chdir(tmp_path)

    def call(*made, args=()):
        monkeypatch.setattr(command, 'STEPS', made)
        monkeypatch.setattr(sys, 'argv', ['gpu', '--out', str(tmp_path), *args])
        status = command.main()
        found = capsys.readouterr()
        return status, found.out.splitlines(), found.err
    return call


def test_a_step_that_fails_or_hangs_costs_the_others_nothing_and_comes_last_when_it_is_tried_again(call, tmp_path):
    bad, hangs, good, late = step('bad', BAD), step('hangs', HANGS, 1.), step('good', GOOD), step('late', GOOD)
    status, lines, error = call(bad, hangs, good)
    assert status == 1 and 'see gpu/logs for bad, hangs' in error
    assert lines[0].startswith('bad: failed') and lines[1].startswith('hangs: stopped in 1 s')
    assert lines[2].startswith('good: ok') and lines[-1] == 'left: bad, hangs; run the command again'
    state = load(tmp_path / 'gpu/state.json')
    assert state['bad']['status'] == 3 and state['hangs']['status'] is None and not state['good']['left']
    _, lines, _ = call(bad, hangs, good, late)
    assert [line.partition(':')[0] for line in lines[:3]] == ['late', 'bad', 'hangs']
    call(bad, hangs, good, late)
    status, lines, _ = call(bad, hangs, good, late)  # three times are enough
    assert status == 1 and lines[0] == 'bad: it went wrong 3 times; remove state.json to try again'
    _, lines, _ = call(step('bad', GOOD), args=['--steps', 'bad'])
    assert lines[0].startswith('bad: it went wrong')
    (tmp_path / 'gpu/state.json').unlink()
    status, lines, _ = call(step('bad', GOOD), step('good', GOOD))
    assert status == 0 and lines[0].startswith('bad: ok') and lines[-1] == 'nothing is left to do'


def test_what_a_step_that_is_ended_had_started_ends_with_it(call, tmp_path):
    status, lines, _ = call(step('stubborn', STUBBORN, 2.))
    assert status == 1 and lines[0].startswith('stubborn: stopped')
    pid = int((tmp_path / 'gpu/stubborn.pid').read_text())
    for _ in range(50):
        state = Path(f'/proc/{pid}/stat')
        if not state.exists() or state.read_text().split()[2] == 'Z':
            return
        time.sleep(.1)
    raise AssertionError(f'process {pid} is still there')


def test_a_call_ends_in_time_and_the_next_goes_on(call, monkeypatch):
    monkeypatch.setattr(command, 'PAGES', 0)
    slow = step('slow', 'import time; time.sleep(2); ' + GOOD), step('next', GOOD)
    start = time.monotonic()
    _, lines, _ = call(*slow, args=['--minutes', str(1.5 / 60)])
    assert time.monotonic() - start < 4 and lines[0].startswith('slow: stopped')
    assert lines[-1] == 'left: slow, next; run the command again'
    _, lines, _ = call(*slow)
    assert [line.partition(':')[0] for line in lines[:2]] == ['next', 'slow'] and lines[-1] == 'nothing is left to do'


def test_helpers_of_a_step_run_beside_it_and_are_ended_with_their_own_time(tmp_path):
    jobs = [process.Job('own', [sys.executable, '-c', 'print("hello")'], 20),
            process.Job('helper', [sys.executable, '-c', HANGS], .5)]
    found = process.run(jobs, tmp_path, tmp_path, {})
    assert found['own'].how == 'ok' and found['helper'].how == 'stopped'
    assert (tmp_path / 'own.log').read_text() == 'hello\n'


@pytest.mark.parametrize(('args', 'words'), [
    (['--minutes', '0'], 'argument --minutes: must be more than 0, got 0'),
    (['--minutes', 'many'], 'argument --minutes: invalid float value'),
    (['--size', '32'], 'argument --size: must be 64 or more, got 32'),
    (['--frames', '0'], "argument --frames: must be a positive int, got '0'"),
    (['--out', 'no/such'], "argument --out: there is no folder 'no/such'"),
    (['--steps', 'all'], "argument --steps: invalid choice: 'all'"),
    ([], 'there is no CUDA device here')])
def test_wrong_arguments(args, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['gpu', *args])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err


# The steps themselves

def test_one_call_is_enough_up_to_table_7():
    before_training = [s.seconds for s in steps.STEPS[:[s.name for s in steps.STEPS].index('training')]]
    assert sum(before_training) + command.PAGES <= 9 * 60
    for s in steps.STEPS:  # the table says what the code has
        line = next(line for line in steps.__doc__.splitlines() if line.split(',')[0].split()[:1] == [s.name])
        assert s.name == 'rest' or f' {s.seconds:.0f} ' in line


def test_commands_name_no_path_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    place = steps.Place(ROOT / 'benchmarks/results')
    for s in steps.STEPS:
        for job in s.jobs(place, 100.):
            assert not [arg for arg in job.command[1:] if Path(arg).is_absolute()], job
            assert job.seconds == 100


def test_tests_are_written_down_one_by_one_and_go_on_where_they_were(tmp_path, monkeypatch):
    tests, out = tmp_path / 'test_it.py', tmp_path / 'check.json'
    tests.write_text('\n'.join([
        'import os', 'def test_a(): pass', 'def test_b(): assert 0, "no"', 'def test_c(): os._exit(9)']))
    monkeypatch.setattr(checking, 'PROCESSES', 0)
    monkeypatch.chdir(ROOT)

    def check():
        found = checking.check(out, 60, [str(tests)])
        machine.write(out, found)
        return found
    found = check()
    assert not found['complete'] and (found['passed'], found['failed']) == (1, 1) and found['status'] == 9
    assert found['failures'][0]['test'].endswith('test_b') and 'no' in found['failures'][0]['reason']
    tests.write_text(tests.read_text().replace('os._exit(9)', 'pass').replace('test_a(): pass', 'test_a(): 1/0'))
    found = check()
    assert (found['passed'], found['failed'], found['complete']) == (2, 1, False)  # it passed before: not run again
    found = check()
    assert found['complete'] and found['attempts'] == 2  # what fails twice, fails
    assert len(outcomes.read(out.with_suffix('.jsonl'))) == 3


def test_a_capture_that_fails_on_fake_cuda_fails_as_on_a_real_one():
    with fake_cuda(), pytest.raises(RuntimeError, match='not permitted when stream is capturing'):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(1).item()
    assert machine.REHEARSAL is None and not torch.cuda.Event.__module__.startswith('fake')
