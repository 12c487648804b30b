"""benchmarks.versus: two checkouts timed against each other; here one against itself."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import versus

ROOT = Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, '-m', 'benchmarks.versus', str(ROOT), *args], cwd=ROOT, capture_output=True, text=True)


def test_a_checkout_against_itself(tmp_path):
    done = run('--only', 'TIM 8x4x4, inference', '--rounds', '3', '--out', str(tmp_path / 'versus.json'))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'versus.json').read_text())
    assert results['commits']['before'] == results['commits']['after']
    case, = results['cases']
    assert case['name'] == 'TIM 8x4x4, inference' and len(case['before']) == len(case['after']) == 3
    pairs = sorted(after / before for before, after in zip(case['before'], case['after']))
    assert pairs[0] > 0 and case['ratio']['median'] == pytest.approx(pairs[1])  # how near 1 it is, the machine decides


def test_error_no_case_and_no_checkout(tmp_path, monkeypatch, capsys):
    for before, only, message in (
            (ROOT, 'nothing', "argument --only: no case contains 'nothing'"),
            (tmp_path, '', 'argument before: must be a checkout of this repository')):
        monkeypatch.setattr(sys, 'argv', ['versus', str(before), '--only', only])
        with pytest.raises(SystemExit) as stop:
            versus.main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
