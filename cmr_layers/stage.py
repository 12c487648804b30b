"""Stages whose blocks hand on what they know: in inference the end of a block is one pass over the frames.

A block ends with a sum and a ReLU. The CME of the next block pools the result, or the SME of this block compares its
frames, and either reads all of it again. :func:`.ops.block_end` computes both from what it writes. A fused stage gives
that to the layer that wants it, as an argument and within one call, so that nothing has to be remembered.

It looks at its blocks in every call. One that somebody hooked, patched or replaced is called, as in any
``nn.Sequential``.
"""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import ops, torchvision_block
from .attach import all_or_nothing
from .block import CMRBasicBlock, CMRBlock, TemporalBlock
from .bypass import is_bare, is_own, is_pointwise_conv
from .ops.path import is_exporting
from .sme import SME
from .trial import buffers_kept, check_example, check_result, distance, make_trial, run, run_reference

__all__ = ['FusedStage', 'StageFusion', 'fuse_stages', 'run_stages']


def _methods(kind: Any) -> Tuple[Any, ...]:
    return kind.forward, kind._begin, getattr(kind, '_branches', None)


# As they were when this was imported: somebody may patch the classes. A subclass may have layers of other kinds.
_KNOWN = tuple(_methods(kind) for kind in (
    CMRBlock, CMRBasicBlock, torchvision_block.CMRBottleneck, torchvision_block.CMRBasicBlock))
_RELU = nn.ReLU.forward


class FusedStage(nn.Sequential):
    """An ``nn.Sequential`` of residual blocks that computes what it did, see :func:`fuse_stages`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for block in self:
                input = block(input)
        else:
            input = _run(self, input, None)[0]
        return input


_FORWARD = FusedStage.forward


def run_stages(stages: Sequence[Any], x: Any) -> Any:
    """Stages one after the other. Fused ones hand on what they know, too, unless somebody hooked or patched them."""
    pooled = None
    for stage in stages:
        if (_may_fuse(x) and type(stage) is FusedStage and FusedStage.forward is _FORWARD
                and is_bare(stage) and stage._compiled_call_impl is None):
            x, pooled = _run(stage, x, pooled)
        else:
            x, pooled = stage(x), None
    return x


def _run(stage: FusedStage, x: Any, pooled: Optional[Tensor]) -> Tuple[Any, Optional[Tensor]]:
    """What a stage computes; ``pooled``: shares of the mean of its input, or its output, over the pixels, if known."""
    fuses = _may_fuse(x)
    for block in stage:
        if fuses and not _obstacle(block):
            x, pooled = _run_block(block, x, pooled)
        else:
            x, pooled = block(x), None
    return x, pooled


def _may_fuse(x: Any) -> bool:
    # FX passes a proxy, and a graph that is exported names each module that is called
    return isinstance(x, Tensor) and not torch.is_grad_enabled() and not is_exporting()


def _run_block(block: Any, x: Tensor, pooled: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """What a block computes, and shares of the mean of that over its pixels, if they are known."""
    y, shortcut = block._branches(block._begin(x, pooled), x)
    sme = block.sme
    if _takes_similarity(sme):
        _, num_frames = sme.frames(y)
        y, known = ops.block_end(y, shortcut, num_frames, num_frames > 1, owner=block)
        if num_frames == 1 or known is None:
            return sme(y), None
        conv = sme.conv
        return ops.sme(y, num_frames, conv.weight, conv.bias, None, owner=sme, similarity=known), None
    y, known = ops.block_end(y, shortcut, 1, False, owner=block)
    if type(sme) is nn.Identity and is_bare(sme):
        return y, known
    return sme(y), None


def _takes_similarity(sme: Any) -> bool:
    """Whether a module is an SME whose norm is folded, and which computes what its kind does."""
    return is_own(sme, SME) and is_pointwise_conv(sme.conv) and type(sme.bn) is nn.Identity and is_bare(sme.bn)


def _obstacle(block: Any) -> str:
    """Why a block has to be called, instead of being run by its parts; empty if it has not."""
    if not isinstance(block, TemporalBlock):
        return f'is a {type(block).__name__}, not one of our blocks'
    if _methods(type(block)) not in _KNOWN or type(block).__call__ is not nn.Module.__call__:
        return f'is a {type(block).__name__}, which has methods of its own'
    if not is_bare(block) or block._compiled_call_impl is not None:
        return 'is hooked, patched or compiled'
    act = getattr(block, block.last_act)
    if type(act) is not nn.ReLU or nn.ReLU.forward is not _RELU or not is_bare(act):
        return f'ends with a {type(act).__name__}' + (', hooked or patched' if type(act) is nn.ReLU else ', not a ReLU')
    return ''


@dataclass(frozen=True)
class StageFusion:
    """What :func:`fuse_stages` did; print it.

    Attributes:
        model: Class of the network.
        stages: Names of the stages, and of the blocks in them that end with one pass.
        left: Names of the blocks and of the SMEs that run as before, and why.
    """
    model: str
    stages: Dict[str, List[str]]
    left: Dict[str, str]

    def __len__(self) -> int:
        return sum(map(len, self.stages.values()))

    def __str__(self) -> str:
        lines = [f'{self.model}: {len(self)} blocks of {len(self.stages)} stages fused, {len(self.left)} left alone']
        width = max(map(len, self.left), default=0)
        return '\n'.join(lines + [f'  {name:<{width}}  {reason}' for name, reason in self.left.items()])


def fuse_stages(model: nn.Module, example_input: Tensor) -> StageFusion:
    """Let blocks that follow each other hand on what they know of their frames, in place. For inference on a GPU.

    The end of a block, the sum of both branches and its ReLU, becomes one Triton kernel. It also computes the means
    over the pixels that the CME of the next block begins with, or the similarities that the SME of the block begins
    with, each of which would read all frames once more. A stage is an ``nn.Sequential`` of blocks of the ``cmr_resnet``
    family, or of those that :func:`retrofit` made of a ResNet of timm or torchvision. It becomes a subclass of
    ``nn.Sequential``. Blocks, names, parameters and state dict stay.

    With gradients, on a CPU, in ``torch.export`` and wherever else the kernel does not apply, the blocks compute what
    they did in the way they did. So does a block that is hooked, patched or replaced, also afterwards. The networks of
    the ``cmr_resnet`` family hand the means on from one stage to the next, too, other networks do not.

    Call it after :func:`fold`: an SME with a batch norm of its own computes its similarities itself. Call it before the
    network is compiled or captured. :func:`save_model` does not know the fused form. :func:`restore` takes out the
    layers and leaves a stage that calls its blocks.

    Args:
        model: The network, in eval mode.
        example_input: What it takes, of its device and dtype.

    Returns:
        What was fused, and what was left alone for which reason. If a call is interrupted or raises an error, the
        network is left as it was.

    Raises:
        ValueError: model is in training mode, or example_input leads to no finite number.
        TypeError: model is no module or a compiled one, example_input is no tensor, or the model returns none.
        RuntimeError: The fused network, or a kernel of it, computes something else; a layer that was inserted is not at
            its place.

    Example:
        >>> import timm, cmr_layers
        >>> from cmr_layers.deploy import fold, fuse_stages
        >>> model, clip = timm.create_model('cmr_resnet18', num_frames=4).eval(), torch.randn(1, 4, 3, 64, 64)
        >>> _ = fold(model, clip)
        >>> print(fuse_stages(model, clip))
        CMRResNet: 8 blocks of 4 stages fused, 0 left alone
    """
    check_example(model, example_input)
    found = _find(model)
    with all_or_nothing(model), buffers_kept(model):
        if found.stages:
            x = example_input.detach().clone()
            want = run_reference(model, x)
            check_result(want)
            trial, wide, truth, tolerance = make_trial(model, x, want)
            before = run(model, x)
            if trial is not model:
                _fuse(trial, found)
                _check(found, distance(truth, run_reference(trial, wide)), tolerance)
            _fuse(model, found)
            # The law does not run the kernels. Here they run: each is compared with the law of what it wrote, since
            # the network may amplify the rounding of half precision until its result says little.
            narrow = (not x.is_meta and torch.is_autocast_enabled(x.device.type)) or any(
                p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
            with _Comparison():  # type: ignore[no-untyped-call]
                after = run(model, x)
            _check(found, distance(before, after), .3 if narrow else 1e-2)
    return found


def _find(model: nn.Module) -> StageFusion:
    stages: Dict[str, List[str]] = {}
    left: Dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}
    for name, stage in model.named_modules():
        blocks = [child for child in stage.children() if isinstance(child, TemporalBlock)]
        reasons = {names[block]: _obstacle(block) for block in blocks}
        if isinstance(stage, FusedStage):
            continue
        if type(stage) is not nn.Sequential or 'forward' in vars(stage):
            reasons = {block: 'is not in an nn.Sequential' for block in reasons}
        left.update((block, reason) for block, reason in reasons.items() if reason)
        fused = [block for block, reason in reasons.items() if not reason]
        if fused:
            stages[name] = fused
        left.update(
            (f'{block}.sme', 'computes its similarities itself: its batch norm is not folded, or it is no SME of ours')
            for block in fused
            if not (_takes_similarity(sme := model.get_submodule(f'{block}.sme')) or type(sme) is nn.Identity))
    return StageFusion(type(model).__name__, stages, left)


def _fuse(model: nn.Module, found: StageFusion) -> None:
    for name in found.stages:
        model.get_submodule(name).__class__ = FusedStage


class _Comparison(TorchDispatchMode):
    """Compares whatever the kernels know of their frames with the law of these frames."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.cmr_layers.block_end.default:
            (y, known), (x, shortcut, num_frames, motion) = result, args
            frames = y.float()
            if motion:
                want = ops.reference.similarity(ops.reference.clips(frames, num_frames)).flatten(0, 1)
                off = (known - want).abs().max()
            else:
                want = frames.mean((2, 3))
                off = (known.sum(0) - want).abs().max() / want.abs().max().clamp(min=1e-30)
            if not bool(off <= 1e-3) or distance((x + shortcut).relu_(), y) > 1e-2:
                raise RuntimeError(
                    f'the kernel at the end of a block is wrong on this device: off by {float(off):.1e} with {y.dtype} '
                    f'frames of {list(y.shape)}. The network was left as it is. Please report it')
        return result


def _check(found: StageFusion, moved: float, tolerance: float) -> None:
    if not moved <= tolerance:
        raise RuntimeError(
            f'{", ".join(found.stages)} can not be fused: the {found.model} would compute something else on '
            f'example_input, by {moved:.1e} of its size, and was left as it is. Something asks for the class of a '
            f'stage, or sees whether a block is called')
