"""Read a clip from a video with PyAV, then resize and normalise it for a model.

It needs the extra ``[video]``.
"""
from .clip import Clip, read_clip
from .decode import MAX_CLIP_PIXELS, MAX_PIXELS
from .sample import sample_indices
from .transform import ClipTransform

__all__ = ['Clip', 'ClipTransform', 'MAX_CLIP_PIXELS', 'MAX_PIXELS', 'read_clip', 'sample_indices']
