"""Train a network on a list of videos.

    python -m examples.action_recognition.train --preset finetune --train-list videos/train --val-list videos/val
    torchrun --nproc-per-node 8 -m examples.action_recognition.train --preset sthv1 ...

The same command goes on where it was interrupted.
"""
import argparse
import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, List, Optional

import torch
from torch import nn

from cmr_layers.video.dataset import VideoDataset

from . import checkpoint
from .config import FREE, Config, add_flags, from_flags, read_config, write_config
from .data import WORKER_ENDED, batches_of, build_index, build_lists, eval_dataset, make_loader, train_dataset
from .engine import Trainer, check_finite, per_epoch
from .logs import Clock, Table, tensorboard
from .metrics import Result, evaluate
from .model import build_model, freeze
from .processes import Processes
from .start import start_from

__all__ = ['Run', 'main']

CONFIG, CLASSES, LOCK = 'config.yaml', 'classes.txt', '.lock'


class Run:
    """A run: its lists, its network, its folder.

    Args:
        config: The configuration.
        processes: The processes that train together.
        say: Prints a line. Only the first process does.

    Raises:
        ValueError: The configuration, the lists, the network or the folder do not fit each other.
        OSError: A list or the folder can't be read or written.
    """

    def __init__(self, config: Config, processes: Processes, say: Any = print) -> None:
        self.config, self.processes, self.say = config, processes, say if processes.is_first else _silent
        self.folder = Path(config.output)
        if config.train_list is None:
            raise ValueError('train_list must be a list of videos, got none')
        train, val = build_lists(config)
        assert train is not None
        self.classes = train.classes
        self._check_folder()
        data = train_dataset(config, train, build_index(train, processes))
        self._tell('training', len(train), data.unreadable)
        self.loader, self.sampler = make_loader(
            data, config.batch_size, config.workers, processes, config.seed, processes.device.type == 'cuda')
        self.updates = per_epoch(len(self.sampler), config, processes.world_size)
        self.data = {'processes': processes.world_size, 'updates of an epoch': self.updates, 'videos': _digest(data)}
        self.val_loader: Any = None
        if val is not None:
            val_data = eval_dataset(config, val, build_index(val, processes))
            self._tell('validation', len(val), val_data.unreadable)
            self.val_loader, _ = make_loader(val_data, config.batch_size, config.workers, processes)
        self.trainer = Trainer(self._network(), config, processes, self.updates)
        self._write_folder()
        self._resume()

    def _tell(self, what: str, count: int, unreadable: Any) -> None:
        self.say(f'{count} videos for {what}' + (
            f', {len(unreadable)} of them cannot be read' + ('' if what == 'validation' else ' and are left out')
            if unreadable else ''))
        for reason in list(unreadable.values())[:5]:
            self.say(f'  {reason}')

    def _network(self) -> nn.Module:
        torch.manual_seed(self.config.seed)  # the layers that begin at random
        new, start = not self._last.exists(), self.config.checkpoint
        network = build_model(self.config, len(self.classes), self.config.pretrained and new and start is None)
        if new and start is not None:
            self.say(start_from(network, start, self.config))
        freeze(network, self.config)
        return network

    @property
    def _last(self) -> Path:
        return self.folder / checkpoint.LAST

    def _check_folder(self) -> None:
        """Take a folder that is new, or that holds this very run."""
        old = self.folder / CONFIG
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f'output={str(self.folder)!r} is a file; wanted a folder')
        if old.exists():
            before, now = Config.from_dict(read_config(old), str(old)).to_dict(), self.config.to_dict()
            differ = [key for key in now if key not in FREE and now[key] != before[key]]
            if differ:
                raise ValueError(
                    f'output={str(self.folder)!r} holds a run of another configuration: '
                    + ', '.join(f'{key}={before[key]!r} there, {now[key]!r} here' for key in differ)
                    + '; wanted another folder, or the same options to go on')
            file = self.folder / CLASSES
            names = tuple(file.read_text().splitlines()) if file.exists() else self.classes
            if names != self.classes:
                raise ValueError(
                    f'output={str(self.folder)!r} holds a run of {len(names)} other classes; the list has '
                    f'{len(self.classes)}')
        elif self.folder.is_dir() and any(
                path.suffix != '.part' and path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(f'output={str(self.folder)!r} is not empty and holds no run; wanted a new folder')
        self.processes.barrier()  # all have looked before the first one writes
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(f'output={str(self.folder)!r} cannot be written to')
            self._lock = _lock(self.folder)

    def _write_folder(self) -> None:
        """Make the folder this run's, now that no option can be wrong any more."""
        if not self.processes.is_first:
            return
        config, classes = self.folder / CONFIG, self.folder / CLASSES
        # each whole or not at all, and the configuration first: killed in between, the same command goes on
        if not config.exists():
            part = config.with_name(f'{CONFIG}.part')
            write_config(self.config, part)
            os.replace(part, config)
        if not classes.exists():
            part = classes.with_name(f'{CLASSES}.part')
            part.write_text(''.join(f'{name}\n' for name in self.classes))
            os.replace(part, classes)

    def _resume(self) -> None:
        if self._last.exists():
            content = checkpoint.load(self._last)
            before = content.get('data', self.data)
            differ = [f'{key} {before[key]!r} there, {self.data[key]!r} here' for key in self.data
                      if before.get(key) != self.data[key]]
            if differ:
                raise ValueError(
                    f'output={str(self.folder)!r} holds a run of other data: {", ".join(differ)}; to go on it wants as '
                    f'many processes and the same readable videos in the same order')
            self.trainer.restore(content, str(self._last))
            done, total = self.trainer.progress.update, self.config.epochs * self.updates
            self.say(
                f'goes on after update {done} of {total}' if done < total else f'the run is complete: {total} updates')
        self.processes.check_agreed((self.trainer.progress.update, self.data), 'update and data')

    def save(self, name: str) -> None:
        """Write a checkpoint."""
        if self.processes.is_first:
            checkpoint.save(self.folder / name, {
                **self.trainer.state(), 'data': self.data, 'config': self.config.to_dict(),
                'classes': list(self.classes)})

    def train(self) -> Optional[Result]:
        """Train to the end. Returns the last validation."""
        config, progress = self.config, self.trainer.progress
        total = config.epochs * self.updates
        self._open_logs()
        clock = Clock(total - progress.update)
        result = None
        if progress.update and progress.update % self.updates == 0:  # cut off in the validation
            result = self._validate_if_due(progress.update // self.updates)
        for epoch in range(progress.update // self.updates, config.epochs):
            done = progress.update - epoch * self.updates
            self.sampler.set_epoch(epoch, done * config.batch_size * config.accumulate)
            batches = batches_of(self.loader)
            for update in range(done, self.updates):
                loss, norm = self.trainer.update(batches, clock)
                progress.loss += loss
                progress.count += 1
                check_finite(loss, progress.update)
                if progress.update % config.log_every == 0 or progress.update == total:
                    self._log(epoch, float(norm), clock)
                if config.save_every and progress.update % config.save_every == 0 and update + 1 < self.updates:
                    self.save(checkpoint.LAST)
            self.save(checkpoint.LAST)  # before the validation, which may fail
            result = self._validate_if_due(epoch + 1) or result
        return result

    def _validate_if_due(self, epochs: int) -> Optional[Result]:
        """Validate after a number of epochs, if that has to be and has not been."""
        due = epochs % self.config.val_every == 0 or epochs == self.config.epochs
        if self.val_loader is None or not due or epochs <= self.trainer.progress.validated:
            return None
        result = self._validate(epochs - 1)
        self.trainer.progress.validated = epochs
        self.save(checkpoint.LAST)
        return result

    def _open_logs(self) -> None:
        update = self.trainer.progress.update
        self.board = None
        if self.processes.is_first:
            self.log = Table(self.folder / 'log.csv', [
                'update', 'epoch', 'loss', 'lr', 'grad_norm', 'clips_per_second', 'data_share', 'memory_mb',
                'failures'], update)
            self.val_log = Table(self.folder / 'validation.csv', [
                'update', 'epoch', 'top1', 'top5', 'mean_per_class', 'loss', 'count', 'unreadable'],
                self.trainer.progress.validated * self.updates)
            if self.config.tensorboard:
                self.board = tensorboard(self.folder, update)

    def _log(self, epoch: int, norm: float, clock: Clock) -> None:
        progress, figures = self.trainer.progress, clock.read()
        loss, lr = progress.loss / progress.count, self.trainer.lr
        progress.loss, progress.count = 0., 0
        if not self.processes.is_first:
            return
        left = figures.pop('seconds_left')
        self.log.add(update=progress.update, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, failures=progress.failures,
                     **figures)
        if self.board is not None:
            for name, value in {'loss': loss, 'lr': lr, 'grad_norm': norm, **figures}.items():
                self.board.add_scalar(f'train/{name}', value, progress.update)
        self.say(
            f'epoch {epoch + 1}/{self.config.epochs}  update {progress.update}/{self.config.epochs * self.updates}  '
            f'loss {loss:.4f}  lr {lr:.2e}  {figures["clips_per_second"]:.1f} clips/s  '
            f'data {figures["data_share"]:.0%}  {figures["memory_mb"]:.0f} MB  {timedelta(seconds=round(left))} left'
            + (f'  {progress.failures} videos did not decode' if progress.failures else ''))

    def _validate(self, epoch: int) -> Result:
        progress = self.trainer.progress
        self.processes.share_buffers(self.trainer.evaluated)
        result = evaluate(
            self.trainer.evaluated, batches_of(self.val_loader), self.processes.device, len(self.classes),
            amp=self.trainer.amp, channels_last=self.config.channels_last)
        if self.processes.is_first:
            figures = {name: getattr(result, name) for name in (
                'top1', 'top5', 'mean_per_class', 'loss', 'count', 'unreadable')}
            self.val_log.add(update=progress.update, epoch=epoch, **figures)
            if self.board is not None:
                for name, value in figures.items():
                    self.board.add_scalar(f'validation/{name}', value, progress.update)
        self.say(
            f'epoch {epoch + 1}/{self.config.epochs}  top-1 {result.top1:.1%}  top-5 {result.top5:.1%} of '
            f'{result.count} videos' + (f', {result.unreadable} of them unreadable' if result.unreadable else ''))
        if result.top1 > progress.best:
            progress.best = result.top1
            self.save(checkpoint.BEST)
        return result


def _digest(data: VideoDataset) -> str:
    """What tells the videos of a training from others: their names, labels and windows, in order."""
    digest = hashlib.sha256()
    for i, entry in enumerate(data.videos.entries):
        if i not in data.unreadable:
            digest.update(repr((os.path.basename(entry.path), *entry[1:])).encode())
    return digest.hexdigest()[:16]


def _lock(folder: Path) -> Any:
    """Keep other trainings out of a folder, for as long as this process lives. Forked readers do not hold the lock."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    file = open(folder / LOCK, 'w')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(f'output={str(folder)!r} is in use: another process trains in it') from error
    except OSError:  # a file system without locks
        pass
    return file


def _silent(*args: Any) -> None:
    pass


def main(arguments: Optional[List[str]] = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog='train', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser)
    args = parser.parse_args(arguments)
    try:
        config = from_flags(args)
        processes = Processes(config.device)
        run = Run(config, processes)
        run.train()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f'train: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('train: interrupted; the same command goes on', file=sys.stderr)
        return 130
    except RuntimeError as error:
        if 'do not decode' in str(error):
            print(f'train: {str(error).splitlines()[-1]}', file=sys.stderr)
        elif 'is killed by signal' in str(error):  # PyTorch raises this in whatever runs when a worker is killed
            print(f'train: {WORKER_ENDED.format(error)}', file=sys.stderr)
        else:
            raise
        return 1
    processes.close()
    return 0


if __name__ == '__main__':
    sys.exit(main())
