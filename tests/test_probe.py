"""What reaches each module is found out by running the network once: on which image, and without a trace."""

import pytest
import timm
import torch
from helpers import anatomy, image_net, values
from torch import nn

from cmr_layers import SME, TIM, insert, restore, retrofit

T = 4


def images(*shape, **kwargs):
    return torch.randn(*(shape or (2 * T, 3, 32, 32)), **kwargs)


def test_networks_of_a_fixed_size_get_their_own_size():
    model = timm.create_model('levit_conv_128s', device='meta')
    assert model.pretrained_cfg['fixed_input_size']
    assert [i.channels for i in insert(model, TIM, 'stages.*.blocks.0', where='before')]
    model = timm.create_model('maxvit_rmlp_pico_rw_256', device='meta')
    assert [i.channels for i in insert(model, SME, 'stages.*', num_frames=T)] == [32, 64, 128, 256]
    assert model.eval()(torch.empty(T, 3, 256, 256, device='meta')).shape == (T, 1000)


@pytest.mark.parametrize('in_chans', [1, 2, 6])
def test_networks_with_other_input_channels(in_chans):
    model = timm.create_model('mobilenetv3_small_050', in_chans=in_chans, device='meta')
    assert len(insert(model, TIM, 'blocks.*')) == 6


def test_example_input():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8 * 6 * 5, 3)

        def forward(self, x):
            return self.head(self.conv(x[:, 1:]).flatten(1))

    with pytest.raises(ValueError, match=r'Pass one that it can run on as example_input$'):
        insert(Odd(), TIM, 'conv')
    model = Odd()
    assert insert(model, TIM, 'conv', example_input=torch.zeros(1, 3, 6, 5)).insertions[0].channels == 8
    assert model(images(T, 3, 6, 5)).shape == (T, 3)


def test_channels_follow_the_images_that_the_model_declares():
    model = timm.create_model('resnet18', in_chans=1)
    assert insert(model, TIM, 'conv1', where='before').insertions[0].channels == 1
    model = timm.create_model('tresnet_m')  # its first convolution sees 48 channels, its image has 3
    assert insert(model, TIM, 'body.layer1').insertions[0].channels == 64


def test_maps_with_channels_last():
    # ConvNeXt's norms see (N, H, W, C): dimension 1 is no channel there
    model = timm.create_model('convnext_atto', conv_mlp=False, device='meta')
    made = insert(model, TIM, 'stages.0.blocks.0.norm').insertions[0]
    assert made.channels == 40 and model.get_submodule(made.name).input_fmt == 'NHWC'


def test_a_map_that_is_as_high_as_it_has_channels_is_no_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
    assert insert(model, SME, at='1', example_input=torch.zeros(1, 3, 32, 48)).insertions[0].channels == 32


def test_probing_leaves_no_trace():
    model = image_net().train()
    model.layer1.eval()
    model.layer2[0].bn1.eval()
    for p in model.layer1.parameters():
        p.requires_grad_(False)
    before, state = anatomy(model), values(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    retrofit(model, num_frames=T)
    assert {n: m.training for n, m in model.named_modules() if n in {row[0] for row in before}} == \
        {row[0]: row[5] for row in before}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert not model.layer1[0].sme.training and not model.layer1[0].sme.bn.training    # as its block
    assert model.layer3[0].sme.training and model.layer3[0].sme.bn.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(model.state_dict()[key], v) for key, v in state.items())
    restore(model)
    assert anatomy(model) == before
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


def test_probing_leaves_no_trace_when_it_fails():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError('broken head')

    model = image_net().train()
    model.layer2.eval()
    model.fc = Broken()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r'could not run on images of shape .*broken head'):
        retrofit(model)
    assert anatomy(model) == before


def test_error_example_input_is_one_image():
    with pytest.raises(ValueError, match=r'^example_input must be one image \(1, C, H, W\), got \[4, 3, 64, 64\]$'):
        retrofit(image_net(), example_input=torch.zeros(4, 3, 64, 64))


def test_lazy_modules_become_what_they_are():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3)).eval()
    x = torch.randn(4, 3, 16, 16)
    insert(model, TIM, '2', 'before', num_frames=4, example_input=x[:1], start='identity')
    assert (model[0].in_channels, model[2].in_channels) == (3, 8)
    want = model(x)
    assert torch.equal(restore(model)(x), want) and type(model[2]) is nn.Conv2d
