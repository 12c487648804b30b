"""What is timed: a model, in a mode, in a setting."""
from typing import Any, NamedTuple

import torch

from benchmarks.runtime.models import MODELS

__all__ = ['DEVICES', 'MODES', 'ON', 'Candidate', 'Mode', 'Setting', 'takes']

# Where the tensors of a device's settings are: a rehearsal without a GPU puts those of 'cuda' elsewhere
DEVICES = {'cpu': 'cpu', 'cuda': 'cuda'}
_DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class Mode(NamedTuple):
    """What is done to a network, and which path its layers take."""
    folded: bool = True
    path: str = 'auto'
    compiled: bool = False
    frozen: bool = False
    graph: bool = False


MODES = {
    'reference': Mode(folded=False, path='reference'),
    'unfolded': Mode(folded=False),
    'folded': Mode(),
    'graph': Mode(graph=True),
    'compiled': Mode(compiled=True),
    'frozen': Mode(compiled=True, frozen=True),
    'compiled-graph': Mode(compiled=True, graph=True),
    'compiled-reference': Mode(path='reference', compiled=True),
    'compiled-reference-graph': Mode(path='reference', compiled=True, graph=True),
}
ON = {
    'cpu': tuple(name for name, mode in MODES.items() if not mode.graph),
    'cuda': tuple(name for name, mode in MODES.items() if not mode.frozen),
}


class Setting(NamedTuple):
    """Where a model is measured, and on what."""
    device: str
    dtype: str
    batch: int
    size: int
    layout: str
    frames: int = 8

    @classmethod
    def of(cls, entry: dict[str, Any]) -> 'Setting':
        """The setting of a result, which holds the fields among others."""
        return cls(**{field: entry[field] for field in cls._fields if field in entry})

    @property
    def label(self) -> str:
        return f'{self.device}, {self.dtype}, batch {self.batch}, {self.frames}x{self.size}x{self.size}, {self.layout}'

    @property
    def torch_device(self) -> torch.device:
        return torch.device(DEVICES[self.device])

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == 'channels_last' else torch.contiguous_format


class Candidate(NamedTuple):
    """One model, in one mode, somewhere."""
    model: str
    mode: str
    setting: Setting
    width: float = 1  # of the network: a factor on the channels of all stages
    training: bool = False  # a network: a step of SGD; an operator: forward and backward pass

    @classmethod
    def of(cls, entry: dict[str, Any]) -> 'Candidate':
        """The candidate of a result."""
        return cls(entry['model'], entry['mode'], Setting.of(entry), entry['width'], entry['training'])

    @property
    def compiles(self) -> bool:
        return MODES[self.mode].compiled


def takes(model: str, setting: Setting) -> bool:
    """Whether a model runs on clips of this length and size."""
    lengths, sizes = MODELS[model].frames, MODELS[model].sizes
    return (lengths is None or setting.frames in lengths) and (sizes is None or setting.size in sizes)
