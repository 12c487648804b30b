"""A training that is killed goes on to the same result; so do two processes, which are as one."""
import shutil

import pytest
import torch
from small_run import command, environment, flags, table, torchrun

from examples.action_recognition.checkpoint import load
from examples.action_recognition.studies.killing import Kill, kill_and_resume, kill_once, losses, run_to_the_end
from examples.action_recognition.train import main

MORE = ('--save-every', '2', '--epochs', '3', '--accumulate', '1', '--batch-size', '2', '--ema', '.5')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert main(flags(folder, *MORE, output='whole')) == 0
    return folder


def assert_same(state, want):
    """Two states are equal, bit for bit."""
    assert type(state) is type(want)
    if isinstance(want, torch.Tensor):
        assert torch.equal(state, want)
    elif isinstance(want, dict):
        assert state.keys() == want.keys()
        for key in want:
            assert_same(state[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(state) == len(want)
        for a, b in zip(state, want):
            assert_same(a, b)
    else:
        assert state == want


def test_a_run_that_is_killed_twice_equals_one_that_is_not(folder):
    killed = kill_and_resume(command(*flags(folder, *MORE, output='killed')), folder / 'killed', [3, 11], environment())
    assert len(killed) == 2 and killed[-1] < 18
    want = losses(folder / 'whole')
    assert list(want) == list(range(1, 19)) and losses(folder / 'killed') == want
    for name in ('last.pt', 'best.pt'):
        state, whole = (load(folder / run / name) for run in ('killed', 'whole'))
        for content in (state, whole):
            del content['config']['output']
        assert_same(state, whole)
    assert table(folder / 'killed' / 'validation.csv') == table(folder / 'whole' / 'validation.csv')


def test_a_run_that_is_at_its_end_only_says_so(folder, capsys):
    before = (folder / 'whole' / 'last.pt').read_bytes()
    assert main(flags(folder, *MORE, output='whole')) == 0
    assert 'is complete: 18 updates' in capsys.readouterr().out
    assert (folder / 'whole' / 'last.pt').read_bytes() == before


def test_a_copied_run_goes_on_elsewhere(folder, capsys):
    shutil.copytree(folder / 'whole', folder / 'copy')
    assert main(flags(folder, *MORE, output='copy')) == 0
    assert 'is complete: 18 updates' in capsys.readouterr().out


def test_a_run_that_was_killed_at_its_very_start_begins(folder, capsys):
    run = folder / 'begun'
    run.mkdir()
    (run / 'config.yaml.part').write_text('layout: fol')
    assert main(flags(folder, *MORE[:-4], '--batch-size', '12', output='begun')) == 0
    (run / 'classes.txt').unlink()  # it is written after the configuration
    assert main(flags(folder, *MORE[:-4], '--batch-size', '12', output='begun')) == 0
    assert (run / 'classes.txt').read_text() == (folder / 'whole' / 'classes.txt').read_text()
    assert not list(run.glob('*.part'))


def test_a_killed_reader_is_named(folder):
    args = flags(folder, *MORE, '--workers', '1', output='reader')
    output = kill_once(command(*args), folder / 'reader', Kill(2, 'child'), environment()).output
    assert 'train: a process that reads videos has ended' in output and 'Traceback' not in output


def test_two_processes_are_as_one_of_the_same_batch_and_go_on_when_one_is_killed(tmp_path):
    args = ('--sync-bn', '--save-every', '2', '--epochs', '2', '--lr', '.01', '--val-every', '2')
    assert main(flags(tmp_path, *args, '--batch-size', '4', output='one')) == 0
    two = flags(tmp_path, *args, '--batch-size', '2', output='two')
    kill_once(torchrun(*two), tmp_path / 'two', Kill(4, 'child'), environment())
    run_to_the_end(torchrun(*two), environment())
    one, pair = losses(tmp_path / 'one'), losses(tmp_path / 'two')
    assert list(pair) == list(one) == list(range(1, 7))
    for update, loss in one.items():
        assert pair[update] == pytest.approx(loss, rel=1e-4), update
    states = [load(tmp_path / run / 'last.pt')['state_dict'] for run in ('one', 'two')]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)
    figures = [table(tmp_path / run / 'validation.csv')[-1] for run in ('one', 'two')]
    assert [f['count'] for f in figures] == ['4', '4'] and figures[0]['top1'] == figures[1]['top1']
