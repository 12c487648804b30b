"""The command that evaluates: real videos in, figures and files out, by one process or by two."""
import json
import os

import numpy as np
import pytest
import torch
from recognition_run import CLASSES, by_two_processes, moving, write_list, write_run

from cmr_layers.video.index import index_videos
from cmr_layers.video.lists import Entry, VideoList
from cmr_layers.video.shards import write_shards
from examples.action_recognition.checkpoint import load_network
from examples.action_recognition.data import build_lists
from examples.action_recognition.evaluate import evaluate_list, main
from examples.action_recognition.metrics import Predictions, summarise
from examples.action_recognition.processes import Processes
from examples.action_recognition.results import as_text

pytest.importorskip('av')
pytest.importorskip('matplotlib')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run whose validation list has seven videos, the last one broken."""
    folder = tmp_path_factory.mktemp('evaluate')
    file = write_list(folder)
    return write_run(folder / 'run', val_list=str(file), root=str(folder))


# the index warns of the broken video
pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be read:UserWarning')


def evaluate(run, out, *arguments):
    assert main([str(run), '--out', str(out), '--workers', '0', '--device', 'cpu', *arguments]) == 0
    return json.loads((out / 'results.json').read_text()), np.load(out / 'predictions.npz')


def test_one_view(run, tmp_path, capsys):
    results, rows = evaluate(run, tmp_path / 'out')
    said = capsys.readouterr().out
    assert (results['videos'], results['unreadable']) == (7, 1)
    assert rows['scores'].shape == (7, 3) and rows['classes'].tolist() == list(CLASSES)
    assert rows['label'].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert rows['unreadable'].tolist() == [False] * 6 + [True]
    assert rows['predicted'][:6].tolist() == rows['scores'][:6].argmax(1).tolist() and rows['predicted'][6] == -1
    right = int((rows['predicted'] == rows['label']).sum())
    assert results['top1'] == right / 7 and results['top5'] == 6 / 7
    assert f'({right} of 7 videos)' in said and '1 of the 7 videos cannot be read: they count as wrong' in said
    assert np.sum(results['confusion']) == 6
    assert [row['videos'] for row in results['per_class']] == [3, 2, 2]
    assert (tmp_path / 'out' / 'confusion.png').read_bytes().startswith(b'\x89PNG')
    assert [os.path.basename(path) for path in rows['path']] == [f'{i}.mp4' for i in range(7)]


def test_views_as_in_the_paper(run, tmp_path):
    """Two clips and three crops: the mean of six probabilities, however many are computed at once."""
    results, rows = evaluate(run, tmp_path / 'a', '--clips', '2', '--crops', '3')
    assert (results['clips'], results['crops'], results['average']) == (2, 3, 'scores')
    _, few = evaluate(run, tmp_path / 'b', '--clips', '2', '--crops', '3', '--clips-per-pass', '4')
    np.testing.assert_allclose(rows['scores'][:6], few['scores'][:6], rtol=1e-4)
    _, logits = evaluate(run, tmp_path / 'c', '--clips', '2', '--crops', '3', '--average', 'logits')
    _, one = evaluate(run, tmp_path / 'd')
    for other in (logits, one):
        assert np.abs(rows['scores'][:6] - other['scores'][:6]).max() > 1e-5
    np.testing.assert_allclose(rows['scores'][:6].sum(1), 1, rtol=1e-5)


def test_two_processes_give_the_same(run, tmp_path):
    """Seven videos over two processes, one view at a time, so that sums are in one order."""
    views = ('--clips', '2', '--clips-per-pass', '1')
    wanted, rows = evaluate(run, tmp_path / 'one', *views)
    out = tmp_path / 'two'
    arguments = [str(run), '--out', str(out), '--workers', '0', '--device', 'cpu', *views]
    assert by_two_processes(lambda rank: main(arguments)) == [0, 0]
    assert json.loads((out / 'results.json').read_text()) == wanted
    again = np.load(out / 'predictions.npz')
    for name in rows:
        np.testing.assert_array_equal(again[name], rows[name])


def test_parquet(run, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    _, rows = evaluate(run, tmp_path / 'a')
    assert main([str(run), '--out', str(tmp_path / 'b'), '--workers', '0', '--predictions', '.parquet']) == 0
    table = parquet.read_table(tmp_path / 'b' / 'predictions.parquet')
    assert json.loads(table.schema.metadata[b'classes']) == list(CLASSES)
    for name in ('path', 'label', 'predicted', 'unreadable'):
        assert table[name].to_pylist() == rows[name].tolist()
    np.testing.assert_array_equal(np.array(table['scores'].to_pylist(), np.float32), rows['scores'])


def test_another_list(run, tmp_path):
    """A list of one window of one video, of a class that other classes stand before."""
    moving(tmp_path / 'a.mp4', 2, num_frames=30)
    file = tmp_path / 'test.csv'
    file.write_text('a.mp4, 1, 2.5, right\n')
    results, rows = evaluate(run, tmp_path / 'out', '--list', str(file), '--layout', 'list')
    assert results['videos'] == 1 and rows['label'].tolist() == [2]
    assert (rows['start'].tolist(), rows['end'].tolist()) == ([1], [2.5])
    assert results['per_class'][0] == {'name': 'down', 'videos': 0, 'top1': None}


def test_shards_give_what_their_videos_give(run, tmp_path, capsys):
    _, want = evaluate(run, tmp_path / 'files')
    loaded = load_network(run)
    _, videos = build_lists(loaded.config, loaded.classes)
    write_shards(videos, index_videos(videos.paths, progress=False), tmp_path / 'shards', progress=False)
    _, got = evaluate(run, tmp_path / 'out', '--list', str(tmp_path / 'shards'), '--layout', 'shards')
    for name in ('label', 'predicted', 'unreadable', 'scores'):
        np.testing.assert_array_equal(got[name], want[name])
    said = refused(capsys, run, '--list', tmp_path / 'shards', '--layout', 'shards', '--root', tmp_path)
    assert "layout 'shards' wants the folder of the shards as the list and no root" in said


def refused(capsys, *arguments):
    """What the command says as it refuses its arguments."""
    assert main([*map(str, arguments), '--workers', '0', '--device', 'cpu']) == 1
    return capsys.readouterr().err


def test_label_that_the_network_does_not_know(run, tmp_path, capsys):
    moving(tmp_path / 'a.mp4', 2)
    file = tmp_path / 'test.csv'
    file.write_text('a.mp4, up\n')
    assert "'up'" in refused(capsys, run, '--list', file, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_another_clip_length(run, tmp_path, capsys):
    said = refused(capsys, run, '--out', tmp_path / 'out', '--frames', 8)
    assert said.startswith('evaluate: --frames 8: ') and 'was trained with clips of 4 frames' in said


def test_no_list(tmp_path, capsys):
    said = refused(capsys, write_run(tmp_path / 'run'), '--out', tmp_path / 'out')
    assert 'was trained without a validation list; wanted --list' in said


def test_no_checkpoint(tmp_path, capsys):
    assert 'does not exist; wanted a run folder or a checkpoint' in refused(capsys, tmp_path)


def test_results_are_not_lost(run, tmp_path, capsys):
    before, _ = evaluate(run, tmp_path / 'out')
    said = refused(capsys, run, '--out', tmp_path / 'out', '--clips', '3')
    assert 'results.json' in said and 'exists; --force replaces it' in said
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == before
    after, _ = evaluate(run, tmp_path / 'out', '--clips', '3', '--force')
    assert after['clips'] == 3


def test_list_of_other_classes(run):
    """Its labels would be counted as what they are not."""
    loaded = load_network(run)
    videos = VideoList((Entry('a.mp4', 0),), ('left', 'down', 'right'))
    with pytest.raises(ValueError, match=r'the list has 3 classes \(left, down, right\), but .* tells apart 3 '
                                         r'\(down, left, right\)'):
        evaluate_list(loaded, videos, index_videos(videos.paths, progress=False), Processes('cpu'))


def test_folder_of_its_own(run):
    assert main([str(run), '--clips', '2', '--average', 'logits']) == 0  # workers decode
    assert (run / 'evaluation-videos-2x1-logits' / 'results.json').is_file()


def test_layout_without_list(run, capsys):
    with pytest.raises(SystemExit):
        main([str(run), '--layout', 'folders'])
    assert '--layout and --root are of --list, which is not given' in capsys.readouterr().err


def test_text_of_many_classes():
    scores = torch.eye(20)[[0, 1, 1, 1, *range(4, 20)]]
    rows = Predictions(torch.arange(20), torch.arange(20), torch.zeros(20, dtype=torch.bool), scores)
    text = as_text(summarise(rows), [f'class {i}' for i in range(20)], worst=3)
    assert 'top-1  90.00%  (18 of 20 videos)' in text and 'cannot be read' not in text
    assert text.splitlines()[-3:] == [
        '  class 2    0.00% of     1  most often taken for class 1',
        '  class 3    0.00% of     1  most often taken for class 1',
        '  class 0  100.00% of     1']
