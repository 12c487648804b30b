"""Layers are put in and taken out as a whole or not at all, and found wherever they are."""
import copy
import sys

import pytest
import timm
import torch
from helpers import anatomy, assert_same, image_net, randomize, res2net, values
from torch import nn

from cmr_layers import CME, SME, TIM, insert, restore, retrofit
from cmr_layers.attach import all_or_nothing
from cmr_layers.clip import ClipLayer
from cmr_layers.hosts import Host

T = 4
SMALL = {'num_classes': 5, 'zero_init_last': False, 'channels': (64, 16, 16, 16)}


def resnet():
    # timm's resnet18 of half the depth
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (2, 2, 1, 1), **SMALL)


def images(*shape, **kwargs):
    return torch.randn(*(shape or (2 * T, 3, 32, 32)), **kwargs)


class Stop(BaseException):
    """As Ctrl-C: no Exception."""


def interrupt(function, files, after):
    """Run function, raise Stop at the line number ``after`` that runs in these files; whether it came so far."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == 'line':
            lines += 1
            if lines == after:
                raise Stop
        return trace

    sys.settrace(trace)
    try:
        function()
    except Stop:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize('name', ['insert', 'retrofit', 'retrofit of hosts', 'restore'])
def test_an_interrupt_leaves_all_or_nothing(name):
    def make():
        if name == 'insert':
            return nn.Sequential(nn.Conv2d(3, 8, 1), timm.layers.DropPath(.5), nn.ReLU())
        return res2net() if name == 'retrofit of hosts' else timm.models.ResNet(
            timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(16, 8, 8, 8))

    def act(model):
        if name == 'restore':
            restore(model)
        elif name == 'insert':
            insert(model, CME, ['0', '2'], example_input=torch.zeros(1, 3, 4, 4))
        else:
            retrofit(model, num_frames=T)

    files = tuple(f'cmr_layers/{file}.py' for file in ('attach', 'hosts', 'drop', 'retrofit', 'insert', 'probe'))
    model = make()
    if name == 'restore':
        insert(model, SME, 'layer2.0')
        insert(model, TIM, ['layer1.0.conv1', 'conv1'], 'before')
    before, classes = anatomy(model), [type(module) for module in model.modules()]
    interrupts, after = 0, 1
    while interrupt(lambda: act(model), files, after):
        if anatomy(model) != before:  # it was after the last change: all of it is there
            break
        assert [type(module) for module in model.modules()] == classes
        interrupts, after = interrupts + 1, 1 + int(after * (1.01 if name == 'insert' else 1.2))
    assert interrupts > 20
    if anatomy(model) == before:
        act(model)
    if name != 'restore':
        restore(model)
        assert anatomy(model) == before
    assert not any(isinstance(module, (ClipLayer, Host)) for module in model.modules())


def test_what_fails_is_undone():
    model = resnet()
    before, state = anatomy(model), values(model)
    handle = model.layer1[0].register_forward_hook(lambda *args: None)
    with pytest.raises(KeyError), all_or_nothing(model):
        model.layer1[0].add_module('x', nn.ReLU())
        model.layer1[0].__class__ = nn.ReLU
        model.layer2[0].conv1 = nn.Identity()
        model.layer3[0].register_forward_pre_hook(print)
        del model.layer4
        model.layer1[1].stride = 7
        raise KeyError
    handle.remove()  # it still knows the dictionary that its hook is in
    assert anatomy(model) == before
    assert_same(state, model.state_dict())


def test_error_restore_without_anything_to_take_out():
    model = image_net()
    with pytest.raises(ValueError, match=r'^model \(ResNet\) holds nothing that insert\(\) or retrofit\(\) put in$'):
        restore(model)
    retrofit(model)
    restore(model)
    with pytest.raises(ValueError, match=r'^model \(ResNet\) holds nothing'):
        restore(model)


def test_restore_finds_the_layers_from_a_wrapper_and_in_a_part():
    model, wrapped = image_net(), nn.Sequential(image_net())
    keys = list(model.state_dict())
    retrofit(wrapped[0])
    restore(wrapped)
    assert list(wrapped[0].state_dict()) == keys
    retrofit(model)
    restore(model.layer1)
    assert not any(isinstance(m, ClipLayer) for m in model.layer1.modules())
    assert any(isinstance(m, ClipLayer) for m in model.layer2.modules())


def test_restore_finds_the_layers_of_a_block_that_was_copied_alone():
    model = image_net()
    keys = list(model.state_dict())
    retrofit(model)
    model.layer1[0] = copy.deepcopy(model.layer1[0])
    restore(model)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_hooked_convolution_copied_alone_keeps_the_registered_layers():
    # folding a batch norm copies the convolution, and with it its hooks
    model, x = image_net(), torch.randn(4, 3, 32, 32)
    retrofit(model, num_frames=4)
    block = model.layer1[0]
    block.conv1, block.bn1 = nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    want = model(x)
    nn.init.zeros_(block.tim.weight)
    assert not torch.equal(model(x), want)


def test_error_restore_of_a_copied_part_leaves_the_network_alone():
    model, x = image_net(), images()
    retrofit(model, num_frames=T)
    want = model(x)
    with pytest.raises(ValueError, match=r'^model \(Conv2d\) holds nothing that insert\(\) or retrofit\(\) put in$'):
        restore(copy.deepcopy(model.layer1[0].conv1))
    assert torch.equal(model(x), want)


def test_error_restore_of_a_part_that_runs_layers_leaves_the_network_alone():
    model, x = randomize(timm.create_model('res2net50_14w_8s', num_classes=5)).eval(), images(T, 3, 32, 32)
    retrofit(model, num_frames=T)
    want = model(x)
    with pytest.raises(ValueError, match=r'^model \(Conv2d\) is only a part: layer1\.0\.cme belongs to a'):
        restore(model.layer1[0].conv1)
    assert torch.equal(model(x), want)
