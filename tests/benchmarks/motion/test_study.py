"""Runs, the file of their results, and whether the study would notice a fault."""
import json
from collections import Counter

import pytest
import torch

from benchmarks import machine
from benchmarks.motion.__main__ import main
from benchmarks.motion.rows import GROUPS, ROWS, image_network
from benchmarks.motion.run import run
from benchmarks.motion.scene import clips, stills
from benchmarks.motion.size import SIZES
from benchmarks.motion.study import save, study

SMOKE = SIZES['smoke']
TIMES = ('seconds', 'machine', 'date', 'torch')


def network(folder, name):
    return torch.load(folder / f'movers-{name}-0.pt', weights_only=True)


def same(one, other):
    """Whether two networks have the same weights, wherever both have some."""
    return all(torch.equal(one[key], other[key]) for key in one.keys() & other.keys())


def test_a_run_again_gives_the_same_numbers(tmp_path):
    (tmp_path / 'again').mkdir()
    one, again = run(tmp_path, 'all', 0, SMOKE), run(tmp_path / 'again', 'all', 0, SMOKE)
    assert {**one, 'seconds': 0} == {**again, 'seconds': 0}
    assert same(network(tmp_path, 'all'), network(tmp_path / 'again', 'all'))
    other = run(tmp_path, 'all', 1, SMOKE)
    assert other['losses'] != one['losses']


@pytest.mark.parametrize('layer, base, broken, shuffled', [
    ('cme', 'tim', 'broken_cme', 'shuffled_cme'), ('only_sme', 'plain', 'broken_sme', 'shuffled_sme')])
def test_a_broken_layer_makes_a_row_its_baseline_to_the_last_digit(tmp_path, layer, base, broken, shuffled):
    found = {name: run(tmp_path, name, 0, SMOKE) for name in (layer, base, broken, shuffled)}
    for key in ('losses', 'curve', 'confusion', 'image'):
        assert found[broken][key] == found[base][key]
    nets = {name: network(tmp_path, name) for name in found}
    assert same(nets[broken], nets[base])
    assert not same(nets[layer], nets[base]) and not same(nets[shuffled], nets[layer])


def test_the_command_goes_on_and_repeats_nothing(tmp_path, capsys):
    out, folder = tmp_path / 'motion.json', tmp_path / 'networks'
    arguments = ['--out', str(out), '--folder', str(folder), '--size', 'smoke', '--jobs', '1', '--rows', 'plain', 'tim']
    assert main([*arguments, '--seeds', '0']) == 0
    first = json.loads(out.read_text())
    assert [(f['row'], f['seed']) for f in first['runs']] == [('plain', 0), ('tim', 0)]
    assert sum(map(sum, first['runs'][0]['confusion'])) == SMOKE.test
    assert set(first['runs'][0]['sweeps']) == {'step', 'clutter', 'share'}
    assert main([*arguments, '--seeds', '0', '1', '--minutes', '0']) == 0
    assert '2 runs are left; the same command goes on' in capsys.readouterr().out
    assert main([*arguments, '--seeds', '0', '1']) == 0
    second = json.loads(out.read_text())
    assert second['runs'][0] == first['runs'][0] and len(second['runs']) == 4


def test_a_file_of_another_study_is_an_error(tmp_path):
    out = tmp_path / 'motion.json'
    save(out, {'size': 'other', 'settings': {'side': 7}, 'runs': []})
    with pytest.raises(ValueError, match=r"of size 'smoke', with {'side': 40}, got .* 'other', with {'side': 7}"):
        study(out, tmp_path, [], 'smoke')


def test_tables_4_and_6_have_more_seeds_than_the_rest(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('benchmarks.motion.__main__.study', lambda out, folder, keys, *rest: asked.extend(keys))
    assert main(['--out', str(tmp_path / 'motion.json'), '--tasks', 'movers', 'ego']) == 0
    assert len(asked) == len(set(asked))
    seeds = Counter((task, row) for task, row, _ in asked)
    main_rows = {*GROUPS['table4'], *GROUPS['table6']}
    assert seeds == {**{('movers', row): 5 if row in main_rows else 1 for row in ROWS},
                     **{('ego', row): 1 for row in main_rows}}
    asked.clear()
    assert main(['--out', str(tmp_path / 'motion.json'), '--rows', 'r4', 'tim', '--seeds', '7', '8']) == 0
    assert asked == [('movers', 'r4', 7), ('movers', 'tim', 7), ('movers', 'r4', 8), ('movers', 'tim', 8)]


def test_a_seed_is_of_one_machine(tmp_path, capsys):
    """Another one makes another image network of it, so its rows would differ by that, too."""
    out = tmp_path / 'motion.json'
    arguments = ['--out', str(out), '--folder', str(tmp_path), '--size', 'smoke', '--jobs', '1', '--seeds']
    assert main([*arguments, '0', '--rows', 'plain']) == 0
    found = json.loads(out.read_text())
    found['runs'][0]['machine'] = 'another'
    save(out, found)
    assert main([*arguments, '0', '--rows', 'plain']) == 0  # nothing to do
    assert main([*arguments, '1', '0', '--rows', 'plain', 'tim']) == 1
    assert "--seeds must be such as have no runs of another machine or PyTorch, got 0, which has runs of 'another'" in (
        capsys.readouterr().err)
    assert main([*arguments, '1', '--rows', 'plain']) == 0
    second = json.loads(out.read_text())
    assert len(second['runs']) == 2 and len(second['commands']) == len({found['command'], *second['commands']})
    with pytest.raises(SystemExit):
        main([*arguments, '-1'])
    assert 'argument --seeds: must be an int of 0 or more, got' in capsys.readouterr().err


@pytest.mark.parametrize('name, wanted', [
    ('start', '--folder must have the image network that other runs began with, but of seed 0 row plain has 1234'),
    ('clips', '--out must have runs of the same test clips, but of seed 0 row plain has 1234')])
def test_rows_of_a_seed_that_cannot_be_compared_are_an_error(tmp_path, capsys, name, wanted):
    out = tmp_path / 'motion.json'
    arguments = ['--out', str(out), '--folder', str(tmp_path), '--size', 'smoke', '--jobs', '1', '--seeds', '0']
    assert main([*arguments, '--rows', 'plain']) == 0
    found = json.loads(out.read_text())
    found['runs'][0][name] = '1234'
    save(out, found)
    assert main([*arguments, '--rows', 'tim']) == 1
    assert wanted in capsys.readouterr().err
    assert len(json.loads(out.read_text())['runs']) == 1
    # other frames are other clips, another kind has another image network
    assert main([*arguments, '--rows', 'tim_16' if name == 'clips' else 'tea']) == 0


def test_two_commands_may_write_one_file_and_what_is_asked_twice_is_done_once(tmp_path, monkeypatch):
    out = tmp_path / 'motion.json'
    arguments = ['--out', str(out), '--folder', str(tmp_path), '--size', 'smoke', '--jobs', '1']
    read, other = machine.read_json, tmp_path / 'other.json'
    assert main(['--out', str(other), *arguments[2:], '--rows', 'plain', '--seeds', '3']) == 0

    def beside(path):
        """As if the other command had ended since this one began."""
        found = read(path)
        return found if found is None else {**found, **read(other), 'runs': found['runs'] + read(other)['runs']}
    assert main([*arguments, '--rows', 'tim', '--seeds', '0']) == 0
    monkeypatch.setattr('benchmarks.motion.study.read_json', beside)
    assert main([*arguments, '--rows', 'plain', 'plain', '--seeds', '0', '0']) == 0
    found = json.loads(out.read_text())
    assert [(run['row'], run['seed']) for run in found['runs']] == [('plain', 0), ('plain', 3), ('tim', 0)]


def test_maps_are_measured_where_there_are_layers(tmp_path):
    found = {name: run(tmp_path, name, 0, SMOKE)['maps'] for name in ('plain', 'only_sme', 'all')}
    assert found['plain'] == {}
    assert set(found['only_sme']) == {'sme', 'sme_input', 'sme_term', 'difference'}
    assert set(found['all']) == {'sme', 'sme_input', 'sme_term', 'cme_top', 'cme_bottom', 'difference'}
    # pixels of the actor differ from the next frame's more than others do; nothing was learned for that
    assert found['all']['difference'][0] > .7


@pytest.mark.parametrize('name', ['all', 'similar', 'gsm', 'released'])
def test_a_run_in_half_precision_as_on_a_gpu(tmp_path, name):
    size = SMOKE._replace(recipe=SMOKE.recipe._replace(amp=True), stills=SMOKE.stills._replace(amp=True))
    found = run(tmp_path, name, 0, size)
    assert sum(map(sum, found['confusion'])) == SMOKE.test and len(found['losses']) == 2
    assert all(loss == loss and loss < 10 for loss in found['losses'])


@pytest.mark.parametrize('make', [clips, stills])
def test_clips_are_drawn_on_the_device_that_is_asked_for(make):
    """The meta device refuses to mix with another one, as a GPU does."""
    made = make(4, (1,), side=56, device='meta')
    assert {tensor.device.type for tensor in made} == {'meta'} and made.clips.shape[-2:] == (56, 56)


def test_the_larger_size_is_a_resnet_50_for_a_gpu():
    size = SIZES['gpu']
    assert size.device == 'cuda' and size.side == 112
    model = image_network('resnet', 6, size.shape)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 6, 3]
    assert model.fc.in_features == 2048
