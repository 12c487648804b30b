"""The worked example: every command of it runs, on a few videos."""
import importlib
import json

import pytest
import torch

pytest.importorskip('av')
pytest.importorskip('skimage')

from examples.action_recognition import worked_example
from examples.action_recognition.checkpoint import load
from examples.action_recognition.config import PRESETS, Config, read_config
from examples.action_recognition.model import build_model
from examples.action_recognition.motion_videos import CLASSES
from examples.action_recognition.start import start_from


def test_every_command_runs_and_both_networks_start_alike(tmp_path, capsys):
    commands = worked_example.stages(tmp_path, 11, 1, 1)
    for module, *arguments in commands.values():
        main = importlib.import_module(f'examples.action_recognition.{module}').main
        assert main(arguments) == 0, (module, capsys.readouterr())
    assert (tmp_path / 'classified.mp4').stat().st_size > 1000 and (tmp_path / 'sheet.png').stat().st_size > 1000
    for name in ('temporal', 'plain'):
        results = json.loads((tmp_path / name / 'evaluation' / 'results.json').read_text())
        assert results['videos'] == 6 and len(results['per_class']) == 6
    # only the layers differ, in the options as in the weights
    options = [load(tmp_path / name / 'last.pt')['config'] for name in ('temporal', 'plain')]
    assert {key for key in options[0] if options[0][key] != options[1][key]} == {'temporal', 'temporal_args', 'output'}
    started = []
    for config in map(Config.from_dict, options, ('temporal', 'plain')):
        model = build_model(config, 6)
        start_from(model, config.checkpoint, config)
        started.append(model.state_dict())
    assert started[1].keys() < started[0].keys()
    assert all('.cme.' in key or '.tim.' in key or '.sme.' in key for key in started[0].keys() - started[1].keys())
    assert all(torch.equal(started[0][key], value) for key, value in started[1].items() if '.fc.' not in key)
    # other videos than those that are there would be left out silently
    with pytest.raises(ValueError, match=r'val must be 1, as many as .* has of each class, got 2'):
        worked_example.checked(tmp_path, 2)


def test_what_it_says_at_its_end():
    names = sorted(CLASSES)
    rows = [{'name': name} for name in names]
    right = {'videos': 60, 'per_class': rows, 'confusion': [[10 * (i == j) for j in range(6)] for i in range(6)]}
    # half of the videos on the right line, half of these in the right direction
    mixed = [[5 * (CLASSES[a][0] == CLASSES[b][0]) // 2 for b in names] for a in names]
    assert worked_example.direction(names, mixed) == (12, 24)
    results = {'temporal': right, 'plain': {**right, 'confusion': mixed}, 'chance': .1667}
    assert worked_example.said(results).splitlines() == [
        'with temporal layers  100.0% of 60 videos (95% interval 94.0% to 100.0%)',
        '  direction           100.0% of 60 videos taken for a class on their line (95% interval 94.0% to 100.0%)',
        'without                20.0% of 60 videos (95% interval 11.8% to 31.8%)',
        '  direction            50.0% of 24 videos taken for a class on their line (95% interval 31.4% to 68.6%)',
        'chance                 16.7%',
        '  direction            50.0%']
    nothing = {**right, 'confusion': [[0] * 6] * 6}
    assert '0.0% of 0 videos' in worked_example.said({**results, 'plain': nothing})


def test_a_command_that_fails_ends_it(tmp_path, capfd):
    (tmp_path / 'videos').write_text('no folder')
    assert worked_example.main([str(tmp_path), '--train', '11', '--val', '1']) == 1
    out, err = capfd.readouterr()
    assert 'motion_videos: ' in err and 'the last command failed (1)' in err and out.count('$ python -m') == 1
    assert not (tmp_path / 'results.json').exists()
    assert worked_example.main([str(tmp_path / 'videos'), '--val', '1']) == 1  # it is a file
    assert 'worked_example: ' in capfd.readouterr().err
    with pytest.raises(SystemExit):
        worked_example.main([str(tmp_path), '--train', '10'])
    assert '--train must be at least 11' in capfd.readouterr().err


def test_the_plain_network_does_not_see_the_order_of_frames():
    preset = read_config(PRESETS / 'motion.yaml')
    clips = torch.randn(2, 8, 3, 48, 48)
    for temporal, arguments, same in (('none', {}, True), ('retrofit', {'start': 'paper'}, False)):
        model = build_model(Config(**{**preset, 'temporal': temporal, 'temporal_args': arguments}), 6).eval()
        with torch.no_grad():
            assert torch.allclose(model(clips), model(clips.flip(1)), rtol=1e-5, atol=1e-5) is same
