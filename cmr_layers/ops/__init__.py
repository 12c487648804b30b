"""The layers' arithmetic as functions of tensors; :mod:`.reference` holds the plain PyTorch form."""
from .reference import cme, cme_gate, motion, similarity, tim

__all__ = ['cme', 'cme_gate', 'motion', 'similarity', 'tim']
