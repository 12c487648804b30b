"""What the shapes that were seen at a module say: is it a map, which axis are the channels, which tokens are patches?

Nothing is guessed. What can't be told is an error that offers the argument which tells it.
"""
import re
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Type

from torch import Tensor, nn

from .format import check_format

__all__ = ['Form', 'Pass', 'Patches', 'Sighting']

Shape = Tuple[int, ...]
# Parameters that are tokens before the patches.
_TOKENS = re.compile(r'(cls|class|dist|distillation|reg|register)_?(embedding|tokens?)')
# Attributes that count the heads of an attention.
_HEADS = ('num_heads', 'heads', 'n_heads', 'num_attention_heads')
# Modules that take and return maps (N, C, H, W) and nothing else.
_OF_MAPS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_WANTED = '(N, C, H, W), (N, H, W, C) or (N, L, C), with N frames and always the same C'


class Form(NamedTuple):
    """Arguments of a layer that follow from its place."""
    channels: int
    input_fmt: str = 'NCHW'
    num_prefix_tokens: int = 0

    def kwargs(self) -> Dict[str, Any]:
        """What differs from the defaults, as a layer of somebody else may take maps (N, C, H, W) only."""
        return {key: value for key, value in self._asdict().items()
                if key != 'channels' and value != self._field_defaults[key]}


class Pass(NamedTuple):
    """What a pass ran on."""
    images: int
    height: int
    width: int


class Sighting(NamedTuple):
    """A tensor at a module, or what was there instead."""
    run: Pass
    shape: Optional[Shape]
    other: str = ''
    cube: Optional[Tensor] = None  # the tensor, if C, H and W are equal

    @classmethod
    def of(cls, run: Pass, x: Any, may_be_first: bool = False) -> 'Sighting':
        """``may_be_first``: a tuple whose first element is a tensor counts as that, as layers take it."""
        if may_be_first and type(x) is tuple and x and isinstance(x[0], Tensor):
            x = x[0]
        if not isinstance(x, Tensor):
            return cls(run, None, 'not positional' if x is None else type(x).__name__)
        if not x.is_floating_point():
            return cls(run, None, f'{str(x.dtype).removeprefix("torch.")} of {list(x.shape)}')
        return cls(run, tuple(x.shape), cube=x if _is_cube(x) else None)

    def __str__(self) -> str:
        n, height, width = self.run
        where = f'{n} image{"s" if n > 1 else ""} of {height}x{width}'
        return f'{self.other if self.shape is None else list(self.shape)} for {where}'


class Patches:
    """What a network says of its tokens, and which of them did not depend on the image where they were first seen."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes = 1  # of images that the network ran on
        self.fixed: Dict[int, List[bool]] = {}  # for a number of tokens, whether each was the same for both images
        self.counts: Set[int] = set()  # numbers of tokens
        self.shapes: Dict[Tuple[nn.Module, Pass], Set[Shape]] = {}  # of what modules returned for a frame
        self.cubes: List[Tensor] = []  # maps (N, C, H, W) whose C, H and W are equal
        self.windowed: Set[Type[nn.Module]] = set()  # classes of modules that took parts of frames
        counts = {getattr(m, 'num_prefix_tokens', None) for m in model.modules()}
        tokens = [p.shape[-2] if p.ndim > 1 else 1 for name, p in model.named_parameters()
                  if _TOKENS.match(name.rpartition('.')[2])]
        self.declared = {count for count in counts if isinstance(count, int)} | {*tokens, sum(tokens)}
        # what a product or a norm takes along the last axis
        self.features = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
        self.features |= {m.normalized_shape[-1] for m in model.modules() if isinstance(m, nn.LayerNorm)}
        heads = [getattr(m, name, None) for m in model.modules() for name in _HEADS]
        self.heads = {count for count in heads if isinstance(count, int)}  # a network may list those of its stages
        grids = {getattr(m, 'grid_size', None) for m in model.modules()}
        self.grids = {grid[0] * grid[1] for grid in grids if isinstance(grid, tuple) and len(grid) == 2}

    def watch(self, run: Pass, module: nn.Module, output: Any) -> None:
        """Look at what a module returned."""
        x = output[0] if type(output) is tuple and output else output
        if isinstance(x, Tensor) and x.ndim and x.shape[0] == run.images:
            self.shapes.setdefault((module, run), set()).add(tuple(x.shape[1:]))
        self.look(run, module, x)

    def look(self, run: Pass, module: nn.Module, x: Any) -> None:
        """Look at what a module takes or returned for two images, which differ everywhere."""
        x = x[0] if type(x) is tuple and x else x
        if not isinstance(x, Tensor):
            return
        if isinstance(module, _OF_MAPS) and _is_cube(x):
            self.cubes.append(x)
        if x.ndim > 2 and x.shape[0] != run.images and x.shape[0] % run.images == 0:
            self.windowed.add(type(module))
        if x.ndim == 3 and x.shape[0] == run.images == 2:
            self.counts.add(x.shape[1])
            if x.shape[1] not in self.fixed and x.numel() and not x.is_meta:
                same = (x[0] == x[1]).all(1).tolist()
                if not all(same):  # else the network lost the image before
                    self.fixed[x.shape[1]] = same

    def vary(self) -> bool:
        """Whether anything in the network follows the size of the image."""
        seen: Dict[nn.Module, Set[Shape]] = {}
        return any(seen.setdefault(module, shapes) != shapes for (module, _), shapes in self.shapes.items())

    def form(
            self, side: str, around: List[nn.Module], seen: List[Sighting], input_fmt: Optional[str],
            num_prefix_tokens: Optional[int],
    ) -> Form:
        """What a layer has to be at a place where these were seen; see :meth:`.probe.Call.form`."""
        said = '; '.join(dict.fromkeys(map(str, seen)))
        if any(sighting.shape is None for sighting in seen):
            raise ValueError(
                f'{side} must be one tensor of floating point numbers, {_WANTED}; it is {said}')
        if num_prefix_tokens is not None and input_fmt is None:
            input_fmt = 'NLC'
        shapes = [(sighting.run, sighting.shape) for sighting in seen if sighting.shape is not None]
        formats = {self._format(*one, input_fmt) for one in zip(*_by_size(shapes))}
        if formats == {'?'} and all(any(sighting.cube is cube for cube in self.cubes) for sighting in seen):
            formats = {'NCHW'}
        if len(formats) != 1 or '' in formats or '?' in formats:
            if any(len(one[1]) == 4 and self._is_attention(*one) for one in shapes):
                raise ValueError(
                    f'{side} looks like heads of an attention, (N, heads, L, L) or (N, heads, L, C / heads): it is '
                    f"{said}; wanted {_WANTED}. Choose the block around it, or pass input_fmt='NCHW' if it is a map")
            raise ValueError(_complaint(side, said, shapes, '?' in formats))
        fmt = formats.pop()
        if input_fmt is None and self.sizes == 1 and any(self._may_take_windows(m, shapes[0][1]) for m in around):
            raise ValueError(
                f'{side} may be one of several windows in a larger image, and layers would take windows for frames: it '
                f'is {said}, and the model ran on images of one size only. Choose the block around it, or pass '
                f'input_fmt={fmt!r} if it has one entry for each frame at each size that you use')
        axis = {'NCHW': 1, 'NHWC': 3, 'NLC': 2}[fmt]
        channels = {shape[axis] for _, shape in shapes}
        if len(channels) != 1:
            raise ValueError(f'{side} must be one tensor, {_WANTED}; it is {said}')
        prefix = 0
        if fmt == 'NLC':
            known = {self._prefix(side, said, *one) if num_prefix_tokens is None else num_prefix_tokens
                     for one in zip(*_by_size(shapes))}
            if len(known) != 1:
                raise ValueError(f'{side} has a varying number of prefix tokens: {said}')
            prefix = known.pop()
        return Form(channels.pop(), *check_format(fmt, prefix))

    def _format(self, one: Tuple[Pass, Shape], other: Tuple[Pass, Shape], told: Optional[str]) -> str:
        """The format of a tensor, seen at two sizes or twice the same. '': of none, '?': of several."""
        fits: List[str] = []
        ndim = len(one[1])
        if all(shape[0] == run.images and len(shape) == ndim for run, shape in (one, other)):
            if told is not None:
                fits = [told] if ndim == (3 if check_format(told, 0)[0] == 'NLC' else 4) else []
            elif ndim == 4 and not self._is_attention(*one):
                fits = [fmt for fmt, axis in (('NCHW', 2), ('NHWC', 1)) if _is_map(one, other, axis)]
            elif ndim == 3:
                fits = [fmt for fmt, axis in (('NLC', 1), ('NCL', 2)) if self._are_tokens(one, other, axis)]
        if fits == ['NLC', 'NCL'] and one[1][2] in self.features and one[1][1] not in self.features:
            fits = ['NLC']
        return '?' if len(fits) > 1 else '' if fits in ([], ['NCL']) else fits[0]

    def _may_take_windows(self, module: nn.Module, shape: Shape) -> bool:
        """Whether other modules of its class took windows, or its class has the name of one that does."""
        kind = type(module)
        if kind.__module__.startswith('torch.nn.'):
            return False
        if len(shape) == 3 and 'window' in kind.__name__.lower():
            return True
        whole = len(shape) == 3 and any(shape[1] - count in self.grids for count in {0, *self.declared})
        return kind in self.windowed and not whole

    def _is_attention(self, run: Pass, shape: Shape) -> bool:
        """Whether the second axis may be the heads of an attention, of tokens or of channels."""
        _, heads, length, last = shape
        if self.sizes == 1:  # a map may look like this; the user can say so
            sides = [side for count, side, same in ((heads, length, last), (last, heads, length))
                     if count in self.heads and side == same]
            if any(_is_grid(side, run) for side in sides):
                return True
        return heads in self.heads and (heads * last in self.features or (length == last and last in self.counts))

    def _are_tokens(self, one: Tuple[Pass, Shape], other: Tuple[Pass, Shape], axis: int) -> bool:
        """Whether an axis counts tokens and the other does not."""
        length, longer, channels = one[1][axis], other[1][axis], (one[1][3 - axis], other[1][3 - axis])
        if self.sizes == 2:
            return longer > length and channels[0] == channels[1]
        prefixes = {0, *self.declared, sum(self.fixed.get(length, []))}
        return any(_is_grid(length - prefix, one[0]) for prefix in prefixes)

    def _prefix(self, side: str, said: str, one: Tuple[Pass, Shape], other: Tuple[Pass, Shape]) -> int:
        """How many tokens come before the patches: what all that is known agrees on."""
        length = one[1][1]
        answers = {}
        if self.sizes == 2:  # the patches became twice as many, the others did not
            answers['from two sizes'] = 2 * length - other[1][1]
        elif any(length - count in self.grids for count in {0, *self.declared}):
            answers['beside the grid'] = next(count for count in {0, *self.declared} if length - count in self.grids)
        elif len(fits := [count for count in {0, *self.declared} if _is_grid(length - count, one[0])]) == 1:
            answers['beside a map'] = fits[0]
        same = self.fixed.get(length)
        if same is not None and (any(same) or not answers):  # a class token may have seen the image in a stage before
            count = sum(same)
            if not all(same[:count]):
                raise ValueError(
                    f'{side} has tokens that are no patches behind its first ones, at '
                    f'{[n for n, is_same in enumerate(same) if is_same]}: it is {said}. Layers take them at the '
                    f'beginning only; num_prefix_tokens= counts those there, and takes the others for patches')
            answers['that no image changes'] = count
        elif answers.get('from two sizes', 0) not in {0, *self.declared}:  # patches may be rounded up or down
            answers['that the network declares'] = max(self.declared)
        if len(set(answers.values())) != 1 or min(answers.values()) < 0:
            raise ValueError(
                f'{side} looks like tokens, but how many come before the patches can not be told: '
                f'{", ".join(f"{count} {why}" for why, count in answers.items()) or "nothing says it"}; it is {said}. '
                f'Pass num_prefix_tokens=, such as 1 for a class token')
        return next(iter(answers.values()))


def _is_cube(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] == x.shape[2] == x.shape[3]


def _by_size(shapes: List[Tuple[Pass, Shape]]) -> Tuple[List[Tuple[Pass, Shape]], List[Tuple[Pass, Shape]]]:
    """What was seen in the first pass, and what stood at the same call in the second, if there was one."""
    one = [seen for seen in shapes if seen[0] == shapes[0][0]]
    other = [seen for seen in shapes if seen[0] != shapes[0][0]]
    return one, other if len(other) == len(one) else one


def _is_map(one: Tuple[Pass, Shape], other: Tuple[Pass, Shape], axis: int) -> bool:
    """Whether an axis of a tensor is the height of the image, and the next its width, each divided by the same."""
    rest = 3 if axis == 1 else 1  # the channels
    if one[1][rest] != other[1][rest]:
        return False
    if one[0] != other[0] and one[1][1:] == other[1][1:]:  # pooled to a fixed size
        return one[1][axis] == one[1][axis + 1]
    if one[0] != other[0]:  # the network may resize its images, but it keeps how wide they are
        return all(
            abs(shape[axis] - shape[axis + 1] * run.height / run.width) <= 2 + shape[axis] / 16
            for run, shape in (one, other))
    return _is_scaled(one[1][axis], one[1][axis + 1], one[0])


def _is_scaled(height: int, width: int, run: Pass) -> bool:
    """Whether an image has so many places if both sides are divided by the same whole number."""
    if run.height == run.width and height != width:
        return False
    return any(
        abs(height - run.height / k) <= 1 and abs(width - run.width / k) <= 1
        for k in range(1, max(run.height, run.width) + 1))


def _is_grid(count: int, run: Pass) -> bool:
    """Whether so many places are the places of a map. One place may be a class token."""
    return count > 1 and any(
        count % height == 0 and _is_scaled(height, count // height, run) for height in range(1, count + 1))


def _complaint(side: str, said: str, shapes: List[Tuple[Pass, Shape]], ambiguous: bool) -> str:
    shape = shapes[0][1]
    if ambiguous:
        return (f'{side} may be maps (N, C, H, W), maps (N, H, W, C) or tokens (N, L, C): it is {said}. '
                f"Pass input_fmt='NCHW', 'NHWC' or 'NLC', or another example_input")
    if all(len(s) == 3 and s[1] == r.images != s[0] for r, s in shapes):
        return f'{side} looks like (L, N, C): it is {said}; wanted the frames first, (N, L, C)'
    if any(s[0] != r.images and s[0] % r.images == 0 for r, s in shapes):
        return (f'{side} has windows, heads or parts of frames in its first axis: it is {said}; wanted one entry for '
                f'each frame. Choose the block around it')
    if len(shape) == 3 and any(s[1] == shape[1] and s[2] != shape[2] for _, s in shapes):
        return f'{side} looks like (N, C, L): it is {said}; wanted the channels last, (N, L, C)'
    if len(shape) == 3:
        return (f'{side} must be tokens (N, L, C) whose number L grows with the image; it is {said}. '
                f"Pass input_fmt='NLC' and num_prefix_tokens= if it is")
    return f'{side} must be one tensor, {_WANTED}; it is {said}'
