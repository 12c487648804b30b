"""Launch configurations of the kernels: a small table, so that nothing is tuned at run time.

Tuning at run time would measure again in every process and break the first CUDA graph. The values come from the
compiler's resource report (``python -m benchmarks.kernels``), not from a clock: none of them has been timed yet.
"""
from typing import Any, Dict, List, Tuple

from torch import Tensor

from .layout import is_channels_last

__all__ = ['config', 'next_power_of_2']

# Kernel and layout: (largest number of channels it holds for, configuration), the first that fits is taken.
Rows = List[Tuple[float, Dict[str, int]]]
ANY = float('inf')

_TABLE: Dict[Tuple[str, bool], Rows] = {
    ('pool', True): [(ANY, dict(BLOCK_P=64, BLOCK_C=64, num_warps=4))],
    ('pool', False): [(ANY, dict(BLOCK_P=256, BLOCK_C=8, num_warps=4))],
    ('mix', True): [(ANY, dict(FRAMES=8, BLOCK=1024, num_warps=4))],
    ('mix', False): [(ANY, dict(FRAMES=8, BLOCK=1024, num_warps=4))],
    ('correlate', True): [(ANY, dict(FRAMES=8, BLOCK_P=64, BLOCK_C=64, num_warps=8))],
    ('correlate', False): [(ANY, dict(FRAMES=8, BLOCK_P=128, BLOCK_C=16, num_warps=4))],
    ('similarity', True): [(ANY, dict(ROWS=16, BLOCK_C=128, num_warps=4))],
    ('similarity', False): [(ANY, dict(ROWS=256, BLOCK_C=8, num_warps=4))],
    ('motion', True): [(ANY, dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3))],
    ('motion', False): [(ANY, dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP=8, num_warps=8, num_stages=3))],
    ('motion, float32', True): [(ANY, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3))],
    ('motion, float32', False): [(ANY, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3))],
    ('product', True): [(ANY, dict(BLOCK_P=16, BLOCK_C=128, num_warps=4))],
    ('product', False): [(ANY, dict(BLOCK_P=128, BLOCK_C=16, num_warps=4))],
    ('unmotion', True): [(ANY, dict(FRAMES=8, BLOCK_P=16, BLOCK_C=64, num_warps=4))],
    ('unmotion', False): [(ANY, dict(FRAMES=8, BLOCK_P=128, BLOCK_C=8, num_warps=4))],
}
# The vector path does not see the layout.
_TABLE.update({(kernel, last): rows for last in (True, False) for kernel, rows in {
    'project': [
        (256, dict(BLOCK_N=16, BLOCK_O=16, BLOCK_K=64, num_warps=4, num_stages=3)),
        (ANY, dict(BLOCK_N=16, BLOCK_O=16, BLOCK_K=128, num_warps=8, num_stages=3))],
    'gate': [(ANY, dict(BLOCK_C=64, BLOCK_K=32, num_warps=4))],
    'conv': [(ANY, dict(BLOCK_K=32, num_warps=8, num_stages=2))],
}.items()})


def config(kernel: str, x: Tensor) -> Dict[str, Any]:
    """Compile-time arguments of a kernel for frames (N, C, H, W).

    Contraction of products and sums is pinned: its default differs between versions of Triton, and results would
    move with it.
    """
    rows = _TABLE[kernel, is_channels_last(x)]
    return {**next(meta for most, meta in rows if x.shape[1] <= most), 'enable_fp_fusion': True}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
