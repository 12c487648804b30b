"""The operators alone, at the shapes that they have in a ResNet-50, and the least that each of them could take.

An operator is a module with weights, so that it is built, timed and checked as a network is. Its floor is what its
bytes and its operations take at the rates of a large copy and a large matrix product, which are timed in the same run.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmr_layers import ops

__all__ = ['CASES', 'PASSES', 'RATES', 'Case', 'Operator', 'floor_bytes', 'floor_flops']


class Case(NamedTuple):
    """An operator at a shape: the channels of its frames, their height and width at 224x224, and its outputs."""
    op: str
    channels: int
    size: int
    outputs: int

    @property
    def name(self) -> str:
        return f'{self.op} {self.channels}'


# The inputs of a ResNet-50's blocks: channels, size, and outputs of conv1; then the outputs of its stages
_BLOCKS = ((64, 56, 64), (256, 56, 64), (512, 28, 128), (1024, 14, 256), (2048, 7, 512))
_STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
CASES = {case.name: case for case in (
    *(Case('cme_tim', channels, size, channels) for channels, size, _ in _BLOCKS),
    *(Case('cme_tim_conv', *block) for block in _BLOCKS),
    # equation (8) with its batch norm is for inference; in training the batch norm comes after
    *(Case('sme', channels, size, channels) for channels, size in _STAGES),
    *(Case('motion_conv', channels, size, channels) for channels, size in _STAGES))}
PASSES = {'cme_tim': (False, True), 'cme_tim_conv': (False, True), 'sme': (False,), 'motion_conv': (True,)}


def floor_bytes(case: Case, numbers: int, itemsize: int, backward: bool) -> int:
    """Bytes of the frames that have to move. Weights and vectors are not counted.

    X are the frames that come in, Y those that go out. What is needed before a sum over a frame or over the channels
    is complete is read again after it. A gradient gx or gy is as large as its frames.

    ============ ======================= ==================================================
    operator     forward                 backward, besides
    ============ ======================= ==================================================
    cme_tim      2 X read, Y = X written gy (X) read twice, x read, gx written: 4 X
    cme_tim_conv 2 X read, Y written     gy (Y) read twice, x read, gx written: 2 X + 2 Y
    sme          2 X read, Y = X written (none)
    motion_conv  2 X read, Y = X written gy (X) and x read twice, gx written: 5 X
    ============ ======================= ==================================================

    cme_tim: the gates need all of a frame before its first pixel is gated, and their gradient all of gy before gx.
    sme, motion_conv: a similarity needs all channels of a pixel, and so does the matrix product that it scales.

    Args:
        case: The operator.
        numbers: Pixels of all frames.
        itemsize: Bytes of a number.
        backward: Whether the backward pass belongs to it.
    """
    x, y = numbers * itemsize * case.channels, numbers * itemsize * case.outputs
    more = {'cme_tim': 4 * x, 'cme_tim_conv': 2 * x + 2 * y, 'sme': 0, 'motion_conv': 5 * x}
    return 2 * x + y + more[case.op] * backward


def floor_flops(case: Case, numbers: int, backward: bool) -> int:
    """Operations of the 1x1 convolution, three times as many with the two products of its backward pass."""
    if case.op == 'cme_tim':
        return 0
    return 2 * numbers * case.channels * case.outputs * (3 if backward else 1)


class Operator(nn.Module):
    """An operator with weights at the scale of trained ones: no term hides behind a zero, none overflows."""

    def __init__(self, case: Case, num_frames: int) -> None:
        super().__init__()
        C, r = case.channels, case.channels // 8
        cme = [torch.randn(r, C) / C ** .5, torch.randn(r, C) / C ** .5, torch.randn(C, r) / r ** .5]
        taps, weight = torch.rand(C, 1, 3), torch.randn(case.outputs, C, 1, 1) / C ** .5
        norm = [torch.randn(C) / 4, torch.rand(C) + .5, torch.rand(C) + .5, torch.randn(C) / 4]
        self.call, self.num_frames = _CALLS[case.op], num_frames
        self.weights = nn.ParameterList({
            'cme_tim': [*cme, taps], 'cme_tim_conv': [*cme, taps, weight], 'sme': [weight, *norm],
            'motion_conv': [weight]}[case.op])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(x, self.num_frames, *self.weights)
        return y


def _cme_tim(x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, taps: Tensor) -> Tensor:
    return ops.cme_tim(x, num_frames, ops.CMEWeights(w1, w2, w3), taps)


def _cme_tim_conv(
        x: Tensor, num_frames: int, w1: Tensor, w2: Tensor, w3: Tensor, taps: Tensor, weight: Tensor) -> Tensor:
    return ops.cme_tim(x, num_frames, ops.CMEWeights(w1, w2, w3), taps, ops.Convolution(weight))


def _sme(
        x: Tensor, num_frames: int, weight: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return ops.sme(x, num_frames, weight, None, ops.Norm(mean, var, gamma, beta, 1e-5))


def _motion_conv(x: Tensor, num_frames: int, weight: Tensor) -> Tensor:
    return ops.motion_conv(x, num_frames, weight, None)


_CALLS: dict[str, Callable[..., Tensor]] = {
    'cme_tim': _cme_tim, 'cme_tim_conv': _cme_tim_conv, 'sme': _sme, 'motion_conv': _motion_conv}


class Copy(nn.Module):
    """A copy of the frames into memory that is there already."""
    channels, size = 256, 112  # at 224x224
    target: Tensor | None = None

    def __init__(self, num_frames: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if self.target is None:
            self.target = torch.empty_like(x)
        return self.target.copy_(x)

    @classmethod
    def work(cls, numbers: int, itemsize: int) -> float:
        """Bytes read and written."""
        return 2 * numbers * cls.channels * itemsize


class Product(nn.Module):
    """All pixels times a square matrix."""
    channels, size = 2048, 14

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(self.channels, self.channels) / self.channels ** .5)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x if x.is_contiguous() else x.movedim(1, -1)  # a view, in either layout
        return pixels.reshape(-1, self.channels) @ self.weight

    @classmethod
    def work(cls, numbers: int, itemsize: int) -> float:
        """Operations."""
        return 2 * numbers * cls.channels ** 2


RATES: dict[str, type[Copy] | type[Product]] = {'copy': Copy, 'product': Product}  # what floors are taken from
