"""The released code's arithmetic and files, for the tests.

It is an implementation of its own: it computes with a state dict of the file's layout and ``torch.nn.functional``
alone, and shares nothing with the package.
"""
import io
import math
import traceback

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F


def batch_norm(x, sd, name):
    return F.batch_norm(
        x, sd[f'{name}.running_mean'], sd[f'{name}.running_var'], sd[f'{name}.weight'], sd[f'{name}.bias'])


def conv_bn(x, sd, name, conv='0', bn='1', **kwargs):
    y = F.conv2d(x, sd[f'{name}.{conv}.weight'], sd.get(f'{name}.{conv}.bias'), **kwargs)
    return batch_norm(y, sd, f'{name}.{bn}')


def trans_att(x, sd, name, t):
    """CME: projections with BN and ReLU on the map, then the pooling; softmax over dim 1; gate sigma(ReLU(BN(.)))."""
    n, _c = x.shape[:2]
    query = F.relu(conv_bn(x, sd, f'{name}.conv1_reduce_q')).mean((2, 3)).reshape(n // t, t, -1)
    key = F.relu(conv_bn(x, sd, f'{name}.conv1_reduce_k')).mean((2, 3)).reshape(n // t, t, -1)
    fused = torch.empty_like(key)
    for b in range(n // t):
        d = torch.tensor([[-float(query[b, i] @ query[b, j]) for j in range(t)] for i in range(t)], dtype=x.dtype)
        weight = torch.stack([torch.softmax(d[:, j], dim=0) for j in range(t)], dim=1)
        for i in range(t):
            fused[b, i] = key[b, i] + sum(weight[i, j] * key[b, j] for j in range(t))
    gate = torch.sigmoid(F.relu(conv_bn(fused.reshape(n, -1, 1, 1), sd, f'{name}.conv_inflate')))
    return x * gate


def shift_conv(x, sd, name, t):
    n, c, h, w = x.shape
    y = x.reshape(n // t, t, c, h * w).permute(0, 2, 1, 3)
    y = F.conv2d(y, sd[f'{name}.weight'], padding=(1, 0), groups=c)
    return y.permute(0, 2, 1, 3).reshape(n, c, h, w)


def spatial_att(x, sd, name, t):
    n, c, h, w = x.shape
    clips = x.reshape(n // t, t, c, h, w)
    s = F.cosine_similarity(clips[:, :-1], clips[:, 1:], dim=2)
    s = torch.cat([s, s[:, -1:]], dim=1).reshape(n, 1, h, w)
    return conv_bn(x * (1 - s), sd, f'{name}.W') + x


def residual_block(x, sd, name, t, stride):
    net = f'{name}.net' if f'{name}.net.conv1.weight' in sd else name
    y = x
    if f'{name}.trans_att.conv1_reduce_q.0.weight' in sd:
        y = shift_conv(trans_att(y, sd, f'{name}.trans_att', t), sd, f'{name}.shift_conv', t)
    y = F.relu(conv_bn(y, sd, net, 'conv1', 'bn1'))
    y = F.relu(conv_bn(y, sd, net, 'conv2', 'bn2', stride=stride, padding=1))
    y = conv_bn(y, sd, net, 'conv3', 'bn3')
    if f'{net}.downsample.0.weight' in sd:
        x = conv_bn(x, sd, f'{net}.downsample', stride=stride)
    y = F.relu(y + x)
    return spatial_att(y, sd, f'{name}.spatial_att', t) if f'{name}.spatial_att.W.0.weight' in sd else y


def released_forward(x, sd, layers, t):
    sd = {key.removeprefix('module.').removeprefix('base_model.'): value for key, value in sd.items()}
    x = F.relu(batch_norm(F.conv2d(x, sd['conv1.weight'], stride=2, padding=3), sd, 'bn1'))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, count in enumerate(layers, start=1):
        for i in range(count):
            x = residual_block(x, sd, f'layer{stage}.{i}', t, stride=2 if stage > 1 and i == 0 else 1)
    logits = F.linear(x.mean((2, 3)), sd['new_fc.weight'], sd['new_fc.bias'])
    return logits.reshape(-1, t, logits.shape[1]).mean(1)


def released_state_dict(
        layers=(3, 4, 6, 3), num_classes=174, n_round=1, dtype=torch.float32, reduction=8, dropout=True,
        channels=(64, 128, 256, 512)):
    """A file's state dict: exactly the keys of the authors' wrapper, random values."""
    generator = torch.Generator().manual_seed(0)
    sd = {}

    def conv(name, *shape, bias=False):
        fan_in = math.prod(shape[1:])
        sd[f'{name}.weight'] = torch.randn(shape, generator=generator, dtype=dtype) * (1.4 / fan_in ** 0.5)
        if bias:
            sd[f'{name}.bias'] = torch.randn(shape[0], generator=generator, dtype=dtype) * 0.1

    def bn(name, channels):
        sd[f'{name}.weight'] = torch.rand(channels, generator=generator, dtype=dtype) * 0.5 + 0.5
        sd[f'{name}.bias'] = torch.randn(channels, generator=generator, dtype=dtype) * 0.1
        sd[f'{name}.running_mean'] = torch.randn(channels, generator=generator, dtype=dtype) * 0.1
        sd[f'{name}.running_var'] = torch.rand(channels, generator=generator, dtype=dtype) + 0.5
        sd[f'{name}.num_batches_tracked'] = torch.tensor(1000)

    base = 'module.base_model'
    conv(f'{base}.conv1', 64, 3, 7, 7)
    bn(f'{base}.bn1', 64)
    inplanes = 64
    for stage, count in enumerate(layers, start=1):
        planes = channels[stage - 1]
        for i in range(count):
            name = f'{base}.layer{stage}.{i}'
            converted = i % n_round == 0
            net = f'{name}.net' if converted else name
            convs = (planes, inplanes, 1), (planes, planes, 3), (4 * planes, planes, 1)
            for j, (out, inp, size) in enumerate(convs, start=1):
                conv(f'{net}.conv{j}', out, inp, size, size)
                bn(f'{net}.bn{j}', out)
            if i == 0:
                conv(f'{net}.downsample.0', 4 * planes, inplanes, 1, 1)
                bn(f'{net}.downsample.1', 4 * planes)
            if converted:
                for part, out, inp in (
                        ('conv1_reduce_q', inplanes // reduction, inplanes),
                        ('conv1_reduce_k', inplanes // reduction, inplanes),
                        ('conv_inflate', inplanes, inplanes // reduction)):
                    conv(f'{name}.trans_att.{part}.0', out, inp, 1, 1)
                    bn(f'{name}.trans_att.{part}.1', out)
                conv(f'{name}.shift_conv', inplanes, 1, 3, 1)
            if i == 0:
                conv(f'{name}.spatial_att.W.0', 4 * planes, 4 * planes, 1, 1, bias=True)
                bn(f'{name}.spatial_att.W.1', 4 * planes)
            inplanes = 4 * planes
    conv('module.new_fc' if dropout else f'{base}.fc', num_classes, inplanes, bias=True)
    return sd


def whole(state_dict):
    """What the authors' training script saves; its schedule computes the learning rate with numpy."""
    groups = [{'lr': numpy.float64(.01) * .1 ** numpy.sum([0, 1]), 'momentum': .9, 'params': [0, 1]}]
    momentum = {i: {'momentum_buffer': torch.ones(2)} for i in (0, 1)}
    return {
        'epoch': 50, 'optimizer': {'state': momentum, 'param_groups': groups}, 'model': state_dict, 'best_prec1': 49.}


def refused(call, *messages):
    """Assert that a call ends in a ValueError without a way to run what is in the file, and return its text."""
    with pytest.raises(ValueError) as error:
        call()
    shown = ''.join(traceback.format_exception(error.value))
    assert 'weights_only=False' not in shown and '`False`' not in shown
    assert all(message in str(error.value) for message in messages), str(error.value)


def saved(**kwargs):
    file = io.BytesIO()
    torch.save(whole({'conv1.weight': torch.zeros(1000)}), file, **kwargs)
    return file.getvalue()


CONV, NORM = 'module.base_model.conv1.weight', 'module.base_model.layer2.1.net.bn3'


W1 = 'module.base_model.layer1.0.trans_att.conv1_reduce_k.0.weight'


TAPS = 'module.base_model.layer1.0.shift_conv.weight'
HEAD = 'module.new_fc.weight'


def put(value, shape=(64, 3, 7, 7)):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    return tensor


SMALL = {'channels': (8, 8, 8, 8), 'num_frames': 2}


def small(**kwargs):
    """A network of few channels, else as released."""
    return timm.create_model('released_cmr_resnet50', **{**SMALL, **kwargs})
