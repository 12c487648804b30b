"""The network of a run, from clips (B, T, 3, H, W) to logits (B, K), and which of its parts learn."""
from typing import List, Tuple

import timm
from torch import nn

import cmr_layers
from cmr_layers import CME, SME, TIM, ClipModel, adapt, insert, retrofit
from cmr_layers.clip import ClipLayer

from .config import Config

__all__ = ['build_model', 'freeze']

_LAYERS = {'CME': CME, 'SME': SME, 'TIM': TIM}


def build_model(config: Config, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Build the network that a configuration describes.

    Args:
        config: The configuration.
        num_classes: Number K of classes.
        pretrained: Whether timm loads its weights of the image network.

    Returns:
        A network from (B, T, 3, H, W) to (B, K).

    Raises:
        ValueError: There is no such model, or its temporal layers do not fit ``config.temporal``.

    Example:
        >>> build_model(Config(model='resnet10t', temporal='retrofit'), 5).num_classes
        5
    """
    if not timm.is_model(config.model):
        close = timm.list_models(f'*{config.model[:8]}*')[:5]
        raise ValueError(f'model must be one that timm knows, got {config.model!r}' + (
            f'; did you mean one of {", ".join(close)}?' if close else ''))
    own = timm.model_entrypoint(config.model).__module__.split('.')[0] == cmr_layers.__name__
    if own != (config.temporal == 'family'):
        raise ValueError(
            f'temporal must be {"family" if own else "adapt, retrofit, insert or none"} for model={config.model!r}, '
            f'which has {"its" if own else "no"} temporal layers of its own, got {config.temporal!r}')
    if pretrained and not timm.is_model_pretrained(config.model):
        raise ValueError(f'pretrained=True: timm has no weights for model={config.model!r}; wanted --no-pretrained, or '
                         f'a file of weights in --checkpoint')
    arguments = {'drop_rate': config.dropout, **config.model_args}
    if own:
        arguments['num_frames'] = config.num_frames
    network: nn.Module = timm.create_model(config.model, pretrained=pretrained, num_classes=num_classes, **arguments)
    if own:
        return network
    try:
        if config.temporal in ('adapt', 'retrofit'):
            put = adapt if config.temporal == 'adapt' else retrofit
            put(network, config.num_frames, **config.temporal_args)
        common = {key: value for key, value in config.temporal_args.items() if key not in _LAYERS}
        for place in config.insert_at:
            names, at = _place(place)
            for name in names:
                more = {**common, **config.temporal_args.get(name, {})}
                insert(network, _LAYERS[name], at, num_frames=config.num_frames, **more)
    except TypeError as error:  # an argument that they do not have, or one of another type
        if not config.temporal_args:
            raise
        raise ValueError(f'temporal_args={config.temporal_args!r} do not fit temporal={config.temporal!r}: {error}'
                         ) from error
    return ClipModel(network, config.num_frames)


def _place(text: str) -> Tuple[List[str], str]:
    names, _, at = text.partition('@')
    layers = names.split(',')
    if not at or any(name not in _LAYERS for name in layers):
        raise ValueError(f"insert_at must be layers and a module, such as 'CME,TIM@layer*.0', got {text!r}")
    return layers, at


def freeze(model: nn.Module, config: Config) -> None:
    """Let only those parameters learn that the configuration says."""
    if config.freeze == 'backbone' and config.temporal == 'none':
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    elif config.freeze == 'backbone':
        cmr_layers.freeze(model)
    if config.partial_bn:
        for norm in _norms(model)[1:]:
            for p in norm.parameters():
                p.requires_grad_(False)


def _norms(model: nn.Module) -> List[nn.Module]:
    """Batch norms of the image network, not those of the temporal layers, which start untrained."""
    own = {norm for layer in model.modules() if isinstance(layer, ClipLayer) for norm in layer.modules()}
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in own]
