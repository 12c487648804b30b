"""The options of a run: presets, a YAML file, flags."""
import argparse

import pytest
import yaml

from examples.action_recognition.config import Config, add_flags, from_flags, presets, read_config, write_config


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


def test_the_presets_are_the_papers_schedules():
    assert presets() == ['finetune', 'k400', 'motion', 'sthv1', 'sthv2']
    for name, layout in (('sthv1', 'sthv1'), ('sthv2', 'sthv2')):
        config = parse('--preset', name)
        assert config.layout == layout and config.span is None and config.flip == 'none'
        assert (config.epochs, config.milestones, config.lr, config.base_batch) == (50, (30, 40, 45), .01, 64)
    config = parse('--preset', 'k400')
    assert config.layout == 'kinetics' and config.span == 64
    assert (config.epochs, config.milestones, config.lr, config.base_batch) == (100, (50, 75, 90), .01, 64)
    for name in ('sthv1', 'sthv2', 'k400'):
        config = parse('--preset', name)
        assert (config.optimizer, config.momentum, config.num_frames, config.size) == ('sgd', .9, 8, 224)
        assert config.short_side == 256 and config.scales == (1, .875, .75, .66) and config.decay_all
    config = parse('--preset', 'finetune')
    assert config.optimizer == 'adamw' and config.schedule == 'cosine' and config.epochs <= 30


def test_flags_overrule_the_file_and_the_file_the_preset(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('epochs: 7\nlr: 1e-3\nmilestones: [2, 3]\n')
    config = parse('--preset', 'k400', '--config', str(file), '--lr', '.5', '--clip-grad', 'none', '--no-nesterov')
    assert (config.epochs, config.lr, config.milestones, config.span) == (7, .5, (2, 3), 64)
    assert config.clip_grad is None and not config.nesterov


def test_what_is_saved_with_a_run_is_what_it_was(tmp_path):
    config = parse('--preset', 'k400', '--model-args', 'layers=[1, 1]', 'x=1e-3', '--temporal', 'insert', '--insert-at',
                   'CME,TIM@layer1.*', '--scales', '1', '.9')
    assert config.model_args == {'layers': [1, 1], 'x': 1e-3} and config.scales == (1., .9)
    write_config(config, tmp_path / 'config.yaml')
    assert Config(**read_config(tmp_path / 'config.yaml')) == config
    assert yaml.safe_load((tmp_path / 'config.yaml').read_text()) == config.to_dict()
    assert Config.from_dict(config.to_dict(), 'x') == config


@pytest.mark.parametrize('values, message', [
    ({'epochs': 0}, 'epochs must be at least 1, got 0'),
    ({'epochs': 'ten'}, "epochs must be int, got 'ten'"),
    ({'epochs': True}, 'epochs must be int, got True'),
    ({'lr': 'fast'}, "lr must be float, got 'fast'"),
    ({'nesterov': 1}, 'nesterov must be bool, got 1'),
    ({'milestones': (30, '40')}, "milestones must be int, got '40'"),
    ({'layout': 'ucf'}, "layout must be one of 'list', 'folders', .* got 'ucf'"),
    ({'dropout': 1.}, r'dropout must be in \[0, 1\), got 1.0'),
    ({'ema': -.1}, 'ema'), ({'clip_grad': 0.}, 'clip_grad must be > 0 or none, got 0.0'),
    ({'size': 300}, 'size must be at most short_side=256, got 300'),
    ({'temporal': 'insert'}, "insert_at is for temporal='insert', and wanted there"),
    ({'insert_at': ('CME@x',)}, "insert_at is for temporal='insert'"),
    ({'temporal_args': {'start': 'paper'}},
     "temporal_args is for temporal='adapt', 'retrofit' or 'insert', got .*'family'"),
    ({'nesterov': True, 'momentum': 0.}, 'nesterov wants momentum > 0, got 0.0'),
])
def test_error_values(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_error_names_in_a_file(tmp_path):
    file = tmp_path / 'mine.yaml'
    file.write_text('epoch: 7\n')
    message = r"mine.yaml has the option 'epoch', which does not exist; did you mean epochs\?"
    with pytest.raises(ValueError, match=message):
        parse('--config', str(file))
    file.write_text('- 7\n')
    with pytest.raises(ValueError, match=r'mine.yaml must hold options as "name: value", got list'):
        parse('--config', str(file))
    file.write_text('a: [')
    with pytest.raises(ValueError, match=r'mine.yaml is no YAML'):
        parse('--config', str(file))
    with pytest.raises(ValueError, match='model_args must be given as key=value, got '):
        parse('--model-args', 'layers')
