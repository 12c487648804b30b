"""The paper's Figure 5 for any clip: where SME sees motion, and which channels CME opens and closes.

Drawing needs the extra ``[video]``. The maps need no extra.

Paper: `Learning Comprehensive Motion Representation for Action Recognition` (AAAI 2021)
"""
import textwrap
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .checks import check_positive
from .clip import ClipLayer
from .probe import evaluating

__all__ = ['MotionMaps', 'figure5', 'motion_agreement', 'motion_maps', 'top_bottom_channels']


@dataclass(frozen=True)
class MotionMaps:
    """The maps that :func:`motion_maps` finds in one clip of T frames. The fields of a missing layer are None.

    Attributes:
        output: Output of the model.
        sme: Name of the SME.
        motion: Its map 1 - s, (T, H, W): 0 where a pixel's features stay, up to 2 where they reverse. The last frame
            has no next frame and takes the map of the frame before it.
        cme: Name of the CME.
        gates: Its gates, (T, C).
        top: Mean of the k channels with the largest gates, frame by frame, (T, H, W).
        bottom: Mean of the k channels with the smallest gates, (T, H, W).
        k: Channels of each group.
    """
    output: Any
    sme: Optional[str] = None
    motion: Optional[Tensor] = None
    cme: Optional[str] = None
    gates: Optional[Tensor] = None
    top: Optional[Tensor] = None
    bottom: Optional[Tensor] = None
    k: int = 0


def top_bottom_channels(x: Tensor, gates: Tensor, k: int = 10) -> Tuple[Tensor, Tensor]:
    """Mean of the k channels with the largest gates, and of the k channels with the smallest gates, per frame.

    Args:
        x: Input of a CME, (T, C, H, W).
        gates: Its gates, (T, C).
        k: Channels of a group, at most C / 2.

    Returns:
        The two heat maps, (T, H, W) each. Equal gates keep the order of the channels.

    Raises:
        ValueError: The shapes do not fit each other, or k is out of its range.

    Example:
        >>> x = torch.arange(4.).view(1, 4, 1, 1)
        >>> top, bottom = top_bottom_channels(x, torch.tensor([[.1, .9, .5, .8]]), k=2)
        >>> top.item(), bottom.item()  # channels 1 and 3, channels 0 and 2
        (2.0, 1.0)
    """
    if x.ndim != 4 or gates.shape != x.shape[:2]:
        raise ValueError(f'x must be (T, C, H, W) and gates (T, C), got {list(x.shape)} and {list(gates.shape)}')
    if check_positive('k', k) > x.shape[1] // 2:
        raise ValueError(f'k must be at most half of the {x.shape[1]} channels, got {k}')
    order = gates.argsort(dim=1, descending=True, stable=True)
    frame = torch.arange(len(x), device=x.device)[:, None]
    return x[frame, order[:, :k]].mean(1), x[frame, order[:, -k:]].mean(1)


def motion_maps(
        model: nn.Module,
        clip: Tensor,
        cme: Optional[str] = None,
        sme: Optional[str] = None,
        k: int = 10,
) -> MotionMaps:
    """Run a model on one clip and map what a CME and an SME make of their inputs.

    The model runs in eval mode, without gradients. Afterwards it is as it was.

    Args:
        model: Any network that holds a CME or an SME.
        clip: Normalised clip of T frames, (1, T, C, H, W), or (T, C, H, W) for a network of frames.
        cme: Name of the CME, as in ``named_modules()``. None takes the first, which is the paper's choice.
        sme: Name of the SME, likewise.
        k: Channels of each group of :func:`top_bottom_channels`. A narrow layer gives half of its channels.

    Returns:
        The maps.

    Raises:
        ValueError: The model holds neither layer, a name is no such layer or one of tokens, or a layer did not get one
            clip of T frames.

    Example:
        >>> import timm, cmr_layers
        >>> model = timm.create_model('cmr_resnet18', num_frames=4)
        >>> maps = motion_maps(model, torch.randn(1, 4, 3, 64, 64))
        >>> maps.cme, list(maps.gates.shape), list(maps.top.shape), maps.sme, list(maps.motion.shape)
        ('layer1.0.cme', [4, 64], [4, 16, 16], 'layer1.0.sme', [4, 16, 16])
    """
    check_positive('k', k)
    if clip.ndim not in (4, 5) or (clip.ndim == 5 and clip.shape[0] != 1):
        raise ValueError(f'clip must be one clip, (1, T, C, H, W) or (T, C, H, W), got {list(clip.shape)}')
    num_frames = clip.shape[-4]
    names = {'gate': _find(model, 'CME', 'gate', cme), 'similarity': _find(model, 'SME', 'similarity', sme)}
    layers: Dict[str, Any] = {name: model.get_submodule(name) for name in names.values() if name is not None}
    if not layers:
        raise ValueError(
            f'model ({type(model).__name__}) holds neither CME nor SME; wanted a cmr_resnet, or a network that '
            f'retrofit() or insert() has changed'
        )
    for at, layer in layers.items():
        if layer.input_fmt == 'NLC':
            raise ValueError(
                f'{at or "model"} must be a layer of maps to be drawn, got one of tokens, whose places in the image '
                f'it does not know; pick another by cme= or sme=')
    inputs, output = _inputs(model, clip, layers)
    found: Dict[str, Any] = {'output': output}
    for ask, name in names.items():
        if name is None:
            continue
        with torch.no_grad():
            answer = getattr(layers[name], ask)(inputs[name])
        if tuple(answer.shape[:2]) != (1, num_frames):
            raise ValueError(
                f'{name or "model"} saw {answer.shape[0]} clips of {answer.shape[1]} frames, but clip is one of '
                f'{num_frames}: call set_num_frames(model, {num_frames})'
            )
        if ask == 'similarity':
            found.update(sme=name, motion=1 - answer[0])
        else:
            x, _ = layers[name].frames(inputs[name])
            group = min(k, max(1, x.shape[1] // 2))
            top, bottom = top_bottom_channels(x, answer[0], group)
            found.update(cme=name, gates=answer[0], top=top, bottom=bottom, k=group)
    return MotionMaps(**found)


def motion_agreement(motion: Tensor, frames: Tensor) -> float:
    """Rank correlation of an SME map with the absolute difference of the frames' pixels.

    It checks that the map is bright where the clip moves. It is about 0 for a map that has nothing to do with the clip.
    It stays below 1 even for a good map, because pixels change with contrast and features do not.

    Args:
        motion: Map 1 - s, (T, H, W). The map of the last frame is left out, as it has no next frame.
        frames: The pixels that the map covers, (T, C, H', W').

    Returns:
        Spearman's correlation in [-1, 1] over all places and frames, or nan if either is constant.

    Raises:
        ValueError: The shapes do not fit each other, or there is only one frame.

    Example:
        >>> frames = torch.zeros(2, 1, 8, 8)
        >>> frames[1] = torch.arange(64.).view(8, 8)
        >>> round(motion_agreement(frames[1].expand(2, 8, 8), frames), 3)
        1.0
    """
    if motion.ndim != 3 or frames.ndim != 4 or len(motion) != len(frames) or len(motion) < 2:
        raise ValueError(
            f'motion must be (T, H, W) and frames (T, C, H, W) with T >= 2, got {list(motion.shape)} and '
            f'{list(frames.shape)}'
        )
    pixels = frames.double().cpu().mean(1, keepdim=True)
    change = F.adaptive_avg_pool2d((pixels[1:] - pixels[:-1]).abs(), (motion.shape[1], motion.shape[2]))
    ranks = torch.stack([_rank(motion[:-1].double().cpu().flatten()), _rank(change.flatten())])
    return float(torch.corrcoef(ranks)[0, 1])


def figure5(
        frames: Tensor,
        maps: MotionMaps,
        times: Optional[Sequence[float]] = None,
        title: str = '',
        caption: str = '',
) -> Any:
    """Draw the frames, SME's map over them, and the heat maps of CME's most and least opened channels.

    If the model lacks a layer, its rows are left out. Each row has one scale for all its frames.

    Args:
        frames: The frames that the model saw, as images: uint8 (T, 3, H, W), see :meth:`ClipTransform.crop`.
        maps: The maps that :func:`motion_maps` returned for them.
        times: Seconds of each frame.
        title: Line above the figure.
        caption: Text below the figure.

    Returns:
        A matplotlib figure. ``figure.savefig('figure5.png')`` writes it. pyplot is not used.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: frames, maps and times do not fit each other.

    Example:
        >>> figure5(frames, motion_maps(model, clip), times).savefig('figure5.png')  # doctest: +SKIP
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "cmr-layers[video]"') from error

    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f'frames must be uint8 of shape (T, 3, H, W), got {frames.dtype} {list(frames.shape)}')
    t, _, h, w = frames.shape
    for name, value in (('maps.motion', maps.motion), ('maps.top', maps.top), ('times', times)):
        if value is not None and len(value) != t:
            raise ValueError(f'{name} has {len(value)} frames, but frames has {t}')

    images = rearrange(frames, 't c h w -> t h w c').cpu().numpy()
    # label, map, colours, lower end of the scale
    rows: List[Tuple[str, Optional[Tensor], str, Optional[float]]] = [('frames', None, '', None)]
    if maps.motion is not None:
        rows.append((f'motion seen by SME\n1 - s, over the frame\n{maps.sme}', maps.motion, 'inferno', 0.))
    if maps.top is not None:
        rows.append((f'CME: mean of the {maps.k}\nmost opened channels\n{maps.cme}', maps.top, 'viridis', None))
        rows.append((f'CME: mean of the {maps.k}\nleast opened channels\n{maps.cme}', maps.bottom, 'viridis', None))

    # inches: labels left, colour bars right, title above, caption below; many frames are drawn smaller
    cell, left, right, gap = max(.9, 1.85 * min(1., 8 / t)), 1.85, .62, .05
    cell_h, width = cell * h / w, left + t * (cell + gap) + right
    title = _wrap(title, (width - left) * 9)
    caption = _wrap(caption, (width - left) * 12.7)
    above = .35 + (.2 * (title.count('\n') + 1) + .07 if title else 0.)
    below = .19 * (caption.count('\n') + 1) + .2 if caption else .1
    height = above + len(rows) * (cell_h + gap) + below
    figure = Figure(figsize=(width, height), dpi=100, facecolor='white')
    FigureCanvasAgg(figure)

    def axes(row: int, x: float, width_: float) -> Any:
        y = height - above - (row + 1) * (cell_h + gap) + gap
        ax = figure.add_axes((x / width, y / height, width_ / width, cell_h / height))
        ax.set_xticks([])
        ax.set_yticks([])
        return ax

    for row, (label, values, colours, low) in enumerate(rows):
        ax = axes(row, left - gap, gap)
        ax.axis('off')
        ax.text(0, .5, label, ha='right', va='center', fontsize=10, linespacing=1.5, transform=ax.transAxes)
        if values is not None:
            values = values.float().cpu()
            # without a cut, a few outliers would take all the contrast
            ordered = values.flatten().sort().values
            high = float(ordered[-1 - len(ordered) // 100])
            if low is None:
                low = float(ordered[len(ordered) // 100])
            else:
                high = max(high, .01)  # a clip without motion stays dark: no contrast for rounding errors
            norm = Normalize(low, high if high > low else low + 1, clip=True)
            scale = axes(row, left + t * (cell + gap), .12)
            figure.colorbar(ScalarMappable(norm, colours), cax=scale).ax.tick_params(labelsize=8)
        for i in range(t):
            ax = axes(row, left + i * (cell + gap), cell)
            if row == 0 and times is not None:
                ax.set_title(f'{times[i]:.2f} s', fontsize=10, pad=4)
            # one extent, so that a map of any resolution lies on its frame
            place = {'extent': (0, w, h, 0), 'interpolation': 'bilinear'}
            if values is None:
                ax.imshow(images[i], **place)
            elif colours == 'inferno':
                grey = images[i].mean(2) * .75
                strength = F.interpolate(values[None, None, i], (h, w), mode='bilinear')[0, 0].numpy()
                ax.imshow(grey, cmap='gray', vmin=0, vmax=255, **place)
                ax.imshow(strength, cmap=colours, norm=norm, alpha=norm(strength).filled() ** .7, **place)
            else:
                ax.imshow(values[i].numpy(), cmap=colours, norm=norm, **place)
    if title:
        figure.text(left / width, 1 - .1 / height, title, ha='left', va='top', fontsize=13, weight='bold')
    if caption:
        figure.text(left / width, (below - .1) / height, caption, ha='left', va='top', fontsize=9.5, linespacing=1.4)
    return figure


def _wrap(text: str, width: float) -> str:
    """Break the lines of a text that are longer than width characters."""
    return '\n'.join('\n'.join(textwrap.wrap(line, int(width))) for line in text.splitlines())


def _find(model: nn.Module, kind: str, ask: str, name: Optional[str]) -> Optional[str]:
    """Name of the wanted layer, or of the first layer that has the method ``ask``."""
    names = [n for n, m in model.named_modules() if isinstance(m, ClipLayer) and callable(getattr(m, ask, None))]
    if name is not None and name not in names:
        have = f'it has {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}' if names else 'it has none'
        raise ValueError(f'{kind.lower()}={name!r} is no {kind} of {type(model).__name__}; {have}')
    return name if name is not None else next(iter(names), None)


def _inputs(model: nn.Module, clip: Tensor, layers: Dict[str, nn.Module]) -> Tuple[Dict[str, Tensor], Any]:
    """Run the model once and keep the inputs of the layers. A layer that is called twice counts once."""
    inputs: Dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Tuple[Any, ...]) -> None:
            # cloned, as an in-place activation may follow
            inputs.setdefault(name, args[0].detach().clone())
        return hook

    handles = []
    try:
        handles += [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
        with evaluating(model):
            output = model(clip)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in inputs:
            raise ValueError(f'{name} does not run in a forward pass of {type(model).__name__}; pick another layer')
    return inputs, output


def _rank(x: Tensor) -> Tensor:
    """Ranks of a vector. Equal values share their mean rank."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return ranks[inverse]
