"""Motion for 2D image networks: the layers of `Learning Comprehensive Motion Representation for Action Recognition`.

Importing the package registers the ``cmr_resnet`` family with timm.
"""
from .block import CMRBasicBlock, CMRBlock
from .clip import ClipModel, set_num_frames, temporal_keys
from .cme import CME
from .cmr_resnet import *  # noqa: F403  (the family's names, which timm's registry adds to __all__)
from .insert import insert, restore
from .retrofit import retrofit
from .sme import SME
from .tim import TIM
from .version import __version__

