"""Which candidates cost a process its life: it is written down before it happens, and read by the next process.

A kernel that hangs is killed with its process, one that writes where it must not loses the device, a capture that fails
may be the last one that a process can try. Nothing of that can be noted afterwards.
"""
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from benchmarks.runtime.candidate import Candidate

__all__ = ['ATTEMPTS', 'Journal', 'fields']

ATTEMPTS = 2  # a process may also have ended for want of time


class Journal:
    """A small file beside the results; without a path it is kept in memory alone.

    Attributes:
        failed: Candidates that are not tried again, each with its reason.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.failed: dict[Candidate, str] = {}
        self.attempts: dict[Candidate, int] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            self.failed = {Candidate.of(entry): entry['missing'] for entry in found['failed']}
            self.attempts = {Candidate.of(entry): entry['attempts'] for entry in found['attempts']}
        for c, attempts in self.attempts.items():
            if attempts >= ATTEMPTS:
                self.failed.setdefault(c, f'its process ended {attempts} times before it was ready')

    def anew(self) -> 'Journal':
        """An empty one at the same place."""
        self.close()
        return Journal(self.path)

    @contextmanager
    def attempt(self, c: Candidate) -> Iterator[None]:
        """Within it, an end of the process is counted against a candidate. An exception is none."""
        self.attempts[c] = self.attempts.get(c, 0) + 1
        self._write()
        try:
            yield
        finally:
            del self.attempts[c]
            self._write()

    def fail(self, c: Candidate, reason: str) -> None:
        """Never try a candidate again."""
        self.failed[c] = reason
        self._write()

    def close(self) -> None:
        """All is measured: nobody will ask."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.path is None:
            return
        write(self.path, {
            'failed': [{**fields(c), 'missing': reason} for c, reason in self.failed.items()],
            'attempts': [{**fields(c), 'attempts': count} for c, count in self.attempts.items()]})


def fields(c: Candidate) -> dict[str, Any]:
    """A candidate as an entry of the results has it."""
    found = c._asdict()
    return {**found.pop('setting')._asdict(), **found}
