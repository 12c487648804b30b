"""ONNX: both exporters of torch.onnx, onnxruntime's values, and the first step of its quantization guide."""
import onnxruntime
import pytest
import torch
from helpers import randomize
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, CMRBasicBlock, CMRResNet, released

T = 4
MODELS = {
    'CME': lambda: CME(8, T), 'SME': lambda: SME(8, T, bias=True), 'TIM': lambda: TIM(8, T),
    'released CME': lambda: released.CME(8, T),
    # the family's networks, but for their depth
    'CMRResNet': lambda: CMRResNet(
        CMRBasicBlock, (1, 1, 1, 1), num_frames=T, channels=(8, 8, 8, 8), num_classes=3),
    'ClipModel': lambda: ClipModel(nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), CME(8, T), TIM(8, T), SME(8, T), nn.AdaptiveAvgPool2d(1), nn.Flatten()), T),
}
pytestmark = pytest.mark.filterwarnings('ignore')    # of both exporters, about themselves


def run(file, x):
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


# a fixed batch is the layers' business alone: what is around them has no more to say about it
@pytest.mark.parametrize('name, dynamo, dynamic', [
    (name, dynamo, dynamic) for name in MODELS for dynamo in (False, True) for dynamic in (False, True)
    if dynamic or (name in ('CME', 'SME', 'TIM') and not dynamo)])
def test_values_and_quantization(name, dynamo, dynamic, tmp_path):
    model, size = randomize(MODELS[name]()).eval(), (8, 6, 5) if name.endswith(('CME', 'SME', 'TIM')) else (3, 32, 32)

    def clips(batch):
        return torch.randn(batch, T, *size)

    kwargs = {}
    if dynamic and dynamo:
        kwargs = {'dynamic_shapes': ({0: torch.export.Dim('b', min=1, max=64)},)}
    elif dynamic:
        kwargs = {'dynamic_axes': {'x': {0: 'b'}}, 'input_names': ['x']}
    file, prepared = str(tmp_path / 'model.onnx'), str(tmp_path / 'prepared.onnx')
    torch.onnx.export(model, (clips(2),), file, dynamo=dynamo, opset_version=18, **kwargs)
    quant_pre_process(file, prepared)
    for batch in (1, 2, 5) if dynamic else (2,):
        x = clips(batch)
        for graph in (file, prepared):
            torch.testing.assert_close(run(graph, x), model(x), rtol=1e-5, atol=1e-5)
