"""Networks that hand on tokens, with layers: masks, int8, adapters, images that are resized, memory of other orders."""
import copy

import peft
import pytest
import timm
import torch
import torchvision
import transformers
from helpers import SMALL_TRANSFORMER, randomize_layers, small_vit
from torch import nn

from cmr_layers import CME, TIM, adapt, insert, restore

T = 2


HIDDEN = torch.ones(2 * T, 16)
HIDDEN[0, 12:] = 0


@pytest.mark.parametrize('by_name', [False, True])
@pytest.mark.parametrize('mask, shown', [
    (HIDDEN.bool(), False), (HIDDEN.long(), False), (HIDDEN, False), ((1 - HIDDEN) * -1e4, False),
    (HIDDEN > -1, True), (HIDDEN.long() * 0 + 1, True), (HIDDEN * 0 + 1, True), (HIDDEN * 0, True), (None, True),
], ids=['bool', 'int', 'float', 'added', 'bool, all', 'int, all', 'float, all', 'added, all', 'None'])
def test_masks_of_every_kind(mask, shown, by_name):
    class Block(nn.Linear):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    class Net(nn.Module):
        mask = None

        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 8, 4, 4), Block(8, 8)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            y = self.block(x, attention_mask=self.mask) if by_name else self.block(x, self.mask)
            return y.mean(1)

    model, x = Net(), torch.randn(2 * T, 3, 16, 16)
    insert(model, [CME, TIM], 'block', 'before', T, example_input=x[:1])
    want, model.mask = model(x), mask
    if shown:
        assert torch.equal(model(x), want)
    else:
        with pytest.raises(ValueError, match=r'^block runs block\.cme, block\.tim and must get no attention_mask that'):
            model(x)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    if shown:
        torch.testing.assert_close(compiled(x), want)
    else:
        with pytest.raises(RuntimeError, match='must get no attention_mask that hides tokens'):
            compiled(x)
    torch._dynamo.reset()


@pytest.mark.parametrize('masks, name', [
    ({'attention_mask': {'full': HIDDEN.bool()}}, r"attention_mask\['full'\]"),
    ({'batch': {'key_padding_mask': HIDDEN.bool()}}, r"batch\['key_padding_mask'\]"),
])
def test_masks_within_a_dictionary(masks, name):
    class Block(nn.Linear):
        def forward(self, x, **kwargs):
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 8, 4, 4), Block(8, 8)

        def forward(self, x, **kwargs):
            return self.block(self.conv(x).flatten(2).transpose(1, 2), **kwargs).mean(1)

    model, x = Net(), torch.randn(2 * T, 3, 16, 16)
    insert(model, TIM, 'block', 'before', T, example_input=x[:1])
    with pytest.raises(ValueError, match=f'^block runs block.tim and must get no {name} that hides tokens'):
        model(x, **masks)


def test_masks_of_transformers_are_positional():
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL_TRANSFORMER)).eval()
    at = next(name for name, _ in model.named_modules() if name.endswith('layers.0'))
    insert(model, TIM, at, 'before', T)
    x, mask = torch.randn(T, 3, 32, 32), torch.ones(T, 17, dtype=torch.long)
    torch.testing.assert_close(model(x, attention_mask=mask).pooler_output, model(x).pooler_output)
    mask[0, 9:] = 0
    with pytest.raises(ValueError, match='must get no attention_mask that hides tokens'):
        model(x, attention_mask=mask)


def test_an_int8_network_of_torchvision():
    kinds = torchvision.models.quantization.resnet
    model = kinds._resnet(kinds.QuantizableBasicBlock, [1, 1, 1, 1], None, False, True).eval()
    with pytest.raises(ValueError, match=r'of floating point numbers, .* it is quint8 of \[2, 64, 8, 8\] for 2 images'):
        insert(model, TIM, 'layer1.0', num_frames=T, example_input=torch.zeros(1, 3, 32, 32))


def test_an_adapter_that_replaces_a_host_is_an_error():
    model, x = small_vit().eval(), torch.randn(T, 3, 32, 32)
    insert(model, [CME, TIM], 'blocks.*.attn.qkv', 'before', T, start='identity')
    with pytest.raises(RuntimeError, match=r'^blocks\.0\.attn\.qkv\.cme and .* of the VisionTransformer must run once'):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv']))(x)
    first = peft.get_peft_model(small_vit().eval(), peft.LoraConfig(target_modules=['qkv'])).base_model.model
    want = first(x)
    insert(first, [CME, TIM], 'blocks.*.attn', 'before', T, start='identity')
    assert torch.equal(first(x), want)


def test_layers_in_a_detection_network_that_resizes_its_images():
    network = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3).eval()
    report = insert(network.backbone, TIM, 'features.0.3.block.0', 'before', T, torch.zeros(1, 3, 64, 64), 'identity')
    [layer] = [network.backbone.get_submodule(one.name) for one in report]
    assert (layer.channels, layer.input_fmt) == (24, 'NCHW')
    x = torch.rand(T, 3, 48, 64)
    got, want = network(list(x)), restore(copy.deepcopy(network))(list(x))
    assert all(torch.equal(one[key], other[key]) for one, other in zip(got, want) for key in one)


class Encoder(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **kwargs) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize('norm_first', [False, True])
def test_layers_run_where_pytorch_runs_no_modules(norm_first):
    model, x = Encoder(norm_first=norm_first).eval(), torch.randn(2 * T, 3, 32, 32)
    with pytest.raises(ValueError, match=r"^at='layers.0.norm1' must not be inside of an nn.TransformerEncoderLayer, "):
        insert(model, TIM, 'layers.*.norm1', 'before', T, example_input=x[:1])
    report = adapt(model, T, example_input=x[:1])
    assert {one.at for one in report} == {f'layers.{n}' for n in range(4)} and not report.left
    randomize_layers(model)
    want = model(x)  # with gradients it runs the modules
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)


def test_error_query_key_and_value_are_one_tensor():
    model, image = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32), torch.zeros(1, 3, 32, 32)
    at = 'encoder.layers.encoder_layer_0.self_attention'
    with pytest.raises(ValueError, match=rf"the input of at='{at}' must be one argument, got a tensor"):
        insert(model, TIM, at, 'before', T, image)
    assert len(insert(model, TIM, at, 'after', T, image)) == 1


def test_no_pass_of_the_probe_leaves_anything_on_modules():
    levit = timm.create_model('levit_128s').eval()
    insert(levit, TIM, 'stages.0.blocks.*', num_frames=T)
    assert not any(getattr(m, 'attention_bias_cache', None) for m in levit.modules())
    # it makes its windows smaller on a small image, for good
    config = transformers.SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, image_size=32)
    swin = transformers.SwinModel(config).eval()
    other, x = copy.deepcopy(swin), torch.randn(T, 3, 64, 64)
    adapt(other, T)
    want = swin(x).pooler_output
    assert torch.equal(other(x).pooler_output, want) and torch.equal(restore(other)(x).pooler_output, want)
