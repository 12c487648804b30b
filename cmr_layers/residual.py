"""Find the stages of a network, the blocks of a stage and the place where a block's residual branch begins.

A block has one of a few names for the beginning of its residual branch, see ``_ENTRIES``. A stage is a module that
holds blocks at any depth, such as an ``nn.Sequential``, timm's ``RegStage`` or a tree of DLA. Stages are numbered
children (``layer1``, ``res2``, ``s1``) or the children of a container (``stages.0``).
"""
import fnmatch
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

__all__ = ['CONTAINERS', 'SHORTCUT', 'WEIGHTED', 'Branch', 'Stages', 'find_stages', 'is_match', 'watching']

# A stage is a list of (name, block).
Stage = List[Tuple[str, nn.Module]]
Stages = List[Stage]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Children that begin a residual branch: of most networks, of timm's byobnet, of transformers, of torchvision's RegNet.
_ENTRIES = ('conv1', 'conv1_1x1', 'conv1_kxk', 'layer', 'f')
_NUMBERED = re.compile(r'(layer|res|stage|block|level|s)_?(\d+)')
SHORTCUT = re.compile(r'down_?sample|short_?cut|skip|identity|^proj')
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_WAY_OUT = 'Name the modules that are stages by stages=, or put the layers at any module by insert()'


def find_stages(
        model: nn.Module, stages: Optional[Union[str, Sequence[str]]] = None) -> Tuple[str, Stages]:
    """The stages of a network, and words for where they are.

    Args:
        model: The network, or a network that contains it.
        stages: Names or patterns of the modules that are stages. None: they are looked for.

    Raises:
        ValueError: There are no stages, or it is not clear which modules they are, or a name matches nothing.
        TypeError: stages is no name and no list of names.
    """
    if stages is not None:
        named = [(name, _all_blocks(name, model.get_submodule(name))) for name in _match(model, stages)]
        for name, blocks in named:
            if not blocks:
                raise ValueError(
                    f'stages={name!r} must hold blocks with a convolution, got a '
                    f'{type(model.get_submodule(name)).__name__}')
        modules = [block for _, blocks in named for _, block in blocks]
        if len(set(modules)) != len(modules):
            raise ValueError(f'stages={stages!r} must be modules that hold different blocks; some hold the same ones')
        return _between([name for name, _ in named]), [blocks for _, blocks in named]
    hosts = _hosts('', model)
    kind = type(model).__name__
    if not hosts:
        raise ValueError(
            f'model ({kind}) holds no ResNet that is known: no stages (layer1 to layerN, res2 to res5, stages.*) of '
            f'blocks that begin with {", ".join(_ENTRIES[:-2])}. {_WAY_OUT}')
    strange = {root: _strange(root, names, model) for root, names in hosts.items()}
    (root, names), *more = hosts.items()
    if more and not all(strange.values()):
        raise ValueError(
            f'model ({kind}) holds several ResNets: {", ".join(name or "itself" for name in hosts)}; wanted one. Pass '
            f'one of them, or name the modules that are stages by stages=')
    if strange[root]:
        raise ValueError(
            f'model ({kind}) holds no plain ResNet: beside the blocks of {_between(names)} is {strange[root][0]}, '
            f'which is not known. {_WAY_OUT}')
    return _between(names), [_known_blocks(name, model.get_submodule(name)) for name in names]


def _strange(root: str, names: List[str], model: nn.Module) -> List[str]:
    """Modules of a network that may be blocks, too, and are none of its stages' known ones."""
    inside = {block for name in names for _, block in _known_blocks(name, model.get_submodule(name))}
    found = [name for stage in names for name, _ in _others(stage, model.get_submodule(stage), everywhere=True)]
    children = dict(_children(root, model.get_submodule(root)))
    found += [name for name, block in _in_containers(root, model.get_submodule(root)) if block not in inside]
    # children that look like stages behind the first one and hold no block
    own = list(children)
    groups = {_group(name) for name in names} if not _is_container(model.get_submodule(root)) else None
    for name in own[own.index(names[0]):]:
        if name not in names and _weights(children[name]) > 1 and (groups is None or _group(name) in groups):
            found.append(name)
    return found


def _between(names: List[str]) -> str:
    return names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'


def _match(model: nn.Module, stages: Union[str, Sequence[str]]) -> List[str]:
    patterns = [stages] if isinstance(stages, str) else stages
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f'stages must be names or patterns of modules, or None, got {stages!r}')
    if not patterns:
        raise ValueError(f'stages must name at least one module, got {stages!r}')
    names = [name for name, _ in model.named_modules() if name]
    selected: Dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in names if is_match(name, pattern)]
        if not matched:
            level = [name for name in names if name.count('.') == pattern.count('.')]
            raise ValueError(
                f'stages={pattern!r} matches no module of {type(model).__name__}; it has '
                f'{", ".join(level[:8] or names[:8])}, ...')
        selected.update(dict.fromkeys(matched))
    return list(selected)


def is_match(name: str, pattern: str) -> bool:
    """Whether the name of a module matches a pattern, whose wildcards match within a component."""
    parts, wanted = name.split('.'), pattern.split('.')
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, CONTAINERS)


def _weights(module: nn.Module) -> int:
    return sum(isinstance(part, WEIGHTED) for part in module.modules())


def _entry(block: nn.Module) -> Optional[str]:
    """The child with which a block of a known kind begins its residual branch."""
    names = block._modules
    for name in [] if _is_container(block) else _ENTRIES:
        child = names.get(name)
        if child is None or isinstance(child, (nn.ModuleList, nn.ModuleDict)) or not _weights(child):
            continue
        # a depthwise convolution that has its pointwise one behind it is no block
        if not name.startswith('conv1') or any(other.startswith('conv') and other != name for other in names):
            return name
    return None


def _children(name: str, module: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    for own, child in module.named_children():
        yield (f'{name}.{own}' if name else own), child


def _known_blocks(name: str, module: nn.Module) -> Stage:
    """The blocks of a known kind in a module, which may be one itself."""
    if SHORTCUT.search(name.rpartition('.')[2]):
        return []
    if _entry(module) is not None:
        return [(name, module)]
    return [block for path, child in _children(name, module) for block in _known_blocks(path, child)]


def _others(name: str, module: nn.Module, everywhere: bool) -> Stage:
    """What stands beside blocks of a known kind and may be a block of another kind. A single convolution is none.

    Args:
        everywhere: Not only in a container of blocks, but also beside the container.
    """
    if _entry(module) is not None:
        return []
    children = list(_children(name, module))
    found = [other for path, child in children for other in _others(path, child, everywhere)]
    known = [path for path, child in children if _known_blocks(path, child)]
    if known if everywhere else _is_container(module) and any(_entry(child) is not None for _, child in children):
        found += [(path, child) for path, child in children if path not in known and _weights(child) > 1]
    return found


def _all_blocks(name: str, module: nn.Module) -> Stage:
    """The blocks in a module that the user calls a stage: of any kind, in the order of the network."""
    known = {id(block) for _, block in [*_known_blocks(name, module), *_others(name, module, everywhere=False)]}
    if known:
        return [
            (f'{name}.{own}' if own else name, block) for own, block in module.named_modules() if id(block) in known]
    if _is_container(module):
        return [block for path, child in _children(name, module) for block in _all_blocks(path, child)]
    for own in ('blocks', 'layers'):
        child = module._modules.get(own)
        if child is not None and _is_container(child):
            return _all_blocks(f'{name}.{own}', child)
    return [(name, module)] if module._modules and _weights(module) else []


def _hosts(name: str, module: nn.Module) -> Dict[str, List[str]]:
    """The innermost modules that have stages, with the names of these."""
    inner = {host: names for path, child in _children(name, module) for host, names in _hosts(path, child).items()}
    if inner:
        return inner
    children = list(_children(name, module))
    # a network may be pruned: then it has empty stages
    stages = [
        path for path, child in children
        if _entry(child) is None and (_known_blocks(path, child) or (type(child) is nn.Sequential and not len(child)))]
    groups: Dict[str, List[str]] = {}
    for path in stages:
        group = _group(path)
        if group is not None:
            groups.setdefault(group, []).append(path)
    candidates = [*groups.values(), *([stages] if _is_container(module) else [])]
    modules = dict(children)
    for names in candidates:
        if len(names) > 1 and any(modules[path]._modules for path in names):
            return {name: names}
    return {}


def _group(name: str) -> Optional[str]:
    """What stands before the number of a stage: 'layer' for layer1."""
    match = _NUMBERED.fullmatch(name.rpartition('.')[2])
    return match[1] if match else None


def _in_containers(name: str, module: nn.Module) -> Stage:
    """The blocks of a known kind that stand in some container."""
    return [
        (path, child) for above, part in module.named_modules() if _is_container(part)
        for path, child in _children('.'.join(filter(None, (name, above))), part) if _entry(child) is not None]


class Branch:
    """What a block gives to its convolutions in a forward pass, and so where its residual branch begins."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name, self.block = name, block
        self.known = _entry(block)
        if self.known is not None:
            self.known = _first(block, self.known)
        self.called = False
        self.shape: Optional[Tuple[int, ...]] = None  # of the block's input
        self.first: Optional[str] = None  # what runs first on the residual branch
        self.same_shape = self.is_input = False  # its input is like the block's, or the same
        self.beside: List[str] = []  # convolutions that read the same tensor
        self._input: Any = None
        self._entry_input: Any = None

    def targets(self) -> Iterator[Tuple[str, nn.Module]]:
        """The modules to watch."""
        inside = f'{self.known}.'
        for name, module in self.block.named_modules():
            if name == self.known or (
                    isinstance(module, WEIGHTED) and not name.startswith(inside)
                    and not any(SHORTCUT.search(part) for part in name.split('.'))):
                yield name, module

    def begin(self, args: Tuple[Any, ...]) -> None:
        self._input = args[0] if args else None
        self._entry_input, self.called = None, True
        self.shape = tuple(self._input.shape) if isinstance(self._input, Tensor) else None
        self.first, self.same_shape, self.is_input, self.beside = None, False, False, []

    def look(self, name: str, args: Tuple[Any, ...]) -> None:
        x = args[0] if args else None
        # the child with a known name that gets the input itself is the entry, whatever ran before
        is_entry = name == self.known and x is self._input and x is not None
        if self.first is None or (is_entry and not self.is_input):
            self.first, self._entry_input, self.beside = name, x, []
            self.is_input = x is not None and x is self._input
            self.same_shape = isinstance(x, Tensor) and len(x.shape) == 4 and tuple(x.shape) == self.shape
        elif x is self._entry_input and name != self.first:
            self.beside.append(name)

    def end(self) -> None:
        self._input = self._entry_input = None  # not longer in memory than the block runs

    def entry(self, model: nn.Module) -> str:
        """Name, in the block, of the module that CME and TIM belong in front of."""
        where = f'block {self.name!r} ({type(self.block).__name__})'
        start = f'model ({type(model).__name__}) is not supported: {where} '
        if not self.called or self.first is None:
            raise ValueError(
                f'{start}{"runs no convolution of its own" if self.called else "is not called"} in a forward pass, as '
                f'in a traced network. {_WAY_OUT}')
        if not self.same_shape or (self.known is not None and self.first != self.known):
            raise ValueError(
                f'{start}does not hand its input to {self.known or self.first!r}, where CME and TIM belong, nor what '
                f'norms and activations make of it: its input is {self.shape or "no tensor"}, and {self.first!r} runs '
                f'first. {_WAY_OUT}')
        if self.known is None and self.beside:
            raise ValueError(
                f'{start}has several branches: {self.first!r} and {", ".join(map(repr, self.beside))} read the same '
                f'tensor, and it is not clear which begins the residual branch. insert() can put the layers at any '
                f'module')
        return self.first


def _first(block: nn.Module, name: str) -> str:
    """Follow an ``nn.Sequential`` down to the module that takes its input: it can't run layers itself."""
    module = block.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        child = next(iter(module._modules))
        name, module = f'{name}.{child}', module.get_submodule(child)
    return name


@contextmanager
def watching(stages: Stages) -> Iterator[Dict[str, Branch]]:
    """Watch the residual branches of all blocks in the forward passes that run inside."""
    branches = {name: Branch(name, block) for stage in stages for name, block in stage}
    handles = []
    for branch in branches.values():
        handles.append(branch.block.register_forward_pre_hook(lambda _, args, at=branch: at.begin(args)))
        handles.append(branch.block.register_forward_hook(lambda _, args, out, at=branch: at.end()))
        for name, module in branch.targets():
            handles.append(module.register_forward_pre_hook(
                lambda _, args, at=branch, name=name: at.look(name, args)))
    try:
        yield branches
    finally:
        for handle in handles:
            handle.remove()
