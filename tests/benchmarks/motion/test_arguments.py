"""What the commands of the study say to wrong arguments, before anything is measured or overwritten."""
import json

import pytest
import torch

from benchmarks.motion import __main__ as study
from benchmarks.motion import again, figure, gates, latency, search
from benchmarks.motion.rows import image_network
from benchmarks.motion.run import trained
from benchmarks.motion.size import SIZES

COMMANDS = {'study': study, 'search': search, 'gates': gates, 'latency': latency, 'again': again, 'figure': figure}
OTHER = '{"flops": 1}'


def said(capsys, name, *arguments):
    """The error of a command, without the usage before it."""
    try:
        assert COMMANDS[name].main(list(map(str, arguments))) == 1
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err.split('error: ')[-1]


@pytest.mark.parametrize('name', ['study', 'search', 'gates', 'latency'])
@pytest.mark.parametrize('text, wanted', [
    ('A page.', 'must be a new file or a result file, got'), ('{"runs"', 'must be a new file or a result file, got'),
    (OTHER, 'which has flops')])
def test_a_file_that_is_no_result_is_not_overwritten(tmp_path, monkeypatch, capsys, name, text, wanted):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'README.md'
    file.write_text(text)
    assert wanted in said(capsys, name, '--out', file)
    assert file.read_text() == text


@pytest.mark.parametrize('name', ['study', 'search', 'gates', 'latency', 'figure'])
def test_a_folder_is_no_file(tmp_path, capsys, name):
    assert 'argument --out: must be a file, got the folder' in said(capsys, name, '--out', tmp_path)


@pytest.mark.parametrize('name, arguments, wanted', [
    ('study', ['--seeds', '-1'], "argument --seeds: must be an int of 0 or more, got '-1'"),
    ('gates', ['--seeds', '-2'], "argument --seeds: must be an int of 0 or more, got '-2'"),
    ('figure', ['--seed', '-1'], "argument --seed: must be an int of 0 or more, got '-1'"),
    ('study', ['--minutes', 'nan'], "argument --minutes: must be 0 or more, got 'nan'"),
    ('study', ['--minutes', '-3'], "argument --minutes: must be 0 or more, got '-3'"),
    ('study', ['--folder', __file__], 'argument --folder: must be a folder, got the file'),
    ('again', [], 'argument --out: must be a result file, got'),
    ('gates', ['--folder', 'nowhere'], 'which has no movers-cme-0.pt'),
    ('figure', ['--folder', 'nowhere'], 'which has no movers-all-0.pt'),
])
def test_arguments(tmp_path, capsys, name, arguments, wanted):
    assert wanted in said(capsys, name, '--out', tmp_path / 'new', *arguments)


@pytest.mark.parametrize('name', ['study', 'search', 'gates', 'figure'])
def test_the_size_for_a_gpu_needs_one(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    wanted = "argument --size: must be 'cpu' or 'smoke' where PyTorch finds no GPU, got 'gpu'"
    assert wanted in said(capsys, name, '--out', tmp_path / 'new', '--size', 'gpu')


def test_rows_and_groups_add_up(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, 'study', lambda out, folder, keys, *rest: asked.extend(keys))
    arguments = ['--out', str(tmp_path / 'new'), '--seeds', '3', '--rows', 'r4', 'sme', '--groups', 'mapless']
    assert study.main(arguments) == 0
    assert [row for _, row, _ in asked] == ['r4', 'sme', 'tim', 'mapless']


def test_results_of_another_size_are_not_overwritten(tmp_path, capsys):
    file = tmp_path / 'gates.json'
    file.write_text(json.dumps({'size': 'cpu', 'networks': []}))
    assert "one of size 'smoke', got one of 'cpu'" in said(capsys, 'gates', '--out', file, '--size', 'smoke')


def test_networks_of_another_size_are_an_error(tmp_path):
    torch.save(image_network('resnet', 12, SIZES['smoke'].shape).state_dict(), tmp_path / 'movers-tim-0.pt')
    with pytest.raises(ValueError, match=r'--folder must have networks of the size that --size says, got .* tensors'):
        trained(tmp_path, 'tim', 0, SIZES['cpu'])
