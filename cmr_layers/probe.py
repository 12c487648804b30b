"""Find out what flows at the modules of a network, by running it on images.

In general a module does not tell its channels, nor in which order the axes of its tensors come. Two passes show it. One
has two images, and the other one image that is twice as wide: the axis of the frames follows the number of images, one
axis of the places follows the width, and the channels follow neither. :mod:`.sighting` draws the conclusions.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .sighting import Form, Pass, Patches, Sighting
from .snapshot import Snapshot

__all__ = ['Call', 'evaluating', 'is_passed_twice', 'like', 'probe', 'zero_image']


def is_passed_twice(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
    """Whether the first argument is another one, too, as query, key and value may be: layers would change it alone."""
    return any(x is args[0] for x in (*args[1:], *kwargs.values()) if args)


class Call:
    """The inputs and outputs of a module in the passes."""

    def __init__(self, name: str, around: List[nn.Module]) -> None:
        self.name = name
        self.around = around  # the module and those that hold it
        self.seen: Dict[str, List[Sighting]] = {'before': [], 'after': []}
        self.patches: Optional[Patches] = None
        self.shares = False  # whether the first argument is another one, too

    def record(self, run: Pass, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> None:
        self.shares |= is_passed_twice(args, kwargs)
        self.seen['before'].append(Sighting.of(run, args[0] if args else None))
        self.seen['after'].append(Sighting.of(run, output, may_be_first=True))

    def form(self, where: str, input_fmt: Optional[str] = None, num_prefix_tokens: Optional[int] = None) -> Form:
        """Channels and format of the input ('before') or the output ('after').

        Args:
            where: 'before' or 'after'.
            input_fmt: The format, if somebody knows it.
            num_prefix_tokens: Likewise.

        Raises:
            ValueError: It is no map and no tokens of the frames, or which of them can't be told. Layers there would not
                run in inference.
        """
        side = f'the {"input" if where == "before" else "output"} of at={self.name!r}'
        if not self.seen[where]:
            raise ValueError(f'at={self.name!r} does not run in a forward pass of the model; wanted a module that does')
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in self.around[:-1]):
            raise ValueError(
                f'at={self.name!r} must not be inside of an nn.TransformerEncoderLayer, which does not run its modules '
                f'in inference, but reads their weights; choose the nn.TransformerEncoderLayer itself')
        assert self.patches is not None
        return self.patches.form(side, self.around, self.seen[where], input_fmt, num_prefix_tokens)

    def check_alone(self, where: str) -> None:
        """Raise a ValueError if layers would change one argument of several that are the same tensor."""
        if where == 'before' and self.shares:
            raise ValueError(
                f'the input of at={self.name!r} must be one argument, got a tensor that is passed twice, such as query '
                f'and key: layers would change the first only. Choose the module before it, or the block around it')


def probe(
        model: nn.Module,
        targets: Dict[str, nn.Module],
        example_input: Optional[Tensor] = None,
) -> Dict[str, Call]:
    """Run the model on images, in eval mode and without gradients, and record the calls of the targets."""
    if example_input is None:
        example_input = zero_image(model, _image_size(model))
    elif not isinstance(example_input, Tensor):
        raise TypeError(f'example_input must be a tensor (1, C, H, W), got {type(example_input).__name__}')
    elif example_input.ndim != 4 or example_input.shape[0] != 1:
        raise ValueError(f'example_input must be one image (1, C, H, W), got {list(example_input.shape)}')
    calls = {name: Call(name, _around(model, name)) for name in targets}
    patches = Patches(model)
    # Images that differ everywhere: tokens that are the same for both belong to no place.
    images = torch.cat([example_input, _another(example_input)])
    with _unchanged(model), evaluating(model):
        try:
            _run(model, images, targets, calls, patches)
        except Exception as error:
            raise ValueError(
                f'the model could not run on images of shape {list(images.shape)} to find its channels: {error}. '
                f'Pass one that it can run on as example_input'
            ) from error
        first = {name: (list(call.seen['before']), list(call.seen['after'])) for name, call in calls.items()}
        try:
            _run(model, torch.cat([example_input, example_input], 3), targets, calls, patches)
            # a network may resize its images, and then has seen one size only
            patches.sizes = 2 if patches.vary() else 1
        except Exception:  # a network of a fixed size may raise anything
            patches.sizes = 1
        if patches.sizes == 1:
            for name, (before, after) in first.items():
                calls[name].seen = {'before': before, 'after': after}
    for call in calls.values():
        call.patches = patches
    return calls


def _around(model: nn.Module, name: str) -> List[nn.Module]:
    parts = name.split('.') if name else []
    return [model.get_submodule('.'.join(parts[:n])) for n in range(len(parts) + 1)]


def _another(image: Tensor) -> Tensor:
    """An image that is another one at each place."""
    if not image.is_floating_point():
        return image.flip(3)
    generator = None if image.is_meta else torch.Generator(image.device).manual_seed(0)  # leave the user's alone
    return image + torch.randn(image.shape, device=image.device, generator=generator).to(image.dtype)


def _run(
        model: nn.Module, images: Tensor, targets: Dict[str, nn.Module], calls: Dict[str, Call],
        patches: Patches,
) -> None:
    """One pass, whose calls are recorded. ``patches`` watches all modules."""
    run = Pass(images.shape[0], images.shape[2], images.shape[3])

    def recorder(call: Call) -> Any:
        def record(module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> None:
            call.record(run, args, kwargs, output)
        return record

    handles = [
        target.register_forward_hook(recorder(calls[name]), with_kwargs=True) for name, target in targets.items()]
    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(lambda module, args: patches.look(run, module, args)),
            module.register_forward_hook(lambda module, args, output: patches.watch(run, module, output))]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a pass writes on modules: a cache of biases, which other weights would not change, or a smaller window.
    """
    before = Snapshot(model)
    try:
        yield
    finally:
        before.undo(classes=False)  # a lazy module has become another one, and stays it


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
    """Height and width that the network was built for, or declares for timm or transformers, or 224x224."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    config = getattr(model, 'config', None)
    built_for = (getattr(module, 'img_size', None) for module in model.modules())  # what makes patches says it
    size: Any = next((size for size in built_for if isinstance(size, tuple) and len(size) == 2), None)
    if not size:
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
