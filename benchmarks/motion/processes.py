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
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), _start)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Of a process: one thread, so that a run's sums do not depend on what runs beside it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # whoever waits for the result is gone

    threading.Thread(target=watch, daemon=True).start()
