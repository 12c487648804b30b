"""From the files of three data sets to a network that runs elsewhere, by the commands as a user gives them."""
import json

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from small_run import command, environment, flags

from cmr_layers import load_model
from cmr_layers.video import EvalTransform, read_clip
from examples.action_recognition import classify, evaluate, export, train
from examples.action_recognition.checkpoint import load_network
from examples.action_recognition.data import build_lists
from examples.action_recognition.metrics import score_clips
from examples.action_recognition.studies.killing import kill_and_resume, losses


def run_onnx(file, clips):
    return torch.from_numpy(onnxruntime.InferenceSession(str(file)).run(None, {'clips': clips.numpy()})[0])


def run_openvino(file, clips):
    return torch.from_numpy(openvino.Core().compile_model(str(file), 'CPU')(clips.numpy())[0])


def run_pt2(file, clips):
    return torch.export.load(file).module()(clips)


@pytest.mark.parametrize('layout, kind, run_graph', [
    ('sthv1', 'onnx', run_onnx), ('sthv2', 'pt2', run_pt2), ('kinetics', 'openvino', run_openvino)])
def test_from_files_to_a_network_that_runs_elsewhere(layout, kind, run_graph, tmp_path, capsys):
    arguments = flags(tmp_path, '--save-every', '1', layout=layout, per_class=4)
    run = tmp_path / 'run'
    if layout == 'sthv1':  # it is the same for all of them, and starts two processes
        assert kill_and_resume(command(*arguments), run, [2], environment())[0] >= 2
    else:
        assert train.main(arguments) == 0
    assert list(losses(run)) == [1, 2, 3, 4]

    assert evaluate.main([str(run), '--workers', '0', '--device', 'cpu', '--clips', '2', '--crops', '3', '--out',
                          str(tmp_path / 'evaluation')]) == 0
    figures = json.loads((tmp_path / 'evaluation' / 'results.json').read_text())
    assert figures['videos'] == 4 and 0 <= figures['top1'] <= 1
    assert (tmp_path / 'evaluation' / 'confusion.png').stat().st_size > 1000
    saved = np.load(tmp_path / 'evaluation' / 'predictions.npz')

    loaded = load_network(run)
    video = build_lists(loaded.config, loaded.classes)[1].entries[0]
    capsys.readouterr()
    assert classify.main([str(run), video.path, '--json', '--device', 'cpu', '--sheet', str(tmp_path / 's.png')]) == 0
    assert video.path in capsys.readouterr().out and (tmp_path / 's.png').stat().st_size > 1000

    clips = EvalTransform(32, 36)(read_clip(video.path, 4).frames)
    with torch.no_grad():
        want = score_clips(loaded.model, clips[None], 'cpu', 2)
    file = tmp_path / f'network.{ {"onnx": "onnx", "pt2": "pt2", "openvino": "xml"}[kind]}'
    assert export.main([str(run), '--format', kind, '--out', str(file)]) == 0
    torch.testing.assert_close(run_graph(file, clips).softmax(1), want, rtol=1e-3, atol=1e-4)

    assert export.main([str(run), '--format', 'folder', '--out', str(tmp_path / 'folder')]) == 0
    with torch.no_grad():
        assert torch.equal(score_clips(load_model(tmp_path / 'folder'), clips[None], 'cpu', 2), want)
    assert saved['scores'].shape == (4, 2)
