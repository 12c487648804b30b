"""Processes for runs side by side, one thread each."""
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

__all__ = ['cores', 'processes']


def cores(device: str) -> int:
    """How many runs are side by side if nobody says: one on a GPU."""
    return os.cpu_count() or 1 if device == 'cpu' else 1


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool. An error or an interruption ends what runs in it: nobody would take the result."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), _start, (os.getpid(),))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process, which ends them
    try:
        for _ in range(jobs):
            pool.submit(os.getpid)  # as many begin, since none is idle yet
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # files are replaced when they are whole
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(parent: int) -> None:
    """Of a process: one thread, so that a run's sums do not depend on what runs beside it."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # whoever waits for the result is gone, perhaps since before this began

    threading.Thread(target=watch, daemon=True).start()
