"""Networks of torchvision, transformers and open_clip, all with random weights."""
import fnmatch
import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.metadata import packages_distributions
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.check import check

__all__ = ['PACKAGES', 'installed', 'networks']

_Found = dict[str, Any]
_TINY: dict[str, Any] = {'hidden_size': 32, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 64,
                         'image_size': 64}
_STAGES: dict[str, Any] = {'depths': [1, 1, 2, 1], 'image_size': 64}
# of transformers: the class of the network, the class of its configuration, and arguments of that
_TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    'ViT': ('ViTForImageClassification', 'ViTConfig', {**_TINY, 'patch_size': 8}),
    'ViT without a head': ('ViTModel', 'ViTConfig', {**_TINY, 'patch_size': 8}),
    'DeiT': ('DeiTForImageClassification', 'DeiTConfig', {**_TINY, 'patch_size': 8}),
    'BEiT': ('BeitForImageClassification', 'BeitConfig', {**_TINY, 'patch_size': 8}),
    'DINOv2': ('Dinov2ForImageClassification', 'Dinov2Config', {**_TINY, 'patch_size': 8}),
    'DINOv2 with registers': (
        'Dinov2WithRegistersForImageClassification', 'Dinov2WithRegistersConfig', {**_TINY, 'patch_size': 8}),
    'DINOv3 ViT': ('DINOv3ViTModel', 'DINOv3ViTConfig', {**_TINY, 'patch_size': 8, 'num_register_tokens': 4}),
    'DINOv3 ConvNeXt': ('DINOv3ConvNextModel', 'DINOv3ConvNextConfig',
                        {'hidden_sizes': [16, 32, 48, 64], **_STAGES}),
    'SigLIP': ('SiglipVisionModel', 'SiglipVisionConfig', {**_TINY, 'patch_size': 8}),
    'CLIP': ('CLIPVisionModel', 'CLIPVisionConfig', {**_TINY, 'patch_size': 8}),
    'CLIP with a projection': (
        'CLIPVisionModelWithProjection', 'CLIPVisionConfig', {**_TINY, 'patch_size': 8, 'projection_dim': 16}),
    'Swin': ('SwinForImageClassification', 'SwinConfig',
             {'embed_dim': 16, 'num_heads': [1, 2, 2, 4], 'window_size': 2, **_STAGES}),
    'Swin v2': ('Swinv2ForImageClassification', 'Swinv2Config',
                {'embed_dim': 16, 'num_heads': [1, 2, 2, 4], 'window_size': 2, **_STAGES}),
    'ConvNeXt': ('ConvNextForImageClassification', 'ConvNextConfig', {'hidden_sizes': [16, 32, 48, 64], **_STAGES}),
    'ConvNeXt v2': (
        'ConvNextV2ForImageClassification', 'ConvNextV2Config', {'hidden_sizes': [16, 32, 48, 64], **_STAGES}),
    'ResNet': ('ResNetForImageClassification', 'ResNetConfig',
               {'embedding_size': 16, 'hidden_sizes': [16, 32, 48, 64], 'depths': [1, 1, 2, 1]}),
    'PVT v2': ('PvtV2ForImageClassification', 'PvtV2Config',
               {'hidden_sizes': [16, 32, 48, 64], 'num_attention_heads': [1, 2, 2, 4], 'image_size': 64}),
    'Segformer': ('SegformerForImageClassification', 'SegformerConfig',
                  {'hidden_sizes': [16, 32, 48, 64], 'num_attention_heads': [1, 2, 2, 4], 'image_size': 64}),
}
# of torchvision: one network of each kind
_CLASSIFIERS = ('alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'efficientnet_v2_s', 'googlenet',
                'inception_v3', 'maxvit_t', 'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'regnet_x_400mf',
                'regnet_y_400mf', 'resnet18', 'resnet50', 'resnext50_32x4d', 'shufflenet_v2_x0_5', 'squeezenet1_0',
                'swin_t', 'swin_v2_t', 'vgg11', 'vgg11_bn', 'vit_b_32', 'wide_resnet50_2')
_SIDE = {'inception_v3': 299, 'ssd300_vgg16': 300, 'maxvit_t': 224, 'vit_b_32': 224, 'swin_v2_t': 224}
_OPEN_CLIP = ('ViT-B-32', 'RN50', 'convnext_base')


def _torchvision(name: str) -> _Found:
    from torchvision import models

    torch.manual_seed(0)
    kind, _, builder = name.partition('/')
    side = _SIDE.get(builder, 64 if kind == 'classification' else 96)
    more: dict[str, Any] = {'init_weights': True} if builder in ('googlenet', 'inception_v3') else {}
    if kind != 'classification':
        more = {'weights_backbone': None, **({} if kind == 'segmentation' else {'num_classes': 5})}
    model = models.get_model(builder, weights=None, **more)
    if kind == 'detection':
        model = model.backbone  # with random weights the heads find nothing that could differ
    return check(model, torch.zeros(1, 3, side, side), (3, side, side), values=True)


def _transformers(name: str) -> _Found:
    import transformers

    torch.manual_seed(0)
    network, config, arguments = _TOWERS[name]
    if not hasattr(transformers, network):
        return {'verdict': 'not built', 'reason': f'this version of transformers has no {network}'}
    made: nn.Module = getattr(transformers, network)(getattr(transformers, config)(**arguments))
    return check(made, torch.zeros(1, 3, 64, 64), (3, 64, 64), values=True)


def _open_clip(name: str) -> _Found:
    import open_clip

    torch.manual_seed(0)
    model: nn.Module = open_clip.create_model(name, pretrained=None).visual
    side = 224
    return check(model, torch.zeros(1, 3, side, side), (3, side, side), values=True)


def _torchvision_names() -> list[str]:
    from torchvision import models

    def of(module: Any) -> list[str]:
        return [name for name in models.list_models(module=module) if not fnmatch.fnmatch(name, 'quantized_*')]

    return [*(f'classification/{name}' for name in _CLASSIFIERS),
            *(f'detection/{name}' for name in of(models.detection)),
            *(f'segmentation/{name}' for name in of(models.segmentation))]


PACKAGES: dict[str, tuple[Callable[[], list[str]], Callable[[str], _Found]]] = {
    'torchvision': (_torchvision_names, _torchvision),
    'transformers': (lambda: list(_TOWERS), _transformers),
    'open_clip': (lambda: list(_OPEN_CLIP), _open_clip),
}


def installed() -> list[str]:
    """The distributions, as pip names them, of those packages that are here."""
    distributions = packages_distributions()
    return [distributions[package][0] for package in PACKAGES if package in distributions]


def networks(package: str) -> dict[str, Callable[[], _Found]]:
    """The networks of a package, and what tries each. A package that is not installed has none."""
    if importlib.util.find_spec(package) is None:
        return {}
    names, measure = PACKAGES[package]
    return {name: partial(measure, name) for name in names()}
