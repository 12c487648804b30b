"""How much of what a CME sees, and of its gates, changes within a clip."""
import json

import pytest
import torch

from benchmarks.motion.gates import decoded, main, measure, within
from benchmarks.motion.rows import build, image_network
from benchmarks.motion.run import run
from benchmarks.motion.size import SIZES
from benchmarks.motion.tables import render_gates

SMOKE = SIZES['smoke']


def test_the_share_within_clips_is_that_of_the_variance():
    clips, frames = torch.tensor([[0.], [3.]]), torch.tensor([[-1., 1., -1., 1.]])
    assert within(clips.expand(2, 4)[..., None]) == 0
    assert within((frames * torch.tensor([[1.], [-1.]]))[..., None]) == 1
    both = torch.stack([clips.expand(2, 4), frames * torch.tensor([[1.], [-1.]])], 2)
    assert within(both) == pytest.approx(1 / (1 + 2.25))  # variances 1 and 2.25
    assert within(clips[..., None] + frames[..., None]) == 0  # what all clips have in common at a time is no motion
    torch.manual_seed(0)
    assert within(torch.randn(2000, 8, 3)) == pytest.approx(7 / 8, abs=.01)


def test_a_class_is_decoded_from_what_knows_it_and_from_nothing_else():
    torch.manual_seed(0)
    labels = torch.randint(8, (1200,))
    noise = torch.randn(1200, 4, 10)
    assert decoded(noise, labels) == pytest.approx(1 / 8, abs=.06)
    known = noise.clone()
    known[:, 2, :8] += 4 * torch.nn.functional.one_hot(labels, 8)
    assert decoded(known, labels) > .9
    assert decoded(known[:, 3:], labels) == pytest.approx(1 / 8, abs=.06)
    assert decoded(torch.zeros(1200, 3), labels) < .2  # nothing varies


def test_gates_of_frames_that_are_all_alike_do_not_change():
    weights = image_network('resnet', 4, SMOKE.shape).state_dict()
    model = build('all', 12, SMOKE.shape, weights, 0).eval()
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (5, 8, 3, 40, 40), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = measure(model, [(clips, labels)])
    assert len(found) == 4 and all(0 < layer[name] < 1 for layer in found for name in layer if 'decoded' not in name)
    (first, *_) = measure(build('cme', 12, SMOKE.shape, weights, 0).eval(), [(clips[:, :1].expand_as(clips), labels)])
    assert first['place'] == first['pooled'] == first['gates'] == 0


def test_the_command_reads_what_a_study_has_left(tmp_path, capsys):
    out, folder = tmp_path / 'gates.json', ['--folder', str(tmp_path), '--size', 'smoke', '--rows', 'cme']
    with pytest.raises(SystemExit):
        main(['--out', str(out), *folder])
    assert 'of task movers, row cme and seed 0, got' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['--out', str(out), '--rows', 'tim'])
    assert "argument --rows: invalid choice: 'tim'" in capsys.readouterr().err
    for seed in (0, 1):
        run(tmp_path, 'cme', seed, SMOKE)
    assert main(['--out', str(out), *folder, '--seeds', '0', '1', '1']) == 0
    found = json.loads(out.read_text())
    assert [(network['row'], network['seed']) for network in found['networks']] == [('cme', 0), ('cme', 1)]
    lines = render_gates(found).splitlines()[2:]
    assert [line.split(' | ')[:4] for line in lines] == [
        ['| TIM + CME', f'{i + 1}', '0, 1', line.split(' | ')[3]] for i, line in enumerate(lines)] and len(lines) == 4
