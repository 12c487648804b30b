"""Optimizer and learning rate of a run."""
import math
from functools import partial
from typing import Any, Dict, List

import torch
from torch import nn

from cmr_layers import temporal_keys, trainable_parameters

from .config import Config

__all__ = ['make_optimizer', 'make_scheduler']


def make_optimizer(model: nn.Module, config: Config, batch: int) -> torch.optim.Optimizer:
    """SGD or AdamW over what learns. ``batch``: clips of an update over all processes, for the linear rule."""
    lr = config.lr * batch / config.base_batch if config.base_batch else config.lr
    own = {'lr': lr * config.temporal_lr}
    groups: List[Dict[str, Any]] = [
        {'params': [], **rate, **decay} for rate in ({}, own) for decay in ({}, {'weight_decay': 0.})]
    temporal = temporal_keys(model) if config.temporal_lr != 1 else frozenset()  # without them the groups are two
    for name, p in trainable_parameters(model):
        groups[2 * (name in temporal) + (not config.decay_all and p.ndim < 2)]['params'].append(p)
    groups = [group for group in groups if group['params']]
    if config.optimizer == 'sgd':
        return torch.optim.SGD(
            groups, lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)
    return torch.optim.AdamW(groups, lr, weight_decay=config.weight_decay)


def make_scheduler(
        optimizer: torch.optim.Optimizer, config: Config, updates: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate by update. ``updates``: those of an epoch."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, config, updates))


def factor(config: Config, updates: int, update: int) -> float:
    """What the learning rate is multiplied by in an update, counted from 0.

    Example:
        >>> [factor(Config(epochs=3, milestones=(1, 2)), 10, update) for update in (0, 9, 10, 20)]
        [1.0, 1.0, 0.1, 0.010000000000000002]
    """
    warmup = config.warmup_epochs * updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.schedule == 'step':
        return float(.1 ** sum(update >= milestone * updates for milestone in config.milestones))
    rest = config.epochs * updates - warmup
    return .5 + .5 * math.cos(math.pi * min(1., (update - warmup) / max(rest, 1)))
