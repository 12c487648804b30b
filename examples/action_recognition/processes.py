"""The processes that train together: started by torchrun, or just this one."""
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Iterator, List, Optional

import torch
import torch.distributed as dist
from torch import nn

__all__ = ['Processes']


class Processes:
    """Joins the processes that torchrun started. Without torchrun there is one.

    Args:
        device: Device to compute on. None is a GPU if there is one, the one of this process's number on its machine.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        is_first: Whether this is the one that prints and writes.
        device: Device of this process.

    Example:
        >>> processes = Processes('cpu')
        >>> processes.rank, processes.world_size, processes.is_first
        (0, 1, True)
    """

    def __init__(self, device: Optional[str] = None) -> None:
        self.rank, self.local = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.is_first = self.rank == 0
        kind = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        self.device = torch.device(f'cuda:{self.local}' if kind == 'cuda' else kind)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo')
        # the first look at a list may take hours, after which a group would take its members for dead
        self._patient: Any = dist.new_group(backend='gloo', timeout=timedelta(days=7)) if self.world_size > 1 else None

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def first_of_machine(self) -> Iterator[None]:
        """Let the first process of each machine do what it leaves for the others to find."""
        if self.local != 0:
            self._wait()
        yield
        if self.local == 0:
            self._wait()

    def _wait(self) -> None:
        if self._patient is not None:
            dist.barrier(self._patient)

    def check_agreed(self, value: Any, what: str) -> None:
        """Raise a ValueError in all processes if the value is not the same in all."""
        if self.world_size > 1:
            values: List[Any] = [None] * self.world_size
            dist.all_gather_object(values, value, self._patient)
            if any(other != values[0] for other in values):
                raise ValueError(
                    f'the processes must have the same {what}, got {values}; wanted one folder and one list that all '
                    f'of them see')

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first one, whose are saved. Statistics of batch norms differ."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
