"""Eight bits: an ONNX file quantized with calibration clips, and what that costs in accuracy."""
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .graphs import INPUT, extra

__all__ = ['Loss', 'measure', 'quantize']


def quantize(onnx: Path, file: Path, batches: Iterable[Tensor]) -> None:
    """Quantize the convolutions and matrix products of an ONNX file: weights per channel, activations per tensor.

    The range of an activation is that of its values on the calibration clips. The arithmetic between, such as that of
    the temporal layers, stays in float32: to quantize it, too, costs more accuracy than it saves time. So does the
    classifier, since OpenVINO 2026.4 computes something else if it is quantized. Weights have 7 bits, as the sums of
    two products overflow in a processor without VNNI if they have 8.

    Args:
        onnx: A file of :func:`write_onnx`.
        file: Where to write the other one, which has pairs of QuantizeLinear and DequantizeLinear.
        batches: Calibration clips, uint8 (B, T, 3, H, W).
    """
    quantization = extra('onnxruntime.quantization')
    preparation = extra('onnxruntime.quantization.shape_inference')

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        queue = iter(batches)

        def get_next(self) -> Optional[Dict[str, Any]]:
            batch = next(self.queue, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = file.with_suffix('.prepared')
    preparation.quant_pre_process(onnx, prepared)  # batch norms become part of the convolutions
    quantization.quantize_static(
        prepared, file, Reader(), op_types_to_quantize=['Conv', 'MatMul'], per_channel=True, reduce_range=True)
    prepared.unlink()


class Loss(NamedTuple):
    """What another precision costs on a list of videos. A video that does not decode is wrong in both.

    Attributes:
        videos: Number of videos, the denominator.
        unreadable: How many of them do not decode.
        before: How many the network is right about.
        after: How many the other one is right about.
        agree: For how many of those that decode both say the same class.
    """
    videos: int
    unreadable: int
    before: int
    after: int
    agree: int

    def __str__(self) -> str:
        n = max(self.videos, 1)
        return (
            f'top-1 {self.before / n:.2%} before, {self.after / n:.2%} after ({(self.after - self.before) / n:+.2%}), '
            f'of {self.videos} videos, {self.unreadable} of them unreadable; the same class for {self.agree} of the '
            f'{self.videos - self.unreadable} others')


def measure(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor],
            batches: Iterable[Tuple[Tensor, Tensor, Tensor]]) -> Loss:
    """Compare two networks on labelled clips.

    Args:
        before: Takes uint8 clips (B, T, 3, H, W), returns logits (B, K).
        after: Likewise.
        batches: Clips, their labels (B,), and whether their video does not decode (B,).
    """
    loss = Loss(0, 0, 0, 0, 0)
    for clips, label, broken in batches:
        clips, right = clips[~broken], label[~broken]
        with torch.no_grad():
            first, second = (run(clips).argmax(1) if len(clips) else right for run in (before, after))
        found = (len(label), int(broken.sum()), int((first == right).sum()), int((second == right).sum()),
                 int((first == second).sum()))
        loss = Loss(*(a + b for a, b in zip(loss, found)))
    return loss
