"""A plugin of pytest's that writes down each test as it ends, and leaves out those that ended before.

A summary at the end would be lost with a run that is ended. ``pytest -p benchmarks.gpu.outcomes`` wants two
environment variables: :data:`LOG`, the file to write to, one line of JSON for each test, and :data:`DONE`, a file with
the names of the tests that are left out.
"""
import json
import os
from pathlib import Path
from typing import Any

import pytest

__all__ = ['DONE', 'LOG', 'read']

LOG, DONE = 'CMR_LAYERS_TESTS_LOG', 'CMR_LAYERS_TESTS_DONE'
_is_worker = False  # of pytest-xdist: the process that started it hears of all tests


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, 'workerinput')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(Path(os.environ[DONE]).read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _is_worker or (report.when != 'call' and report.outcome == 'passed'):
        return
    entry = {'test': report.nodeid, 'outcome': report.outcome, 'seconds': round(report.duration, 3)}
    if report.outcome != 'passed':
        crash = getattr(report.longrepr, 'reprcrash', None)
        text = crash.message if crash else str(report.longrepr[-1] if isinstance(
            report.longrepr, tuple) else report.longrepr)
        entry['reason'] = text.strip().partition('\n')[0]
    with open(os.environ[LOG], 'a') as log:
        log.write(json.dumps(entry) + '\n')


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of each test; the worst of its phases, if several failed in one run."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off with its process
            continue
        found[entry['test']] = entry
    return found
