"""Everything that is compared, under its name in the tables, with what the paper says of it."""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

import cmr_layers.released  # noqa: F401  (registers the family, and the released variant)
from benchmarks.peers import PEERS
from benchmarks.peers.gsm import GSM
from benchmarks.peers.stm import CMM
from benchmarks.peers.tdrl import PEM
from benchmarks.peers.tea import ME
from benchmarks.peers.tei import MEM
from benchmarks.peers.tsm import TemporalShift
from benchmarks.runtime.operators import CASES, RATES, Operator
from cmr_layers import CME, SME, TIM, ClipModel, adapt
from cmr_layers.clip import Fold

__all__ = [
    'BACKBONES', 'LAYERS', 'LAYER_CHANNELS', 'MODELS', 'NUM_CLASSES', 'OFF_THE_SHELF', 'OPERATORS', 'PLACEMENTS',
    'REDUCTIONS', 'TABLE_7', 'Model']

NUM_CLASSES = 174  # of Something-Something V1


class Model(NamedTuple):
    """A row of the tables.

    ``build(num_frames, num_classes, **kwargs)`` makes it; timings and accuracy are the paper's: ms at batch 1 and
    videos a second at batch 8 on a V100 (Tables 5 and 7), and top-1 on Something-Something V1, 8 frames, in %.
    """
    label: str
    build: Callable[..., nn.Module]
    latency: float | None = None
    throughput: float | None = None
    accuracy: float | None = None
    frames: tuple[int, ...] | None = None  # clip lengths that it takes, if not all
    sizes: tuple[int, ...] | None = None  # heights and widths, likewise
    in_channels: int = 3


class Video(nn.Module):
    """One of torchvision's networks, which take (B, C, T, H, W), behind the door that the others have."""

    def __init__(self, network: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.fold = Fold(num_frames)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(self.fold(x).unflatten(0, (-1, self.fold.num_frames)).transpose(1, 2))
        return y


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def build(num_frames: int = 8, num_classes: int = NUM_CLASSES, **kwargs: Any) -> nn.Module:
        from torchvision.models import get_model  # it comes with timm
        return Video(get_model(name, num_classes=num_classes, **kwargs), num_frames)
    return build


def _cmr(name: str = 'cmr_resnet50', **placements: Any) -> Callable[..., nn.Module]:
    def build(num_frames: int = 8, num_classes: int = NUM_CLASSES, **kwargs: Any) -> nn.Module:
        return timm.create_model(name, num_frames=num_frames, num_classes=num_classes, **placements, **kwargs)
    return build


TABLE_7 = {
    'tsn': Model('ResNet-50 (TSN)', PEERS['tsn'], accuracy=18.1),
    'tsm': Model('TSM', PEERS['tsm'], 12.3, 107.3, 45.6),
    'tei': Model('TEI', PEERS['tei'], 20.4, 78.5, 47.4),
    'stm': Model('STM', PEERS['stm'], 14.7, 93.2, 49.2),
    'tdrl': Model('TDRL', PEERS['tdrl'], 63.8, 49.5, 49.8),
    'tea': Model('TEA', PEERS['tea'], accuracy=48.9),
    'gsm': Model('GSM', PEERS['gsm']),
    'tim': Model('baseline (TIM)', _cmr(cme='none', sme='none'), accuracy=46.1),
    'cme': Model('baseline+CME', _cmr(sme='none'), 18.9, 75.2, 50.6),
    'sme': Model('baseline+SME', _cmr(cme='none'), 16.3, 72.6, 50.6),
    'cmr': Model('baseline+CME&SME', _cmr(), 21.4, 61.8, 51.3),
    'released': Model('CMR as released', _cmr('released_cmr_resnet50')),
}
OFF_THE_SHELF = {
    'r3d_18': Model('R3D-18', _torchvision('r3d_18')),
    'r2plus1d_18': Model('R(2+1)D-18', _torchvision('r2plus1d_18')),
    's3d': Model('S3D', _torchvision('s3d'), frames=(16,), sizes=(224,)),
    'swin3d_t': Model('Swin3D-T', _torchvision('swin3d_t')),
    # last: its forward waits for the device, which no graph can capture
    'mvit_v2_s': Model('MViTv2-S', _torchvision('mvit_v2_s'), frames=(16,), sizes=(224,)),
}
PLACEMENTS = {  # Table 5; its second row is 'cmr'
    'all-all': Model('CME all, SME all', _cmr(sme='all'), 30.4, accuracy=51.0),
    'first-all': Model('CME first, SME all', _cmr(cme='first', sme='all'), 26.5, accuracy=51.2),
    'first-first': Model('CME first, SME first', _cmr(cme='first'), 17.4, accuracy=50.4),
}
REDUCTIONS = {  # Table 3; reduction 8 is 'cmr'
    'r1': Model('r1 = r2 = 1', _cmr(reduction=1), accuracy=47.3),
    'r4': Model('r1 = r2 = 4', _cmr(reduction=4), accuracy=50.6),
    'r16': Model('r1 = r2 = 16', _cmr(reduction=16), accuracy=50.3),
}



def _backbone(name: str, adapted: bool = False, **arguments: Any) -> Callable[..., nn.Module]:
    def build(num_frames: int = 8, num_classes: int = NUM_CLASSES, **kwargs: Any) -> nn.Module:
        network = timm.create_model(name, num_classes=num_classes, **arguments, **kwargs)
        if adapted:
            adapt(network, num_frames)
        return ClipModel(network, num_frames)
    return build


BACKBONES = {  # each followed by itself with temporal layers
    'vit': Model('ViT-B/16', _backbone('vit_base_patch16_224', dynamic_img_size=True)),
    'vit adapted': Model('ViT-B/16, adapted', _backbone('vit_base_patch16_224', True, dynamic_img_size=True)),
    'convnext': Model('ConvNeXt-T', _backbone('convnext_tiny')),
    'convnext adapted': Model('ConvNeXt-T, adapted', _backbone('convnext_tiny', True)),
}

# Single layers, as one block of the third stage has them
LAYER_CHANNELS = 1024


def _layer(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(num_frames: int = 8, num_classes: int = 0, **kwargs: Any) -> nn.Module:
        return layer(LAYER_CHANNELS, num_frames, **kwargs)
    return build


LAYERS = {
    f'layer {name}': Model(label, _layer(layer), in_channels=LAYER_CHANNELS)
    for name, label, layer in (
        ('shift', "TSM's shift", TemporalShift), ('tim', 'TIM', TIM), ('mem', "TEI's MEM", MEM),
        ('pem', "TDRL's PEM", PEM), ('cmm', "STM's CMM", CMM), ('me', "TEA's ME", ME), ('gsm', 'GSM', GSM),
        ('cme', 'CME', CME), ('sme', 'SME', SME))
}


def _operator(make: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    def build(num_frames: int = 8, num_classes: int = 0, **kwargs: Any) -> nn.Module:
        return make(num_frames)
    return build


OPERATORS = {
    **{name: Model(case.op, _operator(partial(Operator, case)), in_channels=case.channels)
       for name, case in CASES.items()},
    **{name: Model(name, _operator(kind), in_channels=kind.channels) for name, kind in RATES.items()},
}

MODELS = {**TABLE_7, **OFF_THE_SHELF, **PLACEMENTS, **REDUCTIONS, **BACKBONES, **LAYERS, **OPERATORS}
