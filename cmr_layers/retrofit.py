"""Turn a ResNet that somebody else built and trained into a CMR network, in place.

It knows timm's ``ResNet`` class (also as ResNeXt, SE, Res2Net, ResNeSt and SK), the ResNets of torchvision and
transformers, and any network whose stages ``layer1`` to ``layer4`` hold blocks that pass their input to ``conv1``.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
from typing import Dict, List, Optional, Tuple, Union

from torch import Tensor, nn

from .attach import Report, all_or_nothing, check_network, finish, is_adopted, put_in_block
from .block import TemporalBlock, is_placed
from .checks import check_choice, check_positive
from .clip import ClipLayer
from .cme import CME
from .probe import like, probe, zero_image
from .sme import SME
from .tim import TIM

__all__ = ['retrofit']

# A stage is a list of (name, block).
Stages = List[List[Tuple[str, nn.Module]]]


def retrofit(
        model: nn.Module,
        num_frames: int = 8,
        cme: str = 'all',
        tim: str = 'all',
        sme: str = 'first',
        reduction: Union[int, Tuple[int, int]] = 8,
        start: str = 'identity',
        example_input: Optional[Tensor] = None,
) -> Report:
    """Put CME and TIM in front of the residual branches of a ResNet, and SME at the end of its blocks, in place.

    The network keeps its class, its parameters and their names. The layers are children ``cme``, ``tim`` and ``sme`` of
    each block, as in the ``cmr_resnet`` family. State dicts of a retrofitted timm ResNet and of the same ResNet in the
    family fit each other, except for the bias of a CME without a TIM.

    The network still maps frames (B*T, C, H, W) to one output each. Wrap it in :class:`ClipModel` to feed it clips
    (B, T, C, H, W). :func:`restore` gives the original network back. A block that you replace takes its layers with it.
    Stochastic depth and DropBlock are drawn once per clip from now on.

    The blocks of timm's and torchvision's ``ResNet`` become blocks that run the layers themselves. Adapters, fusing,
    quantizing, SyncBatchNorm's conversion, TorchScript and ``torch.fx`` work on them as on any network. Other blocks
    (Res2Net, ResNeSt, SK, transformers', torchvision's quantizable ones) take the layers as :func:`insert` does, with
    the same limits. Compile after the call, not before.

    ``start`` decides what the network computes before it is trained:

    - ``'identity'``: the same as before, bit for bit, for stills and for clips, if every CME has a TIM behind it. SME
      starts as the identity. A gate in (0, 1) can't, so every gate of CME starts at exactly 1/2, and TIM starts with
      the single tap 2. Their product is exact. A CME without a TIM starts with its gates at 0.98: the residual branch
      gets 0.98 x, and the network computes nearly the same as before.
    - ``'paper'``: the layers start as they do alone. SME is the identity, TIM shifts 2/8 of the channels by a frame,
      and CME's gates lie near 1/2. A batch norm in training mode absorbs the factor 1/2. One in eval mode does not, so
      train before you look at predictions.

    Args:
        model: The network, or a network that contains it, such as a segmentation net.
        num_frames: Frames T of a clip.
        cme: Blocks that take a CME: 'all', 'first' (of each stage) or 'none' (Table 5).
        tim: Blocks that take a TIM, likewise.
        sme: Blocks that take an SME, likewise.
        reduction: CME's reduction, r1 = r2 or (r1, r2).
        start: 'identity' or 'paper', see above.
        example_input: Input to find the channels with. None: a zero image (1, C, 64, 64) for the first convolution.

    Returns:
        The inserted layers and their places.

    Raises:
        ValueError: The model holds no ResNet of a known layout, or several. It already has temporal layers. All
            placements are 'none'. An argument is none of its choices.
        TypeError: model is no module or a compiled one, or example_input is no tensor.

    Example:
        >>> import timm, torch
        >>> from cmr_layers import ClipModel
        >>> resnet = timm.create_model('resnet18').eval()
        >>> images = torch.randn(4, 3, 64, 64)
        >>> before = resnet(images)
        >>> report = retrofit(resnet, num_frames=4)
        >>> len(report), bool((resnet(images) == before).all())
        (20, True)
        >>> ClipModel(resnet, num_frames=4)(images[None]).shape
        torch.Size([1, 1000])
    """
    check_network(model)
    check_positive('num_frames', num_frames)
    check_choice('start', start, ('identity', 'paper'))
    _check_untouched(model)
    kin, entry, stages = _find_stages(model)
    with all_or_nothing(model):
        blocks = {name: block for stage in stages for name, block in stage}
        entries = {f'{name}.{entry}': block.get_submodule(entry) for name, block in blocks.items()}
        if example_input is None:
            example_input = zero_image(model, (64, 64))  # a small one shows the channels, too
        calls = probe(model, {**blocks, **entries}, example_input)

        made: Dict[str, Dict[str, ClipLayer]] = {}
        for stage in stages:
            for name, block in stage:
                at = f'{name}.{entry}'
                if calls[at].input is None or calls[at].input is not calls[name].input:
                    raise ValueError(
                        f'model ({type(model).__name__}) is not supported: block {name!r} ({type(block).__name__}) '
                        f'does not hand its input to {entry!r}, where CME and TIM belong. insert() can put the layers '
                        f'at any module'
                    )
                opens_stage = block is stage[0][1]
                has_cme, has_tim = is_placed('cme', cme, opens_stage), is_placed('tim', tim, opens_stage)
                kw = {'num_frames': num_frames, **like(block, model)}
                identity = start == 'identity'
                layers = made.setdefault(name, {})
                if has_cme:
                    gate_init = None if not identity else 0.5 if has_tim else 0.98
                    layers['cme'] = CME(
                        calls[name].channels('before'), reduction=reduction, gate_init=gate_init, **kw)
                if has_tim:
                    init, gain = ('identity', 2. if has_cme else 1.) if identity else ('tsm', 1.)
                    layers['tim'] = TIM(calls[name].channels('before'), init=init, gain=gain, **kw)
                if is_placed('sme', sme, opens_stage):
                    layers['sme'] = SME(calls[name].channels('after'), **kw)
        if not any(made.values()):
            raise ValueError(f"nothing to insert: cme={cme!r}, tim={tim!r} and sme={sme!r}; one must not be 'none'")
        insertions = [
            insertion for name, layers in made.items() for insertion in put_in_block(model, name, entry, layers)]
        finish(model, num_frames)
    return Report(f'{type(model).__name__} ({kin})', num_frames, insertions)


def _check_untouched(model: nn.Module) -> None:
    if any(isinstance(module, TemporalBlock) and not is_adopted(module) for module in model.modules()):
        raise ValueError(
            f'model ({type(model).__name__}) is made of CMR blocks already; choose its layers with cme=, tim= and sme= '
            f'when you build it'
        )
    found = [name for name, module in model.named_modules() if isinstance(module, ClipLayer)]
    if found:
        raise ValueError(
            f'model ({type(model).__name__}) already has {len(found)} temporal layers ({found[0]}, ...); wanted a '
            f'network without. restore(model) takes out what retrofit() and insert() put in'
        )


def _layer_stages(host: nn.Module, prefix: str) -> Optional[Stages]:
    """Stages of timm, torchvision and mmpretrain: layer1 to layer4. They may be empty in a pruned timm network."""
    names = [f'layer{i}' for i in range(1, 5)]
    if not all(isinstance(getattr(host, name, None), nn.Sequential) for name in names):
        return None
    return [[(f'{prefix}{name}.{i}', block) for i, block in getattr(host, name).named_children()] for name in names]


def _encoder_stages(host: nn.Module, prefix: str) -> Optional[Stages]:
    """Stages of transformers: encoder.stages, each with layers."""
    stages = getattr(getattr(host, 'encoder', None), 'stages', None)
    layers = [getattr(stage, 'layers', None) for stage in stages] if isinstance(stages, nn.ModuleList) else [None]
    return [
        [(f'{prefix}encoder.stages.{i}.layers.{j}', block) for j, block in stage.named_children()]
        for i, stage in enumerate(layers) if isinstance(stage, nn.Module)] or None


# The layout, the child of a block that begins its residual branch, and the function that lists the stages.
_LAYOUTS = (
    ('layer1 to layer4', 'conv1', _layer_stages),
    ('encoder.stages', 'layer', _encoder_stages),
)


def _find_stages(model: nn.Module) -> Tuple[str, str, Stages]:
    found: Dict[str, Tuple[str, str, Stages]] = {}
    for name, host in model.named_modules():
        for layout, entry, list_stages in _LAYOUTS:
            stages = list_stages(host, f'{name}.' if name else '')
            blocks = [block for stage in stages or [] for _, block in stage]
            if stages and blocks and all(isinstance(getattr(block, entry, None), nn.Module) for block in blocks):
                found[name or type(model).__name__] = (layout, entry, stages)
    if len(found) != 1:
        raise ValueError(
            f'model ({type(model).__name__}) holds {"several ResNets: " + ", ".join(found) if found else "no ResNet"}; '
            f'wanted one of timm, torchvision or transformers, or one whose layer1 to layer4 hold blocks with a conv1. '
            + ('Pass one of them' if found else 'insert() puts the layers in other networks')
        )
    return next(iter(found.values()))
