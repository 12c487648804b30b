"""What insert concludes from two passes: which axis are the channels, which tokens are patches, what is no frame."""
import pytest
import timm
import torch
import transformers
from helpers import SMALL_TRANSFORMER, anatomy, randomize_layers, small_vit, values
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, insert, load_model, restore, save_model

T = 2


def swin(**kwargs):
    return timm.create_model('swin_tiny_patch4_window7_224', **{
        'img_size': 32, 'window_size': 4, 'depths': (1, 1), 'embed_dim': 16, 'num_heads': (2, 2), **kwargs})


def forms(model, at, where='before', **kwargs):
    made = [model.get_submodule(one.name) for one in insert(model, TIM, at, where, T, **kwargs)]
    return [(layer.channels, layer.input_fmt, layer.num_prefix_tokens) for layer in made]


class Wrap(nn.Module):
    """Gives what a function makes of the image to a module, and returns a vector for each image."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.block, self.function = nn.Conv2d(3, 12, 4, 4), nn.Identity(), function

    def forward(self, x):
        return self.block(self.function(self.conv(x))).flatten(1).mean(1, keepdim=True)


# The five misreads that were accepted

def test_maps_with_channels_last_and_an_image_that_is_not_square():
    model = timm.create_model('mambaout_femto', device='meta')
    image = torch.zeros(1, 3, 192, 320, device='meta')
    assert forms(model, 'stages.2', 'after', example_input=image) == [(192, 'NHWC', 0)]
    # a network of a fixed size, which shows one size only
    assert forms(swin(img_size=(32, 64)), 'layers.*.blocks.*') == [(16, 'NHWC', 0), (32, 'NHWC', 0)]


def test_a_cube_is_told_by_the_second_size_or_by_the_user():
    cube = Wrap(lambda x: x.permute(0, 2, 3, 1))
    assert forms(cube, 'block', example_input=torch.zeros(1, 3, 48, 48)) == [(12, 'NHWC', 0)]
    assert forms(Wrap(lambda x: x), 'block', example_input=torch.zeros(1, 3, 48, 48)) == [(12, 'NCHW', 0)]
    fixed = {'embed_dim': 8, 'num_heads': (2, 2)}  # 8x8 places of 8 channels, at the only size that runs
    with pytest.raises(ValueError, match=(
            r"^the input of at='layers.0' may be maps \(N, C, H, W\), maps \(N, H, W, C\) or tokens .*: it is "
            r"\[2, 8, 8, 8\] for 2 images of 32x32. Pass input_fmt='NCHW', 'NHWC' or 'NLC', or another ")):
        forms(swin(**fixed), 'layers.0')
    assert forms(swin(**fixed), 'layers.0', input_fmt='NHWC') == [(8, 'NHWC', 0)]


class Fixed(Wrap):
    """Runs on images of 24x24 only, where maps are cubes of 12x12x12."""

    def __init__(self, function, *modules):
        super().__init__(function)
        self.conv, self.more = nn.Conv2d(3, 12, 2, 2), nn.Sequential(*modules)

    def forward(self, x):
        if x.shape[2:] != (24, 24):
            raise ValueError('24x24 only')
        return self.more(self.block(self.function(self.conv(x)))).flatten(1)


@pytest.mark.parametrize('module', [nn.Conv2d(12, 2, 1), nn.MaxPool2d(2)])
def test_a_cube_is_told_by_what_takes_or_returns_it(module):
    image = torch.zeros(1, 3, 24, 24)
    assert forms(Fixed(lambda x: x, module), 'block', 'after', example_input=image) == [(12, 'NCHW', 0)]
    assert forms(Fixed(lambda x: x, nn.Flatten()), 'conv', 'after', example_input=image) == [(12, 'NCHW', 0)]
    for function in (lambda x: x.transpose(1, 3), lambda x: x * 1):  # a convolution of another tensor says nothing
        with pytest.raises(ValueError, match=r"it is \[2, 12, 12, 12\] for 2 images of 24x24. Pass input_fmt='NCHW', "):
            forms(Fixed(function, nn.ReLU(), module), 'block', example_input=image)


def test_one_window_of_a_network_that_shows_one_size_may_become_several():
    for at, where in (('layers.1.blocks.0.attn', 'before'), ('layers.1.blocks.0.attn.proj', 'after')):
        with pytest.raises(ValueError, match=(
                rf"at='{at}' may be one of several windows in a larger image, and layers would take windows for "
                rf"frames: it is \[2, 16, 32\] for 2 images of 32x32, .* pass input_fmt='NLC' if it has one entry")):
            forms(swin(), at, where)
        assert forms(swin(), at, where, input_fmt='NLC') == [(32, 'NLC', 0)]
    with pytest.raises(ValueError, match='may be one of several windows'):  # no other window shows it
        forms(swin(depths=(1,), num_heads=(2,), window_size=8, embed_dim=24), 'layers.0.blocks.0.attn')
    # tokens that are as many as the network's patches are no window, though others of their class take windows
    model = timm.create_model('tnt_s_legacy_patch16_224', depth=1, device='meta')
    assert forms(model, 'blocks.0.attn_out') == [(384, 'NLC', 1)]
    model = swin()
    assert forms(model, 'layers.*.blocks.*') == [(16, 'NHWC', 0), (32, 'NHWC', 0)]
    model.set_input_size((64, 64))
    assert model(torch.zeros(T, 3, 64, 64)).shape == (T, 1000)


def test_blocks_of_patches_are_no_channels():
    model = timm.create_model('nest_tiny', device='meta')
    with pytest.raises(ValueError, match=r'must be one tensor, .* it is \[2, 16, 196, 96\] for 2 images of 224x224'):
        forms(model, 'levels.0.transformer_encoder.0')


def test_heads_are_no_channels():
    with pytest.raises(ValueError, match=r'looks like heads of an attention, .* it is \[2, 2, 17, 12\] for 2 images'):
        forms(small_vit(qk_norm=True), 'blocks.*.attn.q_norm')


@pytest.mark.parametrize('make, at, shape', [
    (small_vit, 'blocks.0.attn.attn_drop', '2, 2, 17, 17'),                    # a map of 32x32, halved
    (swin, 'layers.1.blocks.0.attn.attn_drop', '2, 2, 16, 16'),          # likewise
    (lambda: timm.create_model('xcit_nano_12_p16_224', depth=1, cls_attn_layers=1, device='meta'),
     'blocks.0.attn.attn_drop', '2, 4, 32, 32'),                         # of channels, at any size
], ids=['ViT', 'Swin', 'XCiT'])
def test_attention_is_no_map(make, at, shape):
    before = timm.layers.config.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = make()
    finally:
        timm.layers.set_fused_attn(before)
    with pytest.raises(ValueError, match=(
            rf'looks like heads of an attention, .* it is \[{shape}\] for .* Choose the block around it, or pass in')):
        forms(model, at)
    assert forms(model, at, input_fmt='NCHW') == [(int(shape.split(', ')[1]), 'NCHW', 0)]


@pytest.mark.parametrize('name, at, shape', [
    ('efficientformerv2_s0', 'stages.2.blocks.*.token_mixer.talking_head1', '2, 8, 64, 64'),
    ('cait_xxs24_224', 'blocks.0.attn.proj_l', '2, 256, 256, 4')])
def test_attention_of_convolutions_is_no_map(name, at, shape):
    model = timm.create_model(name, img_size=256, device='meta')
    with pytest.raises(ValueError, match=rf'looks like heads of an attention, .* it is \[{shape}\]'):
        forms(model, at, example_input=torch.zeros(1, 3, 256, 256, device='meta'))


def test_a_class_token_alone_is_no_map():
    with pytest.raises(ValueError, match=r'must be tokens .* number L grows with the image; it is \[2, 1, 192\]'):
        forms(timm.create_model('cait_xxs24_224', img_size=32, patch_size=8, depth=2), 'blocks_token_only.*', 'after')


def test_windows_are_no_frames_even_if_there_is_one_at_first():
    model = timm.create_model('efficientvit_m0')
    with pytest.raises(ValueError, match=r'windows, heads or parts of frames in its first axis: .* Choose the block'):
        forms(model, 'stages.1.blocks.0.mixer.m.attn')
    with pytest.raises(ValueError, match=r'in its first axis: it is \[8, 16, 16\] for 2 images of 32x32; wanted one'):
        forms(swin(), 'layers.0.blocks.0.attn')


# Tokens and their prefix

@pytest.mark.parametrize('model, at, want', [
    (small_vit, 'blocks.*.attn', (24, 'NLC', 1)),
    (lambda: small_vit(dynamic_img_size=True), 'blocks.*.attn', (24, 'NLC', 1)),
    (lambda: small_vit(reg_tokens=4, no_embed_class=True), 'blocks.*.norm1', (24, 'NLC', 5)),
    (lambda: small_vit(class_token=False, global_pool='avg'), 'blocks.*', (24, 'NLC', 0)),
    (lambda: small_vit(device='meta'), 'blocks.*', (24, 'NLC', 1)),
    (lambda: small_vit(reg_tokens=2, dynamic_img_size=True, device='meta'), 'blocks.*', (24, 'NLC', 3)),
    (lambda: timm.create_model('cait_xxs24_224', img_size=32, patch_size=8, depth=2), 'blocks.*', (192, 'NLC', 0)),
    (lambda: timm.create_model('mixer_s32_224', img_size=64), 'blocks.*', (512, 'NLC', 0)),
    (lambda: timm.create_model('levit_128s', device='meta'), 'stages.0.blocks.*', (128, 'NLC', 0)),
], ids=['ViT', 'any size', 'registers', 'no class token', 'meta', 'meta, any size', 'CaiT', 'Mixer', 'LeViT'])
def test_prefix_tokens(model, at, want):
    assert set(forms(model(), at)) == {want}


def test_patches_that_are_rounded_up_are_no_prefix():
    # 5 columns of an image, 9 of one twice as wide: 5 tokens more than a grid of twice the width leaves
    for device, why in (('cpu', '1 that no image changes'), ('meta', '1 that the network declares')):
        model = small_vit(dynamic_img_size=True, dynamic_img_pad=True, device=device)
        image = torch.zeros(1, 3, 36, 36, device=device)
        with pytest.raises(ValueError, match=rf'can not be told: 6 from two sizes, {why}; it is .* Pass num_prefix'):
            forms(model, 'blocks.*', example_input=image)
        assert set(forms(model, 'blocks.*', example_input=image, num_prefix_tokens=1)) == {(24, 'NLC', 1)}


@pytest.mark.parametrize('norm_first', [False, True])
def test_a_class_token_that_is_mixed_before_any_module_returns_it(norm_first):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.cls_token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
            self.layers = nn.ModuleList([
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first) for _ in range(2)])

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            for layer in self.layers:
                x = layer(x)
            return x[:, 0]

    assert set(forms(Own(), 'layers.*', example_input=torch.zeros(1, 3, 32, 32))) == {(16, 'NLC', 1)}




@pytest.mark.parametrize('name, kwargs, at, prefix', [
    ('ViT', {}, 'layers.*', 1), ('Dinov2', {}, 'encoder.layer.*', 1),
    ('Dinov2WithRegisters', {'num_register_tokens': 3}, 'encoder.layer.*', 4),
    ('SiglipVision', {}, 'encoder.layers.*', 0), ('CLIPVision', {}, 'encoder.layers.*', 1),
])
def test_transformers(name, kwargs, at, prefix):
    config = getattr(transformers, f'{name}Config')(**SMALL_TRANSFORMER, **kwargs)
    model = getattr(transformers, f'{name}Model')(config).eval()
    names = [own for own, _ in model.named_modules()]
    at = at if at.replace('*', '0') in names else next(
        own for own in names if own.endswith(at.replace('*', '0'))).removesuffix('0') + '*'
    x = torch.randn(2 * T, 3, 32, 32)
    want = model(x).pooler_output
    insert(model, [CME, TIM], at, 'before', T, start='identity')
    found = [m for m in model.modules() if isinstance(m, CME)]
    assert [(m.channels, m.input_fmt, m.num_prefix_tokens) for m in found] == [(24, 'NLC', prefix)] * 2
    assert torch.equal(model(x).pooler_output, want) and ClipModel(model, T)(x).shape == (2, 24)


def test_tokens_at_the_end_are_an_error_and_the_user_may_say_so():
    config = transformers.YolosConfig(**{**SMALL_TRANSFORMER, 'image_size': [32, 32]}, num_detection_tokens=3)
    at, message = 'encoder.layer.*', r'no patches behind its first ones, at \[0, 17, 18, 19\]: it is \[2, 20, 24\] for'
    with pytest.raises(ValueError, match=message):
        insert(transformers.YolosModel(config), TIM, at, 'before', T)
    report = insert(transformers.YolosModel(config), SME, at, 'before', T, num_prefix_tokens=1)
    assert len(report) == 2


@pytest.mark.parametrize('function, message', [
    (lambda x: x.flatten(2), r'looks like \(N, C, L\): .* wanted the channels last, \(N, L, C\)$'),
    (lambda x: x.flatten(2).permute(2, 0, 1), r'looks like \(L, N, C\): .* wanted the frames first, \(N, L, C\)$'),
    (lambda x: x.flatten(2).transpose(1, 2)[:, :7], r'must be tokens \(N, L, C\) whose number L grows with the image'),
    (lambda x: x.flatten(2).transpose(1, 2)[:, :16], r'must be tokens \(N, L, C\) whose number L grows with the image'),
    (lambda x: x.unflatten(2, (2, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1), 'parts of frames in its first axis'),
    (lambda x: x.unsqueeze(2), r'must be one tensor, \(N, C, H, W\), .* it is \[2, 12, 1, 8, 8\] for 2 images'),
    (lambda x: x.mul(100).to(torch.int32), r'must be one tensor of floating point numbers, .* int32 of \[2, 12, 8'),
])
def test_what_is_not_understood_is_an_error(function, message):
    model = Wrap(function)
    if 'int32' in message:
        model.function = lambda x: (x * 100).to(torch.int32)
        model.block = Back()
    before = anatomy(model)
    with pytest.raises(ValueError, match=f"^the input of at='block' .*{message}"):
        forms(model, 'block', example_input=torch.zeros(1, 3, 32, 32))
    assert anatomy(model) == before


class Back(nn.Module):
    def forward(self, x):
        return x.float()


def test_int8_networks_are_refused_while_they_are_probed():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block, self.back = nn.Conv2d(3, 8, 1), nn.Identity(), Dequantize()

        def forward(self, x):
            return self.back(self.block(torch.quantize_per_tensor(self.conv(x), .1, 0, torch.quint8))).mean((2, 3))

    class Dequantize(nn.Module):
        def forward(self, x):
            return x.dequantize()

    with pytest.raises(ValueError, match=r'of floating point numbers, .* it is quint8 of \[2, 8, 32, 32\] for 2 i'):
        forms(Quantized(), 'block', example_input=torch.zeros(1, 3, 32, 32))


def test_networks_that_resize_their_images():
    # they ran on two images, but saw one size
    assert set(forms(timm.create_model('crossvit_tiny_240', device='meta'), 'blocks.0.blocks.*.0')) == {
        (96, 'NLC', 1), (192, 'NLC', 1)}


def test_the_first_of_a_tuple_gets_the_layers():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x), 'size'

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            y, size = self.pair(x)
            assert size == 'size'
            return y.mean((2, 3))

    model, x = Net(), torch.randn(T, 3, 8, 8)
    want = model(x)
    insert(model, TIM, 'pair', num_frames=T)
    assert not torch.equal(randomize_layers(model)(x), want)
    assert torch.equal(restore(model)(x), want)


# Starts

@pytest.mark.parametrize('layers', [SME, TIM, [CME, TIM]], ids=['SME', 'TIM', 'CME and TIM'])
@pytest.mark.parametrize('make, at', [
    (small_vit, 'blocks.*.attn'), (swin, 'layers.*.blocks.*.norm1'),
    (lambda: timm.create_model('convnext_atto', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 'stages.*.blocks.*.conv_dw'),
    (lambda: timm.create_model('mobilenetv3_small_050'), 'blocks.[1-3].0.conv_pw'),
], ids=['ViT', 'Swin', 'ConvNeXt', 'MobileNet'])
def test_identity_is_bit_for_bit(make, at, layers):
    model, x = make().eval(), torch.randn(2 * T, 3, 32, 32)
    want, before, tensors = model(x), anatomy(model), values(model)
    insert(model, layers, at, 'before', T, start='identity')
    assert torch.equal(model(x), want) and torch.equal(model(x[:1]), restore(model)(x[:1]))
    assert anatomy(model) == before and all(torch.equal(v, tensors[k]) for k, v in values(model).items())


def test_a_cme_alone_is_nearly_the_identity():
    model, x = small_vit().eval(), torch.randn(2 * T, 3, 32, 32)
    want = model(x)
    insert(model, CME, 'blocks.*.attn', 'before', T, start='identity')
    assert not torch.equal(model(x), want)
    torch.testing.assert_close(model(x), want, rtol=0, atol=.05 * want.abs().max().item())


@pytest.mark.parametrize('layer, kwargs, error, message', [
    ([CME, TIM], {'start': 'identity', 'gate_init': .9}, ValueError, "^gate_init is set by start='identity', got 0.9"),
    (lambda *a, **k: TIM(*a, **k), {'start': 'identity'}, ValueError, "^start='identity' is for CME, SME and TIM, got"),
    ([TIM, TIM], {}, ValueError, '^layer must name each layer once, got'),
    ([], {}, TypeError, '^layer must be a class such as CME'),
    ([CME, TIM], {'reductoin': 4}, TypeError, "^none of the layers .* has an argument 'reductoin'$"),
    (TIM, {'input_fmt': 'NHWC'}, ValueError, r"^the input of at='blocks.0' must be tokens .* it is \[2, 17, 24\] for"),
])
def test_errors_of_starts_and_layers(layer, kwargs, error, message):
    model = small_vit()
    before = anatomy(model)
    with pytest.raises(error, match=message):
        insert(model, layer, 'blocks.0', 'before', T, **kwargs)
    assert anatomy(model) == before


# Masks, and the life of a network with token layers

def test_masks_that_hide_tokens_are_an_error():
    model = timm.create_model(
        'naflexvit_base_patch16_gap', embed_dim=24, depth=2, num_heads=2, num_classes=5, pos_embed_grid_size=(2, 2))
    model.eval()
    insert(model, [CME, TIM], 'blocks.*.attn', 'before', T, example_input=torch.zeros(1, 3, 32, 32))
    assert model(torch.randn(T, 3, 32, 32)).shape == (T, 5)
    patches = {'patches': torch.randn(T, 6, 16 * 16 * 3), 'patch_valid': torch.ones(T, 6, dtype=torch.bool),
               'patch_coord': torch.tensor([[y, x] for y in range(2) for x in range(3)]).expand(T, 6, 2)}
    assert model(patches).shape == (T, 5)  # nothing is hidden
    patches['patch_valid'] = patches['patch_valid'].clone()
    patches['patch_valid'][0, 4:] = False
    with pytest.raises(ValueError, match=r'blocks.0.attn runs .* and must get no attn_mask that hides tokens: '):
        model(patches)


@pytest.mark.parametrize('make, at', [
    (small_vit, 'blocks.*.attn'), (swin, 'layers.*.blocks.*.norm1')], ids=['ViT', 'Swin'])
def test_a_saved_network_has_its_formats(make, at, tmp_path):
    model, x = make().eval(), torch.randn(2 * T, 3, 32, 32)
    insert(model, [CME, TIM], at, 'before', T)
    insert(model, SME, at.rpartition('.')[0], num_frames=T)
    randomize_layers(model)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small_vit(), torch.randn(2 * T, 3, 32, 32)
    insert(model, [CME, TIM], 'blocks.*.attn', 'before', T)
    randomize_layers(model)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
