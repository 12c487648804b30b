"""The networks that are compared: which layers a ResNet of bottlenecks has, and in which tables that is a row."""
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from benchmarks.motion import variants
from benchmarks.peers import PEERS
from benchmarks.peers.tdrl import PEM
from benchmarks.peers.tei import MEM
from cmr_layers import CME, TIM, CMRBlock, CMRResNet, freeze, retrofit
from cmr_layers.clip_model import ClipModel
from cmr_layers.released import CMRBlock as ReleasedBlock

__all__ = ['BASES', 'GROUPS', 'IMAGE_NETWORKS', 'MAIN', 'ROWS', 'Row', 'build', 'image_network', 'load_image_weights']

Shape = Mapping[str, Any]  # arguments of timm's ResNet that make it thin

#: timm's name of the image network of each kind. 'deep' has more blocks, 'untrained' has learned nothing from images.
IMAGE_NETWORKS = {'resnet': 'resnet26', 'deep': 'resnet26', 'res2net': 'res2net50_26w_4s', 'untrained': 'resnet26'}


class Row(NamedTuple):
    """A network.

    Attributes:
        label: As tables show it.
        make: Builds it from the arguments num_frames, num_classes and those of a thin ResNet.
        num_frames: Frames T of its clips.
        image: Kind of its image network.
        frozen: Whether the image network keeps its weights.
        longer: How many times as many training clips it sees.
    """
    label: str
    make: Callable[..., nn.Module]
    num_frames: int = 8
    image: str = 'resnet'
    frozen: bool = False
    longer: int = 1


def _cmr(cme: str = 'none', sme: str = 'none', tim: str = 'all', block: type[CMRBlock] = CMRBlock,
         **options: Any) -> Callable[..., nn.Module]:
    """A network of the family."""
    return partial(timm.create_model, 'cmr_resnet26', cme=cme, sme=sme, tim=tim, block=block, **options)


def _block(**kinds: Any) -> type[CMRBlock]:
    """The block with layers of other kinds: cme_layer, sme_layer."""
    return type('Block', (CMRBlock,), kinds)


def _identity_start(num_frames: int, num_classes: int, **shape: Any) -> nn.Module:
    """The layers of the full network, put into the image network so that it computes what it did."""
    model = timm.create_model('resnet26', num_classes=num_classes, **shape)
    retrofit(model, num_frames, start='identity')
    return ClipModel(model, num_frames)


_ALL: Any = {'cme': 'all', 'sme': 'first'}

ROWS: dict[str, Row] = {
    'plain': Row('plain', _cmr(tim='none')),
    'cme_sme': Row('CME&SME', _cmr(**_ALL, tim='none')),
    'tim': Row('TIM', _cmr()),
    'all': Row('TIM + CME&SME', _cmr(**_ALL)),
    'mem': Row('TIM + MEM', _cmr(cme='all', block=_block(cme_layer=MEM))),
    'pem': Row('TIM + PEM', _cmr(cme='all', block=_block(cme_layer=PEM))),
    'cme': Row('TIM + CME', _cmr(cme='all')),
    'sme': Row('TIM + SME', _cmr(sme='first')),
    # Table 4 has no row of one layer without TIM; without it, their effect is seen alone
    'only_cme': Row('CME', _cmr(cme='all', tim='none')),
    'only_sme': Row('SME', _cmr(sme='first', tim='none')),
    # Table 5
    'deep': Row("CME in all blocks, SME in each stage's first", _cmr(**_ALL), image='deep'),
    'all_all': Row('CME in all, SME in all', _cmr(cme='all', sme='all'), image='deep'),
    'first_all': Row("CME in each stage's first, SME in all", _cmr(cme='first', sme='all'), image='deep'),
    'first_first': Row("CME and SME in each stage's first", _cmr(cme='first', sme='first'), image='deep'),
    # Table 3
    'r1': Row('r = 1', _cmr(**_ALL, reduction=1)),
    'r4': Row('r = 4', _cmr(**_ALL, reduction=4)),
    'r16': Row('r = 16', _cmr(**_ALL, reduction=16)),
    # peers
    'tsm': Row('TSM', PEERS['tsm']),
    'stm': Row('STM', PEERS['stm']),
    'tdrl': Row('TDRL', PEERS['tdrl']),
    'tea': Row('TEA', PEERS['tea'], image='res2net'),
    'gsm': Row('GSM', PEERS['gsm']),
    'released': Row('released code: TIM + CME&SME', _cmr(**_ALL, block=ReleasedBlock)),
    # 16 frames
    'tim_16': Row('TIM, 16 frames', _cmr(), num_frames=16),
    'cme_16': Row('TIM + CME, 16 frames', _cmr(cme='all'), num_frames=16),
    'sme_16': Row('TIM + SME, 16 frames', _cmr(sme='first'), num_frames=16),
    'all_16': Row('TIM + CME&SME, 16 frames', _cmr(**_ALL), num_frames=16),
    # open questions
    'pool_first': Row('released CME, pooled first', _cmr(
        **_ALL, block=type('Block', (ReleasedBlock,), {'cme_layer': variants.PoolFirstCME}))),
    'softmax_t': Row('softmax over t', _cmr(**_ALL, block=_block(cme_layer=variants.SoftmaxOverT))),
    'similar': Row('no minus: attend to the similar', _cmr(**_ALL, block=_block(cme_layer=variants.SimilarCME))),
    'alone': Row('gates without other frames', _cmr(**_ALL, block=_block(cme_layer=variants.AloneCME))),
    'early': Row('SME before the ReLU', _cmr(**_ALL, block=variants.EarlyBlock)),
    'depthwise': Row('SME with a depthwise convolution', _cmr(
        **_ALL, block=_block(sme_layer=variants.DepthwiseSME))),
    'mapless': Row('TIM + SME without its map', _cmr(sme='first', block=_block(sme_layer=variants.MaplessSME))),
    'even': Row("start='shift'", _cmr(**_ALL, block=_block(
        cme_layer=partial(CME, gate_init=.5), tim_layer=partial(TIM, gain=2.)))),
    'identity': Row("start='identity'", _identity_start),
    'frozen_tim': Row('TIM, image network frozen', _cmr(), frozen=True),
    'frozen_all': Row('TIM + CME&SME, image network frozen', _cmr(**_ALL), frozen=True),
    'frozen_identity': Row("start='identity', image network frozen", _identity_start, frozen=True),
    'scratch_tim': Row('TIM, image network untrained', _cmr(), image='untrained'),
    'scratch_all': Row('TIM + CME&SME, image network untrained', _cmr(**_ALL), image='untrained'),
    # faults, which the study has to notice
    'broken_cme': Row('CME hands on its input', _cmr(cme='all', block=_block(cme_layer=variants.BrokenCME))),
    'broken_sme': Row('SME hands on its input', _cmr(
        sme='first', tim='none', block=_block(sme_layer=variants.BrokenSME))),
    'shuffled_cme': Row('gates of shuffled frames', _cmr(cme='all', block=_block(cme_layer=variants.ShuffledCME))),
    'shuffled_sme': Row('SME of shuffled frames', _cmr(
        sme='first', tim='none', block=_block(sme_layer=variants.ShuffledSME))),
}

ROWS.update({f'{name}_long': ROWS[name]._replace(label=f'{ROWS[name].label}, 3 times the clips', longer=3)
             for name in ('tim', 'cme', 'sme', 'all', 'gsm', 'tea', 'identity', 'tim_16', 'all_16')})

#: Rows by table; the first is what differences are taken to, but for :data:`BASES`.
GROUPS: dict[str, tuple[str, ...]] = {
    'table4': ('tim', 'plain', 'cme_sme', 'all'),
    'table6': ('tim', 'mem', 'pem', 'cme', 'sme', 'all'),
    'alone': ('plain', 'only_cme', 'only_sme', 'cme_sme'),
    'table5': ('deep', 'all_all', 'first_all', 'first_first'),
    'table3': ('all', 'r1', 'r4', 'r16'),
    'peers': ('tim', 'tsm', 'mem', 'stm', 'tdrl', 'tea', 'gsm', 'released', 'all'),
    'mapless': ('tim', 'mapless', 'sme'),
    'longer': ('tim_long', 'cme_long', 'sme_long', 'all_long'),
    'late': ('tim_long', 'gsm_long', 'tea_long', 'identity_long'),  # begin without an exchange between frames
    'frames': ('tim', 'tim_16', 'cme_16', 'sme_16', 'all_16'),
    'frames_longer': ('tim_long', 'tim_16_long', 'all_16_long'),
    'questions': ('all', 'released', 'pool_first', 'softmax_t', 'similar', 'alone', 'early', 'depthwise', 'even',
                  'identity'),
    'frozen': ('tim', 'all', 'identity', 'frozen_tim', 'frozen_all', 'frozen_identity'),
    'scratch': ('tim', 'scratch_tim', 'all', 'scratch_all'),
    'faults': ('tim', 'cme', 'broken_cme', 'shuffled_cme', 'plain', 'only_sme', 'broken_sme', 'shuffled_sme'),
}
#: The rows of Tables 4 and 6.
MAIN = tuple(dict.fromkeys((*GROUPS['table4'], *GROUPS['table6'])))
#: What differences are taken to where it is in the table, and is not its first row.
BASES: dict[str, str] = {
    'cme_16': 'tim_16', 'sme_16': 'tim_16', 'all_16': 'tim_16', 'all_16_long': 'tim_16_long',
    'pool_first': 'released', 'shuffled_cme': 'cme', 'only_sme': 'plain', 'broken_sme': 'plain',
    'shuffled_sme': 'only_sme', 'frozen_tim': 'tim', 'frozen_all': 'frozen_tim', 'frozen_identity': 'frozen_all',
    'scratch_all': 'scratch_tim', 'identity': 'all', 'sme': 'mapless'}


def image_network(kind: str, num_classes: int, shape: Shape) -> nn.Module:
    """The image network alone."""
    model: nn.Module = timm.create_model(IMAGE_NETWORKS[kind], num_classes=num_classes, **shape)
    return model


def build(name: str, num_classes: int, shape: Shape, image_weights: Mapping[str, Tensor], seed: int) -> nn.Module:
    """A row's network, from frames (B*T, 3, S, S) to logits (B, num_classes).

    The temporal layers start by ``seed``, the classifier at zero, the rest with the weights of the image network.
    """
    row = ROWS[name]
    torch.manual_seed(seed)
    model = row.make(num_frames=row.num_frames, num_classes=num_classes, **shape)
    load_image_weights(model, image_weights)
    head: Any = model.get_submodule('fc' if isinstance(model, CMRResNet) else 'model.fc')
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if row.frozen:
        freeze(model)
    for p in model.parameters():
        if p.ndim == 4:  # a GSM has kernels of five
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def load_image_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of an image network, but for its classifier, into a network that has it under other names.

    Raises:
        ValueError: A tensor of the image network is not there, or twice.
    """
    found: dict[str, str] = {}
    for key in model.state_dict():
        # ClipModel's prefix, and what before_conv1 and GSM put around a convolution
        name = re.sub(r'(\.conv\d)\.\d\.(weight|bias)$', r'\1.\2', key.removeprefix('model.'))
        if name in weights and not name.startswith('fc.'):
            if name in found:
                raise ValueError(f'{name} must be one tensor of the network, got {found[name]} and {key}')
            found[name] = key
    missing = {name for name in weights if not name.startswith('fc.')} - set(found)
    if missing:
        raise ValueError(f'all weights of the image network must be in the network, got none for {sorted(missing)}')
    model.load_state_dict({key: weights[name] for name, key in found.items()}, strict=False)
