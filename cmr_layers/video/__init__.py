"""Videos for a model: read a clip of one, or lists of labelled ones for training and evaluation.

It needs the extra ``[video]``.
"""
from .augment import EvalTransform, FlipTable, TrainTransform, flip_table, normalize, side_pairs
from .clip import Clip, read_clip
from .dataset import Sample, VideoDataset
from .decode import MAX_CLIP_PIXELS, MAX_PIXELS
from .frames import UnreadableVideo, read_frames
from .index import Index, VideoInfo, index_videos
from .lists import (
    Entry,
    VideoList,
    read_folders,
    read_kinetics,
    read_list,
    read_something_v1,
    read_something_v2,
    read_videos,
)
from .sample import sample_clips, sample_dense, sample_indices, sample_segments
from .sampler import EpochSampler
from .transform import ClipTransform

__all__ = [
    'Clip', 'ClipTransform', 'Entry', 'EpochSampler', 'EvalTransform', 'FlipTable', 'Index', 'MAX_CLIP_PIXELS',
    'MAX_PIXELS', 'Sample', 'TrainTransform', 'UnreadableVideo', 'VideoDataset', 'VideoInfo', 'VideoList', 'flip_table',
    'index_videos', 'normalize', 'read_clip', 'read_folders', 'read_frames', 'read_kinetics', 'read_list',
    'read_something_v1', 'read_something_v2', 'read_videos', 'sample_clips', 'sample_dense', 'sample_indices',
    'sample_segments', 'side_pairs',
]
