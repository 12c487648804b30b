"""The authors' released variant: its layers, and checkpoints of its layout.

The reference below is an implementation of its own: it computes with a state dict of the file's layout and
``torch.nn.functional`` alone, and shares nothing with the package.
"""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from cmr_layers import SME, TIM, released


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


def released_state_dict(layers=(3, 4, 6, 3), num_classes=174, n_round=1, dtype=torch.float32):
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
        planes = 64 * 2 ** (stage - 1)
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
                        ('conv1_reduce_q', inplanes // 8, inplanes), ('conv1_reduce_k', inplanes // 8, inplanes),
                        ('conv_inflate', inplanes, inplanes // 8)):
                    conv(f'{name}.trans_att.{part}.0', out, inp, 1, 1)
                    bn(f'{name}.trans_att.{part}.1', out)
                conv(f'{name}.shift_conv', inplanes, 1, 3, 1)
            if i == 0:
                conv(f'{name}.spatial_att.W.0', 4 * planes, 4 * planes, 1, 1, bias=True)
                bn(f'{name}.spatial_att.W.1', 4 * planes)
            inplanes = 4 * planes
    conv('module.new_fc', num_classes, 2048, bias=True)
    return sd


@pytest.fixture(scope='module')
def state_dict():
    return released_state_dict()


@pytest.mark.parametrize('t', [1, 2, 5])
def test_cme_computes_what_the_released_code_does(t):
    torch.manual_seed(0)
    layer = released.CME(16, num_frames=t).double().eval()
    for module in layer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -.5, .5)
            torch.nn.init.uniform_(module.running_var, .5, 1.5)
            torch.nn.init.uniform_(module.bias, -.5, .5)
    names = {'w1': 'conv1_reduce_k', 'w2': 'conv1_reduce_q', 'w3': 'conv_inflate'}
    sd = {f'att.{names[key[:2]]}{key[2:]}': value for key, value in layer.state_dict().items()}
    x = torch.randn(3 * t, 16, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), trans_att(x, sd, 'att', t), rtol=1e-12, atol=1e-12)
    assert layer.gate(x).min() >= 0.5  # difference 4
    assert layer.gate(x).shape == (3, t, 16)


def test_cme_refuses_a_reduction_that_does_not_divide():
    with pytest.raises(ValueError, match=r'reduction must divide channels=12, got 8'):
        released.CME(12)


@pytest.mark.parametrize('wrap', [
    lambda sd: {'epoch': 50, 'optimizer': {'state': {}, 'param_groups': []}, 'model': sd, 'best_prec1': 49.},
    lambda sd: {'state_dict': sd},
    lambda sd: sd,
    lambda sd: {key.removeprefix('module.'): value for key, value in sd.items()},
], ids=['model', 'state_dict', 'bare', 'without DataParallel'])
def test_checkpoint_gives_the_released_codes_logits(state_dict, wrap, tmp_path):
    torch.save(wrap(state_dict), tmp_path / 'sthv1_8f.pth.tar')
    model = released.load_released_checkpoint(tmp_path / 'sthv1_8f.pth.tar', num_frames=4)
    x = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        logits, expected = model(x), released_forward(x.flatten(0, 1), state_dict, (3, 4, 6, 3), t=4)
    assert logits.shape == (2, 174)
    assert expected.std() > 1e-3  # nothing has died on the way
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_checkpoint_gives_the_released_codes_logits_in_float64(state_dict):
    double = {key: value.double() if value.is_floating_point() else value for key, value in state_dict.items()}
    model = released.load_released_checkpoint(state_dict, num_frames=4).double()
    x = torch.randn(1, 4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = released_forward(x.flatten(0, 1), double, (3, 4, 6, 3), t=4)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_deep_checkpoint_leaves_every_other_block_alone():
    layers = (3, 4, 23, 3)
    state_dict = released_state_dict(layers, num_classes=5, n_round=2)
    model = released.load_released_checkpoint(state_dict, num_frames=2)
    kinds = [type(block.cme).__name__ for block in model.layer3]
    assert kinds == ['CME', 'Identity'] * 11 + ['CME']
    x = torch.randn(1, 2, 3, 64, 64)
    with torch.no_grad():
        expected = released_forward(x.flatten(0, 1), state_dict, layers, t=2)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_loaded_model_has_the_released_layers_where_the_file_has_them(state_dict):
    model = released.load_released_checkpoint(state_dict)
    count = [sum(isinstance(m, kind) for m in model.modules()) for kind in (released.CME, TIM, SME)]
    assert count == [16, 16, 4]
    assert not model.training and model.drop_rate == 0.5 and model.num_frames == 8 and model.num_classes == 174


@pytest.mark.parametrize('depth, n_round', [(50, 1), (101, 2)])
def test_timm_saves_a_released_model_and_loads_it_again(depth, n_round, tmp_path):
    layers = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    model = released.load_released_checkpoint(released_state_dict(layers, 7, n_round), num_frames=2)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 2, 3, 64, 64)
    assert again.num_frames == 2
    assert torch.equal(again(x), model(x))


def test_cme_survives_large_features_in_half_precision():
    layer = released.CME(512, num_frames=4).eval()
    x = torch.randn(4, 512, 2, 2) * 300
    expected = layer.gate(x)
    with torch.autocast('cpu', dtype=torch.float16):
        assert (layer.gate(x).float() - expected).abs().max() < .02
    assert (layer.half().gate(x.half()).float() - expected).abs().max() < .02


def test_weights_do_not_depend_on_the_number_of_frames(state_dict):
    eight = released.load_released_checkpoint(state_dict, num_frames=8).state_dict()
    sixteen = released.load_released_checkpoint(state_dict, num_frames=16).state_dict()
    assert all(torch.equal(eight[key], sixteen[key]) for key in eight)


@pytest.mark.parametrize('drop, name', [
    ('module.base_model.layer1.0.trans_att.conv_inflate.1.bias', 'layer1.0.cme.w3.1.bias'),
    ('module.base_model.bn1.weight', 'bn1.weight')])
def test_missing_key_is_an_error_that_lists_it(state_dict, drop, name):
    wrong = {key: value for key, value in state_dict.items() if key != drop}
    with pytest.raises(RuntimeError, match=rf'Missing key.*{name}'):
        released.load_released_checkpoint(wrong)


def test_unexpected_key_is_an_error_that_lists_it(state_dict):
    wrong = {**state_dict, 'module.base_model.layer2.1.surprise.weight': torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*layer2\.1\.surprise\.weight'):
        released.load_released_checkpoint(wrong)


def test_other_shape_is_an_error(state_dict):
    wrong = {**state_dict, 'module.base_model.layer1.0.shift_conv.weight': torch.zeros(64, 1, 5, 1)}
    with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.0\.tim\.weight'):
        released.load_released_checkpoint(wrong)


def test_doubled_key_is_an_error(state_dict):
    with pytest.raises(ValueError, match=r'twice'):
        released.load_released_checkpoint({**state_dict, 'base_model.conv1.weight': torch.zeros(64, 3, 7, 7)})


def test_something_else_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'CMR ResNet-50, -101 or -152 as released.*got layer3 of 2 blocks'):
        released.load_released_checkpoint({f'layer3.{i}.conv1.weight': torch.zeros(1) for i in range(2)})
    with pytest.raises(ValueError, match=r"must hold a state dict.*got \['epoch'\]"):
        released.load_released_checkpoint({'epoch': 3})
    with pytest.raises(ValueError, match=r'must be a path or a dict, got int'):
        released.load_released_checkpoint(3)
    with pytest.raises(FileNotFoundError):
        released.load_released_checkpoint(tmp_path / 'missing.pth.tar')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match=r'got list'):
        released.load_released_checkpoint(tmp_path / 'list.pth')


def test_text_file_is_an_error(tmp_path):
    (tmp_path / 'text.pth').write_text('epoch 3\n')
    with pytest.raises(ValueError, match=r"text.pth' is no checkpoint that torch.load can read"):
        released.load_released_checkpoint(tmp_path / 'text.pth')


def test_file_with_code_in_it_is_refused(tmp_path):
    torch.save({'model': torch.nn.Linear(2, 2)}, tmp_path / 'pickle.pth')
    with pytest.raises(Exception, match=r'weights_only|Weights only'):
        released.load_released_checkpoint(tmp_path / 'pickle.pth')


def test_cme_scripts():
    layer, x = released.CME(16, num_frames=4).eval(), torch.randn(8, 16, 5, 5)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
