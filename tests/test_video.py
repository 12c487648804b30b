"""Reading video files: what is sampled, from which file formats, and what is said about a file that is no video."""
import builtins
import importlib
import sys
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import cmr_layers
from cmr_layers.video import ClipTransform, read_clip, sample_indices
from cmr_layers.video.decode import Video

av = pytest.importorskip('av')

RATE = 10
LEVEL = 8  # frame i is grey of level LEVEL * i


def write_video(path, levels, codec='libx264', pix_fmt='yuv420p', size=(64, 48), paint=None, first_pts=0):
    """A video whose frames are grey of the given levels, or painted by paint(image, index)."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        for i, level in enumerate(levels):
            image = np.full((size[1], size[0], 3), level, np.uint8)
            if paint is not None:
                paint(image, i)
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            frame.pts, frame.time_base = first_pts + i, Fraction(1, RATE)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def read_levels(clip):
    """Indices of the frames that a clip holds."""
    return (clip.frames.float().mean((1, 2, 3)) / LEVEL).round().int().tolist()


@pytest.fixture
def clip30(tmp_path):
    return write_video(tmp_path / 'clip.mp4', range(0, 30 * LEVEL, LEVEL))


@pytest.mark.parametrize('n, t, expected', [
    (80, 8, [5, 15, 25, 35, 45, 55, 65, 75]),
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    (9, 2, [2, 6]),
    (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
    (1, 4, [0, 0, 0, 0]),
])
def test_sample_indices(n, t, expected):
    assert sample_indices(n, t) == expected


def test_sample_indices_are_those_of_tsm():
    for n in range(1, 60):
        for t in (1, 3, 8, 16):
            tick = n / t
            assert sample_indices(n, t) == [int(tick / 2 + tick * x) for x in range(t)]


@pytest.mark.parametrize('name, codec, pix_fmt', [
    ('clip.mp4', 'libx264', 'yuv420p'),
    ('clip.mp4', 'mpeg4', 'yuv420p'),
    ('clip.ts', 'libx264', 'yuv420p'),
    ('clip.h264', 'libx264', 'yuv420p'),  # no container: no frame count, no duration
    ('clip.webm', 'libvpx-vp9', 'yuv420p'),
    ('clip.mkv', 'ffv1', 'yuv420p'),
    ('clip.avi', 'mjpeg', 'yuvj420p'),
    ('clip.gif', 'gif', 'rgb8'),
])
def test_formats(tmp_path, name, codec, pix_fmt):
    clip = read_clip(write_video(tmp_path / name, range(0, 30 * LEVEL, LEVEL), codec, pix_fmt), num_frames=5)
    assert clip.frames.shape == (5, 3, 48, 64) and clip.frames.dtype == torch.uint8 and clip.frames.is_contiguous()
    # 8 bits of palette are coarse
    assert np.allclose(read_levels(clip), [3, 9, 15, 21, 27], atol=1 if codec in ('gif', 'mpeg4') else 0)
    if name != 'clip.h264':
        assert clip.times == pytest.approx([.3, .9, 1.5, 2.1, 2.7], abs=.011)


@pytest.mark.parametrize('size', [(17, 31), (101, 2), (33, 64)])
def test_odd_sizes(tmp_path, size):
    clip = read_clip(write_video(tmp_path / 'odd.mkv', [0, 80, 160], 'ffv1', 'bgr0', size), num_frames=3)
    assert clip.frames.shape == (3, 3, size[1], size[0])
    assert clip.frames[:, :, 0, 0].tolist() == [[0] * 3, [80] * 3, [160] * 3]


def test_channels_are_rgb(tmp_path):
    def paint(image, index):
        image[:, :32] = (200, 100, 50)

    clip = read_clip(write_video(tmp_path / 'rgb.mkv', [0], 'ffv1', 'bgr0', paint=paint), num_frames=1)
    assert clip.frames[0, :, 5, 5].tolist() == [200, 100, 50] and clip.frames[0, :, 5, 40].tolist() == [0, 0, 0]


@pytest.mark.parametrize('count, expected', [(1, [0] * 8), (3, [0, 0, 0, 1, 1, 2, 2, 2]), (8, list(range(8)))])
def test_few_frames(tmp_path, count, expected):
    path = write_video(tmp_path / 'short.mp4', range(0, count * LEVEL, LEVEL))
    assert read_levels(read_clip(path, num_frames=8)) == expected


@pytest.mark.parametrize('start, end, expected', [
    (1., 2., [12, 17]),  # frames 10 to 19: the end is not included
    (None, 1., [2, 7]),
    (2., None, [22, 27]),
    (1.45, 1.55, [15, 15]),
    (0, 100, [7, 22]),
])
def test_window(clip30, start, end, expected):
    clip = read_clip(clip30, 2, start, end)
    assert read_levels(clip) == expected
    assert clip.times == pytest.approx([i / RATE for i in expected])


def test_a_video_that_does_not_begin_at_zero(tmp_path):
    path = write_video(tmp_path / 'late.mkv', range(0, 30 * LEVEL, LEVEL), first_pts=7 * RATE)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).time == pytest.approx(7)
    clip = read_clip(path, 2, start=1., end=2.)
    assert read_levels(clip) == [12, 17] and clip.times == pytest.approx([1.2, 1.7], abs=.002)


def test_rotation(tmp_path):
    def paint(image, index):
        image[:8, :8] = 255  # the upper left corner

    path = write_video(tmp_path / 'phone.mp4', [0] * 3, paint=paint)
    assert read_clip(path, 1).frames.shape[2:] == (48, 64)
    data = bytearray(path.read_bytes())
    one = (1 << 16).to_bytes(4, 'big')
    zero, minus = bytes(4), (-(1 << 16)).to_bytes(4, 'big', signed=True)
    unit = one + zero * 3 + one + zero * 3 + (1 << 30).to_bytes(4, 'big')
    at = data.index(unit, data.index(b'tkhd'))
    # a player turns it by 90 degrees clockwise, as of a telephone held upright
    data[at:at + 36] = zero + one + zero + minus + zero * 4 + (1 << 30).to_bytes(4, 'big')
    path.write_bytes(data)
    frame = read_clip(path, 1).frames[0].float().mean(0)
    assert frame.shape == (64, 48)
    assert frame[:6, -6:].mean() > 240 and frame[:, :30].mean() < 10  # the upper right corner


def test_truncated_file_gives_what_is_left(tmp_path):
    path = write_video(tmp_path / 'cut.mkv', range(0, 30 * LEVEL, LEVEL), 'ffv1')
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    levels = read_levels(read_clip(path, 4))
    assert 0 < levels[0] < levels[-1] < 20


def test_damaged_packets_are_skipped(tmp_path):
    path = write_video(tmp_path / 'junk.avi', range(0, 30 * LEVEL, LEVEL), 'mjpeg', 'yuvj420p')
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third:2 * third] = bytes(third)
    path.write_bytes(data)
    clip = read_clip(path, 4)
    assert clip.frames.shape == (4, 3, 48, 64) and read_levels(clip)[0] < 10


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'source=.*nowhere\.mp4.* does not exist; wanted a video file'):
        read_clip(tmp_path / 'nowhere.mp4')


@pytest.mark.parametrize('name, content', [
    ('empty.mp4', b''),
    ('noise.mp4', bytes(range(256)) * 40),
    ('text.mp4', b'not a video\n' * 50),
    ('text.txt', b'not a video\n' * 50),  # FFmpeg would show it
    ('code.py', b'import this\n'),
])
def test_not_a_video(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'source=.*{name}.* is not a video') as caught:
        read_clip(path)
    assert type(caught.value) is ValueError


def test_sound_without_pictures(tmp_path):
    path = tmp_path / 'sound.wav'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match='holds no video'):
        read_clip(path)


def test_a_container_without_a_frame_that_decodes(tmp_path, clip30):
    data = bytearray(clip30.read_bytes())
    begin = data.index(b'mdat') + 4
    size = int.from_bytes(data[begin - 8:begin - 4], 'big') - 8
    data[begin:begin + size] = bytes(size)
    path = tmp_path / 'hollow.mp4'
    path.write_bytes(data)
    with pytest.raises(ValueError, match='not a frame of it decodes'):
        read_clip(path)


def test_a_video_that_decodes_to_less_the_second_time(clip30, monkeypatch):
    decode, passes = Video.frames, []

    def shorter(self):
        passes.append(self)
        frames = list(decode(self))
        return iter(frames if len(passes) == 1 else frames[:20])

    monkeypatch.setattr(Video, 'frames', shorter)
    with pytest.raises(ValueError, match='is damaged: it decodes to 30 frames first and to 20 next'):
        read_clip(clip30)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_frames=0), 'num_frames must be a positive int, got 0'),
    (dict(num_frames=2.), 'num_frames must be a positive int, got 2.0'),
    (dict(start=-1), 'start must be a number of seconds >= 0, got -1'),
    (dict(start='1'), "start must be a number of seconds >= 0, got '1'"),
    (dict(end=float('nan')), 'end must be a number of seconds >= 0, got nan'),
    (dict(start=2, end=1), 'end must be later than start=2, got 1'),
    (dict(end=0), 'end must be later than start=0, got 0'),
    (dict(start=5), 'lies in the window start=5 to end=inf: its 30 frames begin at 0 s and the last one at 2.900 s'),
])
def test_wrong_arguments(clip30, kwargs, message):
    with pytest.raises(ValueError, match=message):
        read_clip(clip30, **kwargs)


def test_without_pyav(clip30, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ImportError, match=r'pip install "cmr-layers\[video\]"'):
        read_clip(clip30)


def test_importing_needs_neither_pyav_nor_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split('.')[0] in ('av', 'matplotlib'):
            raise AssertionError(f'{name} imported')
        return real(name, *args, **kwargs)

    for name in ('video', 'visualize'):
        monkeypatch.setattr(cmr_layers, name, None, raising=False)  # both are put back afterwards
        for module in [m for m in sys.modules if m.startswith(f'cmr_layers.{name}')]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, '__import__', refuse)
    for name in ('video', 'visualize'):
        importlib.import_module(f'cmr_layers.{name}')


class TestClipTransform:
    def test_crop_and_normalise(self):
        frames = torch.randint(0, 256, (3, 3, 120, 200), dtype=torch.uint8)
        transform = ClipTransform()
        cropped = transform.crop(frames)
        assert cropped.shape == (3, 3, 224, 224) and cropped.dtype == torch.uint8
        mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
        expected = (cropped / 255 - mean[:, None, None]) / std[:, None, None]
        assert torch.allclose(transform(frames)[0], expected, atol=1e-5)

    def test_the_crop_is_the_centre(self):
        frames = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
        frames[..., 16:240, 144:368] = 255
        assert ClipTransform().crop(frames).float().min() == 255
        frames[..., 144:368] = 0
        assert ClipTransform().crop(frames).float().max() == 0

    @pytest.mark.parametrize('shape', [(5, 7), (300, 40), (224, 224), (1, 1)])
    def test_any_size(self, shape):
        clip = ClipTransform(size=32)(torch.zeros(2, 3, *shape, dtype=torch.uint8))
        assert clip.shape == (1, 2, 3, 32, 32) and clip.dtype == torch.float32

    def test_statistics_of_the_model(self):
        model = timm.create_model('vit_tiny_patch16_224')  # mean and std 0.5
        assert ClipTransform(model).mean == (.5, .5, .5)
        assert ClipTransform(cmr_layers.ClipModel(model)).std == (.5, .5, .5)
        assert ClipTransform(nn.Sequential()).mean == pytest.approx((.485, .456, .406))
        assert ClipTransform(model, mean=[.1, .2, .3], std=[1, 2, 3]).std == (1, 2, 3)

    def test_of_a_wrapped_model(self, tmp_path):
        model = timm.create_model('vit_tiny_patch16_224')
        wrapped = [
            torch.compile(model), nn.DataParallel(model), nn.Sequential(model, nn.Softmax(-1)), ModelEmaV3(model),
            AveragedModel(model), cmr_layers.ClipModel(torch.compile(model)),
            torch.compile(cmr_layers.ClipModel(model)),
            nn.ModuleDict({'video': nn.Sequential(nn.Identity(), ModelEmaV3(torch.compile(model)))}),
        ]
        if torch.distributed.is_available():
            torch.distributed.init_process_group('gloo', f'file://{tmp_path}/group', rank=0, world_size=1)
            try:
                wrapped += [DistributedDataParallel(model), torch.compile(DistributedDataParallel(model))]
            finally:
                torch.distributed.destroy_process_group()
        for wrapper in wrapped:
            transform = ClipTransform(wrapper)
            assert (transform.mean, transform.std) == ((.5, .5, .5), (.5, .5, .5)), type(wrapper)
            resize = transform._crop.transforms[0]
            assert resize.interpolation.value == model.pretrained_cfg['interpolation'] == 'bicubic'

    def test_models_that_disagree(self):
        halves, imagenet = timm.create_model('vit_tiny_patch16_224'), timm.create_model('resnet18')
        both = nn.Sequential(halves, imagenet)
        with pytest.raises(ValueError, match=r'model \(Sequential\) holds 2 timm models that disagree: mean=\(0.5, .*; '
                                             r'give mean= and std='):
            ClipTransform(both)
        with pytest.raises(ValueError, match='give mean= and std='):
            ClipTransform(both, mean=[0, 0, 0])
        assert ClipTransform(both, mean=[0, 0, 0], std=[1, 1, 1]).std == (1, 1, 1)
        assert ClipTransform(nn.Sequential(halves, timm.create_model('vit_tiny_patch16_224'))).mean == (.5, .5, .5)

    def test_the_outermost_model_decides(self):
        outer = timm.create_model('vit_tiny_patch16_224')
        outer.helper = timm.create_model('resnet18')
        assert ClipTransform(nn.Sequential(outer)).mean == (.5, .5, .5)

    @pytest.mark.parametrize('model', ['resnet18', timm.create_model, torch.zeros(1), {}])
    def test_what_is_no_model(self, model):
        with pytest.raises(TypeError, match=r'model must be an nn\.Module, got'):
            ClipTransform(model)

    def test_feeds_a_model(self):
        model = timm.create_model('cmr_resnet18', num_frames=2, num_classes=5).eval()
        frames = torch.zeros(2, 3, 40, 60, dtype=torch.uint8)
        with torch.no_grad():
            assert model(ClipTransform(model, size=64)(frames)).shape == (1, 5)

    @pytest.mark.parametrize('frames', [
        torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
    ])
    def test_wrong_frames(self, frames):
        with pytest.raises(ValueError, match=r'frames must be uint8 of shape \(T, 3, H, W\), got'):
            ClipTransform()(frames)

    def test_wrong_size(self):
        with pytest.raises(ValueError, match='size must be a positive int, got 0'):
            ClipTransform(size=0)
