"""What the trainer costs beside a bare loop, what share of a step waits for data, and how much memory that takes.

    python -m examples.action_recognition.studies.overhead --out benchmarks/results/training-overhead.json

Updates of the trainer and of the bare loop take turns, on one thread, in random order. Their times are compared pair by
pair, as CPU time, which other processes on the machine hardly change, and as wall time.
"""
import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.machine import describe, positive, result_file, write
from cmr_layers.video.augment import normalize
from cmr_layers.video.dataset import Sample

from ..config import Config
from ..data import build_index, build_lists, make_loader, train_dataset
from ..engine import Trainer
from ..logs import Clock, memory_mb
from ..metrics import mean_std
from ..model import build_model
from ..processes import Processes
from .small import make_videos

GOAL = .03


class Bare:
    """The loop that a tutorial has: the same network, clips and optimizer, and nothing else."""

    def __init__(self, network: nn.Module, config: Config) -> None:
        self.network, self.config = network.train().to(memory_format=torch.channels_last), config
        self.mean_std = mean_std(network)
        self.optimizer = torch.optim.SGD(
            network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)

    def update(self, batch: Sample) -> float:
        """One update; the loss."""
        x = normalize(batch.clips, *self.mean_std)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        loss = F.cross_entropy(self.network(x), batch.label)  # type: ignore[arg-type]  # a batch has a tensor
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_grad or 0.)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def bare_loop(config: Config) -> Callable[[], float]:
    """An update of the bare loop."""
    network, batch = _begin(config)
    bare = Bare(network, config)
    return lambda: bare.update(batch)


def trainer_loop(config: Config) -> Callable[[], float]:
    """An update of the trainer."""
    network, batch = _begin(config)
    trainer, clock = Trainer(network, config, Processes('cpu'), 10 ** 6), Clock(10 ** 6)
    return lambda: trainer.update(iter([batch]), clock)[0]


LOOPS: Dict[str, Callable[[Config], Callable[[], float]]] = {'trainer': trainer_loop, 'bare': bare_loop}


def _begin(config: Config) -> Tuple[nn.Module, Sample]:
    """The network at its start, and the batch."""
    torch.manual_seed(0)
    network = build_model(config, 2)
    clips = torch.randint(256, (config.batch_size, config.num_frames, 3, config.size, config.size), dtype=torch.uint8)
    label = torch.arange(config.batch_size) % 2
    none = torch.zeros_like(label)
    return network, Sample(clips, label, none, none)  # type: ignore[arg-type]


def peak_memory(name: str, config: Config) -> float:
    """Most memory of a new process that makes three updates, in MB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as process:
        return process.submit(_peak_memory, name, config).result()


def _peak_memory(name: str, config: Config) -> float:
    torch.set_num_threads(1)
    update = LOOPS[name](config)
    for _ in range(3):
        update()
    return memory_mb()


def measure(config: Config, rounds: int) -> Dict[str, Any]:
    """Times of the trainer and of the bare loop, which do the same from the same start."""
    loops = {name: loop(config) for name, loop in LOOPS.items()}
    times: Dict[str, List[Tuple[float, float]]] = {name: [] for name in loops}
    losses: Dict[str, List[float]] = {name: [] for name in loops}
    draw = random.Random(0)
    for i in range(rounds + 2):
        for name in draw.sample(sorted(loops), 2):
            begin = time.process_time(), time.perf_counter()
            loss = loops[name]()
            end = time.process_time(), time.perf_counter()
            losses[name].append(loss)
            if i >= 2:  # the first are slower
                times[name].append((end[0] - begin[0], end[1] - begin[1]))
    found: Dict[str, Any] = {
        'rounds': rounds, 'same_losses': losses['trainer'] == losses['bare'],
        'batch_size': config.batch_size, 'size': config.size, 'num_frames': config.num_frames, 'model': config.model}
    for k, kind in enumerate(('cpu', 'wall')):
        pairs = [(a[k], b[k]) for a, b in zip(times['trainer'], times['bare'])]
        ratios = sorted(a / b - 1 for a, b in pairs)
        quarters = statistics.quantiles(ratios, n=4)
        found[kind] = {
            'trainer_s': statistics.median(a for a, _ in pairs), 'bare_s': statistics.median(b for _, b in pairs),
            'overhead': quarters[1], 'quartiles': [quarters[0], quarters[2]],
            'overhead_of_medians': statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs) - 1}
    found['peak_memory_mb'] = {name: peak_memory(name, config) for name in LOOPS}
    return found


def waiting(config: Config, workers: int, updates: int) -> Dict[str, Any]:
    """Share of the time of updates that waits for clips of real files."""
    videos, _ = build_lists(config)
    assert videos is not None
    processes = Processes('cpu')
    loader, sampler = make_loader(
        train_dataset(config, videos, build_index(videos, processes, progress=False)), config.batch_size, workers,
        processes)
    torch.manual_seed(0)
    trainer, clock = Trainer(build_model(config, 2), config, processes, updates), Clock(updates)
    sampler.set_epoch(0)
    batches = iter(loader)
    trainer.update(batches, clock)  # workers begin
    clock.read()
    for _ in range(updates):
        trainer.update(batches, clock)
    figures = clock.read()
    return {'workers': workers, 'updates': updates, 'data_share': figures['data_share'],
            'clips_per_second': figures['clips_per_second']}


def study(rounds: int, out: Path) -> bool:
    """Do it, and write what comes of it as it comes. Returns whether the goal is met."""
    torch.set_num_threads(1)
    results: Dict[str, Any] = {**describe('av', 'numpy'), 'threads': 1, 'goal': GOAL, 'overhead': []}
    options: Dict[str, Any] = {
        'model': 'cmr_resnet18', 'dropout': 0., 'device': 'cpu', 'batch_size': 1, 'lr': .001, 'base_batch': 0}
    for size, times in ((224, 1), (64, 3)):
        results['overhead'].append(measure(Config(**options, size=size), rounds * times))
        print(results['overhead'][-1], flush=True)
        write(out, results)
    results['waiting'] = []
    with tempfile.TemporaryDirectory() as name:
        file = make_videos(Path(name, 'videos'), 12, frames=60, width=340, height=256)
        config = Config(**options, train_list=str(file), root=str(file.parent))
        for workers in (0, 1, 2):
            results['waiting'].append(waiting(config, workers, 8))
            print(results['waiting'][-1], flush=True)
            write(out, results)
    return bool(results['overhead'][0]['cpu']['overhead'] <= GOAL)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--rounds', type=positive, default=15, help='updates of each (default: 15)')
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    args = parser.parse_args()
    return 0 if study(args.rounds, args.out) else 1


if __name__ == '__main__':
    sys.exit(main())
