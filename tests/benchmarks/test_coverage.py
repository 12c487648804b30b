"""`python -m benchmarks.coverage`, and what it found."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import coverage
from benchmarks.coverage import __main__ as command
from benchmarks.coverage.check import check
from benchmarks.coverage.summary import VERDICTS, render, render_failures, render_groups, render_total, render_values
from benchmarks.coverage.timm_names import families, structure

RESULT = Path(coverage.__file__).parents[1] / 'results/coverage.json'
GOAL = .97


def run(monkeypatch, folder, *args):
    monkeypatch.setattr(sys, 'argv', ['coverage', '--journal', str(folder / 'journal.jsonl'),
                                      '--out', str(folder / 'out.json'), *args])
    command.main()
    return json.loads((folder / 'out.json').read_text())


def test_the_command_finds_what_works_and_what_does_not(monkeypatch, tmp_path, capsys):
    names = ['resnet18', 'resnet34', 'selecsls42b']
    arguments = ['--only', 'timm', '--device', 'meta', '--names']
    first = run(monkeypatch, tmp_path, *arguments, *names[:2])
    assert first['timm']['total']['all'] == 2 and first['timm']['total']['measured'] == 1
    assert first['timm']['representatives'] == {'resnet18': ['resnet34']}
    monkeypatch.setattr(command, 'build', lambda name: {'selecsls42b': timm.create_model}[name](name, device='meta'))
    results = run(monkeypatch, tmp_path, *arguments, *names)  # goes on: the others are not built again
    assert len((tmp_path / 'journal.jsonl').read_text().splitlines()) == 3
    total = results['timm']['total']
    assert (total['names'], total['all'], total['some']) == (3, 2, 1)
    failure, = results['timm']['failures']
    assert failure['names'] == ['selecsls42b'] and 'list' in failure['reason']
    assert {'timm', 'torchvision', 'transformers'} <= results['versions'].keys()
    assert results['not tried'] == ['torchvision', 'transformers', 'open_clip']
    assert '2 of 3 names' in render_total(results) and 'selecsls42b' in render_failures(results)
    assert '| `resnet` | 2 | 1 | 2 | 0 | 0 |' in render(results)
    assert '| all of timm | 3 | 2 (66.7%) | 1 | 0 |' in render_groups(results)


def test_a_network_that_takes_too_long_is_a_result(tmp_path):
    journal = command.Journal(tmp_path / 'journal.jsonl')

    def forever():
        while True:
            pass

    journal.try_one('timm', 'meta', 'slow', 1, forever)
    assert journal.lines[0]['verdict'] == 'not built' and 'longer than 1 s' in journal.lines[0]['reason']
    assert command.Journal(tmp_path / 'journal.jsonl').lines == journal.lines


@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224'])
def test_a_network_with_values(name):
    kwargs = {'img_size': 32} if name.startswith('vit') else {}
    model = timm.create_model(name, num_classes=5, depth=4, **kwargs) if kwargs else timm.create_model(name)
    found = check(model, torch.zeros(1, 3, 32, 32), (3, 32, 32), values=True)
    assert found['verdict'] == 'all' and found['identity'] and not found['unconfirmed'] and found['checked']


def test_what_goes_wrong_is_seen(monkeypatch):
    from benchmarks.coverage import check as module
    model = timm.create_model('resnet18', num_classes=5)
    monkeypatch.setattr(module, 'restore', lambda model: model)
    found = check(model, torch.zeros(1, 3, 32, 32), (3, 32, 32), values=True)
    assert found['verdict'] == 'broken' and found['broken'] == ['restore left other modules or keys']
    found = check(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 8, 8), (3, 8, 8), values=True)
    assert found['verdict'] == 'none' and 'no blocks' in found['reason']


def test_a_network_may_list_the_heads_of_its_stages():
    found = check(timm.create_model('pit_ti_224', device='meta'), None, (3, 224, 224))
    assert found['verdict'] == 'all' and found['layers'] == {'CME': 12, 'TIM': 12, 'SME': 3}


def test_structure_leaves_out_widths_and_depths_only():
    small, deep, other = (structure(timm.create_model(name, device='meta'))
                          for name in ('vit_tiny_patch16_224', 'vit_base_patch32_224', 'vit_base_patch16_siglip_224'))
    assert small == deep != other


def test_the_committed_result_adds_up():
    results = json.loads(RESULT.read_text())
    found = results['timm']
    total, failing = found['total'], [name for entry in found['failures'] for name in entry['names']]
    assert total['names'] == sum(total[verdict] for verdict in VERDICTS)
    for parts in (found['families'], found['groups']):
        for key in ('names', *VERDICTS):
            assert sum(counts[key] for counts in parts.values()) == total[key]
    assert len(failing) == len(set(failing)) == total['names'] - total['all']
    assert all(entry['reason'] for entry in found['failures'])
    names = [*found['representatives'], *(name for names in found['representatives'].values() for name in names)]
    assert len(names) == len(set(names)) == total['names'] and len(found['representatives']) == total['measured']
    if timm.__version__ == results['versions']['timm']:
        assert set(names) == {name for names in families().values() for name in names}
    assert total['all'] >= GOAL * total['names']
    assert '%' in render_groups(results) and render_values(results)
