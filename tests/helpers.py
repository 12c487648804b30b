"""What the tests share: makers of frames, weights and networks with values as after training, and how near is near."""
import timm
import torch
from torch import nn

from cmr_layers import CME, SME, TIM, CMRBlock, ops

cl, contiguous = torch.channels_last, torch.contiguous_format
LAYOUTS = {'contiguous': contiguous, 'channels_last': cl}
F64, F32 = torch.float64, torch.float32
HALF = [torch.float16, torch.bfloat16]
# Forms of an operation and what each computes in. The kernels sum in float32, so float64 is for the plain form alone.
PRECISE = [('plain', F64), ('triton', F32)]
ALL = [(form, dtype) for form in ('reference', 'plain', 'triton') for dtype in (F32, *HALF)]
# The rule of tolerance: what a result may be off by, in units of the largest value that is expected. That is a few
# roundings of its dtype, the more the longer the sums that are rounded on the way; half precision sums in float32.
ROUNDINGS = {torch.float64: 5000, torch.float32: 20, torch.float16: 3, torch.bfloat16: 3}
TOLERANCE = {dtype: roundings * torch.finfo(dtype).eps for dtype, roundings in ROUNDINGS.items()}


def assert_near(got, want, dtype=None, times=1., unit=None):
    """``got`` is ``want``, which is exact, up to the rule of tolerance.

    Args:
        dtype: What was rounded to, where it is not the dtype of ``got``.
        times: How often the tolerance, for what goes through several layers or cancels.
        unit: What it is a tolerance in units of, where that is not the largest value of ``want``.
    """
    assert got.shape == want.shape
    largest = unit or (want.detach().abs().max().item() if want.numel() else 0.) or 1.
    torch.testing.assert_close(
        got.detach().double().cpu(), want.detach().double().cpu(), rtol=0,
        atol=times * TOLERANCE[dtype or got.dtype] * largest)


def assert_like(got, x):
    assert (got.shape, got.dtype, got.stride()) == (x.shape, x.dtype, x.stride())


def frames(*shape, dtype=torch.float32, layout=contiguous, device='cpu', scale=1.):
    """Normal values, drawn in float64 so that they are the same for every dtype; any tensor if it is no 4-D shape."""
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def cme_tim_weights(channels, c1=3, c2=2, b3=False, kernel_size=3, dtype=torch.float32, device='cpu'):
    """CME's weights and TIM's taps; c1 or kernel_size None: without. Small enough that no softmax saturates."""
    kw = {'dtype': dtype, 'device': device}
    cme, taps = ops.CMEWeights(), None
    if c1 is not None:
        scale = min(.5, 1.5 * channels ** -.5)
        cme = ops.CMEWeights(
            frames(c1, channels, scale=scale, **kw), frames(c2, channels, scale=scale, **kw),
            frames(channels, c1, scale=.5, **kw), frames(channels, **kw) if b3 else None)
    if kernel_size is not None:
        taps = frames(channels, 1, kernel_size, **kw)
    return cme, taps

HOOKS = (
    '_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs', '_forward_pre_hooks_with_kwargs',
    '_forward_hooks_always_called', '_backward_hooks', '_backward_pre_hooks', '_state_dict_hooks')


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Mean(nn.Module):
    """A frame classifier that shows which frame is which: its logits are the channels' means."""

    def forward(self, x):
        return x.mean((2, 3))


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 1), CME(8, 4), TIM(8, 4), SME(8, 4), Mean()).eval()


def randomize(model, everything=False):
    """Values as after training, so that no wrong term hides behind a zero or a one.

    Args:
        everything: Also in convolutions and linear layers, and whatever else has parameters.
    """
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                if m.affine:
                    m.weight.uniform_(.5, 1.5)
                    m.bias.uniform_(-.5, .5)
                if m.running_mean is not None:
                    m.running_mean.uniform_(-.5, .5)
                    m.running_var.uniform_(.5, 2)
            elif isinstance(m, (CME, TIM)) or (everything and not isinstance(m, WEIGHTED)):
                for p in m.parameters(recurse=False):
                    p.uniform_(-.7, .7)
            elif everything and isinstance(m, WEIGHTED):
                nn.init.kaiming_uniform_(m.weight, nonlinearity='linear')
                if m.bias is not None:
                    m.bias.uniform_(-.7, .7)
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


def small_block(**kwargs):
    """A block of 8 to 16 channels and clips of 4 frames, as after training."""
    made = CMRBlock(8, 4, downsample=nn.Conv2d(8, 16, 1), num_frames=4, reduction=2, **kwargs)
    return randomize(made, everything=True).eval()


def image_net(name='resnet18', **kwargs):
    """A ResNet of timm's with few channels."""
    channels = {'resnet18': (64, 16, 16, 16), 'resnet26': (16, 8, 8, 8), 'resnet50': (16, 8, 8, 8)}
    kwargs = {'num_classes': 5, 'zero_init_last': False, 'channels': channels[name], **kwargs}
    return randomize(timm.create_model(name, **kwargs)).eval()


def res2net():
    """A ResNet whose blocks are changed by hosts, not by their class."""
    return timm.models.ResNet(timm.models.res2net.Bottle2neck, (1, 1, 1, 1), base_width=14, channels=(16, 8, 8, 8))


# The settings of a vision tower of transformers that has a ViT's
SMALL_TRANSFORMER = {
    'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32, 'image_size': 32,
    'patch_size': 8}


def small_vit(**kwargs):
    """A ViT of two blocks, 24 channels, a class token and 4x4 patches."""
    return timm.create_model('vit_tiny_patch16_224', **{
        'img_size': 32, 'patch_size': 8, 'depth': 2, 'embed_dim': 24, 'num_heads': 2, 'num_classes': 5, **kwargs})
