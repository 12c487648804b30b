"""What benchmarks.gpu shows of its results, beside the predictions that are committed."""
import json

from benchmarks.gpu import tables
from benchmarks.kernels.network import launches, places

RESULTS = {
    'date': '2026-01-01T00:00:00', 'gpu': 'a GPU', 'versions': {'torch': '2', 'triton': '3'}, 'command': 'a command',
    'copy_bytes_per_second': 2.5e12, 'complete': True, 'failed': {}}


def test_committed_predictions_are_found_by_what_a_launch_is():
    expected = tables.predictions()
    found = launches(1)
    for launch, place in zip(found, places(found), strict=True):
        weight = launch.buffers.get('weight')
        assert expected[launch.name, place, 1, weight.shape[0] if weight else None] > 0
    assert {batch for *_, batch, _ in expected} == {1, 8}


def test_kernels_are_shown_beside_their_predictions(tmp_path):
    row = {
        'kernel': '_mix_kernel', 'operator': 'cme_tim', 'frames': '512x28', 'batch': 1, 'dtype': 'fp16',
        'backward': False, 'outputs': None, 'cached_us': 8., 'from_memory_us': 12., 'floor_us': 6.}
    product = {**row, 'kernel': '_motion_kernel', 'outputs': 512, 'batch': 8}
    path = tmp_path / 'prediction.json'
    path.write_text(json.dumps({'rows': [
        {'kernel': '_mix_kernel', 'frames': '512x28', 'batch': 1, 'time': 4.},
        {'kernel': '_motion_kernel', 'frames': '512x28', 'batch': 8, 'outputs': 512, 'time': 6.}]}))
    text = tables.render_kernels({**RESULTS, 'kernels': [row, product, {**row, 'dtype': 'bf16'}]}, path)
    mix, motion, other = (line for line in text.splitlines() if line.startswith('| `_'))
    assert mix.endswith('| 8.0 | 12.0 | 6.0 | 2.00 | 4.0 | 2.00 |')     # of one clip the cached time is compared
    assert motion.endswith('| 6.0 | 2.00 |')
    assert other.endswith('| 2.00 |  |  |')
    assert 'There is no prediction' in tables.render_kernels({**RESULTS, 'kernels': [row]}, tmp_path / 'none.json')


def test_checks_name_what_failed():
    failures = [{'test': f'test_{k}', 'reason': 'because'} for k in range(12)]
    text = tables.render_checks(
        {**RESULTS, 'tests': ['tests/ops'], 'passed': 5, 'failed': 12, 'skipped': 1, 'failures': failures})
    assert '`pytest tests/ops`: 5 passed, 12 failed, 1 skipped' in text
    assert text.count('because') == 10 and 'and 2 more' in text
