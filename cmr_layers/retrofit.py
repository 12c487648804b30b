"""Turn a ResNet that somebody else built and trained into a CMR network, in place.

It knows the ResNets of timm, torchvision, transformers and detectron2, their relatives (ResNetV2, RegNet, NF-ResNet,
CSP, DLA), and any network whose stages the caller names. :mod:`.residual` finds the stages and the blocks.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
from typing import Dict, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from .attach import Report, all_or_nothing, check_network, finish, is_adopted, put_in_block
from .block import TemporalBlock, is_placed
from .checks import check_choice, check_positive
from .clip import ClipLayer
from .cme import CME
from .probe import Call, like, probe, zero_image
from .residual import Branch, Stages, find_stages, watching
from .sme import SME
from .starts import STARTS, start_of
from .tim import TIM

__all__ = ['check_untouched', 'retrofit']


def retrofit(
        model: nn.Module,
        num_frames: int = 8,
        cme: str = 'all',
        tim: str = 'all',
        sme: str = 'first',
        reduction: Union[int, Tuple[int, int]] = 8,
        start: str = 'identity',
        example_input: Optional[Tensor] = None,
        stages: Optional[Union[str, Sequence[str]]] = None,
) -> Report:
    """Put CME and TIM in front of the residual branches of a ResNet, and SME at the end of its blocks, in place.

    The network keeps its class, its parameters and their names. The layers are children ``cme``, ``tim`` and ``sme`` of
    each block, as in the ``cmr_resnet`` family. State dicts of a retrofitted timm ResNet and of the same ResNet in the
    family fit each other, except for the bias of a CME without a TIM.

    The network still maps frames (B*T, C, H, W) to one output each. Wrap it in :class:`ClipModel` to feed it clips
    (B, T, C, H, W). :func:`restore` gives the original network back. A block that you replace takes its layers with it.
    Stochastic depth and DropBlock are drawn once per clip from now on.

    Stages are found if they are numbered (``layer1`` to ``layerN``, ``res2`` to ``res5``, ``s1`` to ``s4``) or the
    children of a container (``stages.0``, or ``nn.Sequential(*resnet.children())``), and if their blocks begin with a
    convolution ``conv1`` or with one of the names of timm's byobnet, transformers and torchvision. So ResNetV2 and BiT,
    RegNet, NF-ResNet, CSP networks, DLA and CLIP's ResNet are known, too. The layers go in front of the first
    convolution of the residual branch. In a block that begins with a norm and an activation, that is behind these.

    What is not clear is an error, not a guess. ``stages`` then names the stages. Their blocks may be of any kind that
    gives its input, or what norms and activations make of it, to a single first convolution. Convolutions below a
    child named like a shortcut (``downsample``, ``shortcut``, ``skip``, ``identity``, ``proj``) do not count.

    The blocks of timm's and torchvision's ``ResNet`` become blocks that run the layers themselves. Adapters, fusing,
    quantizing, SyncBatchNorm's conversion, TorchScript and ``torch.fx`` work on them as on any network. Other blocks
    (Res2Net, ResNeSt, SK, transformers', torchvision's quantizable ones) take the layers as :func:`insert` does, with
    the same limits. Compile after the call, not before.

    ``start`` decides what the network computes before it is trained:

    - ``'identity'``: the same as before, bit for bit, for stills and for clips, if every CME has a TIM behind it. SME
      starts as the identity. A gate in (0, 1) can't, so every gate of CME starts at exactly 1/2, and TIM starts with
      the single tap 2. Their product is exact. A CME without a TIM starts with its gates at 0.98: the residual branch
      gets 0.98 x, and the network computes nearly the same as before.
    - ``'shift'``: likewise, but TIM starts as TSM's shift: 2/8 of the channels come from the neighbouring frames, the
      others are the same as before. What the network predicts changes somewhat; in two small studies it learned sooner
      from there than from the identity (docs/training.md, docs/motion.md).
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
        start: 'identity', 'shift' or 'paper', see above.
        example_input: Input to find the channels with. None: a zero image (1, C, 64, 64) for the first convolution, or
            one of the size that the network declares, 224x224 by default, if it does not run on the small one.
        stages: Names, or patterns such as ``'stages.*'``, of the modules that are stages, in their order. None: the
            stages are looked for.

    Returns:
        The inserted layers and their places.

    Raises:
        ValueError: The model holds no ResNet of a known layout, or several. It already has temporal layers. All
            placements are 'none'. An argument is none of its choices. A name in stages matches nothing, or a module
            without blocks. A block does not begin with one convolution.
        TypeError: model is no module or a compiled one, example_input is no tensor, or stages are no names.

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
        >>> convnext = timm.create_model('convnext_atto')
        >>> len(retrofit(convnext, num_frames=4, stages='stages.*', sme='none'))
        24
    """
    check_network(model)
    check_positive('num_frames', num_frames)
    check_choice('start', start, STARTS)
    check_untouched(model)
    places, found = find_stages(model, stages)
    with all_or_nothing(model):
        calls, branches = _look(model, found, example_input)
        entries: Dict[str, str] = {}
        made: Dict[str, Dict[str, ClipLayer]] = {}
        for stage in found:
            for name, block in stage:
                entries[name] = branches[name].entry(model)
                opens_stage = block is stage[0][1]
                has_cme, has_tim = is_placed('cme', cme, opens_stage), is_placed('tim', tim, opens_stage)
                kw = {'num_frames': num_frames, **like(block, model)}
                starts = start_of(start, [CME] * has_cme + [TIM] * has_tim)
                layers = made.setdefault(name, {})
                if has_cme or has_tim:
                    before = calls[name].form('before')
                    kw.update(before.kwargs())
                if has_cme:
                    layers['cme'] = CME(before.channels, reduction=reduction, **starts.get(CME, {}), **kw)
                if has_tim:
                    layers['tim'] = TIM(before.channels, **starts.get(TIM, {}), **kw)
                if is_placed('sme', sme, opens_stage):
                    after = calls[name].form('after')
                    layers['sme'] = SME(after.channels, **{**kw, **after.kwargs()})
        if not any(made.values()):
            raise ValueError(f"nothing to insert: cme={cme!r}, tim={tim!r} and sme={sme!r}; one must not be 'none'")
        insertions = [
            insertion for name, layers in made.items() for insertion
            in put_in_block(model, name, entries[name], layers)]
        finish(model, num_frames)
    return Report(f'{type(model).__name__} ({places})', num_frames, insertions)


def check_untouched(model: nn.Module) -> None:
    """Raise a ValueError if a network has temporal layers already."""
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


def _look(
        model: nn.Module, stages: Stages, example_input: Optional[Tensor],
) -> Tuple[Dict[str, Call], Dict[str, Branch]]:
    """What the blocks get and give in a forward pass of one image, and their residual branches."""
    blocks = {name: block for stage in stages for name, block in stage}
    with watching(stages) as branches:
        if example_input is not None:
            return probe(model, blocks, example_input), branches
        try:
            # a small image shows the channels, too, and takes less time
            return probe(model, blocks, zero_image(model, (64, 64))), branches
        except ValueError:
            return probe(model, blocks), branches  # an image of the size that the network declares
