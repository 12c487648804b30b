"""Files that appear whole or not at all."""
import os
import tempfile
from pathlib import Path

import pytest

from examples.action_recognition.staging import staged


def fill(folder, *names):
    for name in names:
        (folder / name).write_text('new')


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize('place', ['there', 'new'])
def test_files_come_to_their_places_at_the_end(place, tmp_path):
    out = tmp_path if place == 'there' else tmp_path / 'new'
    with staged([out / 'a.xml', out / 'a.bin']) as folder:
        fill(folder, 'a.xml', 'a.bin', 'passing')
        assert not (out / 'a.xml').exists()
    assert texts(out) == {'a.xml': 'new', 'a.bin': 'new'}


@pytest.mark.parametrize('force', [False, True])
def test_an_error_leaves_everything_as_it_was(force, tmp_path):
    fill(tmp_path, 'other')
    if force:
        (tmp_path / 'a').write_text('old')
    before = texts(tmp_path)
    with pytest.raises(ZeroDivisionError), staged([tmp_path / 'a'], force) as folder:
        fill(folder, 'a')
        1 / 0  # noqa: B018
    assert texts(tmp_path) == before
    with pytest.raises(ZeroDivisionError), staged([tmp_path / 'new' / 'a'], force):
        1 / 0  # noqa: B018
    assert not (tmp_path / 'new').exists()


def test_force_replaces_and_leaves_others(tmp_path):
    fill(tmp_path, 'other')
    for name in ('a', 'b'):
        (tmp_path / name).write_text('old')
    with staged([tmp_path / 'a', tmp_path / 'b'], force=True) as folder:
        fill(folder, 'a', 'b')
    assert texts(tmp_path) == {'a': 'new', 'b': 'new', 'other': 'new'}


@pytest.mark.parametrize('there', ['a', 'b'])
def test_error_a_file_is_there(there, tmp_path):
    (tmp_path / there).write_text('old')
    with pytest.raises(FileExistsError, match=f"--out: '.*{there}' exists; --force"):
        with staged([tmp_path / 'a', tmp_path / 'b']):
            raise AssertionError
    assert texts(tmp_path) == {there: 'old'}


def test_error_a_folder_is_there(tmp_path):
    (tmp_path / 'a').mkdir()
    with pytest.raises(IsADirectoryError, match=r"wanted a file, got the folder '.*a'"):
        with staged([tmp_path / 'a'], force=True):
            raise AssertionError


def test_error_the_place_is_a_file_or_too_deep(tmp_path):
    fill(tmp_path, 'file')
    for place in ('file', 'no/where'):
        with pytest.raises(OSError, match=place):
            with staged([tmp_path / place / 'a']):
                raise AssertionError


def test_error_a_file_was_not_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\['b'\] should have been written"):
        with staged([tmp_path / 'a', tmp_path / 'b']) as folder:
            fill(folder, 'a')
    assert texts(tmp_path) == {}


def test_error_no_permission():
    # a folder of this test alone, as the one of pytest is closed to other users
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(PermissionError, match=folder):
                with staged([Path(folder, 'a')]):
                    raise AssertionError
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
        assert os.listdir(folder) == []
