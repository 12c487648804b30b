"""A network written as one graph, run, and compared with the network."""
from itertools import chain
from pathlib import Path
from typing import Dict, Iterable

import torch
from torch import Tensor, nn

from cmr_layers import __version__
from cmr_layers.video.augment import normalize

from .graphs import FORMATS, ExportError, FromPixels, Run, Spec, deviation, trace, write_onnx, write_openvino, write_pt2
from .quantize import quantize

__all__ = ['TOLERANCE', 'network', 'write_graph']

# Largest difference from the network's logits, for the largest logit. Float16 rounds to 11 bits at each operation. Of
# eight bits, accuracy on videos says more; the bound is for what an inference engine gets wrong altogether.
TOLERANCE = {'fp32': 1e-4, 'fp16': 1e-2, 'int8': 0.5}


def write_graph(
        model: nn.Module,
        spec: Spec,
        format: str,
        file: Path,
        precision: str = 'fp32',
        calibration: Iterable[Tensor] = (),
) -> Dict[int, float]:
    """Write a network as one graph, run it, and compare it with the network.

    Args:
        model: Network from clips (B, T, 3, H, W) to logits (B, K). It is left as it is.
        spec: What the file says of it.
        format: 'pt2', 'onnx' or 'openvino'.
        file: Where to write. OpenVINO's weights are written beside it. So are passing files, as 'float.onnx'.
        precision: 'fp32', 'fp16' or, but not as 'pt2', 'int8'.
        calibration: For int8: uint8 clips (B, T, 3, H, W).

    Returns:
        For each batch size, the largest difference from the network's logits, for the largest logit. The clips are
        noise, or the first calibration clips.

    Raises:
        ExportError: The difference is not below :data:`TOLERANCE`, or the graph needs more than PyTorch.
        ValueError: There are no calibration clips.
    """
    noise = torch.Generator().manual_seed(0)
    shape = 3, spec.num_frames, 3, spec.size, spec.size
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    if precision == 'int8':
        queue = iter(calibration)
        first = next(queue, None)
        if first is None:
            raise ValueError('the calibration list must have a video that can be read, got none')
        clips, calibration = first[:1].repeat(3, 1, 1, 1, 1), chain([first], queue)
        clips[:len(first)] = first[:3]
    metadata = {
        **spec._asdict(), 'input': 'clips: uint8 (batch, num_frames, 3, size, size), RGB', 'output': 'logits',
        'precision': precision, 'network': type(model).__name__, 'cmr_layers': __version__}
    half = precision == 'fp16'
    # OpenVINO halves the weights itself
    program = trace(FromPixels(model, spec.mean, spec.std, half and format != 'openvino'), clips)
    if format == 'pt2':
        write_pt2(program, file, metadata)
    else:
        onnx = file.with_name('float.onnx') if format == 'openvino' or precision == 'int8' else file
        write_onnx(program, onnx, metadata)
        if precision == 'int8':
            eight = file.with_name('int8.onnx') if format == 'openvino' else file
            quantize(onnx, eight, calibration)
            onnx = eight
        if format == 'openvino':
            write_openvino(onnx, file, metadata, half)
    run = FORMATS[format].open(file)
    found = {batch: deviation(run, network(model, spec), clips[:batch]) for batch in (1, 3)}
    if not max(found.values()) < TOLERANCE[precision]:
        raise ExportError(
            f'the {format} file in {precision} must compute what the network does, to {TOLERANCE[precision]:g} of the '
            f'largest logit; got a difference of {max(found.values()):.3g}')
    return found


def network(model: nn.Module, spec: Spec) -> Run:
    """The network itself, as evaluation runs it."""
    return lambda clips: model(normalize(clips, spec.mean, spec.std))
