"""The layers' arithmetic as functions of tensors.

:mod:`.reference` is the law, in plain PyTorch. :mod:`.dispatch` decides what runs in its place: operators
(:mod:`.operators`) with kernels in Triton (``triton_*``) or as PyTorch calls (:mod:`.plain`). :func:`use_path` forces a
path, :func:`explain` says which one each layer of a model takes, and why.
"""
from .dispatch import choose, explain, use_path
from .layers import (
    CMEWeights,
    Convolution,
    Known,
    front,
    front_conv,
    joins,
    knows_similarity,
    motion_conv,
    rectified_sum,
    sme,
)
from .layout import dense, rectify_gradient
from .reference import cme, cme_gate, motion, similarity, tim
from .state import is_transformed

__all__ = [
    'CMEWeights', 'Convolution', 'Known', 'choose', 'cme', 'cme_gate', 'dense', 'explain', 'front', 'front_conv',
    'is_transformed', 'joins', 'knows_similarity', 'motion', 'motion_conv', 'rectified_sum', 'rectify_gradient',
    'similarity', 'sme', 'tim', 'use_path',
]
