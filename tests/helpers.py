"""What the tests of whole networks share."""
import torch
from torch import nn

from cmr_layers import CME, SME, TIM

HOOKS = (
    '_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
    '_forward_hooks_always_called', '_backward_hooks', '_backward_pre_hooks', '_state_dict_hooks')


class Mean(nn.Module):
    """A frame classifier that shows which frame is which: its logits are the channels' means."""

    def forward(self, x):
        return x.mean((2, 3))


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 1), CME(8, 4), TIM(8, 4), SME(8, 4), Mean()).eval()


def randomize(model):
    """Values as after training, so that no wrong term hides behind a zero or a one."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
                m.weight.uniform_(.5, 1.5)
                m.bias.uniform_(-.5, .5)
                m.running_mean.uniform_(-.5, .5)
                m.running_var.uniform_(.5, 2)
            elif isinstance(m, (CME, TIM)):
                for p in m.parameters():
                    p.uniform_(-.7, .7)
    return model


def randomize_layers(model):
    """The same for CME, SME and TIM alone."""
    for m in model.modules():
        if isinstance(m, (CME, SME, TIM)):
            randomize(m)
    return model


def anatomy(model):
    """All that a module tree is, but for the tensors' values."""
    return [
        (name, type(m), list(m._parameters), list(m._buffers), sorted(vars(m)), m.training,
         [len(getattr(m, hook, ())) for hook in HOOKS])
        for name, m in model.named_modules()]


def values(model):
    return {key: v.clone() for key, v in model.state_dict().items()}


def assert_same(before, after):
    assert list(before) == list(after)
    for (key, v), w in zip(before.items(), after.values(), strict=True):
        assert torch.equal(v, w), key
