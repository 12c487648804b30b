"""Make any pretrained image network ready for video: one call that picks the places for the temporal layers."""
from contextlib import suppress
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from torch import Tensor, nn

from .attach import Insertion, Report, all_or_nothing, check_network, finish
from .block import is_placed
from .checks import check_choice, check_positive
from .cme import CME
from .freeze import freeze as freeze_network
from .insert import Survey
from .places import Block, around, find_blocks, watching
from .probe import Call
from .residual import find_stages
from .retrofit import check_untouched, retrofit
from .sme import SME
from .tim import TIM

__all__ = ['adapt']

# Where a network has no stages, one block in so many counts as the first of a stage.
_EVERY = 4


def adapt(
        model: nn.Module,
        num_frames: int = 8,
        cme: str = 'all',
        tim: str = 'all',
        sme: str = 'first',
        reduction: Union[int, Tuple[int, int]] = 8,
        start: str = 'identity',
        freeze: str = 'none',
        head: Optional[Union[str, Sequence[str]]] = 'auto',
        norms: bool = False,
        example_input: Optional[Tensor] = None,
) -> Report:
    """Put CME, TIM and SME into a pretrained image network, in place, where they belong in its architecture.

    CME and TIM go before the attention or the first convolution of each block, onto its residual branch, and SME goes
    behind the first block of each stage. A network without stages, such as a ViT, takes an SME behind every fourth
    block. Where an attention gets windows of frames, as in a Swin, they go before the norm that the block begins with,
    or before the block. A ResNet, and what is built like one, is :func:`retrofit`'s case, and that is called. Maps
    (N, C, H, W), maps (N, H, W, C) and tokens (N, L, C) are told apart as :func:`insert` does it.

    The network still maps frames (B*T, C, H, W) to one output each. Wrap it in :class:`ClipModel` to feed it clips.
    :func:`restore` takes the layers out again. What was frozen stays frozen.

    Args:
        model: The network.
        num_frames: Frames T of a clip.
        cme: Blocks that take a CME: 'all', 'first' (of each stage) or 'none' (Table 5).
        tim: Blocks that take a TIM, likewise.
        sme: Blocks that take an SME, likewise.
        reduction: CME's reduction, r1 = r2 or (r1, r2).
        start: 'identity': the network computes what it did until it is trained, bit for bit if every CME has a TIM
            behind it; 'shift': likewise, but TIM shifts 2/8 of the channels by a frame;
            'paper': the layers start as they do alone. See :func:`retrofit`.
        freeze: 'backbone': only the temporal layers and the head train from now on, see :func:`freeze`; or 'none'.
        head: The head that trains with a frozen backbone, as :func:`freeze` takes it.
        norms: Whether the norms train with a frozen backbone.
        example_input: Input (1, C, H, W) to find the places with. None: a zero image of the network's own size.

    Returns:
        The inserted layers and their places, the blocks that took none with the reason, and what trains. Print it.

    Raises:
        ValueError: The model holds no blocks, or none that takes a layer. It already has temporal layers. All
            placements are 'none'. An argument is none of its choices. With a frozen backbone no head is found.
        TypeError: model is no module or a compiled one, or example_input is no tensor.

    Example:
        >>> import timm, torch
        >>> from cmr_layers import ClipModel
        >>> vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=4, num_classes=5).eval()
        >>> print(adapt(vit, num_frames=4, freeze='backbone'))
        VisionTransformer: 4 CME, 4 TIM, 1 SME for clips of 4 frames, 94,848 parameters added
          blocks.0.attn.cme   192 channels, before blocks.0.attn
          blocks.0.attn.tim   192 channels, before blocks.0.attn
          blocks.0.sme        192 channels, after blocks.0
          blocks.1.attn.cme   192 channels, before blocks.1.attn
          blocks.1.attn.tim   192 channels, before blocks.1.attn
          blocks.2.attn.cme   192 channels, before blocks.2.attn
          blocks.2.attn.tim   192 channels, before blocks.2.attn
          blocks.3.attn.cme   192 channels, before blocks.3.attn
          blocks.3.attn.tim   192 channels, before blocks.3.attn
        95,813 of 2,024,453 parameters train (4.73%)
        >>> ClipModel(vit, num_frames=4)(torch.randn(2, 4, 3, 32, 32)).shape
        torch.Size([2, 5])
    """
    check_network(model)
    check_positive('num_frames', num_frames)
    check_choice('freeze', freeze, ('none', 'backbone'))
    check_untouched(model)
    stages = find_blocks(model)
    with all_or_nothing(model):
        report = None
        if _is_resnet(model, stages):
            # a DenseNet is refused: its blocks begin with a convolution of what all blocks returned
            with suppress(ValueError):
                report = retrofit(model, num_frames, cme, tim, sme, reduction, start, example_input)
        if report is None:
            report = _insert(
                model, stages, num_frames, {'cme': cme, 'tim': tim, 'sme': sme}, reduction, start, example_input)
        if freeze == 'none':
            return report
        before = {p: p.requires_grad for p in model.parameters()}
        try:
            trains = freeze_network(model, head, norms)
        except BaseException:
            for p, learns in before.items():
                p.requires_grad_(learns)
            raise
    return replace(report, trainable=(trains.count, trains.total))


def _is_resnet(model: nn.Module, stages: List[List[Block]]) -> bool:
    """Whether all blocks that a network has are those that retrofit() knows."""
    try:
        known = [name for stage in find_stages(model)[1] for name, _ in stage]
    except ValueError:
        return False
    return all(
        any(block.name == name or block.name.startswith(f'{name}.') for name in known)
        for stage in stages for block in stage)


def _insert(
        model: nn.Module, stages: List[List[Block]], num_frames: int, placements: Dict[str, str], reduction: Any,
        start: str, example_input: Optional[Tensor],
) -> Report:
    blocks = [block for stage in stages for block in stage]
    if not blocks:
        raise ValueError(
            f'model ({type(model).__name__}) holds no blocks, modules with two convolutions or projections that follow '
            f'each other in a container or a stage; insert() puts layers at any module')
    if set(placements.values()) == {'none'}:
        raise ValueError("nothing to insert: cme='none', tim='none' and sme='none'; one must be another")
    holders = {stage[0].name: around(model, stage) for stage in stages}
    outer = {block.name: block for found in holders.values() for block in found}
    with watching(blocks) as targets, watching([block for name, block in outer.items() if name not in targets]) as more:
        survey = Survey(model, {**targets, **more}, example_input)
    calls = survey.calls
    sizes = max(len({sighting.run for sighting in call.seen['before']}) for call in calls.values())
    stages = _whole(model, stages, holders, calls, sizes)
    blocks = [block for stage in stages for block in stage]
    wanted: Dict[Tuple[str, ...], List[Any]] = {}  # places of each group of layers
    after: List[Any] = []
    left: Dict[str, str] = {}
    if len(_widths(blocks, calls)) <= 1:
        stages = [blocks[n:n + _EVERY] for n in range(0, len(blocks), _EVERY)]
    for stage in stages:
        for number, block in enumerate(stage):
            placed = {name for name, where in placements.items() if is_placed(name, where, number == 0)}
            try:
                if placed & {'cme', 'tim'}:
                    group = tuple(name for name in ('cme', 'tim') if name in placed)
                    entry = block.entry(calls, sizes)
                    wanted.setdefault(group, []).append(entry)
                if 'sme' in placed:
                    calls[block.name].form('after')
                    after.append(block.name)
            except ValueError as error:
                left[block.name] = str(error)
    if not (wanted or after):
        raise ValueError(
            f'model ({type(model).__name__}) has no block that takes a layer: '
            f'{"; ".join(dict.fromkeys(left.values()))[:600]}. insert() puts layers at any module')
    found: List[Insertion] = []
    for kinds, names in wanted.items():
        layers = [{'cme': CME, 'tim': TIM}[kind] for kind in kinds]
        more = {'reduction': reduction} if 'cme' in kinds else {}
        found += survey.insert(layers, names, 'before', num_frames, start, **more)
    if after:
        found += survey.insert([SME], after, 'after', num_frames, start)
    finish(model, num_frames)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return Report(type(model).__name__, num_frames, sorted(found, key=lambda one: order[one.name]), left)


def _whole(
        model: nn.Module, stages: List[List[Block]], holders: Dict[str, List[Block]], calls: Dict[str, Call],
        sizes: int,
) -> List[List[Block]]:
    """Stages whose blocks take whole frames: where all of them get parts of frames, the module around is the block."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    found: List[List[Block]] = []
    around_parts: Dict[str, List[Block]] = {}  # by what holds them: they may follow each other, and others, in a stage
    for stage in stages:
        kept = [block for block in stage if not (block.inside or block.is_head(calls))]
        outer = [block for block in holders[stage[0].name] if block.takes(calls, sizes)]
        holder = stage[0].name.rpartition('.')[0]
        if kept and outer and not any(block.takes(calls, sizes) for block in kept):
            kept, holder = outer, outer[0].name.rpartition('.')[0]
            if holder not in around_parts:
                around_parts[holder] = []
                found.append(around_parts[holder])
        if holder in around_parts:
            known = [block.name for block in around_parts[holder]]
            around_parts[holder] += [block for block in kept if block.name not in known]
            around_parts[holder].sort(key=lambda block: order[block.name])
        elif kept:
            found.append(kept)
    return found


def _widths(blocks: List[Block], calls: Dict[str, Call]) -> Set[int]:
    """Channels that the blocks return: a network without stages has the same everywhere."""
    widths = set()
    for block in blocks:
        try:
            widths.add(calls[block.name].form('after').channels)
        except ValueError:
            pass
    return widths
