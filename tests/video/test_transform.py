"""From frames to the input of a model."""
import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import cmr_layers
from cmr_layers.video import ClipTransform

av = pytest.importorskip('av')


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
