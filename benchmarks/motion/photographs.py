"""Windows of the photographs that scikit-image ships: grounds, and what things are cut from.

Needs the extra [example].
"""
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.action_recognition.motion_videos import PHOTOGRAPHS, photograph

__all__ = ['windows']


@cache
def windows(split: str, count: int, side: int, seed: int = 0, device: str = 'cpu') -> Tensor:
    """Squares of random place and size, at least a third of the photograph's height.

    Args:
        split: 'train' or 'val'; no photograph is in both.
        count: How many, of all photographs in turn.
        side: Pixels.
        seed: Of place and size.
        device: Where they are kept.

    Returns:
        (count, 3, side, side), each stretched to [0, 1].
    """
    random = np.random.default_rng((seed, len(split), count, side))
    found = np.empty((count, side, side, 3), np.float32)
    for i in range(count):
        image = photograph(PHOTOGRAPHS[split][i % len(PHOTOGRAPHS[split])])
        part = random.uniform(.35, .9) * min(image.size)
        left, top = random.uniform(0, image.width - part), random.uniform(0, image.height - part)
        box = (left, top, left + part, top + part)
        found[i] = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box), np.float32)
    low, high = found.min((1, 2, 3), keepdims=True), found.max((1, 2, 3), keepdims=True)
    pictures = torch.from_numpy((found - low) / np.maximum(high - low, 1))
    return pictures.permute(0, 3, 1, 2).contiguous().to(device)
