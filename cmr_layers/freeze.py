"""Train the temporal layers on a frozen image network, and see what trains."""
import re
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

from torch import nn

from .checks import check_module
from .clip import ClipLayer, temporal_keys
from .clip_model import ClipModel

__all__ = ['TrainableParameters', 'bare_norms', 'freeze', 'train_mode', 'trainable_parameters']

# Where a network without timm's get_classifier() has its head.
_HEADS = ('classifier', 'head', 'fc')
_DISTILLED = ('classifier_distill', 'dist_head')  # transformers' networks average what these say with the head
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters of a network that train. Print it to read them; iterate over it for (name, parameter).

    Attributes:
        model: Class of the network.
        parameters: Names and parameters that train.
        total: Number of values of all parameters of the network.
    """
    model: str
    parameters: List[Tuple[str, nn.Parameter]]
    total: int

    def __iter__(self) -> Iterator[Tuple[str, nn.Parameter]]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def count(self) -> int:
        """Number of values of the parameters that train."""
        return sum(p.numel() for _, p in self)

    def __str__(self) -> str:
        share = self.count / self.total if self.total else 0.
        owners: Dict[str, int] = {}
        for name, p in self:
            owner = name.rpartition('.')[0] or name
            owners[owner] = owners.get(owner, 0) + p.numel()
        width = max(map(len, owners), default=0)
        lines = [f'{self.model}: {self.count:,} of {self.total:,} parameters train ({share:.2%})']
        return '\n'.join(lines + [f'  {owner:<{width}}  {count:>12,}' for owner, count in owners.items()])


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """The parameters that train, by name, with their share of the network.

    Args:
        model: Any module.

    Returns:
        A report with the share of what trains. Print it, or iterate over its names and parameters.

    Raises:
        TypeError: model is no module.

    Example:
        >>> from cmr_layers import TIM
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1).requires_grad_(False), TIM(8))
        >>> print(trainable_parameters(model))
        Sequential: 24 of 56 parameters train (42.86%)
          1            24
    """
    check_module('model', model)
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return TrainableParameters(type(model).__name__, found, sum(p.numel() for p in model.parameters()))


def freeze(
        model: nn.Module, head: Optional[Union[str, Sequence[str]]] = 'auto', norms: bool = False,
) -> TrainableParameters:
    """Freeze an image network: only its temporal layers and its head train from now on.

    It sets ``requires_grad`` of every parameter and changes nothing else. To train, call :func:`train_mode` instead of
    ``model.train()``: in training mode a frozen batch norm would still gather statistics.

    Args:
        model: A network with CME, SME or TIM: one that :func:`retrofit` or :func:`insert` changed, a
            :class:`ClipModel` around it, or one of the ``cmr_resnet`` family.
        head: The head, which trains, too. 'auto': what timm's ``get_classifier`` returns, or else the child
            ``classifier``, ``head`` or ``fc`` that holds parameters. Otherwise a name from ``model.named_modules()``,
            or several; or None, and no head trains.
        norms: Whether weights and biases of the image network's norms train, too.

    Returns:
        What trains, to print, or to give to an optimizer.

    Raises:
        ValueError: The model holds no temporal layer. 'auto' finds no head. A name in head is no module, or one without
            parameters.
        TypeError: model is no module, or head is no name.

    Example:
        >>> import timm
        >>> from cmr_layers import retrofit
        >>> resnet = timm.create_model('resnet18', num_classes=5)
        >>> _ = retrofit(resnet, num_frames=4, cme='none', sme='none')
        >>> print(freeze(resnet))
        ResNet: 6,981 of 11,183,493 parameters train (0.06%)
          layer1.0.tim           192
          layer1.1.tim           192
          layer2.0.tim           192
          layer2.1.tim           384
          layer3.0.tim           384
          layer3.1.tim           768
          layer4.0.tim           768
          layer4.1.tim         1,536
          fc                   2,565
    """
    check_module('model', model)
    if not any(isinstance(module, ClipLayer) for module in model.modules()):
        raise ValueError(
            f'model ({type(model).__name__}) holds no temporal layer to train; wanted one with CME, SME or TIM: '
            f'retrofit() or insert() it first')
    temporal = temporal_keys(model)
    train = {id(p) for part in _heads(model, head) for p in part.parameters()}
    if norms:
        train |= {id(p) for part in _norms(model) for p in part.parameters(recurse=False)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in temporal or id(p) in train)
    return trainable_parameters(model)


def train_mode(model: nn.Module) -> nn.Module:
    """Put a network into training mode, but not the batch norms that are frozen: they keep their statistics.

    A batch norm is frozen if none of its parameters train. One without parameters goes with the parameters beside it,
    those of the nearest module around it that has any: it is frozen if not all of them train.

    Args:
        model: A network, as :func:`freeze` left it or frozen in any other way.

    Returns:
        The same network.

    Raises:
        TypeError: model is no module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8).requires_grad_(False), nn.BatchNorm2d(8))
        >>> [module.training for module in train_mode(model)]
        [True, False, True]
    """
    check_module('model', model)
    model.train()
    bare = bare_norms(model)
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM):
            module.train(bare[name] if name in bare else any(p.requires_grad for p in module.parameters()))
    return model


def bare_norms(model: nn.Module) -> Dict[str, bool]:
    """Batch norms without parameters, by name, and whether they train: as all parameters beside them do."""
    own = _in_layers(model)
    temporal = {p for part in own for p in part.parameters(recurse=False)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORM) and not any(True for _ in module.parameters()):
            around = name
            beside: List[nn.Parameter] = []
            while around and not beside:
                around = around.rpartition('.')[0]
                beside = [p for p in model.get_submodule(around).parameters() if module in own or p not in temporal]
            found[name] = all(p.requires_grad for p in beside)
    return found


def _in_layers(model: nn.Module) -> Set[nn.Module]:
    """The temporal layers of a network and all that is in them."""
    return {part for layer in model.modules() if isinstance(layer, ClipLayer) for part in layer.modules()}


def _norms(model: nn.Module) -> List[nn.Module]:
    """The norms of the image network. Packages have norms of their own, so the name of the class says what is one."""
    own = _in_layers(model)
    return [
        module for module in model.modules()
        if re.search('norm(?!free)', type(module).__name__.lower()) and module not in own]


def _heads(model: nn.Module, head: Optional[Union[str, Sequence[str]]]) -> List[nn.Module]:
    if head is None:
        return []
    if head == 'auto':
        return _found_heads(model)
    names = [head] if isinstance(head, str) else head
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"head must be 'auto', a name, a list of names, or None, got {head!r}")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not any(True for _ in modules[name].parameters()):
            raise ValueError(
                f'head={name!r} must be a module of {type(model).__name__} with parameters; got '
                f'{"none" if name not in modules else type(modules[name]).__name__}; it has {_names(model)}')
    return [modules[name] for name in names]


def _found_heads(model: nn.Module) -> List[nn.Module]:
    network = model.model if isinstance(model, ClipModel) else model
    get_classifier = getattr(network, 'get_classifier', None)
    found = get_classifier() if callable(get_classifier) else None
    parts: List[Any] = list(found) if isinstance(found, (list, tuple)) else [found]  # distilled networks have two
    if get_classifier is None:
        first = next((name for name in _HEADS if isinstance(getattr(network, name, None), nn.Module)), '')
        parts = [getattr(network, name, None) for name in (first, *_DISTILLED)]
    heads = [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]
    if not heads:
        raise ValueError(
            f"head='auto' finds no head with parameters in {type(model).__name__}: no get_classifier() that returns "
            f'one, and none of {", ".join(_HEADS)}. Name it by head=, of {_names(model)}, or pass head=None to train '
            f'none')
    return heads


def _names(model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name and name.count('.') <= isinstance(model, ClipModel)]
    return ', '.join(names[:8] + ['...'] * (len(names) > 8))
