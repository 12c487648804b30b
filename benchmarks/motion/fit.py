"""Train one network on clips that are made on the fly, and test it."""
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_layers import train_mode

__all__ = ['Recipe', 'confusion', 'fit', 'normalise']

MEAN, STD = .35, .25  # of the pixels' range; the same for all channels and tasks


class Recipe(NamedTuple):
    """Training. All rows of a study have the same.

    Attributes:
        updates: Updates of the weights.
        batch: Clips of an update.
        lr: Largest learning rate of AdamW, of one cycle.
        weight_decay: AdamW's.
        amp: Whether the forward pass runs in bfloat16 where autocast says so.
    """
    updates: int = 600
    batch: int = 32
    lr: float = 3e-3
    weight_decay: float = .05
    amp: bool = False


def normalise(clips: Tensor) -> Tensor:
    """uint8 clips (B, T, 3, S, S) to what a network sees: their frames, (B*T, 3, S, S)."""
    frames = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return (frames.float() / 255 - MEAN) / STD


def fit(
        model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe,
        look: Callable[[int], None] | None = None, every: int = 100,
) -> list[float]:
    """Train a network; it is left in eval mode.

    Args:
        model: From frames to logits of clips.
        batches: uint8 clips and labels.
        recipe: How.
        look: Called every so many updates, with their number, in eval mode.
        every: How many.

    Returns:
        Mean loss of each ``every`` updates.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.updates, pct_start=.2)
    losses: list[float] = []
    total = 0.
    train_mode(model)  # what is frozen keeps its statistics
    for update in range(1, recipe.updates + 1):
        clips, labels = next(batches)
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=recipe.amp):
            loss = F.cross_entropy(model(normalise(clips)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cycle.step()
        total += loss.item()
        if update % every == 0 or update == recipe.updates:
            losses.append(total / ((update - 1) % every + 1))
            total = 0.
            model.eval()
            if look:
                look(update)
            train_mode(model)
    model.eval()
    return losses


@torch.no_grad()
def confusion(model: nn.Module, clips: Tensor, labels: Tensor, classes: int, batch: int = 64) -> list[list[int]]:
    """Clips by class and by what a network in eval mode takes them for."""
    found = torch.zeros(classes, classes, dtype=torch.long, device=labels.device)
    for part, true in zip(clips.split(batch), labels.split(batch)):
        guess = model(normalise(part)).argmax(1)
        found.index_put_((true, guess), torch.ones_like(true), accumulate=True)
    rows: Any = found.tolist()
    return rows  # type: ignore[no-any-return]
