"""The peers compute what their sources say: their modules against loops, their blocks and networks against F.

The loops take one clip as nested lists [t][c][h][w], and nothing of the package but the values of the parameters. The
formulas are those of each peer's released code, or of its paper where there is none.
"""
import copy
import functools
import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import nn

from benchmarks import flops
from benchmarks.peers import PEERS
from benchmarks.peers.gsm import GSM
from benchmarks.peers.stm import CMM, STMBlock, cstm
from benchmarks.peers.tdrl import PEM
from benchmarks.peers.tea import ME, TEABlock
from benchmarks.peers.tei import MEM
from benchmarks.peers.tsm import TemporalShift
from cmr_layers import temporal_keys

B, T, H, W = 2, 4, 3, 2


def trained(model):
    return randomize(model, everything=True).double().eval()


def clips(channels, height=H, width=W):
    return torch.randn(B, T, channels, height, width, dtype=torch.float64)


# Loops

def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def dot(weight, vector, bias=None):
    """A 1x1 convolution of one pixel, or of a pooled vector."""
    bias = [0.] * len(weight) if bias is None else bias.tolist()
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b
            for row, b in zip(weight.flatten(1).tolist(), bias, strict=True)]


def norm(vector, bn):
    """Batch norm in eval mode."""
    return [(v - m) / math.sqrt(s + bn.eps) * g + b for v, m, s, g, b in zip(
        vector, bn.running_mean.tolist(), bn.running_var.tolist(), bn.weight.tolist(), bn.bias.tolist(), strict=True)]


def relu(vector):
    return [max(v, 0.) for v in vector]


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def pooled(frame):
    return [sum(map(sum, plane)) / (len(plane) * len(plane[0])) for plane in frame]


def scaled(clip, gates):
    """One number per frame and channel, times the map."""
    return [[[[v * a for v in row] for row in plane] for plane, a in zip(frame, gate, strict=True)]
            for frame, gate in zip(clip, gates, strict=True)]


def shift(clip, ahead, back):
    """Channels in `ahead` read frame t+1, those in `back` frame t-1; frames beyond the clip are zero."""
    T, C, H, W = len(clip), len(clip[0]), len(clip[0][0]), len(clip[0][0][0])

    def value(t, c, h, w):
        source = t + 1 if c in ahead else t - 1 if c in back else t
        return clip[source][c][h][w] if 0 <= source < T else 0.

    return [[[[value(t, c, h, w) for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)]


def pixelwise(frame, f):
    """`f` of the channel vector at each pixel."""
    H, W = len(frame[0]), len(frame[0][0])
    out = [[f([plane[h][w] for plane in frame]) for w in range(W)] for h in range(H)]
    return [[[out[h][w][c] for w in range(W)] for h in range(H)] for c in range(len(out[0][0]))]


def depthwise(frame, weight):
    """A depthwise 3x3 with a border of zeros."""
    H, W = len(frame[0]), len(frame[0][0])

    def value(c, h, w):
        return sum(
            weight[c][i][j] * frame[c][h + i - 1][w + j - 1]
            for i in range(3) for j in range(3) if 0 <= h + i - 1 < H and 0 <= w + j - 1 < W)

    weight = weight[:, 0].tolist()
    return [[[value(c, h, w) for w in range(W)] for h in range(H)] for c in range(len(frame))]


def differences(q, weight):
    """m_t = dw3x3(q_{t+1}) - q_t, m_T = 0."""
    m = []
    for t in range(len(q) - 1):
        after = depthwise(q[t + 1], weight)
        m.append([[[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*planes, strict=True)]
                  for planes in zip(after, q[t], strict=True)])
    return m + [[[[0.] * len(row) for row in plane] for plane in q[-1]]]


def mem_gates(clip, w1, bn1, w2, bn2, w3, bn3):
    """TEINet (AAAI 2020), MEM: d_t = ReLU(BN(W1 p_t)) - ReLU(BN(W2 p_{t+1})), sigma(ReLU(BN(W3 d_t))), last frame 1."""
    p = [pooled(frame) for frame in clip]
    gates = []
    for t in range(len(p) - 1):
        d = [a - b for a, b in zip(relu(norm(dot(w1, p[t]), bn1)), relu(norm(dot(w2, p[t + 1]), bn2)), strict=True)]
        gates.append([sigmoid(v) for v in relu(norm(dot(w3, d), bn3))])
    return gates + [[1.] * len(p[0])]


def pem_gates(clip, w1, bn1, w2, bn2, w, b, wa, ba):
    """TDRL (ECCV 2020), its PEM: d as MEM's but d_T = 1, g_0 = 1; gamma_t = sigma(w.[d_t ; g_{t-1}] + b)."""
    p = [pooled(frame) for frame in clip]
    r = len(w1)
    g = [1.] * r
    gates = []
    for t in range(len(p)):
        if t == len(p) - 1:
            d = [1.] * r
        else:
            d = [
                u - v
                for u, v in zip(relu(norm(dot(w1, p[t]), bn1)), relu(norm(dot(w2, p[t + 1]), bn2)), strict=True)]
        gamma = sigmoid(dot(w, d + g, b)[0])
        g = [gamma * u + (1 - gamma) * v for u, v in zip(d, g, strict=True)]
        gates.append([sigmoid(v) for v in dot(wa, g, ba)])
    return gates


def cmm(clip, squeeze, bn, dw, expand):
    """STM (ICCV 2019), its CMM: q = BN(1x1 h) without ReLU, the differences, a bare 1x1."""
    q = [pixelwise(frame, lambda v: norm(dot(squeeze, v), bn)) for frame in clip]
    return [pixelwise(frame, lambda v: dot(expand, v)) for frame in differences(q, dw)]


def me_gates(clip, squeeze, bn1, dw, expand, bn3):
    """TEA (CVPR 2020, Phoenix1327/tea-action-recognition), its ME: a = sigma(BN(1x1 GAP(m))) - 0.5."""
    q = [pixelwise(frame, lambda v: norm(dot(squeeze, v), bn1)) for frame in clip]
    return [[sigmoid(v) - .5 for v in norm(dot(expand, pooled(m)), bn3)] for m in differences(q, dw)]


def gsm(clip, bn, weight, bias):
    """GSM (CVPR 2020, swathikirans/GSM), of the gated channels alone."""
    T, C, H, W = len(clip), len(clip[0]), len(clip[0][0]), len(clip[0][0][0])
    a = [pixelwise(frame, lambda v: relu(norm(v, bn))) for frame in clip]
    weight, half = weight.tolist(), C // 2      # weight (2, C/2, 3, 3, 3), one filter per half

    def gate(t, k, h, w):
        if not 0 <= t < T:
            return 0.
        total = bias[k].item()
        for c in range(half):
            for dt in range(3):
                for i in range(3):
                    for j in range(3):
                        tt, hh, ww = t + dt - 1, h + i - 1, w + j - 1
                        if 0 <= tt < T and 0 <= hh < H and 0 <= ww < W:
                            total += weight[k][c][dt][i][j] * a[tt][k * half + c][hh][ww]
        return math.tanh(total)

    def y(t, c, h, w):
        return gate(t, c // half, h, w) * clip[t][c][h][w] if 0 <= t < T else 0.

    def value(t, c, h, w):
        k = c // half
        i, j = divmod(c - k * half, 2)              # out[2i + j] of a half is its channel j * C/4 + i
        source = k * half + j * (half // 2) + i
        other = t + 1 if k == 0 else t - 1
        return y(other, source, h, w) + clip[t][source][h][w] - y(t, source, h, w)

    return [[[[value(t, c, h, w) for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)]


def conv_norm(sequence):
    return sequence[0].weight, sequence[1]


def mem_gates_of(m, clip):
    d = m.difference
    return mem_gates(clip, *conv_norm(d.now), *conv_norm(d.later), *conv_norm(m.expand))


def pem_gates_of(m, clip):
    d = m.difference
    return pem_gates(
        clip, *conv_norm(d.now), *conv_norm(d.later), m.gamma.weight, m.gamma.bias, m.expand.weight, m.expand.bias)


def me_gates_of(m, clip):
    d = m.difference
    return me_gates(clip, d.squeeze.weight, d.norm, d.transform.weight, *conv_norm(m.expand))


def cmm_of(m, clip):
    d = m.difference
    return cmm(clip, d.squeeze.weight, d.norm, d.transform.weight, m.expand.weight)


def gsm_of(m, clip):
    g = GATED
    gated = gsm([frame[:g] for frame in clip], m.norm, m.gate.weight, m.gate.bias)
    return [a + frame[g:] for a, frame in zip(gated, clip, strict=True)]


GATED = 16
# reduced to more than the two channels of r = 8, so that not all of them are zero behind a ReLU; the counts pin r
Module = namedtuple('Module', 'make channels loops')
MODULES = {
    'TemporalShift': Module(
        TemporalShift, 16, lambda m, clip: shift(clip, ahead=(0, 1), back=(2, 3))),
    'MEM': Module(functools.partial(MEM, reduction=2), 16, lambda m, clip: scaled(clip, mem_gates_of(m, clip))),
    'PEM': Module(functools.partial(PEM, reduction=2), 16, lambda m, clip: scaled(clip, pem_gates_of(m, clip))),
    'CMM': Module(CMM, 32, cmm_of),
    'ME': Module(ME, 32, lambda m, clip: scaled(clip, [[1 + a for a in gate] for gate in me_gates_of(m, clip)])),
    'GSM': Module(functools.partial(GSM, gated_channels=GATED), 20, gsm_of),
}


@pytest.fixture(params=MODULES)
def module(request):
    """A module with trained-like values, clips for it, and its loops over a batch of clips."""
    make, channels, loops = MODULES[request.param]
    m = trained(make(channels, num_frames=T))
    return m, clips(channels), lambda x: tensor([loops(m, clip) for clip in x.tolist()])


# Modules

def test_modules_compute_the_loops(module):
    m, x, loops = module
    with torch.no_grad():
        torch.testing.assert_close(m(x), loops(x))


def test_modules_take_frames_in_either_layout(module):
    m, x, loops = module
    frames = x.flatten(0, 1)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(m(frames.contiguous(memory_format=layout)), loops(x).flatten(0, 1))


def test_modules_see_a_still_as_a_clip_of_one_frame(module):
    m, x, loops = module
    with torch.no_grad():
        torch.testing.assert_close(m(x[0, :2]), loops(x[0, :2, None])[:, 0])


def test_clips_never_mix(module):
    m, x, _ = module
    other = x.clone()
    other[1] = torch.randn_like(x[1])
    with torch.no_grad():
        before, after = m(x), m(other)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_shift_reads_next_previous_and_the_frame_itself():
    x = torch.arange(1., 5).view(1, T, 1, 1, 1).expand(B, T, 16, H, W)  # frame t holds t + 1
    y = TemporalShift(16, num_frames=T)(x)[:, :, :, 0, 0]
    for b in range(B):
        assert y[b, :, :2].T.tolist() == [[2, 3, 4, 0]] * 2
        assert y[b, :, 2:4].T.tolist() == [[0, 1, 2, 3]] * 2
        assert y[b, :, 4:].T.tolist() == [[1, 2, 3, 4]] * 12


def gates(m, x):
    """What a module multiplies the pooled maps by; exact where `x` is one."""
    with torch.no_grad():
        y = m(x) / x
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y))  # one number per frame and channel
    return y[..., 0, 0]


def test_mem_keeps_at_least_half_and_the_last_frame_exactly():
    m, x = trained(MEM(16, num_frames=T, reduction=2)), clips(16)
    with torch.no_grad():
        assert torch.equal(m(x)[:, -1], x[:, -1])
    gate = gates(m, x)[:, :-1]
    assert (gate >= .5 - 1e-12).all() and (gate < 1).all()
    assert (gate < .5 + 1e-12).any() and (gate > .6).any()  # both sides of the ReLU


def test_mem_looks_one_frame_ahead_only():
    m, x = trained(MEM(16, num_frames=T, reduction=2)), clips(16)
    other = x.clone()
    other[:, 2] += 1
    change = (gates(m, x) - gates(m, other)).abs().amax((0, 2))
    assert (change > 1e-6).tolist() == [False, True, True, False]


def test_pem_carries_every_frame_to_the_last_one():
    m, x = trained(PEM(16, num_frames=T, reduction=2)), clips(16)
    for t, changed in ((0, [True] * 4), (2, [False, True, True, True]), (3, [False, False, True, True])):
        other = x.clone()
        other[:, t] += 1
        change = (gates(m, x) - gates(m, other)).abs().amax((0, 2))
        assert (change > 1e-6).tolist() == changed


def test_pem_gates_lie_between_zero_and_one_on_both_sides_of_a_half():
    gate = gates(trained(PEM(16, num_frames=T, reduction=2)), clips(16))
    assert (gate > 0).all() and (gate < .5).any() and (gate > .5).any() and (gate < 1).all()


def test_pem_starts_without_biases():
    m = PEM(16, num_frames=T)
    assert not m.gamma.bias.any() and not m.expand.bias.any()
    assert m.gamma.weight.any() and m.expand.weight.any()
    assert m.difference.now[0].bias is None and m.difference.later[0].bias is None


def test_pem_of_one_frame_is_a_constant_gate():
    """With d_T = g_0 = 1 there is nothing to mix."""
    m, x = trained(PEM(16, num_frames=1)), clips(16)[:, :1]
    expected = (m.expand.weight[:, :, 0, 0].sum(1) + m.expand.bias).sigmoid().detach()
    torch.testing.assert_close(gates(m, x), expected.expand(B, 1, 16))


def test_cmm_of_the_last_frame_is_zero():
    m, x = trained(CMM(32, num_frames=T)), clips(32)
    with torch.no_grad():
        y = m(x)
    assert torch.equal(y[:, -1], torch.zeros_like(y[:, -1]))
    assert all(y[:, t].any() for t in range(T - 1))


def test_me_moves_a_channel_by_less_than_half():
    m, x = trained(ME(32, num_frames=T)), clips(32)
    with torch.no_grad():
        m.expand[1].weight.mul_(4)
    a = gates(m, x) - 1
    assert (a > -.5).all() and (a < .5).all() and (a < -.2).any() and (a > .2).any()


def test_me_of_the_last_frame_is_what_batch_norm_makes_of_zero():
    m, x = trained(ME(32, num_frames=T)), clips(32)
    expected = 1 + tensor([sigmoid(v) - .5 for v in norm([0.] * 32, m.expand[1])])
    torch.testing.assert_close(gates(m, x)[:, -1], expected.expand(B, 32))


def test_gsm_starts_as_a_permutation():
    x = clips(20)
    m = GSM(20, num_frames=T, gated_channels=16).double().eval()
    permutation = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 16, 17, 18, 19]
    with torch.no_grad():
        assert torch.equal(m(x), x[:, :, permutation])


@pytest.mark.parametrize('sign', [1, -1])
def test_gsm_of_an_open_gate_shifts_the_halves_apart(sign):
    """tanh is one: everything moves and nothing stays. It may also be minus one."""
    x = clips(20)
    m = GSM(20, num_frames=T, gated_channels=16).double().eval()
    nn.init.constant_(m.gate.bias, sign * 100)
    moved = tensor([shift(clip, ahead=range(8), back=range(8, 16)) for clip in x.tolist()])
    y = sign * moved + (x - sign * x)
    permutation = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    with torch.no_grad():
        torch.testing.assert_close(m(x)[:, :, :16], y[:, :, permutation])


def test_gsm_leaves_other_channels_and_reads_none_of_them():
    m, x = trained(GSM(20, num_frames=T, gated_channels=16)), clips(20)
    other = x.clone()
    other[:, :, 16:] += 1
    with torch.no_grad():
        before, after = m(x), m(other)
    assert torch.equal(before[:, :, 16:], x[:, :, 16:])
    assert torch.equal(before[:, :, :16], after[:, :, :16])


def test_gsm_gates_all_channels_by_default():
    assert GSM(8).norm.num_features == 8


@pytest.mark.parametrize('channels', [6, 10])
def test_gsm_wants_a_multiple_of_four(channels):
    with pytest.raises(ValueError, match=f'gated_channels.*4.*got {channels}$'):
        GSM(12, gated_channels=channels)
    with pytest.raises(ValueError, match=f'gated_channels.*4.*got {channels}$'):
        GSM(channels)


@pytest.mark.parametrize('channels', [8, 16])
def test_cstm_starts_with_a_quarter_of_each_neighbour(channels):
    x, q = clips(channels), channels // 4
    expected = tensor([shift(clip, ahead=range(channels - q, channels), back=range(q)) for clip in x.tolist()])
    with torch.no_grad():
        assert torch.equal(cstm(channels, T).double()(x), expected)


# Blocks

def norm2d(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def over_time(x, weight):
    """A depthwise convolution over time of frames (B*T, C, H, W): tap 2 reads frame t+1."""
    x = F.pad(x.unflatten(0, (-1, T)), (0, 0, 0, 0, 0, 0, 1, 1))
    return sum(x[:, i:i + T] * weight[:, 0, i, None, None] for i in range(3)).flatten(0, 1)


def shortcut(block, x, stride):
    if block.downsample is None:
        return x
    return norm2d(F.conv2d(x, block.downsample[0].weight, stride=stride), block.downsample[1])


def last(layer):
    return layer[-1] if isinstance(layer, nn.Sequential) else layer


def same(x):
    return x


def bottleneck(block, x, stride, before_conv1=same, before_conv2=same, motion=None, behind_conv3=same):
    h = F.conv2d(before_conv1(x), last(block.conv1).weight)
    h = F.relu(norm2d(h, block.bn1))
    y = F.conv2d(before_conv2(h), block.conv2.weight, stride=stride, padding=1)
    y = F.relu(norm2d(y, block.bn2))
    if motion:
        m = motion(h)
        y = y + (F.max_pool2d(m, 2) if stride == 2 else m)
    conv3 = block.conv3[0] if isinstance(block.conv3, nn.Sequential) else block.conv3
    y = norm2d(behind_conv3(F.conv2d(y, conv3.weight)), block.bn3)
    return F.relu(y + shortcut(block, x, stride))


def stm_block(block, x, stride, motion):
    return bottleneck(block, x, stride, before_conv2=lambda h: over_time(h, block.time.weight), motion=motion)


def tea_block(block, x, stride, excite):
    h = excite(F.relu(norm2d(F.conv2d(x, block.conv1.weight), block.bn1)))
    stage = block.downsample is not None  # the first block of a stage: splits side by side, the last one pooled
    *splits, d = h.chunk(4, 1)
    outputs = []
    for i, y in enumerate(splits):
        if i > 0 and not stage:
            y = y + outputs[i - 1]
        y = F.conv2d(over_time(y, block.shifts[i].weight), block.convs[i].weight, stride=stride, padding=1)
        outputs.append(F.relu(norm2d(y, block.bns[i])))
    d = over_time(d, block.shifts[3].weight)
    outputs.append(F.avg_pool2d(d, 3, stride, 1) if stage else d)
    y = norm2d(F.conv2d(torch.cat(outputs, 1), block.conv3.weight), block.bn3)
    return F.relu(y + shortcut(block, x, stride))


def frames_by(loops, m):
    return lambda h: tensor([loops(m, clip) for clip in h.unflatten(0, (-1, T)).tolist()]).flatten(0, 1)


def make_block(kind, planes, stride, stage, **kwargs):
    inputs = 24 if stage else 4 * planes
    downsample = nn.Sequential(
        nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)) if stage else None
    block = kind(inputs, planes, stride, downsample, norm_layer=nn.BatchNorm2d, num_frames=T, **kwargs)
    return trained(block), inputs


STRIDES = pytest.mark.parametrize(('stride', 'stage'), [(1, False), (1, True), (2, True)])


@STRIDES
def test_stm_block_adds_motion_behind_batch_norm_and_relu(stride, stage):
    block, inputs = make_block(STMBlock, 32, stride, stage)
    x = clips(inputs, 4, 6).flatten(0, 1)
    before = x.clone()
    with torch.no_grad():
        expected = stm_block(block, x, stride, frames_by(cmm_of, block.cmm))
        torch.testing.assert_close(block(x), expected)
    assert expected.shape == (B * T, 128, 4 // stride, 6 // stride)
    assert torch.equal(x, before)


def test_stm_block_takes_odd_sizes():
    """Where conv2 leaves a row or a column that no whole window of the pool covers, the pool sees what is there."""
    block, inputs = make_block(STMBlock, 32, 2, True)
    x = clips(inputs, 5, 3).flatten(0, 1)
    with torch.no_grad():
        y = block(x)
        h = F.relu(norm2d(F.conv2d(x, block.conv1.weight), block.bn1))
        m = block.cmm(h)
        pooled_motion = torch.stack([
            torch.stack([m[:, :, i:i + 2, j:j + 2].amax((2, 3)) for j in (0, 2)], -1) for i in (0, 2, 4)], -2)
        r = F.relu(norm2d(F.conv2d(over_time(h, block.time.weight), block.conv2.weight, None, 2, 1), block.bn2))
        r = norm2d(F.conv2d(r + pooled_motion, block.conv3.weight), block.bn3)
    torch.testing.assert_close(y, F.relu(r + shortcut(block, x, 2)))


def test_stm_block_starts_with_cstm():
    block = STMBlock(64, 16, norm_layer=nn.BatchNorm2d, num_frames=T)
    now, before, after = [0, 1, 0], [1, 0, 0], [0, 0, 1]
    assert block.time.weight[:, 0].tolist() == [before] * 4 + [now] * 8 + [after] * 4


@STRIDES
def test_tea_block_excites_then_aggregates(stride, stage):
    block, inputs = make_block(TEABlock, 20, stride, stage, scale=4)  # four splits of 8
    x = clips(inputs, 4, 6).flatten(0, 1)
    before = x.clone()
    with torch.no_grad():
        expected = tea_block(block, x, stride, frames_by(MODULES['ME'].loops, block.me))
        torch.testing.assert_close(block(x), expected)
    assert expected.shape == (B * T, 80, 4 // stride, 6 // stride)
    assert torch.equal(x, before)


def test_tea_block_starts_with_the_last_split_shifted_and_the_others_still():
    block = TEABlock(80, 20, norm_layer=nn.BatchNorm2d, num_frames=T)
    x = clips(8)
    with torch.no_grad():
        assert all(torch.equal(block.shifts[i].double()(x), x) for i in range(3))
        expected = tensor([shift(clip, ahead=range(4), back=range(4, 8)) for clip in x.tolist()])
        assert torch.equal(block.shifts[3].double()(x), expected)


# Counts

COUNTS = {
    'tsn': (23.86, 32.70), 'tsm': (23.86, 32.70), 'tei': (29.91, 32.88), 'stm': (24.04, 33.08), 'tdrl': (30.40, 32.88),
    'tea': (24.46, 34.54)}
# channels before each of ResNet-50's blocks; channels and width at 224x224 behind them
INPUTS = [64, 256, 256, 256, *[512] * 4, *[1024] * 6, 2048, 2048]
OUTPUTS = [*[(256, 56)] * 3, *[(512, 28)] * 4, *[(1024, 14)] * 6, *[(2048, 7)] * 3]


@functools.cache
def counted(name):
    return flops.count(PEERS[name](num_frames=8, num_classes=174, device='meta'), 8)


@pytest.mark.parametrize('name', COUNTS)
def test_counts_are_those_of_table_1(name):
    params, macs = COUNTS[name]
    found = counted(name)
    if name == 'tdrl':
        # the released code registers, and never uses, two convolutions r x r and a batch norm of r = C/8 in each block
        dead = sum(2 * (c // 8) ** 2 + 2 * (c // 8) for c in INPUTS) / 1e6
        assert round(dead, 2) == .50
        assert round(found['mparams'], 2) < params
        found = {**found, 'mparams': found['mparams'] + dead}
    assert round(found['mparams'], 2) == params
    assert round(found['gmacs'], 2) == macs


def test_count_of_gsm_is_resnet_and_a_filter_of_27_taps_for_each_gated_channel():
    gated = [c // 4 for c, _ in OUTPUTS]
    params = sum(2 * g + 27 * g + 2 for g in gated)  # batch norm, two filters over half of the channels, two biases
    macs = sum(27 * g * 8 * size ** 2 for g, (_, size) in zip(gated, OUTPUTS, strict=True))
    assert counted('gsm')['mparams'] - counted('tsn')['mparams'] == pytest.approx(params / 1e6, abs=1e-9)
    assert counted('gsm')['gmacs'] - counted('tsn')['gmacs'] == pytest.approx(macs / 1e9, abs=1e-9)


# Networks

def tsm_weight(channels):
    weight = torch.zeros(channels, 1, 3, dtype=torch.float64)
    f = channels // 8
    weight[:f, :, 2] = weight[f:2 * f, :, 0] = weight[2 * f:, :, 1] = 1
    return weight


def tsm_block(block, x, stride):
    return bottleneck(block, x, stride, before_conv1=lambda x: over_time(x, tsm_weight(x.shape[1])))


def gated_block(block, x, stride):
    """TEINet's and TDRL's: gate, then convolution over time."""
    gate, time = block.conv1[0]
    return bottleneck(block, x, stride, before_conv1=lambda x: over_time(gate(x), time.weight))


def gsm_block(block, x, stride):
    return bottleneck(block, x, stride, behind_conv3=block.conv3[1])


BLOCKS = {
    'tsn': bottleneck, 'tsm': tsm_block, 'tei': gated_block, 'tdrl': gated_block, 'gsm': gsm_block,
    'stm': lambda block, x, stride: stm_block(block, x, stride, block.cmm),
    'tea': lambda block, x, stride: tea_block(block, x, stride, block.me)}


def resnet50(net, x, block):
    x = F.conv2d(x.flatten(0, 1), net.conv1.weight, stride=2, padding=3)
    x = F.max_pool2d(F.relu(norm2d(x, net.bn1)), 3, 2, 1)
    for stage, depth in ((net.layer1, 3), (net.layer2, 4), (net.layer3, 6), (net.layer4, 3)):
        assert len(stage) == depth
        for i, module in enumerate(stage):
            x = block(module, x, 2 if i == 0 and stage is not net.layer1 else 1)
    x = F.linear(x.mean((2, 3)), net.fc.weight, net.fc.bias)
    return x.unflatten(0, (-1, T)).mean(1)


NARROW = 64, 64, 64, 64    # channels of the stages, which the formulas do not know
Network = namedtuple('Network', 'name model start x y')


@pytest.fixture(scope='module', params=PEERS)
def network(request):
    """A peer with trained-like values, what its modules started with, clips and their logits."""
    torch.manual_seed(0)
    model = PEERS[request.param](num_frames=T, num_classes=7, channels=NARROW)
    state = model.state_dict()
    start = {key: state[key].clone() for key in temporal_keys(model)}
    trained(model)
    x = torch.randn(B, T, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        return Network(request.param, model, start, x, model(x))


def test_networks_are_resnet50_with_their_modules_in_all_blocks(network):
    with torch.no_grad():
        expected = resnet50(network.model.model, network.x, BLOCKS[network.name])
    assert expected.shape == (B, 7)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    torch.testing.assert_close(network.y, expected)


def test_networks_start_as_their_sources_do(network):
    """Of what starts at chosen values: taps and gates."""
    taps = {key: value[:, 0].tolist() for key, value in network.start.items() if value.ndim == 3}
    assert len(taps) == {'tei': 16, 'tdrl': 16, 'stm': 16, 'tea': 64}.get(network.name, 0)
    before, now, after = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    for key, found in taps.items():
        C = len(found)
        if network.name == 'stm':
            expected = [before] * (C // 4) + [now] * (C // 2) + [after] * (C // 4)
        elif network.name == 'tea':
            expected = [after] * (C // 2) + [before] * (C // 2) if '.shifts.3.' in key else [now] * C
        else:
            expected = [after] * (C // 8) + [before] * (C // 8) + [now] * (C * 3 // 4)
        assert found == expected, key
    gates = [value for key, value in network.start.items() if network.name == 'gsm' and '.gate.' in key]
    assert len(gates) == (32 if network.name == 'gsm' else 0)
    assert not any(value.any() for value in gates)


def test_tsm_is_tsn_of_the_same_weights_with_a_hook_in_front_of_every_conv1():
    tsm, tsn = (PEERS[name](num_frames=T, num_classes=7, channels=NARROW) for name in ('tsm', 'tsn'))
    trained(tsm)
    tsn.double().eval()
    state = {key.replace('conv1.1.', 'conv1.'): value for key, value in tsm.state_dict().items()}
    assert all(value.ndim != 3 for value in state.values())
    x = torch.randn(1, T, 3, 32, 32, dtype=torch.float64)

    def hook(_module, inputs):
        return over_time(inputs[0], tsm_weight(inputs[0].shape[1]))

    with torch.no_grad():
        tsn.load_state_dict(state)
        convs = [m for name, m in tsn.named_modules() if name.endswith('conv1') and '.layer' in name]
        assert len(convs) == 16
        for conv in convs:
            conv.register_forward_pre_hook(hook)
        torch.testing.assert_close(tsm(x), tsn(x))


def test_networks_take_folded_frames_in_either_layout(network):
    frames = network.x.flatten(0, 1)
    with torch.no_grad():
        assert torch.equal(network.model(frames), network.y)
        torch.testing.assert_close(network.model(frames.contiguous(memory_format=torch.channels_last)), network.y)


def test_networks_see_each_clip_for_itself_and_but_for_tsn_the_order_of_its_frames(network):
    first, second = network.x
    with torch.no_grad():
        y = network.model(torch.stack([second.flip(0), first]))
    torch.testing.assert_close(y[1], network.y[0])
    assert torch.allclose(y[0], network.y[1]) == (network.name == 'tsn')


@pytest.mark.parametrize('shape', [(B, T + 1, 3, 64, 64), (B, T - 1, 3, 64, 64), (T + 2, 3, 64, 64)])
def test_networks_refuse_another_number_of_frames(network, shape):
    with pytest.raises(ValueError, match=f'num_frames={T}'):
        network.model(torch.zeros(shape, dtype=torch.float64))


def test_training_reaches_every_parameter_but_frozen_taps(network):
    model = copy.deepcopy(network.model).float().train()
    model(network.x.float()).square().sum().backward()
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    taps = {key for key, value in network.start.items() if value.ndim == 3}
    assert frozen == (taps if network.name == 'tdrl' else set())
    for key, p in model.named_parameters():
        if key in frozen:
            assert p.grad is None
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


@pytest.mark.parametrize('name', ['stm', 'tea'])
def test_options_that_a_block_would_ignore_are_refused(name):
    with pytest.raises(ValueError, match='drop_path must be None, since this block has none, got DropPath'):
        PEERS[name](drop_path_rate=.1, device='meta')
