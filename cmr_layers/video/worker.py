"""Look at videos in processes of their own, which a hostile file may crash."""
import json
import os
import signal
import subprocess
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Generator, List, Optional, Sequence, Tuple, Union

from .info import VideoInfo
from .look import look

__all__ = ['look_at_all', 'pack', 'serve']

# Python's own processes would run the user's script again, which has to be written for that; these run nothing of it
_START = 'import json, sys; sys.path[:] = json.loads(sys.argv[1]); import cmr_layers.video.worker as w; w.serve()'

_Row = Tuple[str, bytes]


def pack(info: VideoInfo) -> bytes:
    """A row of an index."""
    return json.dumps(info.row(), separators=(',', ':')).encode()


def look_at_all(paths: Sequence[str], num_workers: int) -> Generator[_Row, None, None]:
    """Path and row of each video, in the order in which they are done. Fewer than 2 workers look in this process."""
    todo: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[Union[_Row, BaseException]] = SimpleQueue()
    for path in paths:
        todo.put(path)
    # A thread looks even where one is enough. Ctrl-C interrupts this one alone; within a read of FFmpeg's, Python would
    # lose it, and the file would seem to end there.
    workers: List[Union[_Here, _Worker]] = [_Here()] if num_workers < 2 else [_Worker() for _ in range(num_workers)]
    ended = threading.Event()
    threads = [threading.Thread(target=_drain, args=(worker, todo, done, ended), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in paths:
            item = done.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        for worker, thread in zip(workers, threads):
            worker.kill()
            if thread.ident is not None:
                thread.join()


def _drain(worker: 'Union[_Here, _Worker]', todo: 'SimpleQueue[str]',
           done: 'SimpleQueue[Union[_Row, BaseException]]', ended: threading.Event) -> None:
    try:
        while not ended.is_set():
            path = todo.get_nowait()
            done.put((path, worker.look(path)))
    except Empty:
        pass
    except BaseException as error:
        done.put(error)


class _Here:
    """Looks in this process."""

    def look(self, path: str) -> bytes:
        return pack(look(path))

    def kill(self) -> None:
        """Nothing: the look at hand goes on to its end."""


class _Worker:
    """A process that looks at one video after the other. It is started when it is needed, and again after a crash."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._killed = False

    def look(self, path: str) -> bytes:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(path).encode() + b'\n')
            process.stdin.flush()
            row = process.stdout.readline()
        except OSError:  # it is gone
            row = b''
        if row.endswith(b'\n'):
            return row[:-1]
        code = process.wait()
        return pack(VideoInfo(error=f'source={path!r}: the process that decoded it ended with {_ending(code)}'))

    def _running(self) -> 'subprocess.Popen[bytes]':
        with self._lock:
            if self._killed:
                raise InterruptedError('the look was ended')
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, '-c', _START, json.dumps(sys.path)], stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                    start_new_session=True)  # Ctrl-C is for the process that waits for it
            return self._process

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()


def _ending(code: int) -> str:
    try:
        return f'signal {signal.Signals(-code).name}'
    except ValueError:
        return f'exit status {code}'


def serve() -> None:
    """Answer each path on the standard input by a row. This is what a worker runs."""
    answers = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        answers.write(pack(look(json.loads(line))) + b'\n')
        answers.flush()
