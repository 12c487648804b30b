"""Motion for 2D image networks: the layers of `Learning Comprehensive Motion Representation for Action Recognition`.

``import cmr_layers`` registers the ``cmr_resnet`` family with timm.
"""
from .adapt import adapt
from .attach import restore
from .block import CMRBasicBlock, CMRBlock
from .clip import set_num_frames, temporal_keys
from .clip_model import ClipModel
from .cme import CME
from .cmr_resnet import CMRResNet
from .freeze import freeze, train_mode, trainable_parameters
from .insert import insert
from .retrofit import retrofit
from .save import load_model, save_model
from .sme import SME
from .temporal import load_temporal, load_temporal_state_dict, save_temporal, temporal_state_dict
from .tim import TIM
from .version import __version__

__all__ = [
    'CME', 'SME', 'TIM', 'CMRBasicBlock', 'CMRBlock', 'CMRResNet', 'ClipModel', '__version__', 'adapt', 'freeze',
    'insert', 'load_model', 'load_temporal', 'load_temporal_state_dict', 'restore', 'retrofit', 'save_model',
    'save_temporal', 'set_num_frames', 'temporal_keys', 'temporal_state_dict', 'train_mode', 'trainable_parameters',
]
