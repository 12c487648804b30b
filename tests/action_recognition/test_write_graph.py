"""Networks as graphs, in a process that has nothing of the package."""
import json
import subprocess
import sys

import numpy as np
import onnx
import openvino
import pytest
import timm
import torch
from helpers import randomize
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, insert, retrofit
from cmr_layers.video.augment import normalize
from examples.action_recognition import write_graph as module
from examples.action_recognition.graphs import FORMATS, ExportError, FromPixels, Spec, deviation, trace
from examples.action_recognition.write_graph import TOLERANCE, write_graph

T, SIZE = 4, 32
SPEC = Spec(('left', 'right', 'stay; "so"'), T, 40, SIZE, (.485, .456, .406), (.229, .224, .225))
SMALL = {'layers': (1, 1, 1, 1), 'channels': (64, 8, 8, 8), 'num_classes': 3}
pytestmark = pytest.mark.filterwarnings('ignore')  # of the exporters, about themselves


def clips(batch, seed=1):
    shape = batch, T, 3, SIZE, SIZE
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def frames_network():
    """Three layers, which export fast."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), CME(8, T), TIM(8, T), SME(8, T), nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def retrofitted():
    resnet = timm.create_model('resnet18', **SMALL)
    retrofit(resnet, num_frames=T, cme='first', tim='first')
    resnet.layer3, resnet.layer4 = nn.Identity(), nn.Identity()  # nothing else is in them, and they export as slowly
    return ClipModel(resnet, T)


def inserted():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    insert(network, SME, at='1', num_frames=T)
    insert(network, TIM, at='2', where='before', num_frames=T)
    return ClipModel(network, T)


NETWORKS = {
    'small': lambda: ClipModel(frames_network(), T),
    'retrofitted': retrofitted,
    'inserted': inserted,
}

# What a machine without the package runs: one script for each format, with nothing but what the format needs.
ABSENT = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('cmr_layers', 'examples', 'timm', 'einops'):
            raise ImportError(f'{name} is not here')

sys.meta_path.insert(0, Absent())
import numpy as np

file, clips = sys.argv[1], np.load('clips.npy')
"""
ALONE = {
    'pt2': """
import torch
text = {'metadata.json': ''}
network = torch.export.load(file, extra_files=text).module()
metadata, run = json.loads(text['metadata.json']), lambda x: network(torch.from_numpy(x)).detach().numpy()
""",
    'onnx': """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
said = session.get_modelmeta().custom_metadata_map
metadata = {key: json.loads(value) for key, value in said.items() if not key.startswith('onnx.')}
run = lambda x: session.run(['logits'], {'clips': x})[0]
""",
    'openvino': """
import openvino
said = openvino.Core().read_model(file).rt_info['cmr_layers']
metadata = {key: json.loads(value.value) for key, value in said.items()}
model = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
run = lambda x: model(x)['logits'].copy()
""",
}
RESULT = """
np.save('logits.npy', np.concatenate([run(clips[:1]), run(clips[1:6]), run(clips[6:])]))
json.dump(metadata, open('metadata.json', 'w'))
"""


def error(got, want):
    return (got - want).abs().max().item() / want.abs().max().item()


@pytest.mark.parametrize('network, format, precision', [
    ('small', 'onnx', 'fp16'), ('small', 'openvino', 'fp16'), ('small', 'openvino', 'int8'),
    pytest.param('small', 'openvino', 'fp32', marks=pytest.mark.slow), ('retrofitted', 'pt2', 'fp32'),
    ('inserted', 'onnx', 'fp32')])
def test_a_process_without_the_package_computes_the_same_in_batches_of_any_size(network, format, precision, tmp_path):
    model = randomize(NETWORKS[network](), everything=True).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = tmp_path / f'a{FORMATS[format].suffixes[0]}'
    calibration = [clips(4, 2), clips(2, 3)] if precision == 'int8' else []
    found = write_graph(model, SPEC, format, file, precision, calibration)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        want = model(normalize(clips(8), SPEC.mean, SPEC.std))

    np.save(tmp_path / 'clips.npy', clips(8).numpy())
    script = ABSENT + ALONE[format] + RESULT
    subprocess.run([sys.executable, '-W', 'ignore', '-c', script, file], check=True, cwd=tmp_path)
    got = torch.from_numpy(np.load(tmp_path / 'logits.npy'))
    assert got.dtype == torch.float32 and got.shape == want.shape
    # each precision is what it says: neither worse nor better
    least, most = {'fp32': (0, 1e-5), 'fp16': (1e-5, 5e-3), 'int8': (1e-4, .2)}[precision]
    assert least <= error(got, want) < most
    assert set(found) == {1, 3} and least <= max(found.values()) < min(most, TOLERANCE[precision])

    said = json.loads((tmp_path / 'metadata.json').read_text())
    assert said['classes'] == list(SPEC.classes) and said['precision'] == precision
    assert (said['num_frames'], said['short_side'], said['size']) == (T, 40, SIZE)
    assert said['mean'] == list(SPEC.mean) and said['std'] == list(SPEC.std)
    assert said['input'].startswith('clips: uint8 (batch, num_frames, 3, size, size)')
    check_file(file, precision)


def check_file(file, precision):
    """The input is uint8 with a free batch, and the weights have the precision."""
    if file.suffix == '.onnx':
        graph = onnx.load(file).graph
        shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
        assert shape == ['batch', T, 3, SIZE, SIZE]
        assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        halves = [weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.initializer]
        assert sum(halves) >= 8 if precision == 'fp16' else not any(halves)
    elif file.suffix == '.xml':
        model = openvino.Core().read_model(file)
        assert model.input('clips').partial_shape.to_string() == f'[?,{T},3,{SIZE},{SIZE}]'
        kinds = {op.get_element_type().to_string() for op in model.get_ops() if op.get_type_name() == 'Constant'}
        assert {'fp32': 'f32', 'fp16': 'f16', 'int8': 'i8'}[precision] in kinds
        assert ('f16' in kinds) == (precision == 'fp16')


# Bad input

def test_error_a_graph_that_computes_something_else(tmp_path, monkeypatch):
    class Wrong(FromPixels):
        def forward(self, clips):
            return super().forward(clips) * 1.001

    monkeypatch.setattr(module, 'FromPixels', Wrong)
    with pytest.raises(ExportError, match=r'the pt2 file in fp32 must .* to 0.0001 of the largest .* of 0\.001'):
        write_graph(NETWORKS['small']().eval(), SPEC, 'pt2', tmp_path / 'a.pt2')


def test_error_no_calibration_clips(tmp_path):
    with pytest.raises(ValueError, match='the calibration list must have a video that can be read, got none'):
        write_graph(NETWORKS['small']().eval(), SPEC, 'onnx', tmp_path / 'a.onnx', 'int8', [])


def test_error_an_operator_of_a_package():
    class Own(nn.Module):
        def forward(self, x):
            return torch.ops.cmr_tests.twice(x.float())

    library = torch.library.Library('cmr_tests', 'DEF')
    library.define('twice(Tensor x) -> Tensor')
    library.impl('twice', lambda x: 2 * x, 'CompositeExplicitAutograd')
    with pytest.raises(ExportError, match=r'cmr_tests\.twice'):
        trace(Own(), clips(2))


def test_error_what_is_not_finite_or_of_another_shape():
    def nothing(x):
        return torch.full((len(x), 2), float('nan'))

    assert deviation(nothing, lambda x: torch.ones(len(x), 2), clips(2)) == float('inf')
    assert deviation(lambda x: torch.ones(len(x), 2), nothing, clips(2)) == float('inf')
    with pytest.raises(ExportError, match=r'the logits must be \[2, 2\] for \[2, 4, 3, 32, 32\], got \[2, 3\]'):
        deviation(lambda x: torch.ones(len(x), 3), nothing, clips(2))
