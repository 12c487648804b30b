"""The layers' arithmetic as functions of frames (N, C, H, W), N = B * T, the frames of a clip next to each other.

:mod:`.reference` is the law, on clips and in plain PyTorch. :mod:`.cme_tim` and :mod:`.sme` are what the layers call,
and :mod:`.block_end` is what a fused stage calls. For each call :mod:`.path` decides whether the law runs, or an
operator in one of two forms: PyTorch calls (``plain_*``) or Triton kernels (``triton_*``). :func:`use_path` forces a
path. :func:`explain` says which path each layer of a model takes, and why.
"""
from . import reference
from .block_end import block_end
from .cme_tim import CMEWeights, Convolution, cme_tim
from .path import explain, use_path
from .sme import Norm, motion_conv, sme

__all__ = [
    'CMEWeights', 'Convolution', 'Norm', 'block_end', 'cme_tim', 'explain', 'motion_conv', 'reference', 'sme',
    'use_path',
]
