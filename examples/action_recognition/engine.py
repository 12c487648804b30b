"""The training itself: updates, epochs, and what has to be kept to go on as if nothing had happened."""
import math
import random
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmr_layers import train_mode

from .checkpoint import load_weights
from .config import Config
from .logs import Clock
from .metrics import as_input, mean_std
from .optim import make_optimizer, make_scheduler
from .processes import Processes
from .sync_bn import sync_batch_norms

__all__ = ['Progress', 'Trainer', 'check_finite', 'per_epoch']

_TYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass
class Progress:
    """Where a run is. Sums are of the updates since the last row of the log.

    Attributes:
        update: Updates that are done.
        loss: Sum of their losses, each a mean over the clips of all processes.
        count: Number of them.
        failures: Videos that did not decode, of the whole run and all processes.
        best: Best accuracy in validation.
        validated: Epochs up to the last validation.
    """
    update: int = 0
    loss: float = 0.
    count: int = 0
    failures: int = 0
    best: float = -1.
    validated: int = 0


class Trainer:
    """A network, its optimizer, and everything else that changes from update to update.

    Random numbers are seeded anew before every update, from the seed, the update and the process. So a run that goes on
    needs no state of a generator, and draws what it would have drawn.

    Args:
        network: The network, on the CPU, with ``requires_grad`` where it shall learn.
        config: The configuration.
        processes: The processes.
        updates: Updates of an epoch.
    """

    def __init__(self, network: nn.Module, config: Config, processes: Processes, updates: int) -> None:
        self.config, self.processes, self.updates = config, processes, updates
        self.device = processes.device
        if config.sync_bn:
            network = sync_batch_norms(network, self.device)
        self.network = network.to(self.device)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            self.network.set_grad_checkpointing(True)  # type: ignore[operator]
        batch = config.batch_size * config.accumulate * processes.world_size
        self.optimizer = make_optimizer(self.network, config, batch)
        self.scheduler = make_scheduler(self.optimizer, config, updates)
        self.amp = _TYPES.get(config.amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.ema = None if config.ema is None else ModelEmaV3(self.network, decay=config.ema)
        self.mean_std = mean_std(self.network)
        self.progress, self.lr = Progress(), 0.
        self.model: Any = self.network
        if processes.world_size > 1:
            self.model = DistributedDataParallel(
                self.network, [self.device] if self.device.type == 'cuda' else None)
        if config.compile:
            self.model = torch.compile(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: with averaged weights, if there are any."""
        network: nn.Module = self.network if self.ema is None else self.ema.module
        return network

    def update(self, batches: Iterator[Any], clock: Clock) -> Tuple[float, Tensor]:
        """One update from the next batches: the mean loss over all processes, and the norm of the gradient."""
        config, progress = self.config, self.progress
        train_mode(self.network)
        _seed(config.seed, progress.update, self.processes.rank)
        total = torch.zeros(2, device=self.device)  # loss, failures
        clips = 0
        for part in range(config.accumulate):
            batch = clock.wait(batches)
            # gradients travel once an update
            last = part == config.accumulate - 1
            with nullcontext() if last or self.processes.world_size == 1 else self.model.no_sync():
                x = as_input(batch.clips, self.device, *self.mean_std, config.channels_last)
                label = batch.label.to(self.device, non_blocking=True)
                with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
                    logits = self.model(x)
                loss = F.cross_entropy(logits.float(), label, label_smoothing=config.label_smoothing)
                self.scaler.scale(loss / config.accumulate).backward()
            total[0] += loss.detach() / config.accumulate
            if failed := int(batch.failures.sum()):
                total[1] += failed
            clips += len(label)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            [p for group in self.optimizer.param_groups for p in group['params']], config.clip_grad or math.inf)
        if not self.scaler.is_enabled():  # which leaves such an update out, and goes on
            check_finite(float(norm), progress.update + 1, 'norm of the gradient')  # before it is in the weights
        self.lr = float(self.scheduler.get_last_lr()[0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.network, step=progress.update)
        progress.update += 1
        clock.update(clips * self.processes.world_size)
        # the wait for the GPU that follows from this is what lets the clock tell data from computing
        loss_sum, failures = self.processes.sum(total).tolist()
        progress.failures += int(failures)
        return loss_sum / self.processes.world_size, norm

    def state(self) -> Dict[str, Any]:
        """All that is needed to go on."""
        state = {
            'state_dict': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scheduler': self.scheduler.state_dict(), 'scaler': self.scaler.state_dict(),
            'progress': asdict(self.progress)}
        if self.ema is not None:
            state['state_dict_ema'] = self.ema.module.state_dict()
        return state

    def restore(self, state: Dict[str, Any], source: str) -> None:
        """Go on from :meth:`state`."""
        load_weights(self.network, state['state_dict'], source)
        if self.ema is not None:
            load_weights(self.ema.module, state['state_dict_ema'], source)
        self.optimizer.load_state_dict(state['optimizer'])
        self.scheduler.load_state_dict(state['scheduler'])
        self.scaler.load_state_dict(state['scaler'])
        self.progress = Progress(**state['progress'])


def _seed(*numbers: int) -> None:
    """Seed every generator that a network or a transform may draw from."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def check_finite(value: float, update: int, what: str = 'loss') -> None:
    """Raise a FloatingPointError if a run has diverged."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f'the {what} of update {update} is {value}: the training has diverged; wanted a lower lr, a warm-up, '
            f"clip_grad, or amp='none'; the checkpoints are of before")


def per_epoch(share: int, config: Config, world_size: int) -> int:
    """Updates of an epoch, from the number of videos of a process."""
    clips = config.batch_size * config.accumulate
    if share < clips:
        raise ValueError(
            f'batch_size={config.batch_size} times accumulate={config.accumulate} on {world_size} processes wants '
            f'{clips * world_size} videos for one update, got {share * world_size}')
    return share // clips
