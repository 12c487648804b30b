"""adapt: the places that it picks in each architecture, and a network's life afterwards, from training to export."""
import pytest
import timm
import torch
import transformers
from helpers import anatomy, randomize_layers, small_vit, values
from torch import nn

from cmr_layers import CME, SME, TIM, ClipModel, adapt, insert, load_model, restore, save_model, train_mode

T, SIZE = 2, 32


def dinov2():
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8, num_labels=5)
    return transformers.Dinov2ForImageClassification(config)


def timms(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


# The five that the issue names; small enough to export in seconds.
NETWORKS = {
    'ViT': small_vit,
    'Swin': timms('swin_tiny_patch4_window7_224', img_size=SIZE, window_size=4, depths=(2, 1), embed_dim=16,
                  num_heads=(2, 2)),
    'ConvNeXt': timms('convnext_atto', depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), ls_init_value=1.),
    'RegNet': timms('regnetx_002', zero_init_last=False),
    'DINOv2': dinov2,
}


def clips(*shape):
    return torch.randn(*(shape or (2, T, 3, SIZE, SIZE)))


def logits(model, frames):
    return getattr(out := model(frames), 'logits', out)


@pytest.mark.parametrize('name', NETWORKS)
def test_train_a_step_save_load_restore_and_export(name, tmp_path):
    network, x = NETWORKS[name]().eval(), clips()
    before, state, want = anatomy(network), values(network), logits(network, x.flatten(0, 1)).detach()
    report = adapt(network, T, freeze='backbone')
    assert not report.left and {one.kind for one in report} == {'CME', 'TIM', 'SME'}
    assert torch.equal(logits(network, x.flatten(0, 1)), want)  # the start keeps the predictions

    model = train_mode(ClipModel(network, T))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == report.trainable[0] < report.trainable[1] / 2
    optimizer = torch.optim.SGD(trained, .5)
    for _ in range(2):  # the gates' last weight starts at zero: the first step reaches no others
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    learned = {name for name, p in network.named_parameters() if p.requires_grad}
    now = values(network)
    assert all(torch.equal(now[key], state[key]) for key in state.keys() - learned)

    randomize_layers(network)
    model.eval()
    with torch.no_grad():
        got = model(x)
        assert not torch.allclose(got, model(x.flip(1)), atol=1e-4)  # the order of the frames matters
    save_model(model, tmp_path)
    again = load_model(tmp_path, *([] if name != 'DINOv2' else [NETWORKS[name]()]))
    with torch.no_grad():
        assert torch.equal(again(x), got)
    batch = {0: torch.export.Dim('batch', min=1, max=16)}
    program = torch.export.export(model, (clips(3, T, 3, SIZE, SIZE),), dynamic_shapes=(batch,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), got)
    restore(network)
    assert anatomy(network) == before


PLACES = [
    ('vit_tiny_patch16_224', {}, 'blocks.0.attn', ['blocks.0', 'blocks.4', 'blocks.8']),
    ('swin_tiny_patch4_window7_224', {}, 'layers.0.blocks.0.norm1', [f'layers.{i}.blocks.0' for i in range(4)]),
    ('swinv2_tiny_window8_256', {}, 'layers.0.blocks.0', [f'layers.{i}.blocks.0' for i in range(4)]),
    ('convnext_atto', {}, 'stages.0.blocks.0.conv_dw', [f'stages.{i}.blocks.0' for i in range(4)]),
    ('regnetx_002', {}, 's1.b1.conv1', ['s1.b1', 's2.b1', 's3.b1', 's4.b1']),
    ('resnet18', {}, 'layer1.0.conv1', [f'layer{i}.0' for i in range(1, 5)]),
    ('repvgg_a0', {}, 'stages.0.0', [f'stages.{i}.0' for i in range(4)]),  # two branches begin side by side
    ('cait_xxs24_224', {}, 'blocks.0.attn', None),  # the class token comes late
    ('crossvit_tiny_240', {}, 'blocks.0.blocks.0.0.attn', None),  # resizes its images
    ('vgg11', {}, 'features.1', None),  # repeats nothing
]


@pytest.mark.parametrize('name, kwargs, first, sme', PLACES, ids=[place[0] for place in PLACES])
def test_places(name, kwargs, first, sme):
    report = adapt(timm.create_model(name, device='meta', **kwargs), T)
    assert not report.left
    assert next(one.at for one in report if one.kind == 'CME') == first
    assert [one.at for one in report if one.kind == 'CME'] == [one.at for one in report if one.kind == 'TIM']
    if sme is not None:
        assert [one.at for one in report if one.kind == 'SME'] == sme


def test_placements_and_start():
    model = timm.create_model('convnext_atto', device='meta')
    report = adapt(model, T, cme='first', tim='none', sme='none', reduction=4, start='paper')
    assert [one.kind for one in report] == ['CME'] * 4
    assert {model.get_submodule(one.name).reduction for one in report} == {(4, 4)}
    assert {model.get_submodule(one.name).gate_init for one in report} == {None}


def test_blocks_without_a_place_are_named():
    report = adapt(timm.create_model('selecsls42', device='meta'), T)
    assert len(report.left) == 2  # whose blocks return lists, which an SME can't take
    assert '  features.0 is left as it is: the output of at=' in str(report)


@pytest.mark.parametrize('kwargs, message', [
    ({'freeze': 'all'}, "^freeze must be one of 'none', 'backbone', got 'all'$"),
    ({'num_frames': 0}, '^num_frames must be a positive int, got 0$'),
    ({'start': 'tsm'}, "^start must be one of 'identity', 'shift', 'paper', got 'tsm'$"),
    ({'sme': 'last'}, "^sme must be one of 'all', 'first', 'none', got 'last'$"),
    ({'cme': 'none', 'tim': 'none', 'sme': 'none'}, '^nothing to insert'),
    ({'freeze': 'backbone', 'head': 'no_such'}, 'no_such'),
])
def test_errors_leave_the_network_alone(kwargs, message):
    model = NETWORKS['ViT']()
    before, learns = anatomy(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        adapt(model, **kwargs)
    assert anatomy(model) == before and [p.requires_grad for p in model.parameters()] == learns


def test_error_no_blocks_and_layers_already_there():
    with pytest.raises(ValueError, match=r'^model \(Sequential\) holds no blocks, .* insert\(\) puts layers at any'):
        adapt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    model = NETWORKS['ViT']()
    adapt(model, T)
    with pytest.raises(ValueError, match='already has 5 temporal layers'):
        adapt(model, T)


def test_what_adapt_put_in_is_what_insert_takes():
    by_hand, model = NETWORKS['ViT']().eval(), NETWORKS['ViT']().eval()
    model.load_state_dict(by_hand.state_dict())

    insert(by_hand, [CME, TIM], 'blocks.*.attn', 'before', T, start='identity')
    insert(by_hand, SME, 'blocks.0', num_frames=T)
    adapt(model, T)
    assert by_hand.state_dict().keys() == model.state_dict().keys()
