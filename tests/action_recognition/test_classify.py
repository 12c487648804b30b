"""The command that classifies: files, folders and a live source in; answers, a labelled film and a sheet out."""
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from recognition_run import CLASSES, TINY, moving, write_list, write_run
from videos import encode, grey, look

from cmr_layers.video.index import index_videos
from examples.action_recognition import evaluate
from examples.action_recognition.annotate import with_label
from examples.action_recognition.checkpoint import load_network
from examples.action_recognition.classify import find_videos, main
from examples.action_recognition.predict import Classifier, Window, nearest, slide

pytest.importorskip('av')
pytest.importorskip('matplotlib')
pytestmark = pytest.mark.filterwarnings('ignore:.*cannot be read:UserWarning')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Videos 0.mp4 to 6.mp4, the last one broken, and a run."""
    folder = tmp_path_factory.mktemp('classify')
    file = write_list(folder)
    write_run(folder / 'run', val_list=str(file), root=str(folder))
    return folder


def classify(folder, *arguments):
    return main([str(folder / 'run'), *map(str, arguments), '--device', 'cpu'])


def answers(folder, capsys, *arguments, code=0):
    assert classify(folder, *arguments, '--json') == code
    return json.loads(capsys.readouterr().out)


def test_text(folder, capsys):
    assert classify(folder, folder / '0.mp4') == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == str(folder / '0.mp4')
    assert sorted(row.split()[1] for row in rows) == sorted(CLASSES)
    shares = [float(row.split()[0].rstrip('%')) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=.1)


def test_folder_says_what_evaluation_says(folder, tmp_path, capsys):
    assert evaluate.main([str(folder / 'run'), '--workers', '0', '--out', str(tmp_path / 'out'), '--clips', '2',
                          '--crops', '3']) == 0
    capsys.readouterr()
    scores = np.load(tmp_path / 'out' / 'predictions.npz')['scores']
    found = answers(folder, capsys, folder, '--clips', '2', '--crops', '3', code=1)
    assert [row['path'] for row in found] == [str(folder / f'{i}.mp4') for i in range(7)]
    for row, wanted in zip(found[:6], scores):
        said = {guess['class']: guess['score'] for guess in row['best']}
        assert [said[name] for name in CLASSES] == pytest.approx(wanted.tolist(), abs=2e-6)
    assert 'best' not in found[6] and '6.mp4 cannot be read' in found[6]['error']


def test_broken_file(folder, capsys):
    assert classify(folder, folder / '6.mp4') == 1
    said = capsys.readouterr()
    assert said.out == '' and '6.mp4 cannot be read: ' in said.err and '1 of 1 videos cannot be read' in said.err


def test_labelled_film_of_a_long_video(folder, tmp_path, capsys):
    """Four windows over 4 s, and over each frame the label of the window whose middle is nearest."""
    source = tmp_path / 'long.mp4'
    moving(source, 1, num_frames=40, size=(160, 120))  # 10 frames per second
    out = tmp_path / 'out.mp4'
    (row,) = answers(folder, capsys, source, '--video', out, '--window', 1, '--step', 1)
    assert [(w['start'], w['end']) for w in row['windows']] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    rate, times, images = look(out)
    assert rate == 10 and times == [Fraction(i, 10) for i in range(40)]
    assert images[0].shape == (240, 320, 3)  # twice as large, to be read
    _, _, plain = look(source)
    for i, image in enumerate(images):
        best = row['windows'][min(i // 10, 3)]['best'][0]
        wanted = with_label(plain[i].repeat(2, 0).repeat(2, 1), best['class'], best['score'])
        # encoded twice; another label or score differs by 20 and more
        assert np.abs(image.astype(int) - wanted)[:20].mean() < 8
    # the windows are classified as lists with windows are
    index = index_videos([str(source)], progress=False)
    classifier = Classifier(load_network(folder / 'run'))
    scores = list(classifier.scores(index, str(source), [Window(float(i), float(i + 1)) for i in range(4)]))
    for window, wanted in zip(row['windows'], scores):
        assert window['best'][0]['score'] == pytest.approx(float(wanted.max()), abs=1e-5)
    assert (scores[0] - scores[3]).abs().max() > 1e-5


def test_labelled_film_of_uneven_times(folder, tmp_path):
    stamps = [0, 2, 3, 9, 10, 17]
    source = encode(tmp_path / 'a.mkv', stamps, paint=lambda level: grey(level + 60))
    assert classify(folder, source, '--video', tmp_path / 'out.mp4') == 0
    _, times, _ = look(tmp_path / 'out.mp4')
    assert times == [Fraction(stamp, 10) for stamp in stamps]


def test_labelled_film_of_pictures(folder, tmp_path):
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    for i in range(3):
        grey(80 + 40 * i).to_image().save(pictures / f'{i}.png')
    assert classify(folder, pictures, '--video', tmp_path / 'out.mp4') == 0
    rate, times, images = look(tmp_path / 'out.mp4')
    assert (rate, times) == (1, [0, 1, 2])
    assert [round(image[100:].mean() / 40) for image in images] == [2, 3, 4]


def test_sheet(folder, tmp_path, capsys):
    from PIL import Image
    assert classify(folder, folder / '1.mp4', '--sheet', tmp_path / 'sheet.png') == 0
    width, height = Image.open(tmp_path / 'sheet.png').size
    assert width > 4 * 90 and height > 2 * 90  # two rows of four frames

    # the clip of the sheet is what evaluation takes, and its map is bright where the square moves
    from cmr_layers.visualize import motion_agreement
    from examples.action_recognition.figures import motion_sheet
    index = index_videos([str(folder / '1.mp4')], progress=False)
    classifier = Classifier(load_network(folder / 'run'))
    clip, frames, times = classifier.centre(index, str(folder / '1.mp4'))
    assert times == pytest.approx([.1, .4, .7, 1.])
    torch.testing.assert_close(
        classifier.model(clip)[0].softmax(0), next(classifier.scores(index, str(folder / '1.mp4'))))
    _, motion = motion_sheet(classifier.model, clip, frames, times)
    assert motion.shape[0] == 4 and motion_agreement(motion, frames) > .5


def test_sheet_of_a_network_without_sme(folder, tmp_path, capsys):
    write_run(tmp_path / 'run', model_args={**TINY, 'sme': 'none'})
    assert classify(tmp_path, folder / '1.mp4', '--sheet', tmp_path / 'sheet.png') == 1
    assert 'classify: --sheet draws the map of an SME, but the network of ' in capsys.readouterr().err
    assert not (tmp_path / 'sheet.png').exists()


def test_retrofitted_network(folder, tmp_path, capsys):
    """An image network with layers put in answers, and has a map, like any other."""
    write_run(tmp_path / 'run', model='resnet10t', model_args={'channels': (16, 16, 16, 16), 'stem_width': 8},
              temporal='retrofit')
    assert classify(tmp_path, folder / '1.mp4', '--sheet', tmp_path / 'sheet.png') == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 and (tmp_path / 'sheet.png').exists()


def test_camera(folder, tmp_path, capsys):
    """FFmpeg's test pattern comes through its devices as a camera does: without an end, and in real time."""
    assert classify(
        folder, '--camera', 'testsrc=size=320x240:rate=20,realtime', '--camera-format', 'lavfi', '--seconds', 1.5,
        '--window', .5, '--step', .5, '--video', tmp_path / 'seen.mp4', '--json') == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line['time'] for line in lines] == pytest.approx([.45, .95, 1.45], abs=.051)
    assert all(sorted(guess['class'] for guess in line['best']) == sorted(CLASSES) for line in lines)
    rate, times, images = look(tmp_path / 'seen.mp4')
    assert rate == 20 and times == [Fraction(i, 20) for i in range(30)]
    assert images[0].shape == (240, 320, 3)


def test_output_that_is_there(folder, tmp_path, capsys):
    out = tmp_path / 'out.mp4'
    out.write_bytes(b'mine')
    with pytest.raises(SystemExit):
        classify(folder, folder / '1.mp4', '--video', out)
    assert "out.mp4' exists; --force replaces it" in capsys.readouterr().err and out.read_bytes() == b'mine'
    assert classify(folder, folder / '1.mp4', '--video', out, '--force') == 0
    assert len(look(out)[1]) == 12


@pytest.mark.parametrize('arguments, said', [
    ([], 'wanted a video file, a folder, or --camera'),
    (['a.mp4', '--camera', '0'], 'wanted a video file, a folder, or --camera'),
    (['a.mp4', '--video', 'out.avi'], "--video must end in .mp4, got 'out.avi'"),
    (['a.mp4', '--sheet', 'out'], "--sheet must end in .png, .jpg, .pdf or .svg, got 'out'"),
    (['--camera', '0', '--sheet', 'out.png'], '--sheet needs a file'),
    (['a.mp4', '--window', '0'], "must be a number of seconds > 0, got '0'"),
    (['a.mp4', '--clips', '0'], '--clips must be at least 1, got 0'),
])
def test_wrong_arguments(folder, capsys, arguments, said):
    with pytest.raises(SystemExit):
        classify(folder, *arguments)
    assert said in capsys.readouterr().err


def test_one_film_of_many_videos(folder, capsys):
    assert classify(folder, folder, '--video', 'out.mp4') == 1
    said = capsys.readouterr().err
    assert '--video and --sheet take one video, but' in said and said.endswith('holds 7\n')


def test_no_such_file(folder, tmp_path, capsys):
    assert classify(folder, tmp_path / 'none.mp4') == 1
    assert 'none.mp4' in capsys.readouterr().err


def test_find_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist; wanted a video file, or a folder'):
        find_videos(str(tmp_path / 'none'))
    with pytest.raises(ValueError, match='holds no video'):
        find_videos(str(tmp_path))
    for name in ('b/2.jpg', 'a/1.png', 'a/2.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(str(tmp_path)) == [str(tmp_path / 'a'), str(tmp_path / 'b')]
    (tmp_path / 'b' / 'film.WEBM').touch()
    assert find_videos(str(tmp_path)) == [str(tmp_path / 'b' / 'film.WEBM')]
    assert find_videos(str(tmp_path / 'a')) == [str(tmp_path / 'a')]


def test_windows_without_a_frame_are_left_out(tmp_path):
    """A picture that stays for 7 seconds."""
    path = str(encode(tmp_path / 'a.mkv', [0, 10, 20, 90], paint=lambda level: grey(level + 60)))
    info = index_videos([path], progress=False)[path]
    windows = slide(info, 2, 2)
    assert windows[:2] == [Window(0., 2.), Window(2., 4.)] and len(windows) == 3
    assert windows[2] == Window(info.duration - 2) and info.duration >= 9
    assert slide(info, 12, 2) == [Window()]


def test_nearest_window_of_a_single_one():
    assert nearest([Window()], [Fraction(0), Fraction(5)], 6.) == [0, 0]
