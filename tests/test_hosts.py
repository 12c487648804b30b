"""Networks that got layers, and the tools of others: what replaces, wraps, fuses, converts, copies or compiles parts.

Either the network computes what it did, or what was asked for, or there is an error that names the layer. A logit that
is off is off by 1% and more here: the layers are randomized.
"""
import copy
import gc
import io
import pickle
import weakref

import peft
import pytest
import timm
import torch
import torchvision
from helpers import anatomy, randomize, res2net
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrizations, parametrize
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from cmr_layers import CME, SME, TIM, ClipModel, insert, restore, retrofit
from cmr_layers.clip import ClipLayer
from cmr_layers.hosts import Host

T = 4
SMALL = {'num_classes': 5, 'zero_init_last': False, 'channels': (64, 16, 16, 16)}


def resnet():
    # timm's resnet18 of half the depth
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (2, 2, 1, 1), **SMALL)


def images(*shape):
    return torch.randn(*(shape or (2 * T, 3, 32, 32)))


def near(got, want, tolerance=1e-5):
    return float((got - want).abs().max() / want.abs().max()) < tolerance


def put(at, where='after', layer=SME, model=None):
    """A ResNet with an inserted layer, as after training."""
    model = model or resnet()
    insert(model, layer, at, where, num_frames=T)
    return randomize(model).eval()


RETROFITS = {
    'timm basic': lambda: resnet(),
    'timm bottleneck': lambda: timm.create_model('resnet26', **{**SMALL, 'channels': (16, 8, 8, 8)}),
    'torchvision basic': lambda: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
    'torchvision bottleneck': lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5),
}


@pytest.fixture(params=RETROFITS)
def retrofitted(request):
    torch.manual_seed(1)
    model = RETROFITS[request.param]()
    retrofit(model, num_frames=T)
    return randomize(model).eval()


def blocks(model):
    return [name for name, module in model.named_modules() if name.count('.') == 1 and hasattr(module, 'conv1')]


# Retrofitted ResNets are like any network to all of these

def test_a_retrofit_fuses(retrofitted):
    pairs = [[f'{name}.conv{i}', f'{name}.bn{i}'] for name in blocks(retrofitted) for i in (1, 2)]
    x = images()
    want = retrofitted(x)
    assert near(torch.ao.quantization.fuse_modules(retrofitted, pairs)(x), want)


def test_a_retrofit_scripts(retrofitted):
    x, file = images(), io.BytesIO()
    torch.jit.save(torch.jit.script(ClipModel(retrofitted, T)), file)
    file.seek(0)
    clip = x.unflatten(0, (2, T))
    assert near(torch.jit.load(file)(clip), ClipModel(retrofitted, T)(clip))


def test_another_convolution_in_a_retrofit_sees_what_the_layers_give(retrofitted):
    x, block = images(), retrofitted.layer1[0]
    want, old = retrofitted(x), block.conv1
    block.conv1 = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False).requires_grad_(False)
    block.conv1.weight.copy_(old.weight)
    assert torch.equal(retrofitted(x), want)
    nn.init.zeros_(block.tim.weight)
    assert not near(retrofitted(x), want, .01)


def lora(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r'.*\.conv1', r=2))
    for name, p in adapted.named_parameters():
        if 'lora_' in name:
            nn.init.normal_(p, std=.1)
    return adapted.eval()


def test_adapters_of_a_retrofit_see_what_their_convolution_sees(retrofitted):
    x = images()
    want = retrofitted(x)
    adapted = lora(retrofitted)
    got = adapted(x)
    assert not near(got, want, .01)
    assert near(adapted.merge_and_unload()(x), got)


def test_a_retrofit_is_quantized():
    # torchvision's, which uses one ReLU for all, torchao refuses without layers, too
    model, x = resnet(), images()
    retrofit(model, num_frames=T)
    randomize(model).eval()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    assert sum(node.op == 'call_module' for node in prepared.graph.nodes) > 20  # observers
    prepared(x)
    assert near(convert_pt2e(prepared)(x), model(x), .2)


def test_batch_norms_of_a_retrofit_synchronize(retrofitted):
    x = images()
    want = retrofitted(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(retrofitted).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert near(converted(x), want)


def test_fx_fuses_a_retrofit(retrofitted):
    x = images()
    fused = fuse(retrofitted)
    assert isinstance(fused, fx.GraphModule)
    assert near(fused(x), retrofitted(x))
    kept = {name for name, module in fused.named_modules() if isinstance(module, ClipLayer)}
    assert kept == {name for name, module in retrofitted.named_modules() if isinstance(module, ClipLayer)}


@pytest.mark.parametrize('change', [
    lambda model: torch.ao.quantization.fuse_modules(model, [[f'{n}.conv1', f'{n}.bn1'] for n in blocks(model)]),
    lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    lambda model: lora(model).base_model.model], ids=['fuse', 'sync', 'lora'])
def test_a_changed_retrofit_can_be_restored(retrofitted, change):
    changed = restore(change(retrofitted))
    assert not any(isinstance(module, ClipLayer) for module in changed.modules())
    assert {type(module).__module__.split('.')[0] for module in changed.modules()} <= {
        'torch', 'timm', 'torchvision', 'peft'}
    assert changed.eval()(images()).shape == (2 * T, 5)


def test_a_retrofitted_block_with_a_forward_of_its_own_keeps_it():
    model, x = resnet().eval(), images()
    block = model.layer1[1]
    forward = block.forward
    block.forward = lambda x: forward(x) * 2
    want = model(x)
    retrofit(model, num_frames=T)
    assert torch.equal(model(x), want)
    randomize(model)
    got = model(x)
    nn.init.zeros_(block.tim.weight)
    assert not near(model(x), got, .01)
    restore(model)
    assert model(x).shape == want.shape


# Inserted layers: what takes their module away is found out

def sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()


def replace(model):
    model.layer2[0].conv1 = nn.Conv2d(64, 16, 3, 2, 1)
    return model


def copy_alone(model):
    model.layer2[0].conv1 = copy.deepcopy(model.layer2[0].conv1)
    return model


def fold_alone(model):
    block = model.layer2[0]
    block.conv1, block.bn1 = nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    return model


def adapt(model):
    return lora(model).base_model.model


def drop_the_layer(model):
    del model.layer2[0].conv1.sme
    return model


def another_layer(model):
    model.layer2[0].conv1.sme = SME(16, num_frames=T)
    return model


def twice(model):
    model.layer2[0].conv2 = nn.Sequential(model.layer2[0].conv2, model.layer2[0].conv1)
    model.layer2[0].conv1 = nn.Identity()
    return model


def restored_in_part(model):
    restore(model.layer2[0])
    return model


class Twice(nn.Module):
    """A wrapper of somebody's, with the name that PyTorch's own wrappers give to what is in them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) + nn.functional.conv2d(x, self.module.weight, None, 2, 1)


def wrap(model):
    model.layer2[0].conv1 = Twice(model.layer2[0].conv1)
    return model


CHANGES = [wrap, replace, copy_alone, fold_alone, adapt, drop_the_layer, another_layer, twice, restored_in_part]


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('use', [
    lambda model: model(images()), lambda model: model.state_dict(), lambda model: ClipModel(model, T),
    lambda model: nn.Sequential(model)(images()), lambda model: nn.Sequential(model).state_dict(),
    lambda model: torch.jit.trace(model, images()), lambda model: torch.export.export(model, (images(),)),
    lambda model: torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False)],
    ids=['run', 'save', 'wrap', 'run in a wrapper', 'save in a wrapper', 'trace', 'export', 'onnx'])
def test_error_a_layer_that_is_not_at_its_place(change, use):
    model = change(put('layer2.0.conv1'))
    with pytest.raises(RuntimeError, match=(
            r'^layer2\.0\.conv1\.sme of the ResNet must run once, at layer2\.0\.conv1, but layer2\.0\.conv1(\.sme)? is '
            r'(gone|another \w+) now\. A tool .* restore\(model\) takes out the layers that are left')):
        use(model)


@pytest.mark.parametrize('change', [replace, copy_alone, adapt])
@pytest.mark.parametrize('fullgraph', [False, True])
def test_error_a_layer_that_is_not_at_its_place_when_compiled(change, fullgraph):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r'layer2\.0\.conv1\.sme of the ResNet must run once'):
        torch.compile(change(put('layer2.0.conv1')), backend='eager', fullgraph=fullgraph)(images())
    model = put('layer2.0.conv1')
    compiled, x = torch.compile(model, backend='eager', fullgraph=fullgraph), images()
    assert near(compiled(x), model(x))
    change(model)
    with pytest.raises(Exception, match=r'layer2\.0\.conv1\.sme of the ResNet must run once'):
        compiled(x)
    torch._dynamo.reset()


@pytest.mark.parametrize('change', [replace, copy_alone, adapt])
def test_error_a_layer_that_is_not_at_its_place_when_compiled_in_a_wrapper(change):
    torch._dynamo.reset()
    model = put('layer2.0.conv1')
    clip_model = ClipModel(model, T)
    compiled, x = torch.compile(clip_model, backend='eager', fullgraph=True), images()
    assert near(compiled(x), clip_model(x))
    change(model)
    with pytest.raises(Exception, match=r'layer2\.0\.conv1\.sme of the ResNet must run once'):
        compiled(x)
    torch._dynamo.reset()


@pytest.mark.parametrize('change', CHANGES + [sync])
def test_what_is_left_can_be_restored(change):
    model = put('layer2.0.bn1' if change is sync else 'layer2.0.conv1')
    model = restore(change(model))
    assert not any(isinstance(module, (ClipLayer, Host)) for module in model.modules())
    assert not model._forward_pre_hooks and not model._state_dict_pre_hooks
    assert not any('sme' in key for key in model.state_dict())
    assert change is twice or model(images()).shape == (2 * T, 5)


def test_error_a_batch_norm_that_is_converted():
    model = sync(put('layer2.0.bn1'))
    with pytest.raises(RuntimeError, match=r'^layer2\.0\.bn1\.sme .* but layer2\.0\.bn1 is another SyncBatchNorm now'):
        model(images())


@pytest.mark.parametrize('at, where', [
    ('layer2.0.conv1', 'before'), ('layer2.0.conv1', 'after'), ('layer2.0.bn1', 'after')])
def test_fusing_across_a_layer_is_refused(at, where):
    model = put(at, where, TIM)
    with pytest.raises((AssertionError, NotImplementedError), match=r'did not find fuser method'):
        torch.ao.quantization.fuse_modules(model, [['layer2.0.conv1', 'layer2.0.bn1']])


def test_fusing_beside_a_layer_is_fine():
    model, x = put('layer2.0'), images()
    fused = torch.ao.quantization.fuse_modules(model, [['layer2.0.conv1', 'layer2.0.bn1']])
    assert near(fused(x), model(x))


@pytest.mark.parametrize('at', ['layer2.0.conv1', 'layer2.0', 'act1'])
def test_fx_sees_inserted_layers(at):
    model, x = put(at), images()
    for traced in (fx.symbolic_trace(model), fuse(model)):
        assert near(traced(x), model(x))
        assert sum(isinstance(module, SME) for module in traced.modules()) == 1
    insert(model, CME, 'layer1.0.conv1', 'before', num_frames=T)
    insert(model, TIM, 'layer1.0.conv1', 'before', num_frames=T)
    traced = fx.symbolic_trace(model)
    assert near(traced(x), model(x))
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize('at', ['bn1', 'layer2.0.bn1'])
@pytest.mark.parametrize('trace', [fx.symbolic_trace, fuse])
def test_error_fx_cannot_look_into_a_batch_norm(at, trace):
    with pytest.raises(TypeError, match=rf'^torch\.fx must look into {at}, since {at}\.sme runs there, .*timm'):
        trace(put(at))


def test_error_torchscript_and_inserted_layers():
    with pytest.raises(TypeError, match=(
            r'^TorchScript cannot compile layer2\.0, where insert\(\) put layer2\.0\.sme: use torch\.jit\.trace')):
        torch.jit.script(put('layer2.0'))


@pytest.mark.parametrize('order', [0, 1])
def test_compiled_graphs_are_not_those_of_another_network(order):
    # PyTorch's graphs do not depend on hooks: a network without layers and one with them would share theirs
    torch._dynamo.reset()
    plain, x = resnet().eval(), images()
    randomize(plain)
    with_layers = copy.deepcopy(plain)
    insert(with_layers, TIM, ['layer2.0.conv1', 'layer3.0'], num_frames=T)
    wants = [model(x) for model in (plain, with_layers)]
    assert not near(*wants, .01)
    for model, want in list(zip((plain, with_layers), wants, strict=True))[::-1 if order else 1]:
        assert near(torch.compile(model, backend='eager')(x), want)
    assert near(torch.compile(restore(with_layers), backend='eager')(x), wants[0])
    torch._dynamo.reset()


@pytest.mark.parametrize('strict', [False, True])
def test_inserted_layers_export(strict):
    model, x = put(['layer1.0.conv1', 'layer2.0'], 'before', TIM), images()
    program = torch.export.export(model, (x,), strict=strict)
    assert {'layer1.0.conv1.tim.weight', 'layer2.0.tim.weight'} <= set(program.state_dict)
    assert near(program.module()(x), model(x))


@pytest.mark.parametrize('at', ['layer2.0', 'layer2.0.conv1'])
def test_wrappers_that_change_nothing_are_no_error(at):
    model, x = put(at), images()
    want = model(x)
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, timm.models.resnet.BasicBlock))
    assert torch.equal(wrapped(x), want) and type(wrapped.layer2[0]).__name__ == 'CheckpointWrapper'
    wrapped = copy.deepcopy(model)
    wrapped.layer2[0] = torch.compile(wrapped.layer2[0], backend='eager')
    assert near(wrapped(x), want)
    wrapped = copy.deepcopy(model)
    wrapped.layer2 = nn.DataParallel(wrapped.layer2)  # without a device it calls the module
    assert torch.equal(wrapped(x), want)
    torch._dynamo.reset()


def test_parametrized_hosts_run_their_layers_and_restore_when_they_are_their_class_again():
    model, x = put('layer2.0.conv1'), images()
    want = model(x)
    conv = model.layer2[0].conv1
    parametrizations.weight_norm(conv)
    assert near(model(x), want)
    with pytest.raises(ValueError, match=r'^layer2\.0\.conv1 must be a Conv2d that runs layer2\.0\.conv1\.sme to be'):
        restore(model)
    assert near(model(x), want)
    parametrize.remove_parametrizations(conv, 'weight')
    restore(model)
    assert type(conv) is nn.Conv2d


def test_a_module_of_a_hosts_class_runs_no_layers():
    # as adapters make one: type(conv)(...)
    model = put('layer2.0.conv1')
    conv, x = type(model.layer2[0].conv1)(64, 8, 3), images(2, 64, 6, 6)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias))


def test_a_host_is_what_it_was_to_everybody_else():
    model = put('layer2.0.conv1')
    conv = model.layer2[0].conv1
    assert isinstance(conv, nn.Conv2d) and type(conv).__name__ == 'Conv2d' and conv.kernel_size == (3, 3)
    assert [name for name, _ in conv.named_parameters(recurse=False)] == ['weight']


@pytest.mark.parametrize(
    'how', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['copy', 'pickle'])
def test_copies_of_a_network_are_whole(how):
    model, x = put(['layer2.0.conv1', 'layer3.0'], 'before', TIM), images()
    insert(model, CME, 'layer2.0.conv1', 'before', num_frames=T)
    want, twin = model(x), how(model)
    assert torch.equal(twin(x), want)
    nn.init.zeros_(model.layer3[0].tim.weight)
    assert torch.equal(twin(x), want) and not near(model(x), want, .01)
    assert not any(isinstance(module, Host) for module in restore(twin).modules())


def test_error_a_shallow_copy_would_share_the_layers():
    with pytest.raises(TypeError, match=r'^layer2\.0\.conv1 runs layers, and a shallow copy would run the same ones'):
        copy.copy(put('layer2.0.conv1').layer2[0].conv1)


def test_attributes_of_the_modules_own_stay():
    class Own(nn.Conv2d):
        own_class = 3

        def __init__(self):
            super().__init__(3, 8, 1)
            self.place = torch.ones(1)

        def forward(self, x):
            return super().forward(x) * self.place * self.own_class

    model, x = nn.Sequential(Own(), nn.ReLU()), images()
    want = model(x)
    insert(model, SME, '0', num_frames=T)
    assert torch.equal(model(x), want.relu()) and model[0].place == 1
    restore(model)
    assert torch.equal(model(x), want) and vars(model[0])['place'] == 1


@pytest.mark.parametrize('make, match', [
    (lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), r"^at='0' must not be parametrized to take a layer"),
    (lambda: fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1))), r"^at='0' must have the forward of its class"),
    (lambda: torch.jit.trace(nn.Conv2d(3, 8, 1), torch.zeros(1, 3, 4, 4)), r"^at='0' must have the forward of its")],
    ids=['parametrized', 'traced', 'compiled'])
def test_error_modules_whose_class_is_not_theirs(make, match):
    model = nn.Sequential(make(), nn.ReLU())
    kind, keys = type(model[0]), list(model.state_dict())
    with pytest.raises(ValueError, match=match):
        insert(model, TIM, '0', example_input=torch.zeros(1, 3, 4, 4))
    assert type(model[0]) is kind and list(model.state_dict()) == keys and not model._forward_pre_hooks


@pytest.mark.parametrize('part', ['layer1.0', 'layer2.0.conv1'])
@pytest.mark.parametrize('change', ['class', 'forward'])
def test_error_restore_of_what_somebody_changed(part, change):
    model, x = resnet(), images()
    if part == 'layer1.0':
        retrofit(model, num_frames=T)
    else:
        insert(model, SME, part, num_frames=T)
    randomize(model).eval()
    module = model.get_submodule(part)
    if change == 'class':  # as fully_shard does
        module.__class__ = type(f'FSDP{type(module).__name__}', (type(module),), {})
    else:  # as accelerate does
        module.forward = module.forward
    want = model(x)
    with pytest.raises(ValueError, match=r'to be restored.*undo first what changed its class or its forward since'):
        restore(model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize('at', ['layer1.0', 'layer2.0'])
def test_a_second_insert_that_fails_leaves_the_first_as_it_was(at):
    model, x = put('layer1.0'), images()
    want, before = model(x), anatomy(model)
    forward = model.layer2[1].forward
    model.layer2[1].forward = lambda x: forward(x)
    with pytest.raises(ValueError, match=r'must have the forward of its class'):
        insert(model, TIM, [at, 'layer2.1'], num_frames=T)
    del model.layer2[1].forward
    assert anatomy(model) == before and torch.equal(model(x), want)
    assert len(model.state_dict()) == len(resnet().state_dict()) + 6


def test_layers_that_are_made_in_inference_mode_train():
    for change in (lambda model: insert(model, CME, 'layer1.0'), lambda model: retrofit(model)):
        model = resnet()
        with torch.inference_mode():
            change(model)
        model(images()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_error_layers_of_another_num_frames():
    model = put('layer1.0')
    with pytest.raises(ValueError, match=r'^num_frames=8, but layer1\.0\.sme of the model has num_frames=4'):
        insert(model, TIM, 'layer2.0', num_frames=8)


def test_error_a_forward_that_was_replaced():
    model = resnet()
    model.layer1[0].conv1.forward = model.layer1[0].conv2.forward
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"^at='layer1\.0\.conv1' must have the forward of its class"):
        insert(model, TIM, ['layer1.1.conv1', 'layer1.0.conv1'])
    assert anatomy(model) == before


def test_error_layers_put_there_through_another_module():
    model = resnet()
    insert(model.layer1, TIM, '0.conv1', example_input=torch.zeros(1, 64, 8, 8))
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"^at='layer1\.0\.conv1' has layers that were put there through an"):
        insert(model, TIM, 'layer1.0.conv1')
    assert anatomy(model) == before
    insert(model, TIM, 'layer2.0.conv1')
    assert sum(isinstance(module, Host) for module in model.modules()) == 2
    assert not any(isinstance(module, Host) for module in restore(model).modules())


def test_error_an_input_by_keyword_after_all():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.keyword = False

        def forward(self, x):
            return self.conv(input=x) if self.keyword else self.conv(x)

    model = Net()
    insert(model, TIM, 'conv', 'before', num_frames=T)
    model.keyword = True
    with pytest.raises(TypeError, match=r'^conv must get its input as a positional argument, since layers'):
        model(images())


# Memory

@pytest.mark.parametrize('make', [
    lambda: put(['layer2.0.conv1', 'layer3.0']),
    lambda: retrofit(model := resnet(), num_frames=T) and model,
    lambda: retrofit(model := res2net(), num_frames=T) and model,
    lambda: ClipModel(put('layer2.0'), T)], ids=['insert', 'retrofit', 'retrofit of hosts', 'ClipModel'])
def test_a_network_goes_when_it_is_deleted(make):
    gc.collect()
    gc.disable()
    try:
        model = make()
        model(images(T, 3, 32, 32))
        refs = [weakref.ref(module) for module in model.modules()] + [weakref.ref(p) for p in model.parameters()]
        del model
        assert not [ref() for ref in refs if ref() is not None]
    finally:
        gc.enable()
