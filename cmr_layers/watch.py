"""Which batch norms may be part of the convolution before them, as one run of a network shows.

A batch norm may be folded if nobody but it sees what its convolution returns. Modules alone do not tell: a block may
add the convolution's output to something else before or after the batch norm reads it. So the run is watched from two
sides. Hooks tell which module is in its call; a mode of PyTorch's dispatcher tells which tensors each operation takes.
Tensors are told apart by their memory, so that views and changes in place count. What is still in memory after the run
was returned or kept by somebody, though no operation read it.
"""
import gc
from collections import Counter
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .bypass import is_bare
from .fuse import is_conv_class
from .hosts import Host

__all__ = ['Watch']


def _address(x: Tensor) -> Optional[int]:
    """Which memory a tensor is in; None if it has none of its own."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper of other tensors
        return None


def _kind(module: nn.Module) -> Type[nn.Module]:
    """A module's class. A host computes what its own class does, and its layers are modules that are watched."""
    return module._cmr_class if isinstance(module, Host) else type(module)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) or is_conv_class(_kind(module))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of any sort, PyTorch's or not."""
    return isinstance(module, _BatchNorm) or (
        not set(module._modules.keys()) - {'drop', 'act'} and 'BatchNorm' in type(module).__name__)


class _Output(NamedTuple):
    """What a convolution returned."""
    conv: nn.Module
    memory: StorageWeakRef  # weak, else all outputs would be in memory at once; yet nobody else gets its address
    geometry: Tuple[Any, ...]
    readers: List[Optional[nn.Module]]


def _geometry(x: Tensor) -> Tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype


class Watch(TorchDispatchMode):
    """Runs a network once and tells its batch norms apart.

    Args:
        model: The network, in eval mode.

    Attributes:
        pairs: Names of convolutions and of the batch norms that may be folded into them, in the order of the network.
        left: Of the other batch norms, their names and why they may not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.pairs: List[Tuple[str, str]] = []
        self.left: Dict[str, str] = {}
        self.names: Dict[nn.Module, str] = {}
        self.places: Counter[nn.Module] = Counter()
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, name)
            self.places[module] += 1
        self.owners: Dict[int, List[nn.Module]] = {}  # of parameters and buffers, by their address
        for module in self.names:
            for tensor in _tensors(module):
                address = _address(tensor)
                if address is not None and module not in self.owners.setdefault(address, []):
                    self.owners[address].append(module)
        # asked now, as the hooks of this class are no obstacle
        self.obstacles = {
            module: _conv_obstacle(module) if _is_conv(module) else _norm_obstacle(module)
            for module in self.names if _is_conv(module) or _is_norm(module)}

        self.running: List[nn.Module] = []
        self.calls: Counter[nn.Module] = Counter()
        self.outputs: Dict[int, _Output] = {}
        self.sources: Dict[nn.Module, _Output] = {}  # of a batch norm, whose output it got
        self.others: Dict[nn.Module, Optional[nn.Module]] = {}  # of a module, who else read its parameters

    def run(self, run: Callable[[], Any]) -> Any:
        """Call a function that runs the network, see who read what, and return its result."""
        with torch.inference_mode(False), self._hooks(), self:
            result = run()
        kept = {output.conv for output in self.sources.values() if not output.memory.expired()}
        if kept and gc.collect():  # not what nobody can reach any more
            kept = {output.conv for output in self.sources.values() if not output.memory.expired()}
        for module, name in self.names.items():
            if _is_norm(module) and not _is_conv(module):
                reason = self._why_not(module, kept)
                if reason:
                    self.left[name] = reason
                else:
                    self.pairs.append((self.names[self.sources[module].conv], name))
        return result

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: List[Any] = []
        try:
            for module in self.names:
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter))
                    handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Tuple[Any, ...]) -> None:
        self.running.append(module)
        self.calls[module] += 1
        if _is_norm(module) and args and type(args[0]) is Tensor:
            output = self.outputs.get(_address(args[0]) or 0)
            if output is not None and output.geometry == _geometry(args[0]):
                self.sources[module] = output

    def _leave(self, module: nn.Module, args: Tuple[Any, ...], y: Any) -> None:
        if module in self.running:
            while self.running.pop() is not module:  # what raised an error that somebody caught
                pass
        address = _address(y) if type(y) is Tensor else None
        if address is not None and _is_conv(module):
            self.outputs[address] = _Output(module, StorageWeakRef(y.untyped_storage()), _geometry(y), [])
        source = self.sources.get(module)
        if source is not None and (type(y) is not Tensor or y.dtype != source.geometry[-1]):
            self.obstacles[module] = self.obstacles[module] or 'changes the data type'

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = self.running[-1] if self.running else None
        for x in tree_leaves((args, kwargs)):
            address = _address(x) if isinstance(x, Tensor) else None
            if address is None:
                continue
            if address in self.outputs:
                self.outputs[address].readers.append(reader)
            for owner in self.owners.get(address, ()):
                if owner is not reader:
                    self.others.setdefault(owner, reader)
        return func(*args, **(kwargs or {}))

    def _name(self, module: Optional[nn.Module]) -> str:
        return self.names[module] if module is not None and self.names[module] else type(self.model).__name__

    def _why_not(self, norm: nn.Module, kept: Any) -> str:
        """Why a batch norm may not be folded; '' if it may."""
        own = self.obstacles[norm] or self._trouble(norm)
        if own or norm not in self.sources:
            return own or 'is not behind a convolution'
        output = self.sources[norm]
        conv = self._name(output.conv)
        trouble = self.obstacles[output.conv] or self._trouble(output.conv)
        if trouble:
            return f'its convolution {conv} {trouble}'
        if len(output.geometry[0]) != output.conv.weight.ndim:
            return f'its convolution {conv} got no batch'  # it has its channels elsewhere
        readers = [reader for reader in output.readers if reader is not norm]
        if readers:
            return f'the output of {conv} is read by {self._name(readers[0])}, too'
        if output.conv in kept:
            return f'the output of {conv} is returned or kept, too'
        return ''

    def _trouble(self, module: nn.Module) -> str:
        """Why a convolution or a batch norm can't be changed, as the run shows; '' if it can."""
        if self.places[module] > 1:
            return f'stands at {self.places[module]} places'
        if not self.calls[module]:
            return 'does not run'
        if self.calls[module] > 1:
            return f'runs {self.calls[module]} times'
        for tensor in _tensors(module):
            for owner in self.owners.get(_address(tensor) or 0, ()):
                if owner is not module:
                    return f'shares memory with {self._name(owner)}'
        if module in self.others:
            return f'has tensors that {self._name(self.others[module])} reads, too'
        return ''


def _tensors(module: nn.Module) -> List[Tensor]:
    return [t for group in (module._parameters, module._buffers) for t in group.values() if t is not None]


def _obstacle(module: nn.Module) -> str:
    if not is_bare(module):
        return 'has hooks, or a forward that was replaced'
    if is_parametrized(module) or module._parameters.keys() != {'weight', 'bias'}:
        return 'has parameters that are computed'
    if not all(
            type(t) in (Tensor, nn.Parameter) and (t.is_floating_point() or t.ndim == 0) for t in _tensors(module)):
        return 'has tensors of a kind of their own'
    return ''


def _conv_obstacle(conv: nn.Module) -> str:
    """Why nothing may be folded into a convolution, run or not; '' if something may."""
    if isinstance(conv, Host) and conv._cmr_place.after:
        return f'runs {", ".join(conv._cmr_place.after_names)} behind it'
    own = '' if is_conv_class(_kind(conv)) else f'is a {type(conv).__name__}, which has a forward of its own'
    return _obstacle(conv) or own


def _norm_obstacle(norm: nn.Module) -> str:
    """Why a batch norm may not be folded into any convolution; '' if it may."""
    if isinstance(norm, Host):
        return f'runs {", ".join(norm._cmr_place.layers)}'
    if type(norm) is not BatchNormAct2d and (
            not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            or type(norm).forward is not _BatchNorm.forward or type(norm).__call__ is not nn.Module.__call__):
        return f'is a {type(norm).__name__}, which has a forward of its own'
    if norm.running_mean is None or norm.running_var is None:
        return 'has no running statistics'
    others = [name for name in norm._modules if name not in ('drop', 'act')]
    return _obstacle(norm) or (f'holds {", ".join(others)}' if others else '')  # they would have no place any more
