"""One run: a row, trained from a seed and tested.

On one thread of a CPU it follows from its arguments to the last digit.
"""
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.motion.fit import confusion, fit
from benchmarks.motion.maps import localisation
from benchmarks.motion.movers import MOVERS, SWEEPS, sweep
from benchmarks.motion.rows import GROUPS, ROWS, build, image_network
from benchmarks.motion.scene import SHAPES, stills
from benchmarks.motion.size import Size
from benchmarks.motion.task import Task, counts

__all__ = ['SWEPT', 'image_weights', 'network_file', 'run', 'shape_of', 'trained']

#: Rows that are tested at all values of the knobs, and whose maps are looked at.
SWEPT = {row for group in ('table4', 'table6', 'alone') for row in GROUPS[group]}
STILLS, STILLS_TEST = 3, 4  # streams of random numbers; see movers.py


def shape_of(kind: str, size: Size) -> dict[str, Any]:
    """Arguments that make an image network as large as it is."""
    return {**size.shape, 'layers': size.deep} if kind == 'deep' else size.shape


def image_weights(folder: Path, kind: str, size: Size, seed: int) -> tuple[dict[str, Tensor], float]:
    """Weights of an image network and the share of shapes that it tells in single frames; trained once, then read."""
    settings = repr((shape_of(kind, size), size.side, size.stills))
    file = folder / f'{kind}-{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.pt'
    if not file.exists():
        torch.manual_seed(seed)
        model = image_network(kind, len(SHAPES), shape_of(kind, size)).to(size.device)
        model = model.to(memory_format=torch.channels_last)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(size.stills.updates):
                made = stills(size.stills.batch, (STILLS, seed, i), side=size.side, device=size.device)
                yield made.clips, made.labels

        if kind != 'untrained':
            fit(model, batches(), size.stills)
        test = stills(size.test, (STILLS_TEST,), 'val', size.side, device=size.device)
        clips, _, right = counts(confusion(model, test.clips, test.labels, len(SHAPES)), tuple(range(len(SHAPES))))
        _save(file, {'weights': model.cpu().state_dict(), 'right': right / clips})
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found['weights'], found['right']


def _save(file: Path, value: dict[str, Any]) -> None:
    """Leave tensors in a file, whole or not at all."""
    part = file.with_suffix(f'.{os.getpid()}.part')
    torch.save(value, part)
    part.replace(file)


def _digest(tensors: Iterable[Tensor]) -> str:
    """What two runs have to have in common to be compared: of their image network, of their test clips."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def run(folder: Path, name: str, seed: int, size: Size, task: Task = MOVERS) -> dict[str, Any]:
    """Train and test a row.

    Args:
        folder: Of image networks; the trained network is left there, too.
        name: Of the row.
        seed: Of the image network, the layers' start, and the clips and their order.
        size: How large.
        task: What is learned.

    Returns:
        What is known of it, for the result file.
    """
    row = ROWS[name]
    weights, right = image_weights(folder, row.image, size, seed)
    classes, frames = len(task.classes), row.num_frames
    model = build(name, classes, shape_of(row.image, size), weights, seed).to(size.device)
    clips, labels = task.test(seed, size.test, frames, size.side, size.device)
    curve: list[list[int]] = []

    def look(update: int) -> None:
        found = confusion(model, clips[:size.curve], labels[:size.curve], classes)
        curve.append([update * recipe.batch, *counts(found, task.groups)])

    recipe = size.recipe._replace(updates=size.recipe.updates * row.longer)
    torch.manual_seed(seed)  # for what is drawn within networks
    begin = time.perf_counter()
    losses = fit(
        model, task.train(seed, recipe.batch, frames, size.side, size.device), recipe, look, size.every)
    found: dict[str, Any] = {
        'task': task.name, 'row': name, 'seed': seed, 'seconds': round(time.perf_counter() - begin, 1),
        'parameters': sum(p.numel() for p in model.parameters()),
        'learning': sum(p.numel() for p in model.parameters() if p.requires_grad), 'image': round(right, 4),
        'start': _digest(weights.values()), 'clips': _digest([clips, labels]),
        'losses': [round(loss, 4) for loss in losses], 'curve': curve,
        'confusion': confusion(model, clips, labels, classes)}
    if task is MOVERS and name in SWEPT:
        found['sweeps'] = {knob: [[value, *_sweep(model, knob, value, seed, frames, size)] for value in values]
                           for knob, values in SWEEPS.items()}
        found['maps'] = localisation(model, seed, size)
    _save(network_file(folder, name, seed, task), model.cpu().state_dict())
    return found


def trained(folder: Path, name: str, seed: int, size: Size, task: Task = MOVERS) -> torch.nn.Module:
    """The network that a run has left in its folder, in eval mode.

    Raises:
        ValueError: There is none, or it is of another size.
    """
    file, row = network_file(folder, name, seed, task), ROWS[name]
    if not file.exists():
        raise ValueError(f'--folder must have the network that the study leaves of task {task.name}, row {name} and '
                         f'seed {seed}, got {str(folder)!r}, which has no {file.name}')
    model = row.make(num_frames=row.num_frames, num_classes=len(task.classes), **shape_of(row.image, size))
    weights = torch.load(file, weights_only=True)
    shapes, wanted = (
        {key: tuple(value.shape) for key, value in each.items()} for each in (weights, model.state_dict()))
    if shapes != wanted:
        raise ValueError(f'--folder must have networks of the size that --size says, got {str(folder)!r}, whose '
                         f'{file.name} has {len(shapes.items() ^ wanted.items())} other tensors')
    model.load_state_dict(weights)
    return model.to(size.device).eval()


def network_file(folder: Path, name: str, seed: int, task: Task = MOVERS) -> Path:
    """Where a run leaves its network."""
    return folder / f'{task.name}-{name}-{seed}.pt'


def _sweep(model: torch.nn.Module, knob: str, value: float, seed: int, frames: int, size: Size) -> list[int]:
    clips, labels = sweep(knob, value, seed, size.curve, frames, size.side, size.device)
    return counts(confusion(model, clips, labels, len(MOVERS.classes)), MOVERS.groups)
