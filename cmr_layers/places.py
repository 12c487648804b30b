"""Find the blocks of any image network, and where in each of them temporal layers belong.

A block is what a network repeats: a module with at least two convolutions or projections that stands in an
``nn.Sequential``, an ``nn.ModuleList`` or a stage. The layers go before its attention or its first convolution, that
is onto its residual branch, behind a norm that may be there. Where that takes in windows of frames, or heads, they go
before the first part that takes the input of the block, such as a norm, or else before the block.
"""
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from torch import nn

from .probe import Call, is_passed_twice
from .residual import CONTAINERS, SHORTCUT, WEIGHTED

__all__ = ['Block', 'around', 'find_blocks', 'watching']

_MIXER = re.compile(r'attn|attention|token_mixer|mixer|mlp_tokens|xca|linear_tokens|rnn_tokens')


class Entry(NamedTuple):
    """A part of a block that may be the beginning of its residual branch, as it was called."""
    name: str
    mixes: bool  # an attention or a convolution
    takes_input: bool  # it was given the very input of the block


class Block:
    """A block, and what ran in it in a forward pass."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.entries: List[Entry] = []
        self.inside = False  # it ran inside another block, which it was given to: it is a part, not a block
        self._input: Any = None

    def parts(self) -> Iterator[Tuple[str, nn.Module, bool]]:
        """Parts to watch: their names in the network, and whether they are attentions or convolutions."""
        inside: Optional[str] = None
        for own, module in self.module.named_modules():
            if not own or (inside is not None and own.startswith(inside)):
                continue
            if any(SHORTCUT.search(part) for part in own.split('.')):
                continue
            mixer = bool(_MIXER.search(own.rpartition('.')[2])) and bool(module._modules)
            if mixer:
                inside = f'{own}.'
            mixes = mixer or isinstance(module, nn.Conv2d)
            if mixes or '.' not in own:
                yield f'{self.name}.{own}', module, mixes

    def begin(self, args: Tuple[Any, ...]) -> None:
        self._input, self.entries = args[0] if args else None, []

    def look(self, name: str, mixes: bool, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        if not is_passed_twice(args, kwargs):
            self.entries.append(Entry(name, mixes, bool(args) and args[0] is self._input))

    def end(self) -> None:
        self._input = None

    def entry(self, calls: Dict[str, Call], sizes: int) -> str:
        """The module that the layers belong before.

        Raises:
            ValueError: No module of the block takes frames in a format that is known; why, of the block itself.
        """
        mixers = [entry for entry in self.entries if entry.mixes]
        takers = [entry.name for entry in self.entries if entry.takes_input]
        names = [*(entry.name for entry in mixers[:1]), *takers[:1], self.name, *(entry.name for entry in mixers[1:])]
        if sum(entry.takes_input for entry in mixers) > 1:
            names = [self.name]  # several branches begin side by side
        for name in names:
            try:
                calls[name].form('before')
            except ValueError:
                continue
            if len(calls[name].seen['before']) == sizes:  # else it runs several times, or in several blocks
                return name
        calls[self.name].form('before')
        raise ValueError(f'the block {self.name!r} has no module that runs once and takes frames')

    def is_head(self, calls: Dict[str, Call]) -> bool:
        """Whether it takes one vector of each image, or returns a class token alone: it comes after the blocks."""
        before, after = (
            [sighting.shape or () for sighting in calls[self.name].seen[where]] for where in ('before', 'after'))
        return bool(before) and (
            all(len(shape) == 2 for shape in before) or all(len(shape) == 3 and shape[1] == 1 for shape in after))

    def takes(self, calls: Dict[str, Call], sizes: int) -> bool:
        """Whether layers have a place in it."""
        try:
            self.entry(calls, sizes)
        except ValueError:
            return False
        return True


def find_blocks(model: nn.Module) -> List[List[Block]]:
    """The blocks of a network, one list for each stage, in the order of the network's modules.

    A network that repeats nothing, such as a VGG, has its stages for blocks, if timm says where they end.
    """
    found = _chains('', model) or [
        [(info['module'], model.get_submodule(info['module']))] for info in getattr(model, 'feature_info', [])
        if isinstance(info, dict) and info.get('module')]
    return [[Block(name, module) for name, module in stage] for stage in found]


def _chains(name: str, module: nn.Module) -> List[List[Tuple[str, nn.Module]]]:
    """Modules that follow each other in containers, innermost ones only."""
    chains: List[List[Tuple[str, nn.Module]]] = []
    own: List[Tuple[str, nn.Module]] = []
    for child_name, child in module.named_children():
        path = f'{name}.{child_name}' if name else child_name
        inner = _chains(path, child)
        chains += inner
        if not inner and not isinstance(child, CONTAINERS) and _is_composite(child):
            own.append((path, child))
    if re.search('patch_?embed', name.rpartition('.')[2].lower()):
        own = []  # they take the image
    kinds = {type(child) for _, child in own}
    is_stage = re.search('stage|tree', type(module).__name__.lower()) is not None
    if own and (isinstance(module, CONTAINERS) or (is_stage and len(kinds) == 1)):
        chains.append(own)
    elif not name:
        # a network may hold its blocks as children of its own
        repeated = [kind for kind in kinds if sum(type(child) is kind for _, child in own) > 1]
        chains += [[(path, child) for path, child in own if type(child) in repeated]] if repeated else []
    return chains


def around(model: nn.Module, stage: List[Block]) -> List[Block]:
    """The module that holds the blocks of a stage, if it is not the network: a block, if they take parts of frames."""
    name = stage[0].name
    while '.' in name:
        name = name.rpartition('.')[0]
        module = model.get_submodule(name)
        if not isinstance(module, CONTAINERS):
            return [Block(name, module)]
    return []


def _is_composite(module: nn.Module) -> bool:
    return bool(module._modules) and sum(isinstance(part, WEIGHTED) for part in module.modules()) > 1


@contextmanager
def watching(blocks: List[Block]) -> Iterator[Dict[str, nn.Module]]:
    """Watch the blocks in the forward passes that run inside. Yields the modules to probe."""
    targets: Dict[str, nn.Module] = {}
    handles = []
    running: List[Block] = []

    def begin(block: Block, args: Tuple[Any, ...]) -> None:
        block.inside |= bool(running)
        running.append(block)
        block.begin(args)

    def end(block: Block) -> None:
        running.remove(block)
        block.end()

    for block in blocks:
        targets[block.name] = block.module
        handles.append(block.module.register_forward_pre_hook(lambda _, args, at=block: begin(at, args)))
        handles.append(block.module.register_forward_hook(lambda _, args, out, at=block: end(at), always_call=True))
        for name, module, mixes in block.parts():
            targets[name] = module
            handles.append(module.register_forward_pre_hook(
                lambda _, args, kwargs, at=block, name=name, mixes=mixes: at.look(name, mixes, args, kwargs),
                with_kwargs=True))
    try:
        yield targets
    finally:
        for handle in handles:
            handle.remove()
