"""Accuracy of a network on a list of videos: exact, whatever the number of processes.

Every process looks at its videos. Then the rows of all are brought together and sorted by their place in the list, each
video once. All figures come from those rows, so that they do not depend on who looked at what.
"""
from dataclasses import dataclass
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmr_layers.checks import check_choice, check_positive
from cmr_layers.probe import evaluating
from cmr_layers.video import ClipTransform
from cmr_layers.video.augment import normalize

__all__ = ['Predictions', 'Result', 'as_input', 'evaluate', 'mean_std', 'score_clips', 'summarise']


class Predictions(NamedTuple):
    """What a network says of N videos, in the order of the list.

    Attributes:
        video: Place of each video in the list, (N,), int64, ascending.
        label: Its label, (N,), int64.
        unreadable: Whether it does not decode, (N,), bool.
        scores: Its score for each class, (N, K), float32: probabilities. They are nan if it is unreadable.
    """
    video: Tensor
    label: Tensor
    unreadable: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Result:
    """The figures of :func:`evaluate`. An unreadable video is wrong in each of them, and counts in the denominator.

    Attributes:
        top1: Share of the videos whose best class is the label, in [0, 1].
        top5: Share of the videos whose label is among the best five classes.
        mean_per_class: Mean of per_class over the classes that have videos.
        per_class: Share of the videos of each class that are right. It is nan for a class without videos.
        confusion: Number of videos of each label (row) that the network takes for each class (column), (K, K), int64.
            A video without a prediction is in no column.
        count: Number of videos: the denominator.
        unreadable: How many of them do not decode.
        not_finite: How many got scores that are not finite. They are wrong, too.
        loss: Mean cross entropy of the videos that have scores, or nan if none has.
        predictions: The scores of each video.
    """
    top1: float
    top5: float
    mean_per_class: float
    per_class: Tuple[float, ...]
    confusion: Tensor
    count: int
    unreadable: int
    not_finite: int
    loss: float
    predictions: Predictions


def evaluate(
        model: nn.Module,
        loader: Iterable[Any],
        device: Any,
        num_classes: int,
        average: str = 'scores',
        amp: Optional[torch.dtype] = None,
        progress: Optional[str] = None,
        clips_per_pass: Optional[int] = None,
        channels_last: bool = False,
) -> Result:
    """Run a network on all videos of a loader, in eval mode, and count how often it is right.

    In a process group, all processes call this together, each with a loader of its own part. Parts may differ in size,
    be empty, or share videos: each video counts once. All processes get the same result.

    Args:
        model: Network from float (N, T, 3, H, W) to logits (N, K). Its mean and standard deviation normalise the clips.
            Around DistributedDataParallel, the network inside runs, since processes may have unequal work.
        loader: Yields batches :class:`cmr_layers.video.dataset.Sample` of an evaluation dataset: uint8 clips
            (B, V, T, 3, H, W), label, index and failures (B,).
        device: Where the network is. Clips are normalised there.
        num_classes: Number K of classes.
        average: How the V views of a video become one: ``'scores'``, the mean of their probabilities, as the paper
            says; or ``'logits'``, the probabilities of their mean logits, as the released code does.
        amp: Type of mixed precision, such as ``torch.bfloat16``. None is float32.
        progress: Title of a progress bar of the first process. None shows no bar.
        clips_per_pass: Most clips that the network gets at once, to bound memory. None is all of a batch.
        channels_last: Whether the network's memory format is channels_last.

    Returns:
        The figures. There is nothing to divide by in an empty list: then they are nan, and count is 0.

    Raises:
        ValueError: The network does not have num_classes classes, a label is out of their range, or a video has
            different labels in two processes.

    Example:
        >>> from cmr_layers.video.dataset import Sample
        >>> class Bright(nn.Module):  # class 1 if a clip is bright
        ...     def forward(self, clips):
        ...         return torch.stack([torch.zeros(len(clips)), clips.mean((1, 2, 3, 4))], 1)
        >>> clips = torch.zeros(3, 1, 2, 3, 8, 8, dtype=torch.uint8)  # three videos of one view of two frames
        >>> clips[1:] = 255
        >>> batch = Sample(clips, torch.tensor([0, 1, 1]), torch.arange(3), torch.tensor([0, 0, 1]))
        >>> result = evaluate(Bright(), [batch], 'cpu', 2)
        >>> result.top1, result.count, result.unreadable, result.confusion.tolist()
        (0.6666666666666666, 3, 1, [[1, 0], [0, 1]])
    """
    check_choice('average', average, ('scores', 'logits'))
    check_positive('num_classes', num_classes)
    if clips_per_pass is not None:
        check_positive('clips_per_pass', clips_per_pass)
    network = model.module if isinstance(model, DistributedDataParallel) else model
    rows = _Rows(num_classes)
    with evaluating(network):
        for batch in _with_bar(loader, progress):
            rows.add(batch, score_clips(
                network, batch.clips[batch.failures == 0], device, num_classes, average, amp, clips_per_pass,
                channels_last))
    return summarise(_gather(rows.tensors(), torch.device(device)))


def score_clips(
        network: nn.Module,
        clips: Tensor,
        device: Any,
        num_classes: int,
        average: str = 'scores',
        amp: Optional[torch.dtype] = None,
        clips_per_pass: Optional[int] = None,
        channels_last: bool = False,
) -> Tensor:
    """Probabilities (B, K), float32 on the CPU, of videos with V views each: uint8 (B, V, T, 3, H, W).

    The network is used as it is: call this in eval mode, without gradients. For the arguments see :func:`evaluate`.
    """
    videos, views = clips.shape[:2]
    if videos == 0:
        return torch.zeros(0, num_classes)
    mean, std = mean_std(network)
    device = torch.device(device)
    logits = []
    for part in clips.flatten(0, 1).split(clips_per_pass or videos * views):
        x = as_input(part, device, mean, std, channels_last)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            y = network(x)
        if y.shape != (len(part), num_classes):
            raise ValueError(
                f'model returned {list(y.shape)} for {len(part)} clips; wanted logits of num_classes={num_classes}, '
                f'[{len(part)}, {num_classes}]')
        logits.append(y.float())
    by_view = torch.cat(logits).unflatten(0, (videos, views))
    scores: Tensor = by_view.softmax(2).mean(1) if average == 'scores' else by_view.mean(1).softmax(1)
    return scores.cpu()


def as_input(clips: Tensor, device: torch.device, mean: Any, std: Any, channels_last: bool) -> Tensor:
    """uint8 clips (N, T, 3, H, W) as a network takes them, on its device."""
    x = normalize(clips.to(device, non_blocking=True), mean, std)
    if channels_last:
        # of the frames, as that is what the network's convolutions see
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    return x


def mean_std(model: nn.Module) -> Tuple[Any, Any]:
    """Mean and standard deviation of the images that a network wants, from the timm model in it."""
    transform = ClipTransform(model)
    return transform.mean, transform.std


class _Rows:
    """What one process found: a row for each video."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.parts: List[Predictions] = []

    def add(self, batch: Any, scores: Tensor) -> None:
        label = batch.label
        wrong = label[(label < 0) | (label >= self.num_classes)]
        if len(wrong):
            raise ValueError(f'label must be in [0, {self.num_classes}), got {int(wrong[0])}: the list and the network '
                             f'have different classes')
        every = torch.full((len(label), self.num_classes), float('nan'))
        every[batch.failures == 0] = scores
        self.parts.append(Predictions(batch.index.long(), label.long(), batch.failures > 0, every))

    def tensors(self) -> Predictions:
        none = torch.zeros(0, dtype=torch.long)
        parts = [Predictions(none, none, none.bool(), torch.zeros(0, self.num_classes)), *self.parts]
        return Predictions(*(torch.cat(columns) for columns in zip(*parts)))


def _gather(rows: Predictions, device: torch.device) -> Predictions:
    """The rows of all processes, sorted by their place in the list, each video once."""
    if dist.is_available() and dist.is_initialized():
        rows = Predictions(*(_gather_rows(column, device) for column in rows))
    order = rows.video.argsort(stable=True)
    rows = Predictions(*(column[order] for column in rows))
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = rows.video[1:] != rows.video[:-1]
    split = ~first[1:] & (rows.label[1:] != rows.label[:-1])
    if split.any():
        at = int(split.nonzero()[0])
        raise ValueError(f'video {int(rows.video[at])} has label {int(rows.label[at])} in one place and '
                         f'{int(rows.label[at + 1])} in another; wanted one list in all processes')
    return Predictions(*(column[first] for column in rows))


def _gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, one after the other. Their numbers differ, so they travel padded to the longest."""
    # NCCL moves what is on the GPU, gloo what is on the CPU
    place = device if dist.get_backend() == 'nccl' else torch.device('cpu')
    count = torch.tensor([len(rows)], device=place)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = torch.zeros(int(max(counts)), *rows.shape[1:], dtype=rows.dtype, device=place)
    padded[:len(rows)] = rows
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    return torch.cat([part[:int(n)] for part, n in zip(every, counts)]).cpu()


def summarise(rows: Predictions) -> Result:
    """The figures of rows that hold each video once."""
    label, scores = rows.label, rows.scores
    count, num_classes = scores.shape
    finite = scores.isfinite().all(1)
    own = scores.gather(1, label[:, None])
    # of equal scores the class of the lowest number comes first, as in argmax
    before = (scores > own) | ((scores == own) & (torch.arange(num_classes) < label[:, None]))
    rank = before.sum(1)
    right = finite & (rank == 0)
    of_class = torch.bincount(label, minlength=num_classes).double()
    per_class = torch.bincount(label[right], minlength=num_classes).double() / of_class
    cell = label[finite] * num_classes + scores[finite].argmax(1)
    confusion = torch.bincount(cell, minlength=num_classes ** 2)
    # a score of 0 has no logarithm in float32
    loss = -own[finite].double().clamp(min=1e-45).log().mean()
    return Result(
        top1=_share(int(right.sum()), count),
        top5=_share(int((finite & (rank < 5)).sum()), count),
        mean_per_class=float(per_class.nanmean()),
        per_class=tuple(per_class.tolist()),
        confusion=confusion.view(num_classes, num_classes),
        count=count,
        unreadable=int(rows.unreadable.sum()),
        not_finite=int((~finite & ~rows.unreadable).sum()),
        loss=float(loss),
        predictions=rows,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float('nan')


def _with_bar(loader: Iterable[Any], title: Optional[str]) -> Iterable[Any]:
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if title is None or not first:
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('a progress bar needs tqdm: pip install "cmr-layers[train]"') from error
    bar: Iterable[Any] = tqdm(loader, title, unit='batch', disable=None)
    return bar
