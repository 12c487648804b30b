"""The figures of an evaluation: by hand, over processes, and with videos that do not decode."""
import math
import multiprocessing

import pytest
import torch
from torch import nn

from cmr_layers.video.dataset import Sample
from examples.action_recognition.metrics import evaluate

K = 3
# mean 0 and standard deviation 1, so that a pixel of 255 is 1 to the network
PLAIN = {'mean': (0., 0., 0.), 'std': (1., 1., 1.), 'interpolation': 'bilinear'}


class Colours(nn.Module):
    """Logits are gain times the mean red, green and blue of a clip."""

    def __init__(self, gain=10.):
        super().__init__()
        self.pretrained_cfg = PLAIN
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer('steps', torch.zeros(1))
        self.batches = []

    def forward(self, clips):
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append(len(clips))
        return self.gain * clips.mean((1, 3, 4))


def video(*views):
    """A video of one frame per view, (V, 1, 3, 2, 2), each of one colour (r, g, b) in percent."""
    colours = torch.tensor(views).view(len(views), 1, 3, 1, 1) * 2.55
    return colours.expand(-1, -1, -1, 2, 2).to(torch.uint8)


def batches(rows, size=2):
    """Batches of rows (clips, label, index, failures)."""
    return [Sample(torch.stack([r[0] for r in part]), *(torch.tensor([r[i] for r in part]) for i in (1, 2, 3)))
            for part in (rows[i:i + size] for i in range(0, len(rows), size))]


RED, GREEN, BLUE, NOTHING = video((100, 0, 0)), video((0, 100, 0)), video((0, 0, 100)), video((0, 0, 0))
# right, right, taken for class 0, right, unreadable
FIVE = [(RED, 0, 0, 0), (GREEN, 1, 1, 0), (RED, 1, 2, 0), (BLUE, 2, 3, 0), (NOTHING, 2, 4, 1)]


def test_by_hand():
    result = evaluate(Colours(), batches(FIVE), 'cpu', K)
    assert (result.count, result.unreadable, result.not_finite) == (5, 1, 0)
    assert (result.top1, result.top5) == (3 / 5, 4 / 5)  # the unreadable video is not even among the best 3 of 3
    assert result.per_class == (1, 1 / 2, 1 / 2)
    assert result.mean_per_class == pytest.approx(2 / 3)
    assert result.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    right, wrong = -math.log(math.exp(10) / (math.exp(10) + 2)), -math.log(1 / (math.exp(10) + 2))
    assert result.loss == pytest.approx((3 * right + wrong) / 4, rel=1e-5)
    assert result.predictions.video.tolist() == [0, 1, 2, 3, 4]
    assert result.predictions.unreadable.tolist() == [False] * 4 + [True]
    assert result.predictions.scores[:4].sum(1).tolist() == pytest.approx([1] * 4)
    assert result.predictions.scores[4].isnan().all()


def test_model_is_as_it_was():
    model = Colours().train()
    evaluate(model, batches(FIVE), 'cpu', K)
    assert model.training


def test_average_of_scores_and_of_logits():
    # one view is sure of red; two are rather for green: they win the mean of probabilities, not the mean of logits
    clips = video((100, 0, 0), (20, 60, 0), (20, 60, 0))
    rows = [(clips, 1, 0, 0)]
    scores = evaluate(Colours(), batches(rows), 'cpu', K)
    logits = evaluate(Colours(), batches(rows), 'cpu', K, average='logits')
    view = torch.tensor([[10., 0, 0], [2., 6, 0], [2., 6, 0]])
    torch.testing.assert_close(scores.predictions.scores[0], view.softmax(1).mean(0))
    torch.testing.assert_close(logits.predictions.scores[0], view.mean(0).softmax(0))
    assert (scores.top1, logits.top1) == (1, 0)


def test_normalises_with_the_networks_own_numbers():
    model = Colours()
    model.pretrained_cfg = dict(PLAIN, mean=(1., .5, 0.), std=(.5, .25, 1.))
    result = evaluate(model, batches([(video((100, 100, 100)), 1, 0, 0)]), 'cpu', K)
    torch.testing.assert_close(result.predictions.scores[0], torch.tensor([0., 20., 10.]).softmax(0))


def test_parts_of_a_batch_give_the_same():
    clips = [torch.randint(256, (3, 2, 3, 4, 4), dtype=torch.uint8) for _ in range(5)]
    rows = [(c, i % K, i, 0) for i, c in enumerate(clips)]
    whole, parts = Colours(), Colours()
    a = evaluate(whole, batches(rows), 'cpu', K)
    b = evaluate(parts, batches(rows), 'cpu', K, clips_per_pass=2)
    assert whole.batches == [6, 6, 3] and parts.batches == [2, 2, 2, 2, 2, 2, 2, 1]
    torch.testing.assert_close(a.predictions.scores, b.predictions.scores)


def test_equal_scores_count_once():
    """A network that says the same of everything is right for class 0 alone."""
    result = evaluate(Colours(gain=0.), batches(FIVE), 'cpu', K)
    assert result.top1 == 1 / 5


def test_scores_that_are_not_finite_are_wrong():
    result = evaluate(Colours(gain=math.inf), batches(FIVE), 'cpu', K)  # infinity times 0 is nan
    assert (result.top1, result.top5, result.not_finite, result.unreadable) == (0, 0, 4, 1)
    assert math.isnan(result.loss) and result.confusion.sum() == 0


def test_nothing_but_unreadable_videos():
    model = Colours()
    result = evaluate(model, batches([(NOTHING, 0, 0, 1)]), 'cpu', K)
    assert (result.top1, result.count, result.unreadable) == (0, 1, 1)
    assert model.batches == []


def test_nothing_at_all():
    result = evaluate(Colours(), [], 'cpu', K)
    assert result.count == 0 and math.isnan(result.top1)


def test_half_precision():
    result = evaluate(Colours(), batches(FIVE), 'cpu', K, amp=torch.bfloat16, channels_last=True)
    assert result.top1 == 3 / 5 and result.predictions.scores.dtype == torch.float32


def test_another_number_of_classes():
    with pytest.raises(ValueError, match=r'model returned \[2, 3\] for 2 clips; wanted logits of num_classes=4'):
        evaluate(Colours(), batches(FIVE), 'cpu', 4)


def test_label_outside():
    with pytest.raises(ValueError, match=r'label must be in \[0, 3\), got 3'):
        evaluate(Colours(), batches([(RED, 3, 0, 0)]), 'cpu', K)


def test_wrong_choice():
    with pytest.raises(ValueError, match="average must be one of 'scores', 'logits', got 'votes'"):
        evaluate(Colours(), [], 'cpu', K, average='votes')


def _part(rank, world, path, parts, queue):
    torch.distributed.init_process_group('gloo', f'file://{path}', rank=rank, world_size=world)
    try:
        # a forward pass of DDP brings its buffers into line, so that it waits for processes without work
        result = evaluate(nn.parallel.DistributedDataParallel(Colours(3.)), parts[rank], 'cpu', K)
        queue.put((rank, result.top1, result.per_class, result.loss, result.confusion.tolist(), result.count,
                   result.unreadable, result.predictions.scores[:-1].tolist()))
    except Exception as error:
        queue.put((rank, repr(error)))
    finally:
        torch.distributed.destroy_process_group()


def over_processes(tmp_path, *parts):
    """The result of each of several gloo processes."""
    context = multiprocessing.get_context('fork')  # a new interpreter would import torch for seconds
    queue = context.Queue()
    processes = [context.Process(target=_part, args=(rank, len(parts), tmp_path / 'group', parts, queue))
                 for rank in range(len(parts))]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return [row[1:] for row in sorted(found)]


def seven():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(256, (1, 2, 3, 4, 4), dtype=torch.uint8, generator=generator), i % K, i, int(i == 6))
            for i in range(7)]


@pytest.mark.parametrize('shares', [
    ([0, 2, 4, 6], [1, 3, 5]),           # uneven
    ([0, 2, 4, 6], [1, 3, 5, 0]),        # padded to equal parts, as DistributedSampler does
    ([6, 5, 4, 3, 2, 1, 0], []),         # a process without work
    ([0, 1, 2], [2, 3, 4], [4, 5, 6]),   # shared
], ids=['uneven', 'padded', 'idle', 'shared'])
def test_processes_give_what_one_gives(tmp_path, shares):
    rows = seven()
    one = evaluate(Colours(3.), batches(rows, 1), 'cpu', K)
    wanted = (one.top1, one.per_class, one.loss, one.confusion.tolist(), 7, 1, one.predictions.scores[:-1].tolist())
    found = over_processes(tmp_path, *(batches([rows[i] for i in share], 1) for share in shares))
    assert found == [wanted] * len(shares)


def test_processes_with_different_lists(tmp_path):
    found = over_processes(tmp_path, batches([(RED, 0, 0, 0)]), batches([(RED, 1, 0, 0)]))
    assert all('video 0 has label 0 in one place and 1 in another' in row[0] for row in found)
