"""The same numbers again, and a number that is not."""
import json

import pytest

from benchmarks.motion import again
from benchmarks.motion.__main__ import main


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp('again')
    out = folder / 'motion.json'
    assert main(['--out', str(out), '--folder', str(folder / 'networks'), '--size', 'smoke', '--seeds', '0',
                 '--jobs', '1', '--rows', 'tim', 'sme']) == 0
    return out, folder / 'networks'


def test_a_row_run_again_is_the_same(study, capsys):
    out, _ = study
    assert again.main(['--out', str(out), '--rows', 'tim', 'sme']) == 0
    assert capsys.readouterr().out.splitlines() == ['movers sme 0 is the same', 'movers tim 0 is the same']


def test_another_number_is_noticed(study, tmp_path, capsys):
    results = json.loads(study[0].read_text())
    results['runs'][1]['losses'][0] += 1e-4
    changed = tmp_path / 'changed.json'
    changed.write_text(json.dumps(results))
    assert again.main(['--out', str(changed), '--rows', 'tim']) == 1
    assert capsys.readouterr().out == "movers tim 0 differs in ['losses']\n"


def test_maps_that_a_run_has_not_are_added(study, tmp_path, capsys):
    out, folder = study
    results = json.loads(out.read_text())
    maps = dict(results['runs'][0]['maps'])
    assert results['runs'][0]['row'] == 'sme' and set(maps) == {'sme', 'sme_input', 'sme_term', 'difference'}
    del results['runs'][0]['maps']['sme_input']
    changed = tmp_path / 'changed.json'
    changed.write_text(json.dumps(results))
    arguments = ['--out', str(changed), '--maps', '--folder']
    assert again.main([*arguments, str(folder)]) == 0
    assert json.loads(changed.read_text())['runs'][0]['maps'] == maps
    results['runs'][0]['maps']['sme'][0] += .1  # as if of another network
    changed.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r'--folder must have the networks of the runs, got .* row sme of seed 0 has'):
        again.main([*arguments, str(folder)])
    with pytest.raises(SystemExit):
        again.main([*arguments, str(tmp_path)])
    assert 'argument --folder: must have networks of runs that have maps, got' in capsys.readouterr().err


def test_a_file_that_is_none_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        again.main(['--out', str(tmp_path / 'none.json')])
    assert 'argument --out: must be a result file' in capsys.readouterr().err
    (tmp_path / 'other.json').write_text('{"networks": []}')
    with pytest.raises(SystemExit):
        again.main(['--out', str(tmp_path / 'other.json')])
    assert 'must be a result file that has size, settings, runs, got' in capsys.readouterr().err


def test_rows_that_the_file_does_not_have_are_an_error(study, capsys):
    """They would be nothing that differs."""
    with pytest.raises(SystemExit):
        again.main(['--out', str(study[0]), '--rows', 'tim', 'all', '--seed', '0'])
    assert "argument --rows: must be rows that --out has with seed 0, got ['all']" in capsys.readouterr().err
