"""Figure 5: the maps against direct computation, and the picture."""
import math
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cmr_layers
from cmr_layers import CME, SME, ClipModel, adapt
from cmr_layers.visualize import MotionMaps, figure5, motion_agreement, motion_maps, top_bottom_channels

T = 4


def moving_square(t=T, size=64, step=6):
    """Frames uint8 (T, 3, H, W): a square on a textured, still background, and where it is."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(60, 90, (1, 3, size, size), generator=generator).repeat(t, 1, 1, 1)
    texture = torch.randint(100, 255, (3, 16, 16), generator=generator)
    where = torch.zeros(t, size, size, dtype=torch.bool)
    for i in range(t):
        x = 8 + step * i
        frames[i, :, 20:36, x:x + 16] = texture
        where[i, 20:36, x:x + 16] = True
    return frames.to(torch.uint8), where


def normalise(frames):
    return (frames.float() / 255 - .45).div(.225)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('cmr_resnet18', num_frames=T, num_classes=5)


class TestTopBottomChannels:
    def test_against_a_loop(self):
        x, gates = torch.randn(3, 12, 4, 5), torch.rand(3, 12)
        top, bottom = top_bottom_channels(x, gates, k=4)
        for t in range(3):
            order = sorted(range(12), key=lambda c: -gates[t, c].item())
            assert torch.allclose(top[t], sum(x[t, c] for c in order[:4]) / 4, atol=1e-6)
            assert torch.allclose(bottom[t], sum(x[t, c] for c in order[-4:]) / 4, atol=1e-6)

    def test_equal_gates(self):
        x = torch.arange(6.).view(1, 6, 1, 1)
        top, bottom = top_bottom_channels(x, torch.full((1, 6), .5), k=2)
        assert (top.item(), bottom.item()) == (.5, 4.5)

    @pytest.mark.parametrize('x, gates, k, message', [
        ((2, 8, 3), (2, 8), 2, r'x must be \(T, C, H, W\) and gates \(T, C\), got \[2, 8, 3\] and \[2, 8\]'),
        ((2, 8, 3, 3), (2, 7), 2, r'got \[2, 8, 3, 3\] and \[2, 7\]'),
        ((2, 8, 3, 3), (2, 8), 5, 'k must be at most half of the 8 channels, got 5'),
        ((2, 8, 3, 3), (2, 8), 0, 'k must be a positive int, got 0'),
    ])
    def test_wrong_arguments(self, x, gates, k, message):
        with pytest.raises(ValueError, match=message):
            top_bottom_channels(torch.zeros(x), torch.zeros(gates), k)


class TestMotionMaps:
    def test_against_direct_computation(self, model):
        clip = normalise(moving_square()[0])
        maps = motion_maps(model, clip)
        model.eval()
        with torch.no_grad():
            stem = model.maxpool(model.act1(model.bn1(model.conv1(clip[0]))))
            gates = model.layer1[0].cme.gate(stem)[0]
            top, bottom = top_bottom_channels(stem, gates, 10)
            block = model.layer1[0]
            y = block.conv1(block.tim(block.cme(stem)))
            y = block.bn2(block.conv2(block.act1(block.bn1(y))))
            motion = 1 - block.sme.similarity(block.act2(y + stem))[0]
            output = model(clip)
        assert (maps.cme, maps.sme, maps.k) == ('layer1.0.cme', 'layer1.0.sme', 10)
        for got, expected in [
            (maps.gates, gates), (maps.top, top), (maps.bottom, bottom), (maps.motion, motion), (maps.output, output),
        ]:
            assert torch.allclose(got, expected, atol=1e-5)

    def test_layers_by_name(self, model):
        maps = motion_maps(model, normalise(moving_square()[0]), cme='layer3.1.cme', sme='layer2.0.sme', k=3)
        assert (maps.cme, maps.sme, maps.k) == ('layer3.1.cme', 'layer2.0.sme', 3)
        assert maps.gates.shape == (T, 256) and maps.top.shape == (T, 4, 4) and maps.motion.shape == (T, 8, 8)

    def test_the_model_is_left_alone(self, model):
        model.train()
        model.layer2.eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        motion_maps(model, normalise(moving_square()[0]))
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.is_grad_enabled()

    def test_hooks_are_removed_after_an_error(self, model):
        with pytest.raises(ValueError, match='num_frames'):
            motion_maps(model, torch.zeros(1, T + 1, 3, 64, 64))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_moving_square_is_bright(self, model):
        frames, where = moving_square()
        maps = motion_maps(model, normalise(frames))
        here = nn.functional.adaptive_max_pool2d(where.float()[:, None], 16)[:, 0] > 0
        assert maps.motion[here].mean() > 10 * maps.motion[:, 12:].mean()  # the lower quarter does not move
        assert torch.equal(maps.motion[-1], maps.motion[-2])

    def test_a_still_clip_is_dark(self, model):
        frames = moving_square(step=0)[0]
        assert motion_maps(model, normalise(frames)).motion.abs().max() < 1e-5

    def test_retrofitted_and_inserted(self):
        clip = normalise(moving_square()[0])
        resnet = timm.create_model('resnet18')
        cmr_layers.retrofit(resnet, num_frames=T)
        maps = motion_maps(ClipModel(resnet, num_frames=T), clip)
        assert (maps.cme, maps.sme) == ('model.layer1.0.cme', 'model.layer1.0.sme')
        assert motion_maps(resnet, clip[0]).motion.allclose(maps.motion)  # frames instead of clips

        net = timm.create_model('mobilenetv3_small_050')
        cmr_layers.insert(net, SME, at='blocks.1.0', num_frames=T)
        maps = motion_maps(ClipModel(net, num_frames=T), clip)
        assert maps.motion is not None and maps.cme is maps.gates is maps.top is maps.bottom is None

        net = timm.create_model('mobilenetv3_small_050')
        cmr_layers.insert(net, CME, at='blocks.1.0', where='before', num_frames=T)
        maps = motion_maps(ClipModel(net, num_frames=T), clip)
        assert maps.sme is maps.motion is None and maps.k == 4  # half of 8 channels

    def test_layers_that_see_clips(self):
        maps = motion_maps(nn.Sequential(CME(4, num_frames=T), SME(4, num_frames=T)), torch.rand(1, T, 4, 5, 6))
        assert maps.top.shape == maps.motion.shape == (T, 5, 6) and maps.k == 2

    def test_a_layer_that_works_in_place(self):
        class Rectifying(SME):
            def forward_clips(self, x):
                return x.relu_()

        x = torch.rand(1, T, 4, 5, 6)
        x[:, 0] *= -1
        expected = 1 - SME(4, T).similarity(x)[0]
        assert torch.allclose(motion_maps(Rectifying(4, T), x.clone()).motion, expected, atol=1e-6)

    @pytest.mark.parametrize('kwargs, message', [
        (dict(cme='layer9.0.cme'), "cme='layer9.0.cme' is no CME of CMRResNet; it has layer1.0.cme, "),
        (dict(sme='layer1.0.cme'), "sme='layer1.0.cme' is no SME of CMRResNet; it has layer1.0.sme, layer2.0.sme"),
        (dict(k=0), 'k must be a positive int, got 0'),
    ])
    def test_wrong_arguments(self, model, kwargs, message):
        with pytest.raises(ValueError, match=message):
            motion_maps(model, torch.zeros(1, T, 3, 64, 64), **kwargs)

    def test_wrong_clip(self, model):
        for shape in [(2, T, 3, 64, 64), (3, 64, 64)]:
            with pytest.raises(ValueError, match=r'clip must be one clip, \(1, T, C, H, W\) or \(T, C, H, W\), got'):
                motion_maps(model, torch.zeros(shape))

    def test_two_clips_in_a_row(self, model):
        with pytest.raises(ValueError, match=r'saw 2 clips of 4 frames.*call set_num_frames\(model, 8\)'):
            motion_maps(model, torch.zeros(2 * T, 3, 64, 64))

    def test_no_layers(self):
        with pytest.raises(ValueError, match=r'model \(ResNet\) holds neither CME nor SME; wanted a cmr_resnet'):
            motion_maps(timm.create_model('resnet18'), torch.zeros(T, 3, 64, 64))

    def test_a_layer_that_does_not_run(self):
        class Lazy(nn.Module):
            def __init__(self):
                super().__init__()
                self.sme = SME(3, T)

            def forward(self, x):
                return x

        with pytest.raises(ValueError, match='sme does not run in a forward pass of Lazy'):
            motion_maps(Lazy(), torch.zeros(1, T, 3, 8, 8))


class TestMotionAgreement:
    def test_against_scipy(self):
        stats = pytest.importorskip('scipy.stats')
        motion, frames = torch.randn(T, 7, 9), torch.rand(T, 3, 21, 27, dtype=torch.float64)
        change = (frames[1:].mean(1) - frames[:-1].mean(1)).abs()
        pooled = nn.functional.avg_pool2d(change, 3)
        motion = (motion + 20 * torch.cat([pooled, pooled[-1:]])).round()  # with ties
        expected = stats.spearmanr(motion[:-1].flatten(), pooled.flatten()).statistic
        assert expected > .3 and motion_agreement(motion, frames) == pytest.approx(expected, abs=1e-9)

    def test_perfect_reversed_and_unrelated(self):
        frames = torch.rand(T, 3, 32, 32)
        change = (frames[1:].mean(1) - frames[:-1].mean(1)).abs()
        change = torch.cat([change, change[-1:]])
        assert motion_agreement(change ** 3, frames) == pytest.approx(1)
        assert motion_agreement(-change, frames) == pytest.approx(-1)
        assert abs(motion_agreement(torch.rand(T, 32, 32), frames)) < .1

    def test_last_frame_is_left_out(self):
        frames, motion = torch.rand(T, 3, 8, 8), torch.rand(T, 8, 8)
        before = motion_agreement(motion, frames)
        motion[-1] = 100
        assert motion_agreement(motion, frames) == before

    def test_a_still_clip_has_none(self):
        assert math.isnan(motion_agreement(torch.rand(2, 4, 4), torch.zeros(2, 3, 8, 8)))

    @pytest.mark.parametrize('motion, frames', [
        ((1, 4, 4), (1, 3, 8, 8)), ((3, 4, 4), (2, 3, 8, 8)), ((2, 4), (2, 3, 8, 8)),
    ])
    def test_wrong_arguments(self, motion, frames):
        with pytest.raises(ValueError, match='with T >= 2, got'):
            motion_agreement(torch.zeros(motion), torch.zeros(frames))


class TestFigure5:
    def test_rows(self, model):
        pytest.importorskip('matplotlib')
        frames, _ = moving_square()
        maps = motion_maps(model, normalise(frames))
        full = figure5(frames, maps, times=[0., .1, .2, .3], title='A title', caption='two\nlines')
        texts = [t.get_text() for ax in full.axes for t in (*ax.texts, ax.title)] + [t.get_text() for t in full.texts]
        assert {'frames', '0.30 s', 'A title', 'two\nlines'} < set(texts)
        assert any('layer1.0.sme' in t for t in texts) and sum('10\n' in t for t in texts) == 2
        assert sum(len(ax.images) > 0 for ax in full.axes) == 4 * T

        none = MotionMaps(output=None)
        assert sum(len(ax.images) > 0 for ax in figure5(frames, none).axes) == T
        no_cme = MotionMaps(output=None, sme=maps.sme, motion=maps.motion)
        assert sum(len(ax.images) > 0 for ax in figure5(frames, no_cme).axes) == 2 * T

    def test_motion_is_drawn_where_it_is(self, model):
        pytest.importorskip('matplotlib')
        frames, _ = moving_square()
        motion = torch.zeros(T, 16, 16)
        motion[:, 2:6, 10:14] = 1
        figure = figure5(frames, MotionMaps(output=None, sme='sme', motion=motion))
        figure.canvas.draw()
        image = torch.from_numpy(np.array(figure.canvas.buffer_rgba()))[..., :3].float()
        overlays = [ax for ax in figure.axes if len(ax.images) == 2]
        assert len(overlays) == T
        for ax in overlays:
            box = ax.get_window_extent()
            top = image.shape[0] - box.y1
            # colourfulness at places of the frame
            pixels = {
                (x, y): image[int(top + y / 16 * box.height), int(box.x0 + x / 16 * box.width)]
                for x, y in [(12, 4), (4, 4), (12, 12)]}
            colour = {place: float(pixel.max() - pixel.min()) for place, pixel in pixels.items()}
            assert colour[12, 4] > 50 and colour[4, 4] < 10 and colour[12, 12] < 10

    def test_a_still_clip_stays_dark(self):
        pytest.importorskip('matplotlib')
        frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        figure = figure5(frames, MotionMaps(output=None, sme='sme', motion=torch.rand(2, 8, 8) * 1e-7))
        overlay = next(ax.images[1] for ax in figure.axes if len(ax.images) == 2)
        assert overlay.norm.vmax == .01 and np.max(overlay.get_alpha()) < .01

    def test_flat_maps_and_wide_frames(self):
        pytest.importorskip('matplotlib')
        frames = torch.zeros(2, 3, 40, 90, dtype=torch.uint8)
        zeros = torch.zeros(2, 5, 9)
        maps = MotionMaps(output=None, sme='s', motion=zeros, cme='c', gates=torch.zeros(2, 4), top=zeros, bottom=zeros)
        figure = figure5(frames, maps)
        figure.canvas.draw()
        images = [ax for ax in figure.axes if ax.images]
        box = images[0].get_window_extent()
        assert box.width / box.height == pytest.approx(90 / 40, rel=.02)

    @pytest.mark.parametrize('t', [1, 2, 20])
    def test_text_stays_inside(self, t):
        pytest.importorskip('matplotlib')
        frames = torch.zeros(t, 3, 8, 8, dtype=torch.uint8)
        figure = figure5(frames, MotionMaps(None), range(t), title='a long title ' * 8, caption='a caption ' * 30)
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        boxes = [text.get_window_extent() for text in figure.texts]
        assert len(boxes) == 2 and all(b.x1 < width and b.y0 > 0 and b.y1 < height for b in boxes)
        assert min(box.y0 for box in boxes) < 20 < height - 20 < max(box.y1 for box in boxes)

    def test_no_global_state(self, model):
        matplotlib = pytest.importorskip('matplotlib')
        before = dict(matplotlib.rcParams)
        loaded = 'matplotlib.pyplot' in sys.modules
        figure5(moving_square()[0], MotionMaps(output=None))
        assert dict(matplotlib.rcParams) == before
        assert ('matplotlib.pyplot' in sys.modules) == loaded

    @pytest.mark.parametrize('frames, kwargs, message', [
        (torch.zeros(2, 3, 8, 8), {}, 'frames must be uint8 of shape'),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {}, 'frames must be uint8 of shape'),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), dict(times=[0.]), 'times has 1 frames, but frames has 2'),
    ])
    def test_wrong_arguments(self, frames, kwargs, message):
        pytest.importorskip('matplotlib')
        with pytest.raises(ValueError, match=message):
            figure5(frames, MotionMaps(output=None), **kwargs)

    def test_maps_of_another_clip(self):
        pytest.importorskip('matplotlib')
        with pytest.raises(ValueError, match=r'maps\.motion has 3 frames, but frames has 2'):
            figure5(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), MotionMaps(output=None, motion=torch.zeros(3, 4, 4)))

    def test_without_matplotlib(self, monkeypatch):
        for name in [n for n in sys.modules if n.split('.')[0] == 'matplotlib']:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
        with pytest.raises(ImportError, match=r'pip install "cmr-layers\[video\]"'):
            figure5(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), MotionMaps(output=None))


def test_maps_of_layers_with_channels_last_and_none_of_tokens():
    kwargs = {'img_size': 32, 'window_size': 4, 'depths': (1, 1), 'embed_dim': 16, 'num_heads': (2, 2)}
    swin = timm.create_model('swin_tiny_patch4_window7_224', **kwargs)
    adapt(swin, 4)
    maps = motion_maps(swin, torch.randn(4, 3, 32, 32))
    assert maps.cme == 'layers.0.blocks.0.norm1.cme' and maps.top.shape == maps.motion.shape == (4, 8, 8)
    assert maps.gates.shape == (4, 16)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1)
    adapt(vit, 4)
    with pytest.raises(ValueError, match=r'^blocks.0.attn.cme must be a layer of maps to be drawn, got one of tokens'):
        motion_maps(vit, torch.randn(4, 3, 32, 32))
