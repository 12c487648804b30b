"""What a run tells: lines with the time left, a table as CSV, and TensorBoard events."""
import csv
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

__all__ = ['Clock', 'Table', 'tensorboard']


class Table:
    """A CSV file to which rows are added. A run that goes on first drops what came after its checkpoint.

    Args:
        file: The file.
        columns: Names of the columns. The first is the update.
        update: Update that the run goes on after. Later rows are dropped.
    """

    def __init__(self, file: Path, columns: List[str], update: int) -> None:
        self.file, self.columns = file, columns
        rows: List[Dict[str, str]] = []
        if file.exists():
            with open(file, newline='') as old:
                # a run that was killed may have written half a row
                rows = [row for row in csv.DictReader(old) if None not in row.values() and int(row['update']) <= update]
        part = file.with_name(f'{file.name}.part')
        with open(part, 'w', newline='') as new:
            table = csv.DictWriter(new, columns)
            table.writeheader()
            table.writerows(rows)
        os.replace(part, file)

    def add(self, **row: Any) -> None:
        """Add a row, and have it on the disk."""
        with open(self.file, 'a', newline='') as file:
            csv.DictWriter(file, self.columns).writerow(row)


class Clock:
    """Measures how fast a run is, and what share of the time it waits for data."""

    def __init__(self, left: int) -> None:
        self.left = left  # updates of the whole run
        self.begin = self.since = time.perf_counter()
        self.waited, self.done, self.clips = 0., 0, 0

    def wait(self, iterator: Any) -> Any:
        """The next batch; the time it takes is a wait for data."""
        begin = time.perf_counter()
        batch = next(iterator)
        self.waited += time.perf_counter() - begin
        return batch

    def update(self, clips: int) -> None:
        """An update is done."""
        self.done, self.clips = self.done + 1, self.clips + clips

    def read(self) -> Dict[str, float]:
        """Figures since the last call, and the seconds that the run still takes."""
        now = time.perf_counter()
        span = max(now - self.since, 1e-9)
        figures = {
            'clips_per_second': self.clips / span, 'data_share': self.waited / span,
            'seconds_left': (now - self.begin) / max(self.done, 1) * (self.left - self.done), 'memory_mb': memory_mb()}
        self.since, self.waited, self.clips = now, 0., 0
        return figures


def memory_mb() -> float:
    """Most memory that this process had, in MB: of the GPU if there is one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        # what getrusage says begins with the memory of the process that started this one
        with open('/proc/self/status') as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2 ** 10
    except (OSError, StopIteration):  # not on Linux
        pass
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)  # in bytes there, in KB elsewhere


def tensorboard(folder: Path, update: int) -> Optional[Any]:
    """A writer of TensorBoard events that drops what came after an update."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard=True needs TensorBoard: pip install "cmr-layers[train]"') from error
    return SummaryWriter(str(folder), purge_step=update + 1)
