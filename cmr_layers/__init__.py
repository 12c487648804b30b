"""Motion for 2D image networks: the layers of `Learning Comprehensive Motion Representation for Action Recognition`.

Importing the package registers the ``cmr_resnet`` family with timm.
"""
from .block import CMRBasicBlock, CMRBlock
from .clip import ClipModel, set_num_frames, temporal_keys
from .cme import CME
from .cmr_resnet import CMRResNet
from .insert import insert, restore
from .retrofit import retrofit
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = [
    'CME', 'SME', 'TIM', 'CMRBasicBlock', 'CMRBlock', 'CMRResNet', 'ClipModel', '__version__', 'insert', 'restore',
    'retrofit', 'set_num_frames', 'temporal_keys',
]
