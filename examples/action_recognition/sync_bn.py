"""Batch norms that see the batches of all processes."""
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

__all__ = ['sync_batch_norms']


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """As PyTorch's SyncBatchNorm, for CPUs, which that refuses. All processes must have batches of one size."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _mean(wide.mean((0, 2, 3)))
        wide = wide - mean[:, None, None]
        var = _mean(wide.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = wide * scale[:, None, None]
        return (y if self.bias is None else y + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over the processes. The losses of all of them depend on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _mean(x: Tensor) -> Tensor:
    """Mean over the processes."""
    total: Tensor = _Sum.apply(x)
    return total / dist.get_world_size()


def sync_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a network see the batches of all processes.

    Raises:
        ValueError: On a CPU, a batch norm is not a plain ``nn.BatchNorm2d``.
    """
    if device.type != 'cpu':
        synced: nn.Module = convert_sync_batchnorm(model)  # timm's: PyTorch's drops the activations of timm's norms
        return synced
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) is not nn.BatchNorm2d:
                raise ValueError(
                    f'sync_bn on a CPU wants plain nn.BatchNorm2d, but {name} is a {type(module).__name__}')
            exchanged: Any = module
            exchanged.__class__ = _GlobalBatchNorm2d
    return model
