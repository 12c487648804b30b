"""The command ``python -m benchmarks.runtime``: its arguments, its files, and one short run from end to end."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_results import entry, results

from benchmarks.runtime import __main__ as cli
from benchmarks.runtime import plan, plot
from benchmarks.runtime.candidate import MODES, ON
from benchmarks.runtime.results import NO_TIME

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(('args', 'words'), [
    (['--studies', 'speed'], list(plan.STUDIES)),
    (['--models', 'resnet'], ['tsm', 'cmr', 'r3d_18']),
    (['--modes', 'fast'], list(MODES)),
    (['--device', 'cpu', '--modes', 'graph'], list(ON['cpu'])),
    (['--device', 'cpu', '--dtype', 'tf32'], ['fp32, fp16, bf16']),
    (['--dtype', 'fp8'], ['fp32', 'tf32', 'fp16', 'bf16']),
    (['--passes', '0'], ["must be a positive int, got '0'"]),
    (['--size', '32'], ['64 or more, got 32']),
    (['--studies', 'latency', '--models', 's3d'], ['s3d is in none of the studies latency; it takes 16 frames']),
    (['--studies', 'scaling', '--models', 'gsm'], ['gsm is in none of the studies scaling']),
    (['--studies', 'frames', '--models', 's3d', '--size', '112'], ['it takes frames of 224x224']),
    (['--against', 'no.json'], ['--against', 'No such file', 'no.json']),
    (['--against', 'pyproject.toml'], ['pyproject.toml is no JSON']),
    (['--against', 'benchmarks/results/flops.json'], ['flops.json is no result file of benchmarks.runtime']),
    (['--out', 'no/such/x.json'], ["there is no folder 'no/such'"]),
    (['--studies', 'throughput', '--modes', 'reference'], ['nothing is left to measure']),
    (['--minutes', '-1'], ['more than 0']),
    (['--rounds', '0'], ["must be a positive int, got '0'"]),
    (['--device', 'tpu'], ['cpu', 'cuda']),
    (['--layout', 'nhwc'], ['channels_last', 'contiguous']),
])
def test_bad_arguments_fail_at_once_and_list_the_choices(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['runtime', *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_no_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['runtime', '--device', 'cuda'])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and 'choose cpu' in capsys.readouterr().err


def test_a_smoke_run_compiles_no_network(monkeypatch, tmp_path):
    planned = []
    monkeypatch.setattr(cli, 'measure', lambda study, *_: planned.append(study) or [])
    main(monkeypatch, '--quick', '--out', tmp_path / 'r.json')
    assert {c.model for study in planned for c in study.candidates if c.compiles} == {'cme_tim 256'}
    assert {study.name for study in planned} == {'latency', 'operators', 'training', 'layers'}
    assert {c.setting.size for study in planned for c in study.candidates if study.name == 'latency'} == {64}


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['runtime', '--device', 'cpu', *map(str, args)])
    return cli.main()


def test_a_run_goes_on_where_its_file_ends(tmp_path, monkeypatch, capsys):
    out, asked = tmp_path / 'r.json', []

    def fake(study, number, *_):
        asked.append((study.name, number))
        return [entry(c.model, c.mode, setting=c.setting, width=c.width, training=c.training)
                for c in study.candidates]
    monkeypatch.setattr(cli, 'measure', fake)
    args = ['--studies', 'latency', 'training', '--models', 'cmr', '--size', '64', '--rounds', '2', '--out', out]
    assert main(monkeypatch, *args, '--passes', '1') == 0
    assert asked == [('latency', 0), ('training', 0)]
    assert main(monkeypatch, *args, '--passes', '2') == 0
    assert asked[2:] == [('latency', 1), ('training', 1)]  # and not the first pass again
    saved = json.loads(out.read_text())
    assert [(unit['study'], unit['pass']) for unit in saved['units']] == [
        ('latency', 0), ('training', 0), ('latency', 1), ('training', 1)]
    saved['units'][1]['entries'][0]['missing'] = NO_TIME
    out.write_text(json.dumps(saved))
    assert main(monkeypatch, *args, '--passes', '2') == 0
    assert asked[4:] == [('training', 0)]
    capsys.readouterr()
    assert main(monkeypatch, *args, '--passes', '2', '--rounds', '3') == 2  # later --rounds wins
    assert 'has rounds 2, this run 3: choose another file, or --fresh' in capsys.readouterr().err
    assert main(monkeypatch, *args, '--passes', '1', '--rounds', '3', '--fresh') == 0
    assert len(json.loads(out.read_text())['units']) == 2


def test_what_a_file_has_is_not_overwritten(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'r.json'
    missing = set()

    def fake(study, *_):
        found = [entry(c.model, c.mode, setting=c.setting) for c in study.candidates]
        for e in found:
            if e['model'] in missing:
                del e['samples']
                e['missing'] = NO_TIME
        return found
    monkeypatch.setattr(cli, 'measure', fake)
    args = ['--studies', 'latency', '--size', '64', '--rounds', '2', '--passes', '1', '--out', out, '--models']
    missing |= {'cmr'}
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0
    assert 'no time was left for: latency, pass 1: cmr, reference' in capsys.readouterr().err
    before = out.read_text()
    assert main(monkeypatch, *args, 'tei') == 2  # other models
    assert 'has other models or modes of the study latency: choose another file' in capsys.readouterr().err
    missing |= {'tdrl'}
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0  # it got less far than before
    assert out.read_text() == before
    missing.clear()
    assert main(monkeypatch, *args, 'tdrl', 'cmr') == 0
    assert all('samples' in e for e in json.loads(out.read_text())['units'][0]['entries'])
    assert main(monkeypatch, *args, 'tdrl') == 0  # a part of what is there


def test_results_of_two_machines_are_not_mixed(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'r.json'
    monkeypatch.setattr(cli, 'measure', lambda study, *_: [
        entry(c.model, c.mode, setting=c.setting) for c in study.candidates])
    args = ['--studies', 'latency', '--models', 'cmr', '--size', '64', '--rounds', '2', '--passes', '1', '--out', out]
    assert main(monkeypatch, *args) == 0
    saved = json.loads(out.read_text())
    out.write_text(json.dumps({**saved, 'machine': 'another'}))
    assert main(monkeypatch, *args) == 2
    assert 'has machine "another", this run' in capsys.readouterr().err
    assert json.loads(out.read_text())['machine'] == 'another'


def test_a_process_that_is_lost_is_replaced_by_a_fresh_one(tmp_path, monkeypatch, capsys):
    out, restarts = tmp_path / 'r.json', []

    def lost(study, *_):
        entries = [entry(c.model, c.mode, setting=c.setting) for c in study.candidates]
        raise cli.ProcessLost('cmr, graph (too bad)', entries[:2])

    class Replaced(BaseException):
        pass

    def execv(program, args):
        restarts.append((args, os.environ[cli.RESTARTED]))
        raise Replaced
    monkeypatch.setattr(cli, 'measure', lost)
    monkeypatch.setattr(os, 'execv', execv)
    monkeypatch.setenv(cli.RESTARTED, '0 0')
    args = ['--studies', 'latency', '--models', 'cmr', '--size', '64', '--rounds', '2', '--passes', '1', '--out', out]
    with pytest.raises(Replaced):
        main(monkeypatch, *args)
    [(command, found)] = restarts
    assert command[1:] == sys.orig_argv[1:] and found.split()[0] == '1'
    assert float(found.split()[1]) == pytest.approx(time.monotonic() + 24 * 3600, abs=60)  # when the time is up
    assert len(json.loads(out.read_text())['units'][0]['entries']) == 2  # what it had
    monkeypatch.setenv(cli.RESTARTED, f'{cli.MAX_RESTARTS} {time.monotonic() + 60}')
    assert main(monkeypatch, *args, '--fresh') == 1 and len(restarts) == 1
    assert 'run the command again, with --out, for what is left' in capsys.readouterr().err


def test_no_progress_bar_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    with pytest.raises(ImportError, match=re.escape('pip install "cmr-layers[bench]"')):
        cli.bar(1, 0)


def test_no_plot_without_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=re.escape('pip install "cmr-layers[bench]"')):
        plot.draw(results(), tmp_path / 'x.svg')


def test_one_short_run_from_end_to_end_and_one_against_it(tmp_path, monkeypatch, capsys):
    """The only run in a process of its own: all that has to be seen of one is seen here."""
    out = tmp_path / 'r.json'
    args = ['--quick', '--studies', 'operators', 'layers', '--models', 'cme_tim 256', 'layer cme', '--out', str(out)]
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.runtime', '--device', 'cpu', *args], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    saved = json.loads(out.read_text())
    assert [unit['study'] for unit in saved['units']] == ['operators', 'layers']
    operators, layers = ([*unit['entries']] for unit in saved['units'])
    forms = 'reference', 'unfolded', 'compiled-reference'
    assert [e['model'] for e in operators[:2]] == ['copy', 'product']
    assert [(e['model'], e['mode'], e['training']) for e in operators[2:]] == [
        ('cme_tim 256', mode, backward) for backward in (False, True) for mode in forms]
    assert [(e['model'], e['frames']) for e in layers[::2]] == [('layer cme', T) for T in (4, 8, 16, 32, 64)]
    for e in (*operators, *layers):
        assert e['error'] < (1e-3 if e['training'] else 1e-4) and len(e['samples']) >= 2
        assert e['memory_bytes'] > 0 or e['model'] == 'copy'
    assert 'smoke run, no numbers to quote' in done.stdout and 'a copy moves' in done.stdout
    assert 'not measured yet' in done.stdout and 'python -m benchmarks.runtime --device cpu' in done.stdout
    assert 'layers, pass 1 of 1' in done.stderr
    before = out.read_text()
    assert main(monkeypatch, *args, '--against', out) == 0  # all is there: nothing is measured, all ratios agree
    assert '4 ratios: 4 inside, 0 overlapping, 0 apart' in capsys.readouterr().out
    assert out.read_text() == before
