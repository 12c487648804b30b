"""Matrix products of frames on a CPU, by the library that multiplies them fastest there.

PyTorch has two. Intel's MKL, which its matrix products of float32 use, is about half as fast on the processors of other
makers. oneDNN, which its convolutions use, is as fast on all of them. On Intel's own MKL is the faster one here, since
it adds to what is there in the same pass. In half precision PyTorch multiplies by oneDNN anyway.
"""
import functools
import platform
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import is_channels_last

__all__ = ['affine', 'has_onednn', 'is_exact', 'matrices', 'product_dtype']

# Elements of frames that one product takes. Copies of so many stay in some cache. With more products a clip, threads
# would wait for each other more often, and on a busy machine that costs more than anything else.
_SIZE = 2 ** 21


def matrices(x: Tensor, *others: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Frames (N, C, H, W) as matrices (C, pixels) that share their memory, and others with as many pixels likewise.

    The matrices are frames, or in channels_last some pixels of all frames.
    """
    if not is_channels_last(x):
        return zip(*(v.flatten(2) for v in (x, *others)))
    pixels = x.numel() // x.shape[1]
    count = max(1, -(-pixels // max(1, _SIZE // x.shape[1]))) if x.device.type == 'cpu' else 1
    return zip(*(v.permute(0, 2, 3, 1).flatten(0, 2).t().tensor_split(count, 1) for v in (x, *others)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and the CPU has instructions for the dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrices are multiplied in.

    Where the CPU has no instructions for a half precision, PyTorch's own products take ten times as long in it as
    those in float32.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if x.device.type == 'cpu' and half and not has_onednn(x.dtype) else x.dtype


def is_exact() -> bool:
    """Whether a CPU's products of float32 are that, and not of bfloat16 by ``torch.set_float32_matmul_precision``."""
    return torch.backends.mkldnn.matmul.fp32_precision in ('none', 'ieee')  # type: ignore[attr-defined]


def affine(out: Tensor, weight: Tensor, x: Tensor, bias: Optional[Tensor], residual: Optional[Tensor]) -> None:
    """Write weight x + bias + residual into ``out``.

    Args:
        out: Matrix, (D, P).
        weight: Matrix, (D, C).
        x: Matrix, (C, P).
        bias: Vector, (D,), or None.
        residual: Matrix, (D, P), or None.
    """
    if _by_convolution(x):
        image = x.t().unsqueeze(0).unsqueeze(0).permute(0, 3, 1, 2)
        y = F.conv2d(image, weight[:, :, None, None], bias).flatten(2)[0]
        if residual is None:
            out.copy_(y)
        else:
            torch.add(y, residual, out=out)
        return
    if bias is None and residual is None:
        torch.mm(weight, x, out=out)
        return
    start = x.new_zeros(1, 1) if bias is None else bias.unsqueeze(1)
    if residual is None:
        out.copy_(start)
    else:
        torch.add(residual, start, out=out)
    out.addmm_(weight, x)


def _by_convolution(x: Tensor) -> bool:
    # with one thread PyTorch hands such a convolution to MKL
    return (
        x.device.type == 'cpu' and x.dtype == torch.float32 and x.t().is_contiguous() and not _is_intel()
        and torch.backends.mkl.is_available() and has_onednn(x.dtype) and torch.get_num_threads() > 1)


@functools.cache
def _is_intel() -> bool:
    name = platform.processor()
    try:
        with open('/proc/cpuinfo') as lines:
            name += next((line for line in lines if line.startswith('vendor_id')), '')
    except OSError:
        pass
    return 'Intel' in name
