"""What the launchers of the kernels would launch: they run on tensors without memory, and no kernel does."""
import importlib
import math
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import cmr_layers.ops

__all__ = ['DTYPES', 'Buffer', 'Launch', 'Recorder', 'record']

GRID = 65535  # second and third dimension of a launch, at most
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


class Buffer(NamedTuple):
    """A tensor that a kernel was given: its shape, bytes of an element, and whether its memory is in another order."""
    shape: tuple[int, ...]
    itemsize: int
    channels_last: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return self.itemsize * torch.Size(self.shape).numel()


class Launch(NamedTuple):
    """A kernel as it is specialised for its arguments, the arguments, and the number of programs."""
    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    name: str
    grid: tuple[int, ...] = (1,)
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def specialisation(self) -> tuple[Any, ...]:
        """Launches that have it in common run the same machine code."""
        return self[:6]

    @property
    def operations(self) -> int:
        """Of the product of frames x and a matrix, if the kernel multiplies them."""
        x, weight = self.buffers.get('x'), self.buffers.get('weight')
        return 2 * math.prod(x.shape) * weight.shape[0] if x and weight else 0

    @property
    def frames(self) -> dict[str, Buffer]:
        """The frames among its arguments: the first tensor that is (N, C, H, W), and those of its N, H and W."""
        shaped = {name: buffer for name, buffer in self.buffers.items() if len(buffer.shape) == 4}
        sizes = {name: (buffer.shape[0], *buffer.shape[2:]) for name, buffer in shaped.items()}
        return {name: buffer for name, buffer in shaped.items() if sizes[name] == next(iter(sizes.values()))}

    @property
    def buffers(self) -> dict[str, Buffer]:
        """The tensors among its arguments."""
        return {name: value for name, value in self.arguments if isinstance(value, Buffer)}


class Recorder:
    """Stands where a kernel stood and keeps what it was to be launched with."""

    def __init__(self, kernel: JITFunction[Any], launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **meta: Any) -> None:
            names = self.kernel.arg_names
            assert all(size <= GRID for size in grid[1:]), (self.kernel, grid)
            options = {key: meta.pop(key) for key in list(meta) if key not in names}
            self.launches.append(
                _specialise(self.kernel, {**dict(zip(names, args)), **meta}, options)._replace(grid=tuple(grid)))
        return launch


def _specialise(kernel: JITFunction[Any], values: dict[str, Any], options: dict[str, Any]) -> Launch:
    """What Triton does at a launch: a 1 and None become constants, multiples of 16 are noted."""
    signature, constants, aligned, arguments = {}, {}, [], {}
    for name, value in values.items():
        constexpr = kernel.params[kernel.arg_names.index(name)].is_constexpr
        arguments[name] = value
        if constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = 'constexpr', value
        elif isinstance(value, Tensor):
            names = {v: f'*{k}' for k, v in DTYPES.items()}
            signature[name] = names[value.dtype]
            aligned.append(name)
            arguments[name] = Buffer(tuple(value.shape), value.element_size(), not value.is_contiguous())
        elif isinstance(value, float):
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32' if value < 2 ** 31 else 'i64'
            aligned += [name] if value % 16 == 0 else []
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()),
                  kernel.fn.__name__, arguments=tuple(arguments.items()))


def _modules() -> list[ModuleType]:
    """Where the kernels are: the package's files of kernels."""
    names = [info.name for info in pkgutil.iter_modules(cmr_layers.ops.__path__) if info.name.startswith('triton_')]
    return [importlib.import_module(f'cmr_layers.ops.{name}') for name in names]


def record(call: Callable[[], Any]) -> list[Launch]:
    """What a function would launch, given tensors without memory."""
    launches: list[Launch] = []
    kernels = [(module, name, value) for module in _modules() for name, value in vars(module).items()
               if isinstance(value, JITFunction)]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(kernel, launches))
        call()
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return launches
