"""A network as one graph, from pixels to logits: how its kinds of files are written, and how they are run."""
import copy
import importlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

__all__ = [
    'FORMATS', 'ExportError', 'FromPixels', 'Run', 'Spec', 'deviation', 'trace', 'write_onnx', 'write_openvino',
    'write_pt2']

Run = Callable[[Tensor], Tensor]
INPUT, OUTPUT = 'clips', 'logits'
METADATA = 'metadata.json'  # its name in a .pt2 file


class Spec(NamedTuple):
    """The clips that a network takes, and the names of its classes.

    Attributes:
        classes: Names in the order of the logits.
        num_frames: Frames T of a clip.
        short_side: What the short side of a video is resized to.
        size: Height and width of the crop.
        mean: Mean of each colour, where white is 1.
        std: Standard deviation likewise.
    """
    classes: Tuple[str, ...]
    num_frames: int
    short_side: int
    size: int
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    def preprocessing(self) -> Dict[str, Any]:
        """The same under the names of Hugging Face's ``preprocessor_config.json``."""
        return {
            'num_frames': self.num_frames,
            'do_resize': True, 'size': {'shortest_edge': self.short_side},
            'do_center_crop': True, 'crop_size': {'height': self.size, 'width': self.size},
            'do_rescale': True, 'rescale_factor': 1 / 255,
            'do_normalize': True, 'image_mean': list(self.mean), 'image_std': list(self.std)}


class ExportError(RuntimeError):
    """What was written is not what the network is."""


class FromPixels(nn.Module):
    """A network behind its normalization.

    Args:
        model: Network from clips (B, T, 3, H, W) to logits (B, K). It is left as it is.
        mean: Mean of each colour in the training, where white is 1.
        std: Standard deviation likewise.
        half: The network computes in float16. The normalization does not.

    Shapes:
        uint8 clips (B, T, 3, H, W) to float32 logits (B, K).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], half: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float16 if half else torch.float32
        self.model = copy.deepcopy(model).eval().to('cpu', self.dtype)
        self.register_buffer('mean', 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer('std', 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        x = (clips.float() - self.mean) / self.std
        logits: Tensor = self.model(x.to(self.dtype))
        return logits.float()


def trace(model: nn.Module, clips: Tensor) -> ExportedProgram:
    """A network as a graph for batches of any size.

    Args:
        model: Network from clips (B, T, 3, H, W) to logits (B, K).
        clips: Two clips or more.

    Raises:
        ExportError: The graph has operators that a program without their package does not know.
    """
    with torch.no_grad():
        program = torch.export.export(model, (clips,), dynamic_shapes=({0: Dim('batch', min=1)},))
    targets = [
        node.target for graph in program.graph_module.modules() if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes if node.op == 'call_function']
    foreign = {str(target) for target in targets if getattr(target, 'namespace', 'aten') not in ('aten', 'prims')}
    if foreign:
        raise ExportError(f'the graph must have operators of PyTorch alone, got {sorted(foreign)}')
    return program


def deviation(run: Run, reference: Run, clips: Tensor) -> float:
    """The largest difference of two networks' logits, for the largest logit; infinite if the logits are no numbers.

    Args:
        run: What is looked at.
        reference: What is right.
        clips: What both get.

    Raises:
        ExportError: The logits differ in their shape.
    """
    with torch.no_grad():
        got, want = run(clips).double(), reference(clips).double()
    if got.shape != want.shape:
        raise ExportError(f'the logits must be {list(want.shape)} for {list(clips.shape)}, got {list(got.shape)}')
    scale = want.abs().max().item()
    error = (got - want).abs().max().item() / (scale or 1.)
    return error if error == error else float('inf')


def extra(name: str) -> Any:
    """A module of the extra ``[export]``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'this format needs {error.name or name}: pip install "cmr-layers[export]"') from error


# Files. Metadata are names with values that JSON knows.

def write_pt2(program: ExportedProgram, file: Path, metadata: Dict[str, Any]) -> None:
    """The file of ``torch.export``; the metadata is one of its ``extra_files``."""
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata, indent=1)})


def open_pt2(file: Path) -> Run:
    return torch.export.load(file).module()


def write_onnx(program: ExportedProgram, file: Path, metadata: Dict[str, Any]) -> None:
    """An ONNX file; the metadata is in ``metadata_props``, as JSON."""
    extra('onnxscript')
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: 'batch'},), verbose=False)
    assert onnx is not None
    onnx.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(file, external_data=False)


def open_onnx(file: Path) -> Run:
    onnxruntime = extra('onnxruntime')
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])

    def run(clips: Tensor) -> Tensor:
        logits, = session.run([OUTPUT], {INPUT: clips.numpy()})
        return torch.from_numpy(logits)

    return run


def write_openvino(onnx: Path, file: Path, metadata: Dict[str, Any], half: bool) -> None:
    """An ONNX file as OpenVINO's two files; the metadata is in ``rt_info``, as JSON, under 'cmr_layers'.

    Args:
        onnx: The ONNX file.
        file: The file of the graph, ``.xml``. That of the weights, ``.bin``, lies beside it.
        metadata: As of the other formats.
        half: Weights in float16. What computes in which precision is for the device to choose.
    """
    openvino = extra('openvino')
    model = openvino.Core().read_model(onnx)
    for key, value in metadata.items():
        model.set_rt_info(json.dumps(value), ['cmr_layers', key])
    openvino.save_model(model, file, compress_to_fp16=half)


def open_openvino(file: Path) -> Run:
    openvino = extra('openvino')
    # some CPUs compute in bfloat16 unless they are told
    model = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda clips: torch.from_numpy(model(clips.numpy())[0].copy())


class Format(NamedTuple):
    """A kind of file: the names' endings, the first of them the file's own, and how it is run."""
    suffixes: Sequence[str]
    open: Callable[[Path], Run]


FORMATS = {
    'pt2': Format(('.pt2',), open_pt2),
    'onnx': Format(('.onnx',), open_onnx),
    'openvino': Format(('.xml', '.bin'), open_openvino),
}
