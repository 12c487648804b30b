"""Find the channels at the modules of a network by one forward pass of one image.

In general a module does not tell its channels: it may be a block of convolutions, an activation, or pruned.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = ['Call', 'evaluating', 'like', 'probe', 'zero_image']


class Call:
    """The inputs and outputs of a module in a forward pass."""

    def __init__(self, name: str, square: bool) -> None:
        self.name = name
        self.square = square  # whether the image is square
        self.passes: List[Tuple[Any, Any]] = []

    def record(self, module: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        self.passes.append((args[0] if args else None, output))

    @property
    def input(self) -> Any:
        return self.passes[0][0] if self.passes else None

    def channels(self, where: str) -> int:
        """Channels C of the input ('before') or the output ('after'), which must be (1, C, H, W)."""
        side = 'input' if where == 'before' else 'output'
        if not self.passes:
            raise ValueError(f'at={self.name!r} does not run in a forward pass of the model; wanted a module that does')
        found = {
            tuple(x.shape) if isinstance(x, Tensor) else 'not positional' if x is None else type(x).__name__
            for x in (call[where == 'after'] for call in self.passes)}
        shapes = [shape for shape in found if isinstance(shape, tuple) and len(shape) == 4 and shape[0] == 1]
        if self.square and any(height == width != channels for _, height, width, channels in shapes):
            raise ValueError(
                f'the {side} of at={self.name!r} looks like (N, H, W, C): for one square image it is {shapes[0]}; '
                f'wanted (N, C, H, W)'
            )
        channels = {shape[1] for shape in shapes}
        if len(shapes) != len(found) or len(channels) != 1:
            raise ValueError(
                f'the {side} of at={self.name!r} must be one tensor (N, C, H, W), with N frames and always the same C; '
                f'for one image it is {", ".join(map(str, sorted(map(str, found))))}'
            )
        return int(channels.pop())


def probe(
        model: nn.Module,
        targets: Dict[str, nn.Module],
        example_input: Optional[Tensor] = None,
) -> Dict[str, Call]:
    """Run the model once on one image, in eval mode and without gradients, and record the calls of the targets."""
    if example_input is None:
        example_input = zero_image(model, _image_size(model))
    elif not isinstance(example_input, Tensor):
        raise TypeError(f'example_input must be a tensor (1, C, H, W), got {type(example_input).__name__}')
    elif example_input.ndim != 4 or example_input.shape[0] != 1:
        raise ValueError(f'example_input must be one image (1, C, H, W), got {list(example_input.shape)}')
    calls = {name: Call(name, example_input.shape[2] == example_input.shape[3]) for name in targets}
    handles = [target.register_forward_hook(calls[name].record) for name, target in targets.items()]
    try:
        with evaluating(model):
            model(example_input)
    except Exception as error:
        raise ValueError(
            f'the model could not run on an image of shape {list(example_input.shape)} to find its channels: {error}. '
            f'Pass one that it can run on as example_input'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients. Afterwards every module is in its former mode again."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _in_channels(model: nn.Module) -> int:
    """Channels of the network's images: as it declares for timm or transformers, or as its first convolution has."""
    declared = getattr(model, 'in_chans', None) or getattr(getattr(model, 'config', None), 'num_channels', None)
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return declared if isinstance(declared, int) else first


def _image_size(model: nn.Module) -> Tuple[int, int]:
    """Height and width that the network declares for timm or transformers, or 224x224."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    config = getattr(model, 'config', None)
    size = cfg['input_size'][1:] if 'input_size' in cfg else getattr(config, 'image_size', None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width


def zero_image(model: nn.Module, size: Tuple[int, int]) -> Tensor:
    """A zero image for the network, (1, C, *size), on its device and in its dtype."""
    return torch.zeros(1, _in_channels(model), *size, **like(model, model))


def like(module: nn.Module, model: nn.Module) -> Dict[str, Any]:
    """device and dtype for a new layer: as the module's parameters have them, or else the model's."""
    for source in (module, model):
        for p in source.parameters():
            if p.is_floating_point():
                return {'device': p.device, 'dtype': p.dtype}
    return {'device': None, 'dtype': None}
