"""Runs commands side by side, each in a process of its own that ends by itself or is ended."""
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ['Job', 'Outcome', 'run']

GRACE = 5.  # seconds between asking a process to end and ending it
POLL = .05


class Job(NamedTuple):
    """A command and how long it may take."""
    name: str
    command: Sequence[str]
    seconds: float


class Outcome(NamedTuple):
    """How a command ended: ``'ok'``, ``'failed'`` or ``'stopped'``, which is late; its status and its seconds."""
    how: str
    status: int | None
    seconds: float


def run(jobs: Sequence[Job], logs: Path, folder: Path, variables: Mapping[str, str]) -> dict[str, Outcome]:
    """Run commands at the same time and wait for all of them. None of them ends another.

    Args:
        jobs: What to run.
        logs: Folder where ``NAME.log`` gets what a command prints.
        folder: Where they run.
        variables: Environment variables besides those of this process.
    """
    started: list[tuple[Job, float, subprocess.Popen[bytes]]] = []
    try:
        for job in jobs:
            with open(logs / f'{job.name}.log', 'ab') as log:
                started.append((job, time.monotonic(), subprocess.Popen(
                    job.command, cwd=folder, env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True)))  # a group that can be ended as one
        found: dict[str, Outcome] = {}
        while len(found) < len(jobs):
            time.sleep(POLL)
            for job, start, process in started:
                status, seconds = process.poll(), time.monotonic() - start
                if job.name in found:
                    continue
                if status is not None:
                    found[job.name] = Outcome('failed' if status else 'ok', status, seconds)
                elif seconds > job.seconds:
                    _end(process)
                    found[job.name] = Outcome('stopped', None, time.monotonic() - start)
        return found
    finally:  # of a command that ended, what it started may still be there
        for *_, process in started:
            _signal(process, signal.SIGKILL)
            process.wait()


def _end(process: 'subprocess.Popen[bytes]') -> None:
    """Ask a process and all that it started to end, then end them."""
    _signal(process, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: 'subprocess.Popen[bytes]', number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
