"""CME, the TIM behind it and the convolution behind both: what runs together, and that it is the same."""
import pytest
import timm
import torch
from helpers import randomize
from helpers import small_block as block
from torch import nn

from cmr_layers import CME, TIM, ClipModel, retrofit
from cmr_layers.cme_tim import run
from cmr_layers.ops import explain, use_path


@pytest.mark.parametrize('grad', [False, True])
def test_layers_that_follow_each_other_run_as_one_where_they_fit(grad):
    kinds = CME, TIM, TIM, CME, CME, TIM
    layers = nn.Sequential(*(randomize(kind(8, num_frames=4)) for kind in kinds)).eval()
    odd = TIM(8, num_frames=2)      # of other clips
    x = torch.randn(4, 8, 3, 2)

    class Together(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return run(list(self.layers), x)

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(list(layers), x), layers(x))
        torch.testing.assert_close(run([layers[0], odd], x), odd(layers[0](x)))
    assert [row[1] for row in explain(Together(*layers), x)] == ['CME + TIM', 'TIM', 'CME', 'CME + TIM']
    assert [row[1] for row in explain(Together(layers[0], odd), x)] == ['CME', 'TIM']
    assert run([], x) is x


def test_a_block_calls_an_operator_for_cme_and_tim_and_one_for_sme():
    assert [row[:2] for row in explain(block(), torch.randn(4, 8, 3, 2))] == [
        ('cme', 'CME + TIM'), ('sme', 'SME')]
    assert [row[1] for row in explain(block(cme='none', sme='none'), torch.randn(4, 8, 3, 2))] == ['TIM']
    assert [row[1] for row in explain(block(tim='none', sme='none'), torch.randn(4, 8, 3, 2))] == ['CME']


def test_with_gradients_the_convolution_joins_cme_and_tim_and_its_input_is_not_kept():
    made, x = block(), torch.randn(4, 8, 3, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        made.conv1.register_forward_hook(lambda *args: None)
        made(x)
        with_hook = len({v.data_ptr() for v in kept if v.shape == x.shape})
        kept.clear()
        made.conv1._forward_hooks.clear()
        y = made(x)
    assert len({v.data_ptr() for v in kept if v.shape == x.shape}) == with_hook - 1
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('train', [False, True])
def test_a_block_is_its_parts(train):
    made, x = block().train(train), torch.randn(8, 8, 3, 2)
    state = {key: v.clone() for key, v in made.state_dict().items()}
    with torch.set_grad_enabled(train):
        got = made(x)
        made.load_state_dict(state)
        with use_path('reference'):
            torch.testing.assert_close(got, made(x), rtol=1e-4, atol=1e-5)


def test_error_a_block_wants_a_tensor():
    with pytest.raises(TypeError, match=r"^x must be a tensor, got <class 'list'>$"):
        block()([1])


def test_a_retrofitted_network_takes_one_pass_for_cme_and_tim():
    net = timm.create_model('resnet18', num_classes=3).eval()
    report = retrofit(net, num_frames=4)
    model, x = ClipModel(net, num_frames=4).eval(), torch.randn(1, 4, 3, 32, 32)
    rows = explain(model, x)
    kinds = [insertion.kind for insertion in report]
    assert len(rows) == kinds.count('CME') + kinds.count('SME')
    assert {row[1] for row in rows} == {'CME + TIM', 'SME'}
    assert all(row[0].startswith('model.layer') for row in rows)
