"""Motion for 2D image networks: the layers of `Learning Comprehensive Motion Representation for Action Recognition`.

``import cmr_layers`` registers the ``cmr_resnet`` family with timm.
"""
from .attach import restore
from .block import CMRBasicBlock, CMRBlock
from .clip import set_num_frames, temporal_keys
from .clip_model import ClipModel
from .cme import CME
from .cmr_resnet import CMRResNet
from .insert import insert
from .retrofit import retrofit
from .save import load_model, save_model
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = [
    'CME', 'SME', 'TIM', 'CMRBasicBlock', 'CMRBlock', 'CMRResNet', 'ClipModel', '__version__', 'insert', 'load_model',
    'restore', 'retrofit', 'save_model', 'set_num_frames', 'temporal_keys',
]
