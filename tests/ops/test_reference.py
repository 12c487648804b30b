"""The law against loops that follow the paper's indices one by one, their derivatives, and the edges of the numbers."""
import loops
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cmr_layers.ops import reference as law

F64 = {'dtype': torch.float64}
SHAPES = [(2, 4, 6, 3, 2), (1, 1, 3, 2, 2), (2, 2, 4, 1, 1), (1, 3, 5, 7, 5), (1, 5, 2, 2, 1), (1, 7, 3, 1, 2)]
EXACT = {'rtol': 1e-12, 'atol': 1e-12}
HALF = [torch.float16, torch.bfloat16]


def cme_weights(channels, r1=2, r2=2, bias=False, **kw):
    values, keys = -(-channels // r1), -(-channels // r2)
    shapes = (values, channels), (keys, channels), (channels, values)
    weights = [torch.randn(shape, **kw) for shape in shapes]
    return weights + ([torch.randn(channels, **kw)] if bias else [])


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('r1, r2, bias', [(2, 2, False), (1, 4, False), (3, 2, True)])
def test_cme_follows_equations_1_to_6(shape, r1, r2, bias):
    x, weights = torch.randn(shape, **F64), cme_weights(shape[2], r1, r2, bias, **F64)
    torch.testing.assert_close(law.cme_gate(x, *weights), loops.cme_gate(x, *weights), **EXACT)
    torch.testing.assert_close(law.cme(x, *weights), loops.cme(x, *weights), **EXACT)


def test_cme_attends_most_to_the_frame_that_differs_most():
    # one channel, W1 = W2 = W3 = 1: frame 0 is alike to frame 1 and opposed to frame 2
    x = torch.tensor([3., 3., -3.], **F64).view(1, 3, 1, 1, 1)
    one = torch.ones(1, 1, **F64)
    torch.testing.assert_close(
        law.cme_gate(x, one, one, one).view(3), torch.tensor([0., 0., 0.], **F64).sigmoid(), rtol=0, atol=1e-6)


def test_cme_softmax_runs_over_the_other_frames_j_not_over_t():
    # softmax over t (as the authors' code) and over j (as the paper) differ as soon as the rows of d sum differently
    x, weights = torch.randn(1, 3, 4, 1, 1, **F64), cme_weights(4, **F64)
    w1, w2, w3 = weights
    pooled = x[0, :, :, 0, 0]
    z, k = pooled @ w1.T, pooled @ w2.T
    d = -k @ k.T
    over_j, over_t = ((w3 @ (z + d.softmax(dim) @ z).T).T.sigmoid() for dim in (1, 0))
    torch.testing.assert_close(law.cme_gate(x, *weights)[0], over_j, **EXACT)
    assert (over_j - over_t).abs().max() > 1e-3


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_similarity_and_motion_follow_equation_7(shape):
    x = torch.randn(shape, **F64)
    torch.testing.assert_close(law.similarity(x), loops.similarity(x), **EXACT)
    torch.testing.assert_close(law.motion(x), loops.motion(x), **EXACT)


def test_the_last_frame_takes_the_similarity_of_the_one_before():
    s = law.similarity(torch.randn(2, 5, 4, 3, 2))
    assert torch.equal(s[:, -1], s[:, -2])
    assert not torch.equal(s[:, -2], s[:, -3])


def test_a_still_is_similar_to_itself():
    x = torch.randn(2, 1, 4, 3, 2)
    assert torch.equal(law.similarity(x), torch.ones(2, 1, 3, 2))
    assert torch.equal(law.motion(x), torch.zeros_like(x))


def test_similarity_of_known_vectors():
    # the same, the same direction, orthogonal, opposite
    x = torch.tensor([[1., 0.], [1., 0.], [5., 0.], [0., 2.], [0., -3.]], **F64).view(1, 5, 2, 1, 1)
    torch.testing.assert_close(law.similarity(x).view(5), torch.tensor([1., 1., 0., -1., -1.], **F64), **EXACT)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_tim_is_a_depthwise_convolution_over_frames_with_zero_padding(shape, kernel_size):
    x, weight = torch.randn(shape, **F64), torch.randn(shape[2], 1, kernel_size, **F64)
    torch.testing.assert_close(law.tim(x, weight), loops.tim(x, weight), **EXACT)


@pytest.mark.parametrize('num_frames', [1, 2, 3])
@pytest.mark.parametrize('r1, r2, bias', [(2, 2, False), (1, 3, True)])
def test_gradients_of_cme(num_frames, r1, r2, bias):
    # half the scale keeps the softmax away from saturation, where every gradient is nearly zero
    inputs = [torch.randn(2, num_frames, 3, 2, 1, **F64), *cme_weights(3, r1, r2, bias, **F64)]
    inputs = [(v / 2).requires_grad_() for v in inputs]
    assert gradcheck(law.cme, inputs)
    assert gradgradcheck(law.cme, inputs)


@pytest.mark.parametrize('num_frames', [1, 2, 3])
def test_gradients_of_tim(num_frames):
    inputs = [torch.randn(1, num_frames, 2, 2, 2, **F64), torch.randn(2, 1, 3, **F64)]
    inputs = [v.requires_grad_() for v in inputs]
    assert gradcheck(law.tim, inputs)
    assert gradgradcheck(law.tim, inputs)


@pytest.mark.parametrize('num_frames', [1, 2, 4])
def test_gradients_of_motion(num_frames):
    x = torch.randn(2, num_frames, 3, 2, 1, **F64, requires_grad=True)
    assert gradcheck(law.motion, x)
    assert gradgradcheck(law.motion, x)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALF], ids=str)
def test_zero_pixels_have_similarity_zero_and_finite_gradients(dtype):
    x = torch.randn(1, 4, 5, 2, 2).to(dtype)
    x[:, :, :, 0, 0] = 0          # zero in every frame
    x[:, 1, :, 0, 1] = 0          # zero in one frame
    x.requires_grad_()
    s = law.similarity(x)
    assert torch.equal(s[0, :, 0, 0], torch.zeros(4, dtype=s.dtype))
    assert torch.equal(s[0, :2, 0, 1], torch.zeros(2, dtype=s.dtype))
    assert (s[0, :, 1] != 0).all()
    torch.testing.assert_close(s, loops.similarity(x.detach()).to(s), rtol=1e-5, atol=1e-6)
    law.motion(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, :, :, 1] != 0).any()


def test_zero_clips_pass_through_every_op_with_finite_gradients():
    x = torch.zeros(1, 3, 4, 2, 2, requires_grad=True)
    weights = [w.requires_grad_() for w in cme_weights(4)]
    taps = torch.randn(4, 1, 3, requires_grad=True)
    outs = law.cme(x, *weights), law.motion(x), law.tim(x, taps)
    for y in outs:
        assert torch.equal(y, torch.zeros_like(y))
    sum(y.sum() for y in outs).backward()
    assert all(v.grad.isfinite().all() for v in (x, taps, *weights))


@pytest.mark.parametrize('scale', [1e-6, 1e-9, 1e-12, 1e-15, 1e-18, 1e-25, 1e-38])
def test_tiny_features_have_finite_gradients(scale):
    x = (torch.randn(1, 3, 4, 2, 2) * scale).requires_grad_()
    s = law.similarity(x)
    assert s.abs().max() <= 1 + 1e-5
    s.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('dtype, value', [(torch.float16, 6e4), (torch.float32, 1e15), (torch.bfloat16, 1e15)], ids=str)
def test_huge_features_do_not_overflow_in_the_similarity(dtype, value):
    # 2048 squares of 6e4 sum to 7e12: a hundred million times more than float16 can hold
    x = (torch.rand(1, 3, 2048, 1, 2) * value).to(dtype)
    s = law.similarity(x)
    torch.testing.assert_close(s, loops.similarity(x).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(law.motion(x).double(), loops.motion(x), rtol=.02, atol=value * 1e-3)


@pytest.mark.parametrize('value', [1e19, 1e30, 3e38])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_features_whose_squares_overflow_have_a_similarity_and_gradients_all_the_same(value, dtype):
    x = ((torch.rand(1, 3, 64, 2, 2) * 2 - 1) * value).to(dtype).requires_grad_()
    s = law.similarity(x)
    s.sum().backward()
    torch.testing.assert_close(s, law.similarity(x.detach().double() / value).float(), rtol=1e-4, atol=1e-4)
    assert x.grad.isfinite().all()
    still = law.similarity(x[:, :1].expand(1, 3, 64, 2, 2))
    torch.testing.assert_close(still, torch.ones_like(still))


@pytest.mark.parametrize('dtype, value', [(torch.float16, 6e4), (torch.float32, 1e15), (torch.float32, 1e30)], ids=str)
@pytest.mark.parametrize('signed', [False, True])
def test_huge_features_give_cme_gates_between_0_and_1(dtype, value, signed):
    channels = 2048 if dtype == torch.float16 else 32
    x = (torch.rand(1, 4, channels, 2, 2) * 2 - int(signed)).mul(value / 2).to(dtype)
    weights = [w / channels ** .5 for w in cme_weights(channels, 8, 8)]
    a = law.cme_gate(x, *weights)
    assert not a.isnan().any()
    assert a.min() >= 0 and a.max() <= 1
    assert not law.cme(x, *weights).isnan().any()


def test_huge_features_still_prefer_the_frame_that_differs():
    # every dot product overflows float32; frame 2 alone is opposed to the others, so frames 0 and 1 attend to it
    x = torch.tensor([1e30, 1e30, -1e30]).view(1, 3, 1, 1, 1)
    one = torch.ones(1, 1)
    torch.testing.assert_close(law.cme_gate(x, one, one, one * 0 + 1e-30).view(3), torch.full((3,), .5))


@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_half_precision_gates_and_similarity_are_those_of_the_rounded_clip(dtype):
    # accumulated in float32: no worse than float32, though the clip is half
    x, weights = torch.randn(1, 4, 8, 3, 3).to(dtype), [w.to(dtype) for w in cme_weights(8)]
    s, a = law.similarity(x), law.cme_gate(x, *weights)
    assert s.dtype == a.dtype == torch.float32
    torch.testing.assert_close(s.double(), loops.similarity(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.double(), loops.cme_gate(x, *weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_half_precision_outputs_are_within_rounding_of_float64(dtype):
    eps = torch.finfo(dtype).eps
    x, weights, taps = torch.randn(1, 4, 8, 3, 3).to(dtype), cme_weights(8), torch.randn(8, 1, 3).to(dtype)
    for got, want in (
            (law.cme(x, *weights), loops.cme(x, *weights)),      # rounds the gate and the product
            (law.motion(x), loops.motion(x)),                    # rounds 1 - s and the product
            (law.tim(x, taps), loops.tim(x, taps)),              # rounds up to three times
    ):
        assert got.dtype == dtype and got.shape == x.shape
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize('shape', [(0, 4, 3, 2, 2), (0, 1, 3, 2, 2)], ids=str)
def test_empty_batch(shape):
    x = torch.zeros(shape)
    assert law.cme(x, *cme_weights(3)).shape == law.tim(x, torch.ones(3, 1, 3)).shape == law.motion(x).shape == shape
    assert law.similarity(x).shape == (0, shape[1], 2, 2)
