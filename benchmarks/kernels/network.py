"""Which kernels a network launches: its passes run on fake tensors, with the launchers and without the kernels."""
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cmr_layers.ops.path
from cmr_layers.ops import use_path
from cmr_layers.stage import FusedStage

from .record import DTYPES, Launch, record

__all__ = ['NETWORK', 'collect', 'launches', 'places']

NETWORK, SIZE = 'cmr_resnet50', 224
MODES = ('folded', 'fused', 'unfolded', 'training')


class _Operators(TorchDispatchMode):
    """Runs the package's operators as on a GPU, launchers and all, where fake tensors would only get their shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == 'cmr_layers':
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            return func.redispatch(keys, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Tensors hold no data, and the kernels take those of a CPU, too."""
    with patch.object(cmr_layers.ops.path, '_triton_obstacle', lambda x, num_frames: ''), \
            FakeTensorMode(allow_non_fake_inputs=False):
        yield


def _convert(model: nn.Module, dtype: torch.dtype, channels_last: bool) -> None:
    """``model.to(dtype, memory_format)``, which fake parameters do not take."""
    for module in model.modules():
        both: Any = (module._parameters, module._buffers)
        for tensors in both:
            for name, value in tensors.items():
                if value is not None and value.is_floating_point():
                    last = channels_last and value.ndim == 4
                    new = value.detach().to(
                        dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
                    tensors[name] = nn.Parameter(new) if isinstance(value, nn.Parameter) else new


def launches(
        batch: int = 2, num_frames: int = 8, dtype: torch.dtype = torch.float16, channels_last: bool = True,
        mode: str = 'folded',
) -> list[Launch]:
    """What one pass of a CMR-ResNet-50 launches.

    Args:
        batch: Clips, of 224x224.
        num_frames: Frames of a clip.
        dtype: Of frames and weights.
        channels_last: The layout of the network.
        mode: 'folded' or 'unfolded' for inference with the batch norms folded or not, 'fused' for folded stages that
            hand on what they know, 'training' for a forward and a backward pass.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
    return list(_launches(batch, num_frames, dtype, channels_last, mode))


@lru_cache(None)
def _launches(
        batch: int, num_frames: int, dtype: torch.dtype, channels_last: bool, mode: str) -> tuple[Launch, ...]:

    def call() -> None:
        training = mode == 'training'
        with _without_gpu(), torch.set_grad_enabled(training):
            model = timm.create_model(NETWORK, num_frames=num_frames).train(training)
            if mode in ('folded', 'fused'):
                model = reparameterize_model(model, inplace=True)
            if mode == 'fused':  # as fuse_stages does, which compares numbers, and here are none
                for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                    stage.__class__ = FusedStage
            _convert(model, dtype, channels_last)
            clips = torch.empty(batch, num_frames, 3, SIZE, SIZE, dtype=dtype)
            with use_path('triton'), _Operators():  # type: ignore[no-untyped-call]
                logits = model(clips)
                if training:
                    logits.sum().backward()

    return tuple(record(call))


def places(found: list[Launch]) -> list[str]:
    """The frames that each launch is about, as 'channels x height'. Launches on vectors follow one on frames."""
    names, name = [], ''
    for launch in found:
        shape = next((buffer.shape for buffer in launch.frames.values()), None)
        name = f'{shape[1]}x{shape[2]}' if shape else name
        names.append(name)
    return names


def collect(
        dtypes: list[str], layouts: list[bool], frames: list[int], stages: list[str] | None = None,
        modes: tuple[str, ...] = MODES,
) -> list[Launch]:
    """The different kernels of some modes, in order, each at its first launch.

    Args:
        dtypes: Keys of DTYPES.
        layouts: Whether channels_last.
        frames: Frames of a clip.
        stages: Only those of these :func:`places`.
        modes: As :func:`launches` knows them.
    """
    different: dict[tuple[Any, ...], Launch] = {}
    for dtype in dtypes:
        for layout in layouts:
            for num_frames in frames:
                for mode in modes:
                    found = launches(2, num_frames, DTYPES[dtype], layout, mode)
                    for launch, place in zip(found, places(found)):
                        if stages is None or place in stages:
                            different.setdefault(launch.specialisation, launch)
    return list(different.values())
