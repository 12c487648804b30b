"""Save, load and merge back what trained on a frozen image network: the temporal layers and the head.

A file holds a few MB, whatever the network weighs. Its header says which layers it is for and which image network they
were trained on, since layers that fit another network by their shapes would give wrong answers without a word.
"""
import fnmatch
import hashlib
import json
import os
from typing import Any, Dict, List, Mapping, Sequence, Set, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checks import check_module
from .clip import ClipLayer, temporal_keys
from .clip_model import ClipModel
from .cme import CME
from .freeze import bare_norms
from .hosts import Host
from .recipe import few
from .sme import SME
from .tim import TIM
from .version import __version__

__all__ = ['load_temporal', 'load_temporal_state_dict', 'save_temporal', 'temporal_state_dict']

State = Dict[str, Tensor]
_HEADER = 'cmr_layers_temporal'
_KINDS = (CME, SME, TIM)
_KEYS = {'network', 'num_frames', 'layers', 'extra', 'image_network', 'sha256'}
# What a layer computes beyond its weights. Starts are left out: they are over when a layer is loaded.
_SETTINGS = ('channels', 'input_fmt', 'num_prefix_tokens', 'reduction', 'kernel_size')


def temporal_state_dict(model: nn.Module, trained: bool = False, extra: Sequence[str] = ()) -> State:
    """The part of the state dict that belongs to CME, SME and TIM: parameters and buffers.

    Args:
        model: A network with temporal layers.
        trained: Whether to add all else that trains: the parameters that require a gradient, the buffers beside them,
            such as a batch norm's statistics, and batch norms without parameters that :func:`train_mode` trains. After
            :func:`freeze` that is the head.
        extra: Names of modules or keys of the state dict to add, or patterns of them, such as ``['fc']``.

    Returns:
        The tensors of the network itself, not copies, in the order of the state dict.

    Raises:
        ValueError: The model holds no temporal layer, or a name in extra is neither a module with a state nor a key.
        TypeError: model is no module, or extra is no list of names.

    Example:
        >>> from cmr_layers import SME
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), SME(8), nn.Flatten(), nn.Linear(8, 5))
        >>> list(temporal_state_dict(model, extra=['3']))
        ['1.conv.weight', '1.bn.weight', '1.bn.bias', '1.bn.running_mean', '1.bn.running_var', \
'1.bn.num_batches_tracked', '3.weight', '3.bias']
    """
    check_module('model', model)
    state = model.state_dict()
    keys = _temporal(model) | _matching(model, state, extra)
    if trained:
        parameters = dict(model.named_parameters(remove_duplicate=False))  # one that is tied has two keys
        owners = {name.rpartition('.')[0] for name, p in parameters.items() if p.requires_grad}
        owners |= {name for name, learns in bare_norms(model).items() if learns}
        frozen = {name for name, p in parameters.items() if not p.requires_grad}
        keys |= {key for key in state if key.rpartition('.')[0] in owners and key not in frozen}
    return {key: value for key, value in state.items() if key in keys}


def load_temporal_state_dict(model: nn.Module, state: Mapping[str, Tensor], extra: Sequence[str] = ()) -> None:
    """Load what :func:`temporal_state_dict` returned into a network with the same layers, all or nothing.

    Args:
        model: The network, with its temporal layers in place.
        state: Tensors by key: all of the temporal layers, and nothing else but what extra names.
        extra: Names of modules or keys, or patterns of them, whose keys state must have besides.

    Raises:
        ValueError: A key is missing or unexpected, or a tensor has another shape or dtype; nothing was loaded then.
            The model holds no temporal layer, or its tensors are on the meta device. A name in extra matches nothing.
        TypeError: model is no module, state holds no tensors, or extra is no list of names.

    Example:
        >>> from cmr_layers import TIM
        >>> one, other = (nn.Sequential(nn.Conv2d(3, 8, 1), TIM(8, init=init)) for init in ('tsm', 'identity'))
        >>> load_temporal_state_dict(other, temporal_state_dict(one))
        >>> bool((other[1].weight == one[1].weight).all())
        True
    """
    check_module('model', model)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(f'state must be tensors by key, got {type(state).__name__}')
    _load(model, state, _temporal(model) | _matching(model, model.state_dict(), extra), 'state')


def save_temporal(
        model: nn.Module, file: Union[str, 'os.PathLike[str]'], trained: bool = True, extra: Sequence[str] = (),
) -> None:
    """Save the temporal layers of a network, and what trained with them, into one safetensors file.

    A :class:`ClipModel` and the network inside write the same file. The image network is not saved; a digest of it is.
    So train with :func:`freeze` and :func:`train_mode`: whatever else moved is missing in the file, and
    :func:`load_temporal` refuses the network that you load it into.

    Args:
        model: The network.
        file: The file; it is overwritten.
        trained: Whether to add all else that trains, as in :func:`temporal_state_dict`.
        extra: Names of modules or keys to add, or patterns of them.

    Raises:
        ValueError: As :func:`temporal_state_dict`; everything trains, so that no small file can hold it; layers have
            different ``num_frames``; or a tensor has no values.
        TypeError: model is no module, or extra is no list of names.

    Example:
        >>> import tempfile, timm
        >>> from cmr_layers import freeze, retrofit
        >>> def build():
        ...     torch.manual_seed(0)  # the same image network each time, as pretrained=True gives it
        ...     resnet = timm.create_model('resnet18', num_classes=5)
        ...     _ = retrofit(resnet, num_frames=4)
        ...     return resnet.eval()
        >>> trained, fresh = build(), build()
        >>> _ = freeze(trained)
        >>> for p in trained.fc.parameters():
        ...     _ = nn.init.normal_(p)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_temporal(trained, f'{folder}/layers.safetensors')
        ...     load_temporal(fresh, f'{folder}/layers.safetensors')
        >>> frames = torch.randn(4, 3, 64, 64)
        >>> torch.equal(fresh(frames), trained(frames))
        True
    """
    check_module('model', model)
    network = _network(model)
    state = temporal_state_dict(network, trained, extra)
    rest = [key for key in network.state_dict() if key not in state]
    if trained and all(p.requires_grad for p in network.parameters()):
        raise ValueError(
            f'model ({type(network).__name__}) trains as a whole, so a file of what trained would hold all of it: '
            f'freeze(model) it before it trains, save it by save_model(), or pass trained=False')
    # copies: tensors may share memory, which safetensors refuses
    tensors = {key: _plain(key, value).detach().cpu().clone().contiguous() for key, value in state.items()}
    temporal = _temporal(network)
    header = {
        'cmr_layers': __version__, 'network': type(network).__name__, **_layers(network),
        'extra': [key for key in state if key not in temporal],
        'image_network': _digest(network, rest),
        'sha256': _digest_of(tensors)}
    part = f'{os.fspath(file)}.part'
    save_file(tensors, part, metadata={'format': 'pt', _HEADER: json.dumps(header)})
    os.replace(part, file)  # an interrupted call leaves the old file


def load_temporal(
        model: nn.Module, file: Union[str, 'os.PathLike[str]'], same_image_network: bool = True) -> None:
    """Merge a file of :func:`save_temporal` into a network with the same layers at the same places, all or nothing.

    Args:
        model: The network, with its temporal layers in place, or a :class:`ClipModel` around it.
        file: The file.
        same_image_network: Whether the rest of the network must have the weights that it had when the file was saved.
            False: the layers are only a start for another training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not one of :func:`save_temporal`, or damaged. Its layers differ from the model's in
            number, kind, place, settings or ``num_frames``. A tensor is missing or unexpected or has another shape or
            dtype. The image network has other weights. Nothing was loaded then.
        TypeError: model is no module.
    """
    check_module('model', model)
    network, name = _network(model), f'file={os.fspath(file)!r}'
    if not os.path.isfile(file):
        raise FileNotFoundError(f'{name} is no file; wanted one that save_temporal() wrote')
    try:
        with safe_open(file, framework='pt') as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, 'null'))
            # copies: what is read lies in the mapped file
            state = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{name} is damaged, or not one that save_temporal() wrote: {error}') from error
    if not isinstance(header, dict) or not header.keys() >= _KEYS:
        raise ValueError(
            f'{name} is not one that save_temporal() wrote; load_temporal_state_dict() takes tensors without a header')
    if _digest_of(state) != header['sha256']:
        raise ValueError(f'{name} is damaged: its tensors are not those that save_temporal() wrote')
    expected = _temporal(network) | set(header['extra'])
    _check_layers(network, header, name)
    current = network.state_dict()
    missing = [key for key in header['extra'] if key not in current]
    if missing:
        raise ValueError(f'{name} does not fit model ({type(network).__name__}): {few(missing)} is not in the model')
    _check(network, state, expected, name)
    if same_image_network:
        rest = [key for key in current if key not in expected]
        if _digest(network, rest) != header['image_network']:
            raise ValueError(
                f'{name} belongs to a {header["network"]} whose image network has other weights than this '
                f'{type(network).__name__}. More than the file holds was trained, or batch norms ran in training mode '
                f'(see freeze() and train_mode()), or another checkpoint or dtype was loaded. same_image_network=False '
                f'takes the layers as a start')
    _load(network, state, expected, name)


def _network(model: nn.Module) -> nn.Module:
    """The network in a ClipModel: both write the same file."""
    if not isinstance(model, ClipModel):
        return model
    outside = [key for key in temporal_keys(model) if not key.startswith('model.')]
    if outside:
        raise ValueError(f'{outside[0]} must be in the network of the ClipModel, got a layer outside of it')
    return model.model


def _temporal(model: nn.Module) -> Set[str]:
    keys = temporal_keys(model)
    if not keys:
        raise ValueError(
            f'model ({type(model).__name__}) holds no temporal layer; wanted one with CME, SME or TIM: retrofit() or '
            f'insert() it first')
    return keys


def _matching(model: nn.Module, state: Mapping[str, Any], extra: Sequence[str]) -> Set[str]:
    """The keys that names or patterns of modules or keys stand for."""
    if isinstance(extra, str) or not isinstance(extra, (list, tuple)) or not all(isinstance(n, str) for n in extra):
        raise TypeError(f'extra must be a list of names of modules or keys, got {extra!r}')
    keys: Set[str] = set()
    for pattern in extra:
        depth = pattern.count('.') + 1
        found = {key for key in state if fnmatch.fnmatchcase('.'.join(key.split('.')[:depth]), pattern)}
        if not found:
            raise ValueError(
                f'extra={pattern!r} must be a module of {type(model).__name__} with a state, or a key of it, got none; '
                f'it has {few(list(dict.fromkeys(key.split(".")[0] for key in state)))}')
        keys |= found
    return keys


def _check(model: nn.Module, state: Mapping[str, Tensor], expected: Set[str], name: str) -> None:
    current = model.state_dict()
    wrong = [f'{key} is missing' for key in current if key in expected and key not in state]
    wrong += [f'{key} is unexpected' for key in state if key not in expected]
    for key in [key for key in state if key in expected]:
        value, target = state[key], current[key]
        if value.is_meta or target.is_meta:
            wrong.append(f'{key} is on the meta device, without values')
        elif value.shape != target.shape:
            wrong.append(f'{key} is {list(value.shape)} for {list(target.shape)}')
        elif value.dtype != target.dtype:
            wrong.append(f'{key} is {value.dtype} for {target.dtype} (convert the model by model.to())')
    if wrong:
        raise ValueError(f'{name} does not fit model ({type(model).__name__}): {few(wrong)}')


def _load(model: nn.Module, state: Mapping[str, Tensor], expected: Set[str], name: str) -> None:
    _check(model, state, expected, name)
    current = model.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            current[key].copy_(value)  # into the parameters themselves, so optimizers keep theirs


def _layers(network: nn.Module) -> Dict[str, Any]:
    """What the temporal layers of a network are."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, ClipLayer)}
    frames = sorted({layer.num_frames for layer in layers.values()})
    if len(frames) != 1:
        raise ValueError(f'model ({type(network).__name__}) must have layers of one num_frames, got {frames}')
    at: Dict[nn.Module, str] = {}  # of layers that a module of another network runs: a block of ours has them named
    for name, module in network.named_modules():
        if isinstance(module, Host):
            place = module._cmr_place
            for where, group in (('before', place.before), ('after', place.after)):
                at.update({layer: f'{where} {name}, {n}' for n, layer in enumerate(group, 1)})
    described = {}
    for name, layer in layers.items():
        kind = type(layer)
        settings = {key: getattr(layer, key) for key in _SETTINGS if hasattr(layer, key)}
        if layer in at:
            settings['at'] = at[layer]
        if isinstance(layer, SME):
            norm = type(layer.bn).__name__
            settings['norm'] = [
                'BatchNorm2d' if norm == 'SyncBatchNorm' else norm, getattr(layer.bn, 'eps', None),
                getattr(layer.bn, 'num_groups', None)]
        described[name] = {
            'kind': kind.__name__ if kind in _KINDS else f'{kind.__module__}.{kind.__name__}', **settings}
    made: Dict[str, Any] = json.loads(json.dumps({'num_frames': frames[0], 'layers': described}))
    return made


def _check_layers(network: nn.Module, header: Dict[str, Any], name: str) -> None:
    """Raise a ValueError if the layers of a network are not those of a file."""
    own = _layers(network)
    want, got = header['layers'], own['layers']
    wrong = [f'{layer} ({want[layer]["kind"]}) is not in the model' for layer in want if layer not in got]
    wrong += [f'{layer} ({got[layer]["kind"]}) of the model is not in the file' for layer in got if layer not in want]
    for layer in [layer for layer in want if layer in got and want[layer] != got[layer]]:
        wrong += [
            f'{layer} has {key}={want[layer].get(key)!r} for {got[layer].get(key)!r}'
            for key in dict.fromkeys([*want[layer], *got[layer]]) if want[layer].get(key) != got[layer].get(key)]
    if wrong:
        raise ValueError(
            f'{name} has {len(want)} temporal layers of a {header["network"]}, which are not the {len(got)} of this '
            f'{type(network).__name__}: {few(wrong)}')
    if own['num_frames'] != header['num_frames']:
        raise ValueError(
            f'{name} has num_frames={header["num_frames"]}, the model has num_frames={own["num_frames"]}; '
            f'set_num_frames(model, {header["num_frames"]}) puts it right')


def _digest(network: nn.Module, keys: List[str]) -> str:
    """Digest of the tensors of an image network, but for the counters of batches, which no eval mode reads."""
    state = network.state_dict()
    return _digest_of({key: state[key] for key in keys if not key.endswith('num_batches_tracked')})


def _digest_of(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = _plain(key, tensors[key])
        digest.update(f'{key} {value.dtype} {list(value.shape)} '.encode())
        # bytes of one tensor at a time: a giant network is not copied as a whole
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.layout != torch.strided:
        raise ValueError(
            f'{key} must be a plain tensor with values, got '
            f'{f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__}')
    return value
