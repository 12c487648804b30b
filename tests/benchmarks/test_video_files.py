"""A share of the files of benchmarks/video_files.py, and what the result of all of them says."""
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip('av')

from benchmarks import video_files

RESULT = Path(__file__).parents[2] / 'benchmarks/results/video_files.json'


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is limited and measured as on Linux')
def test_a_share_of_the_files(tmp_path):
    cases = list(video_files.make(tmp_path))
    assert len(cases) > 200 and len({case.path for case in cases}) == len(cases)
    whole = ('animations', 'counts', 'large', 'no file', 'pictures')
    share = [case for i, case in enumerate(cases) if i % 7 == 0 or case.kind in whole]
    results = video_files.run(share)
    assert results['failures'] == [] and results['files'] == len(share)
    assert set(results['kinds']) == {case.kind for case in cases}


def test_a_wrong_answer_is_a_failure(tmp_path):
    (tmp_path / 'text.mp4').write_text('no video')
    video = next(video_files.make_videos(tmp_path))
    cases = [
        video_files.Case('wrong', tmp_path / 'text.mp4', video_files.READ),
        video_files.Case('wrong', video, video_files.REFUSED),
        video_files.Case('wrong', video, video_files.READ, frames=8),
    ]
    assert [failure['file'] for failure in video_files.run(cases)['failures']] == ['text.mp4', video.name, video.name]


def test_the_result():
    results = json.loads(RESULT.read_text())
    assert results['failures'] == [] and results['files'] > 200
    assert sum(sum(counts.values()) for counts in results['kinds'].values()) == results['files']
    assert all(set(counts) <= {'read', 'refused'} for counts in results['kinds'].values())
