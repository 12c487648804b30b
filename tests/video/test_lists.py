"""Lists of videos: what each layout reads, and that a wrong line is an error that names it."""
import json
import pickle
import re

import pytest
from PIL import Image
from videos import LEVEL, read_levels, write_video

from cmr_layers.video import (
    Entry,
    VideoList,
    read_clip,
    read_folders,
    read_kinetics,
    read_list,
    read_something_v1,
    read_something_v2,
    read_videos,
)


@pytest.fixture
def write(tmp_path):
    """Writes a file of some text, or of bytes or JSON."""
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
        return path
    return write


def relative(videos, folder):
    """Entries with their paths from a folder."""
    return [(entry.path.removeprefix(f'{folder}/'), *entry[1:]) for entry in videos.entries]


class TestVideoList:
    def test_paths_are_unique_and_in_order(self):
        videos = VideoList((Entry('b', 0), Entry('a', 1, 0, 1), Entry('a', 0, 1)), ('x', 'y'))
        assert videos.paths == ('b', 'a') and len(videos) == 3 and videos.file is None
        assert pickle.loads(pickle.dumps(videos)) == videos

    @pytest.mark.parametrize('entries, classes, message', [
        ((), ('x',), 'entries is empty; wanted at least one video'),
        ((Entry('a', 1),), ('x',), r'entry 0 \(a\) has label 1; wanted one of 0 to 0'),
        ((Entry('a', -1),), ('x',), r'entry 0 \(a\) has label -1; wanted one of 0 to 0'),
        ((Entry('a', 0),), (), 'classes holds no name of a class'),
        ((Entry('a', 0),), 'jump', "classes must hold names of classes, got 'jump'"),
        ((Entry('a', 0),), ('x', ''), 'classes must hold names of classes'),
        ((Entry('a', 0),), ('x', 'y', 'x'), "classes has two classes of the name 'x', 0 and 2 counted from 0"),
        ((Entry('a', 0, 2, 2),), ('x',), r'entry 0 \(a\): the window from start=2 to end=2 is empty'),
        ((Entry('a', 0, None, 0),), ('x',), 'is empty; wanted 0 <= start < end'),
        ((Entry('a', 0, float('nan')),), ('x',), 'is empty; wanted 0 <= start < end'),
    ])
    def test_wrong_ones(self, entries, classes, message):
        with pytest.raises(ValueError, match=message):
            VideoList(entries, classes)

    @pytest.mark.parametrize('entry', [('a', 'x'), (3, 0), ('a', .5)])
    def test_wrong_types(self, entry):
        with pytest.raises(TypeError, match=r'entries must be Entry\(path, label\), got'):
            VideoList((entry,), ('x',))


class TestPlainList:
    def test_columns(self, write, tmp_path):
        file = write('train.csv', (
            'clips/a.mp4, run\n'
            '\n'
            '"b, take 2.mp4", 1.5, 4, jump\n'
            '  c.mp4 ,, 2 ,run\n'
            'c.mp4, 2, , jump\n'
            f'{tmp_path}/d.mp4,jump'))
        videos = read_list(file)
        assert videos.classes == ('jump', 'run') and videos.file == str(file)
        assert relative(videos, tmp_path) == [
            ('clips/a.mp4', 1, None, None), ('b, take 2.mp4', 0, 1.5, 4.), ('c.mp4', 1, None, 2.),
            ('c.mp4', 0, 2., None), ('d.mp4', 0, None, None)]

    def test_paths_are_those_of_the_videos(self, write, tmp_path):
        write_video(tmp_path / 'a.mp4', range(0, 30 * LEVEL, LEVEL))
        videos = read_list(write('lists/train.csv', '../a.mp4, 1, 2, run\n'))
        entry, = videos.entries
        assert entry.path == str(tmp_path / 'a.mp4')
        assert read_levels(read_clip(entry.path, 2, entry.start, entry.end)) == [12, 17]

    def test_root(self, write, tmp_path):
        (tmp_path / 'videos').mkdir()
        file = write('train.csv', f'a.mp4, run\n{tmp_path}/videos/b.mp4, run\nsub/../c.mp4, run\n')
        assert read_list(file, tmp_path / 'videos').paths == tuple(f'{tmp_path}/videos/{n}.mp4' for n in 'abc')

    @pytest.mark.parametrize('path', ['../a.mp4', 'x/../../a.mp4', '/etc/a.mp4', '../videos2/a.mp4'])
    def test_paths_outside_of_root(self, write, tmp_path, path):
        (tmp_path / 'videos').mkdir()
        file = write('train.csv', f'a.mp4, run\n{path}, run\n')
        with pytest.raises(ValueError, match=rf'train\.csv, line 2: path {path!r} lies outside root='):
            read_list(file, tmp_path / 'videos')

    def test_a_root_that_is_no_folder(self, write, tmp_path):
        file = write('train.csv', 'a.mp4, run\n')
        with pytest.raises(NotADirectoryError, match=r'/no.* does not exist; wanted the folder of the videos'):
            read_list(file, tmp_path / 'no')
        with pytest.raises(NotADirectoryError, match='is no folder; wanted the folder of the videos'):
            read_list(file, file)

    @pytest.mark.parametrize('content', [
        b'\xef\xbb\xbfa.mp4, run\n\xc3\xa9.mp4, jump\n', b'a.mp4, run\r\n\xc3\xa9.mp4, jump\r\n',
        b'a.mp4, run\r\xc3\xa9.mp4, jump'])
    def test_byte_order_mark_and_line_ends(self, write, tmp_path, content):
        assert relative(read_list(write('train.csv', content)), tmp_path) == [
            ('a.mp4', 1, None, None), ('é.mp4', 0, None, None)]

    @pytest.mark.parametrize('content, message', [
        (b'a.mp4, run\n\xe9.mp4, jump\n', r'train\.csv, line 2: no UTF-8 \(byte 0xe9\); wanted a list saved as UTF-8'),
        ('a.mp4, run\n'.encode('utf-16'), r'train\.csv, line 1: no UTF-8 \(it looks like UTF-16\)'),
        ('a.mp4, run\n'.encode('utf-16-le'), r'train\.csv, line 1: a null character; wanted a list saved as text'),
        (b'', r'train\.csv lists no video; wanted at least one'),
        (b'\n  \n', r'train\.csv lists no video'),
        (b'path, label\na.mp4, run', r'line 1: a header, path, label; wanted a video: the list has no header'),
        (b'Path,Start,End,Label\na.mp4,0,1,run', 'line 1: a header, Path, Start, End, Label'),
        (b'a.mp4, run\na.mp4', r'line 2: 1 columns, a\.mp4; wanted path, label or path, start, end, label \(columns'),
        (b'clips/a 31 5\n', 'line 1: 1 columns, clips/a 31 5;.*"path num_frames label" are read as layout sthv1'),
        (b'a.mp4, 1, run', r'line 1: 3 columns, a\.mp4, 1, run; wanted .* \(a path with a comma needs quotes\)'),
        (b'a.mp4, 1, 2, run, 4', 'line 1: 5 columns'),
        (b', run', 'line 1: no path; wanted that of a video'),
        (b'a.mp4, ', 'line 1: no label; wanted path, label or'),
        (b'a.mp4, 1, 2,', 'line 1: no label; wanted path, label or'),
        (b'a.mp4, x, 2, run', "line 1: start must be a number of seconds >= 0, or empty, got 'x'"),
        (b'a.mp4, 0, 0:20, run', "line 1: end must be a number of seconds >= 0, or empty, got '0:20'"),
        (b'a.mp4, -1, 2, run', "start must be a number of seconds >= 0, or empty, got '-1'"),
        (b'a.mp4, nan, 2, run', "start must be a number of seconds >= 0, or empty, got 'nan'"),
        (b'a.mp4, 0, inf, run', "end must be a number of seconds >= 0, or empty, got 'inf'"),
        (b'b.mp4, run\n\na.mp4, 4, 2, run', 'line 3: start=4 is not before end=2; wanted a window that holds frames'),
        (b'a.mp4, , 0, run', 'line 1: start=0 is not before end=0'),
        (b'a.mp4, run\n"b.mp4, run\nc.mp4, run', r'train\.csv, line 3: unexpected end of data; wanted quotes that'),
        (b'"a" b.mp4, run', r'line 1: .*; wanted quotes that close'),
        (b'a.mp4, run\nb.mp4, jump\na.mp4, jump',
         r"line 3: .*a\.mp4 has label 'jump', but in .*line 1 label 'run'; wanted one label, or windows that differ"),
        (b'a.mp4, 1, 2, run\n./a.mp4, 1.0, 2, jump', "line 2: .* has label 'jump', but in .*line 1 label 'run'"),
        (b'a.mp4, 0, 2, run\na.mp4, , 2, jump', "line 2: .* has label 'jump', but in .*line 1 label 'run'"),
        (b'a.mp4, run\nb.mp4, Run', "line 2: label 'Run' is spelled 'run' in .*line 1; wanted one spelling"),
        (b'a.mp4, go left\nb.mp4, go  left', "line 2: label 'go  left' is spelled 'go left' in"),
        ('a.mp4, é\nb.mp4, e\u0301'.encode(), "line 2: label 'e\u0301' is spelled 'é' in .*line 1"),
    ])
    def test_wrong_lines(self, write, content, message):
        with pytest.raises(ValueError, match=message):
            read_list(write('train.csv', content))

    def test_one_video_more_than_once(self, write):
        lines = 'a.mp4, run\na.mp4, run\na.mp4, 0, 1, jump\na.mp4, 0, 2, run\n'
        assert [entry.label for entry in read_list(write('train.csv', lines)).entries] == [1, 1, 0, 1]

    def test_missing_list(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'/no\.csv does not exist; wanted a list'):
            read_list(tmp_path / 'no.csv')
        with pytest.raises(IsADirectoryError, match='is a folder; wanted a list'):
            read_list(tmp_path)

    def test_a_list_that_may_not_be_read(self, tmp_path):
        """A link to itself cannot be opened, not even by root."""
        (tmp_path / 'loop.csv').symlink_to(tmp_path / 'loop.csv')
        with pytest.raises(OSError, match=r'loop\.csv cannot be read: .*; wanted a list'):
            read_list(tmp_path / 'loop.csv')


class TestLabels:
    LINES = 'a.mp4, {}\nb.mp4, {}\nc.mp4, {}\n'

    def read(self, write, labels, classes=None):
        videos = read_list(write('train.csv', self.LINES.format(*labels)), classes=classes)
        return [entry.label for entry in videos.entries], videos.classes

    def test_names(self, write):
        assert self.read(write, ('run', 'jump', 'run')) == ([1, 0, 1], ('jump', 'run'))
        classes = ('walk', 'run', 'jump')
        assert self.read(write, ('run', 'jump', 'run'), classes) == ([1, 2, 1], classes)

    def test_numbers(self, write):
        assert self.read(write, (2, 0, 1)) == ([2, 0, 1], ('0', '1', '2'))
        assert self.read(write, (2, 0, 2), ['walk', 'run', 'jump']) == ([2, 0, 2], ('walk', 'run', 'jump'))

    def test_numbers_of_a_list_for_validation(self, write):
        """They mean what they mean in the list for training, also where not all occur."""
        numbers = tuple(map(str, range(12)))
        assert self.read(write, (2, 11, '03'), numbers) == ([2, 11, 3], numbers)

    def test_names_that_are_numbers(self, write):
        assert self.read(write, (10, 30, 20), ('10', '20', '30')) == ([0, 2, 1], ('10', '20', '30'))
        with pytest.raises(ValueError, match="line 1: label '0' is not one of the 3 classes; wanted a name such as"):
            self.read(write, (0, 1, 20), ('10', '20', '30'))

    def test_names_that_differ_in_case_only_if_classes_say_so(self, write):
        assert self.read(write, ('a', 'A', 'a'), ('A', 'a')) == ([1, 0, 1], ('A', 'a'))

    @pytest.mark.parametrize('labels, classes, message', [
        ((1, 2, 3), None, r'train\.csv: labels start at 1; wanted numbers from 0, with no class left out: subtract 1'),
        ((5, 6, 7), None, 'labels start at 5; wanted numbers from 0.* subtract 5'),
        ((0, 1, 4), None, 'labels go from 0 to 4, but 2 of them do not occur, first 2; wanted every number, or give'),
        ((0, 2, 10 ** 12), None, 'labels go from 0 to 1000000000000, but .* do not occur, first 1'),
        ((0, -1, 1), None, r'train\.csv, line 2: label -1 is negative; wanted numbers from 0'),
        ((1, 2, 3), ('x', 'y', 'z'), 'line 3: label 3 is not one of the 3 classes; wanted a number from 0 to 2, or '
                                     'the name of a class; labels seem to start at 1'),
        ((0, 2, 3), ('x', 'y', 'z'), 'line 3: label 3 is not one of the 3 classes.* the name of a class$'),
        ((0, -1, 1), ('x', 'y', 'z'), 'line 2: label -1 is not one of the 3 classes'),
        (('run', 'jmp', 'run'), ('run', 'jump'), "line 2: label 'jmp' is not one of the 2 classes; wanted a name such "
                                                 "as 'jump'"),
        (('run', 1, 'run'), ('run', 'jump'), "line 2: label '1' is not one of the 2 classes"),
        (('run', 1, 'run'), ('run', 'jump', 'run'), "classes has two classes of the name 'run', 0 and 2"),
    ])
    def test_wrong_labels(self, write, labels, classes, message):
        with pytest.raises(ValueError, match=message):
            self.read(write, labels, classes)


class TestClasses:
    def names(self, write, name, content):
        lines = 'a.mp4, run\n'
        return read_list(write('train.csv', lines), classes=write(name, content)).classes

    @pytest.mark.parametrize('content', [
        'walk\nrun\nto jump, high\n', '\ufeffwalk\r\n run \r\n"to jump, high"\r\n\r\n', '"walk"\nrun\nto jump, high'])
    def test_lines(self, write, content):
        assert self.names(write, 'classes.txt', content) == ('walk', 'run', 'to jump, high')

    @pytest.mark.parametrize('numbers', [('1', '0', '2'), (1, 0, 2)])
    def test_numbers_of_names(self, write, numbers):
        table = dict(zip(('run', 'walk', 'jump'), numbers))
        assert self.names(write, 'labels.json', table) == ('walk', 'run', 'jump')

    @pytest.mark.parametrize('name, content, message', [
        ('c.txt', '', r'c\.txt, line 1: no name; wanted the name of class 0'),
        ('c.txt', 'run\n\njump\n', r'c\.txt, line 2: no name; wanted the name of class 1'),
        ('c.txt', 'run\njump\nrun\n', r"c\.txt has two classes of the name 'run', 0 and 2 counted from 0"),
        ('c.json', '{"run": "0", "jump": "1", "run": "2"}', r"c\.json has two of the name 'run' in one object"),
        ('c.json', '{"run": "0",\n"jump": }', r'c\.json, line 2: no JSON: Expecting value'),
        ('c.json', '["run"]', r'c\.json holds list; wanted the number of each name'),
        ('c.json', {}, r'c\.json holds dict; wanted the number of each name'),
        ('c.json', {'run': '1', 'jump': '2'}, r'c\.json: numbers of the 2 classes start at 1; wanted 0 to 1'),
        ('c.json', {'run': '0', 'jump': '2'}, r'c\.json: numbers of the 2 classes leave out 1; wanted 0 to 1'),
        ('c.json', {'run': '0', 'jump': 0}, r"c\.json: classes 'run' and 'jump' have the same number 0"),
        ('c.json', {'run': '0', 'jump': 'x'}, r"c\.json: class 'jump' has number 'x'; wanted a number from 0"),
        ('c.json', {'run': True}, r"c\.json: class 'run' has number True"),
        ('c.json', {'run': .5}, r"c\.json: class 'run' has number 0\.5"),
    ])
    def test_wrong_files(self, write, name, content, message):
        with pytest.raises(ValueError, match=message):
            self.names(write, name, content)

    def test_missing(self, write, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'no\.txt does not exist'):
            read_list(write('train.csv', 'a.mp4, run\n'), classes=str(tmp_path / 'no.txt'))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path)


class TestFolders:
    def test_a_folder_per_class(self, tmp_path):
        for name in ('run/b.mp4', 'run/a.webm', 'jump/C.MP4', '.cache/x.mp4', 'jump/.hidden.mp4'):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        picture(tmp_path / 'jump' / 'frames' / '1.jpg')
        (tmp_path / 'classes.txt').write_text('run\njump\n')
        videos = read_folders(tmp_path)
        assert videos.classes == ('jump', 'run') and videos.file == str(tmp_path)
        assert relative(videos, tmp_path) == [
            ('jump/C.MP4', 0, None, None), ('jump/frames', 0, None, None), ('run/a.webm', 1, None, None),
            ('run/b.mp4', 1, None, None)]
        given = read_folders(tmp_path, tmp_path / 'classes.txt')
        assert given.classes == ('run', 'jump') and [entry.label for entry in given.entries] == [1, 1, 0, 0]
        assert read_folders(str(tmp_path), ('fly', 'jump', 'run')).entries[0].label == 1

    def test_folders_that_are_numbers(self, tmp_path):
        for name in '125':
            (tmp_path / name).mkdir()
            (tmp_path / name / 'a.mp4').touch()
        assert read_folders(tmp_path).classes == ('1', '2', '5')

    def test_other_files_are_counted(self, tmp_path):
        for name in ('run/a.mp4', 'run/notes.txt', 'jump/b.mp4', 'jump/Thumbs.db'):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        with pytest.warns(UserWarning, match=r'2 of the files under .* are left out, .* first is .*jump/Thumbs\.db'):
            assert len(read_folders(tmp_path)) == 2

    @pytest.mark.parametrize('files, message', [
        ([], 'holds no folder; wanted a folder per class'),
        (['notes.txt'], 'holds no folder; wanted a folder per class'),
        (['run/a.mp4', 'b.mp4'], r'b\.mp4 lies in no folder of a class; wanted .*/<class>/b\.mp4'),
        (['run/a.mp4', 'jump/'], 'jump holds no video; wanted files such as'),
        (['run/a.txt'], 'run holds no video; wanted files such as .* folders of pictures$'),
        (['run/1.jpg'], 'run holds no video; .*; pictures are frames, and each video has a folder of them'),
        (['run/a.mp4', 'run/more/b.mp4'], "run/more is a folder without pictures; wanted the videos of class 'run' in"),
        (['run/a.mp4', 'fly/a.mp4'], "fly/a.mp4: label 'fly' is not one of the 2 classes; wanted a name such as"),
    ])
    def test_wrong_folders(self, tmp_path, files, message):
        for name in files:
            path = tmp_path / name
            (path if name.endswith('/') else path.parent).mkdir(exist_ok=True, parents=True)
            if not name.endswith('/'):
                path.touch()
        with pytest.raises(ValueError, match=message):
            read_folders(tmp_path, ('run', 'jump'))

    def test_missing(self, tmp_path):
        with pytest.raises(NotADirectoryError, match='does not exist; wanted the folder of the videos'):
            read_folders(tmp_path / 'no')


class TestSomethingV1:
    NAMES = 'Turning something upside down\nPushing something from left to right\nHolding something\n'

    def test_official(self, write, tmp_path):
        picture(tmp_path / '100218' / '00001.jpg')
        file = write('train.csv', '100218;Turning something upside down\n24413;Holding something\n')
        videos = read_something_v1(file, tmp_path, write('labels.csv', self.NAMES))
        assert videos.classes == tuple(sorted(self.NAMES.splitlines()))  # as TSM's lists count
        assert relative(videos, tmp_path) == [('100218', 2, None, None), ('24413', 0, None, None)]
        assert read_something_v1(file, tmp_path, self.NAMES.splitlines()).entries[1].label == 2
        assert read_something_v1(file, tmp_path).classes == ('Holding something', 'Turning something upside down')
        assert read_clip(videos.entries[0].path, 1).frames.shape == (1, 3, 8, 8)

    def test_scripted(self, write, tmp_path):
        file = write('val.txt', '100218 42 2\n\nsome folder/24413  8\t0 \n')
        names = tuple(sorted(self.NAMES.splitlines()))
        videos = read_something_v1(file, tmp_path, write('category.txt', '\n'.join(names)))
        assert videos.classes == names
        assert relative(videos, tmp_path) == [('100218', 2, None, None), ('some folder/24413', 0, None, None)]
        assert read_something_v1(file, tmp_path, self.NAMES.splitlines()).classes == tuple(self.NAMES.splitlines())

    def test_numbers_and_names_of_unknown_order(self, write, tmp_path):
        with pytest.raises(ValueError, match=r'labels\.csv.* is not in the order of the alphabet, .*wanted a sorted'):
            read_something_v1(write('val.txt', '100218 42 2\n'), tmp_path, write('labels.csv', self.NAMES))

    @pytest.mark.parametrize('content, message', [
        ('', 'lists no video'),
        ('1;Holding something\n2\n', r'list, line 2: 1 columns, 2; wanted id;label'),
        ('1;Holding something;x\n', r'list, line 1: 3 columns'),
        ('1;\n', r'list, line 1: 2 columns, 1; ; wanted id;label'),
        ('1;Holding something else\n', r"list, line 1: label 'Holding something else' is not one of the 3 classes; "
                                       "wanted a name such as 'Holding something'"),
        ('../1;Holding something\n', r"line 1: path '\.\./1' lies outside root="),
        ('1\n2\n', "list, line 1: '1'; wanted id;label, or path .*; the list of the test set has no labels"),
        ('1 2\n', "list, line 1: '1 2'; wanted id;label, or path num_frames label .* for the label$"),
        ('1 40 2\n2 x 1\n', "list, line 2: '2 x 1'; wanted"),
        ('1 40 1\n2 40 3\n', 'list, line 2: label 3 is not one of the 3 classes.*start at 1'),
    ])
    def test_wrong_lines(self, write, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_something_v1(write('list', content), tmp_path, sorted(self.NAMES.splitlines()))


class TestSomethingV2:
    LABELS = {'Holding something': '1', 'Holding something next to something': '0'}  # noqa: RUF012
    ENTRIES = [  # noqa: RUF012
        {'id': '78687', 'label': 'holding potato next to bottle', 'template': 'Holding [something] next to [something]',
         'placeholders': ['potato', 'bottle']},
        {'id': '42326', 'label': 'holding cup', 'template': 'Holding [something]', 'placeholders': ['cup']},
    ]

    def test_official(self, write, tmp_path):
        write_video(tmp_path / '42326.webm', range(0, 8 * LEVEL, LEVEL), codec='libvpx-vp9')
        videos = read_something_v2(write('train.json', self.ENTRIES), tmp_path, write('labels.json', self.LABELS))
        assert videos.classes == ('Holding something next to something', 'Holding something')
        assert relative(videos, tmp_path) == [('78687.webm', 0, None, None), ('42326.webm', 1, None, None)]
        assert read_levels(read_clip(videos.entries[1].path, 4)) == [1, 3, 5, 7]
        assert read_something_v2(tmp_path / 'train.json', tmp_path, list(self.LABELS)).entries[0].label == 1

    @pytest.mark.parametrize('content, message', [
        ([], 'lists no video'),
        ({'1': 'x'}, r'train\.json holds dict; wanted a list'),
        ('[{"id": "1",\n}]', r'train\.json, line 2: no JSON'),
        ([{'id': '1420'}], 'entry 0: id 1420 has no template, .*, which the list of the test set does not have'),
        (['1420'], r"entry 0: '1420'; wanted \{\"id\": \.\.\., \"template\""),
        ([{'template': 'Holding [something]'}], 'entry 0: .*; wanted'),
        ([{'id': '1', 'template': 'Holding [someone]'}], r"entry 0 \(id 1\): label 'Holding someone' is not one of the "
                                                         "2 classes; wanted a name such as 'Holding something'"),
        ([{'id': '../1', 'template': 'Holding [something]'}], r"path '\.\./1\.webm' lies outside root="),
    ])
    def test_wrong_entries(self, write, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_something_v2(write('train.json', content), tmp_path, write('labels.json', self.LABELS))

    def test_no_classes(self, write, tmp_path):
        with pytest.raises(ValueError, match='classes must be names or a file, such as something-something-v2-labels'):
            read_something_v2(write('train.json', self.ENTRIES), tmp_path, None)


class TestKinetics:
    HEADER = 'label,youtube_id,time_start,time_end,split\n'

    def test_cut_and_whole(self, write, tmp_path):
        root = tmp_path / 'train'
        for name in ('-0000000001_000010_000020.mp4', 'b0000000002.mp4', 'abseiling/c0000000003_000000_000010.mp4',
                     'abseiling/d0000000004.mp4', 'e0000000005.mp4', 'e0000000005_000007_000017.mp4'):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        file = write('train.csv', (
            'label,youtube_id,time_start,time_end,split,is_cc\n'
            'zumba,-0000000001,10,20,train,0\n'
            'zumba,b0000000002,2.5,12.5,train,0\n'
            'abseiling,c0000000003,0,10,train,1\n'
            'abseiling,d0000000004,5,15,train,1\n'
            '"playing ""king"", fast",e0000000005,7,17,train,1\n'
            'zumba,f0000000006,1,11,train,1\n'))
        videos = read_kinetics(file, root)
        assert videos.classes == ('abseiling', 'playing "king", fast', 'zumba')
        assert relative(videos, root) == [
            ('-0000000001_000010_000020.mp4', 2, None, None),
            ('b0000000002.mp4', 2, 2.5, 12.5),
            ('abseiling/c0000000003_000000_000010.mp4', 0, None, None),
            ('abseiling/d0000000004.mp4', 0, 5., 15.),
            ('e0000000005_000007_000017.mp4', 1, None, None),
            ('f0000000006_000001_000011.mp4', 2, None, None),
        ]
        assert read_kinetics(file, root, ('zumba', 'abseiling', 'playing "king", fast')).entries[0].label == 0

    def test_other_order_of_columns(self, write, tmp_path):
        file = write('val.csv', 'youtube_id,time_end,time_start,label\na,20,10,zumba\n')
        assert relative(read_kinetics(file, tmp_path), tmp_path) == [('a_000010_000020.mp4', 0, None, None)]

    @pytest.mark.parametrize('content, message', [
        ('', 'lists no video'),
        (HEADER, 'lists no video'),
        ('youtube_id,time_start,time_end,split\na,1,2,test\n', r'list\.csv, line 1: .* has no column label; wanted'),
        ('zumba,a,1,2,train\n', 'line 1: .* has no column label, youtube_id, time_start, time_end'),
        (HEADER + 'zumba,a,1,2\n', 'line 2: 4 columns, zumba, a, 1, 2; wanted 5'),
        (HEADER + 'zumba,a,1,2,train\nzumba,b,1,2,val\n', "line 3: split 'val' in a list of 'train'; wanted a list of"),
        (HEADER + 'zumba,,1,2,train\n', 'line 2: youtube_id is empty'),
        (HEADER + ',a,1,2,train\n', 'line 2: label is empty'),
        (HEADER + 'zumba,a,,2,train\n', 'line 2: time_start is empty'),
        (HEADER + 'zumba,a,0:10,2,train\n', "line 2: time_start must be a number of seconds >= 0, .*got '0:10'"),
        (HEADER + 'zumba,a,20,10,train\n', 'line 2: time_start=20 is not before time_end=10'),
        (HEADER + 'zumba,../a,1,2,train\n', r"line 2: path '\.\./a_000001_000002\.mp4' lies outside root="),
        (HEADER + 'zumba,a,1,2,train\nabseiling,a,1,2,train\n', "line 3: .* has label 'abseiling', but in .*line 2"),
    ])
    def test_wrong_lines(self, write, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read_kinetics(write('list.csv', content), tmp_path)


class TestLayouts:
    def test_each(self, write, tmp_path):
        (tmp_path / 'videos' / 'run').mkdir(parents=True)
        root = tmp_path / 'videos'
        (root / 'run' / 'a.mp4').touch()
        plain, v1 = write('a.csv', 'a.mp4, run'), write('b.csv', '1;run')
        v2 = write('c.json', [{'id': 1, 'template': 'run'}])
        kinetics = write('d.csv', TestKinetics.HEADER + 'run,a,1,2,x')
        names = ('jump', 'run')
        assert read_videos('list', plain) == read_list(plain)
        assert read_videos('list', plain, root, names) == read_list(plain, root, names)
        assert read_videos('folders', root) == read_videos('folders', None, root) == read_folders(root)
        assert read_videos('sthv1', v1, root, names) == read_something_v1(v1, root, names)
        assert read_videos('sthv2', v2, root, names) == read_something_v2(v2, root, names)
        assert read_videos('kinetics', kinetics, root) == read_kinetics(kinetics, root)

    @pytest.mark.parametrize('arguments, message', [
        (('ucf', 'a.csv'), "layout must be one of 'list', 'folders', 'sthv1', 'sthv2', 'kinetics', got 'ucf'"),
        (('list', None), "file must be the list of layout 'list', got None"),
        (('folders', None), "layout 'folders' has no list; wanted one of file and root"),
        (('folders', 'a', 'b'), "layout 'folders' has no list; wanted one of file and root"),
        (('sthv1', 'a.csv'), "root must be the folder of the videos of layout 'sthv1', got None"),
        (('kinetics', 'a.csv'), "root must be the folder of the videos of layout 'kinetics', got None"),
        (('sthv2', 'a.json', '.'), "classes must be the names of layout 'sthv2', such as its labels.json, got None"),
    ])
    def test_missing_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_videos(*arguments)
