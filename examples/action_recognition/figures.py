"""Pictures of what a network says: its confusions, and a contact sheet with SME's map. They need matplotlib."""
from dataclasses import replace
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from cmr_layers.clip import ClipLayer
from cmr_layers.visualize import figure5, motion_maps

__all__ = ['confusion_figure', 'has_sme', 'motion_sheet']

NAMES = 60  # most classes that are written beside a picture
NUMBERS = 25  # most classes whose shares are written into it
LONGEST = 40  # characters of a name


def confusion_figure(confusion: Tensor, classes: Sequence[str], totals: Sequence[int], title: str = '') -> Any:
    """Draw which class the videos of each class are taken for.

    Args:
        confusion: Number of videos of each label (row) taken for each class (column), (K, K).
        classes: K names.
        totals: Videos of each class, with the unreadable ones. A row shows shares of that.
        title: Line above the picture.

    Returns:
        A matplotlib figure. pyplot is not used.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are not K names and totals.
    """
    k = len(classes)
    if confusion.shape != (k, k) or len(totals) != k:
        raise ValueError(f'confusion must be {[k, k]} and totals {k} numbers for {k} classes, got '
                         f'{list(confusion.shape)} and {len(totals)}')
    figure_type, canvas = _matplotlib()
    share = confusion.double() / torch.tensor(totals).double().clamp(min=1)[:, None]
    names = [name if len(name) <= LONGEST else name[:LONGEST - 1] + '…' for name in classes]
    side = min(max(4., .32 * k), 14.)
    label = .085 * max(map(len, names)) + .5 if k <= NAMES else .6
    figure = figure_type(figsize=(side + label + 1.2, side + label + .6), dpi=100, facecolor='white')
    canvas(figure)
    width, height = figure.get_size_inches()
    ax = figure.add_axes((label / width, label / height, side / width, side / height))
    image = ax.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1)
    bar = figure.add_axes(((label + side + .15) / width, label / height, .15 / width, side / height))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    ax.set_xlabel('prediction')
    ax.set_ylabel('label')
    ax.set_title(title, fontsize=10)
    if k <= NAMES:
        size = 8 if k <= NUMBERS else 6
        ax.set_xticks(range(k), names, rotation=90, fontsize=size)
        ax.set_yticks(range(k), names, fontsize=size)
    if k <= NUMBERS:
        for row, column in confusion.nonzero().tolist():
            value = float(share[row, column])
            ax.text(column, row, f'{value:.0%}', ha='center', va='center', fontsize=7,
                    color='white' if value > .5 else 'black')
    return figure


def has_sme(model: nn.Module) -> bool:
    """Whether a network holds an SME, whose map can be drawn."""
    return any(isinstance(m, ClipLayer) and callable(getattr(m, 'similarity', None)) for m in model.modules())


def motion_sheet(
        model: nn.Module,
        clip: Tensor,
        frames: Tensor,
        times: Optional[Sequence[float]] = None,
        title: str = '',
) -> Tuple[Any, Tensor]:
    """Draw the frames that a network saw in a row, and under each the motion that its first SME finds there.

    Args:
        model: Network with an SME.
        clip: Normalised clip on the network's device, (1, T, 3, H, W).
        frames: The same as images: uint8 (T, 3, H, W).
        times: Seconds of each frame.
        title: Line above the sheet.

    Returns:
        A matplotlib figure, and the map, (T, H', W').

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The network holds no SME.
    """
    if not has_sme(model):
        raise ValueError(f'a contact sheet shows the map of an SME, but {type(model).__name__} holds none; wanted a '
                         f'network with SME')
    _matplotlib()
    maps = motion_maps(model, clip)
    assert maps.motion is not None
    # the heat maps of a CME are left out
    only = replace(maps, motion=maps.motion.float().cpu(), cme=None, gates=None, top=None, bottom=None)
    assert only.motion is not None
    return figure5(frames, only, times, title), only.motion


def _matplotlib() -> Tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "cmr-layers[video]"') from error
    return Figure, FigureCanvasAgg
