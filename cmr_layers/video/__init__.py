"""A clip from a video: sample frames with PyAV, resize and normalise them for a model.

Needs the extra: ``pip install "cmr-layers[video]"``.
"""
from .clip import Clip, read_clip
from .decode import MAX_CLIP_PIXELS, MAX_PIXELS
from .sample import sample_indices
from .transform import ClipTransform

__all__ = ['Clip', 'ClipTransform', 'MAX_CLIP_PIXELS', 'MAX_PIXELS', 'read_clip', 'sample_indices']
