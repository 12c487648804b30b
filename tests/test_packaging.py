"""The package as it is shipped: what the wheel holds, and that the core needs torch, einops and timm alone."""
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import cmr_layers

ROOT = Path(__file__).parents[1]


def build(kind, out, pattern):
    subprocess.run([sys.executable, '-m', 'build', f'--{kind}', '--outdir', str(out), str(ROOT)], check=True,
                   stdout=subprocess.DEVNULL)
    [path] = out.glob(pattern)
    return path


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return build('wheel', tmp_path_factory.mktemp('dist'), '*.whl')


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    """The unpacked sdist."""
    out = tmp_path_factory.mktemp('sdist')
    with tarfile.open(build('sdist', out, '*.tar.gz')) as archive:
        archive.extractall(out, filter='data')
    return out / f'cmr_layers-{cmr_layers.__version__}'


def test_sdist_holds_what_the_readmes_commands_need(sdist):
    ours = {path.relative_to(ROOT).as_posix() for folder in (
        'cmr_layers', 'benchmarks', 'tests', 'examples', 'docs', '.ci') for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts}
    ours |= {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith('quickstart')}
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob('*') if path.is_file()}
    assert ours - packed == set() and packed - ours <= {'PKG-INFO'}
    assert {'tests/helpers.py', 'tests/conftest.py', 'tests/loops.py', 'tests/interpreter.py'} <= packed


@pytest.mark.slow
def test_sdists_own_tests_are_found(sdist):
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', '--collect-only', '-m', ''], cwd=sdist, capture_output=True,
        text=True)
    assert run.returncode == 0 and int(re.search(r'(\d+) tests collected', run.stdout).group(1)) > 3000, run.stdout


def test_sdists_own_tests_run(sdist):
    # those that need files beside the package
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', 'tests/test_readme.py', '-k', 'not step'],
        cwd=sdist, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r'\d+ passed', run.stdout), run.stdout


def test_wheel_holds_the_package_its_types_and_its_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f'cmr_layers/{path.relative_to(ROOT / "cmr_layers").as_posix()}'
               for path in (ROOT / 'cmr_layers').rglob('*.py')}
    info = f'cmr_layers-{cmr_layers.__version__}.dist-info'
    assert package | {'cmr_layers/py.typed', f'{info}/licenses/LICENSE'} <= names
    assert {name.split('/')[0] for name in names} == {'cmr_layers', info}  # no tests, no benchmarks


def test_wheel_declares_what_it_needs(wheel):
    info = f'cmr_layers-{cmr_layers.__version__}.dist-info/METADATA'
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(info).decode())
    core = [need for need in metadata.get_all('Requires-Dist') if 'extra ==' not in need]
    assert sorted(need.split('>')[0] for need in core) == ['einops', 'timm', 'torch']
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Version'] == cmr_layers.__version__
    extras = {'video', 'train', 'quickstart', 'example', 'motion', 'export', 'bench', 'docs', 'test'}
    assert extras == set(metadata.get_all('Provides-Extra'))


def test_wheel_runs_where_no_extra_is_installed(wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target',
                    str(tmp_path / 'site'), str(wheel)], check=True)
    script = tmp_path / 'script.py'
    script.write_text(f'''
import sys

class NoExtras:
    """Hide the packages of the extras, as if they were not there."""
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('av', 'matplotlib', 'skvideo'):
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, NoExtras())
sys.path.insert(0, {str(tmp_path / 'site')!r})
import timm, torch
import cmr_layers, cmr_layers.released, cmr_layers.video, cmr_layers.visualize
assert cmr_layers.__file__.startswith({str(tmp_path)!r}), cmr_layers.__file__
model = timm.create_model('cmr_resnet18', num_frames=2, num_classes=3).eval()
print(list(model(torch.randn(1, 2, 3, 32, 32)).shape))
for call in (lambda: cmr_layers.video.read_clip(__file__),
             lambda: cmr_layers.visualize.figure5(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None)):
    try:
        call()
    except ImportError as error:
        print(error)
''')
    run = subprocess.run([sys.executable, '-I', str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == '[1, 3]'
    assert len(lines) == 3 and all('cmr-layers[video]' in line for line in lines[1:]), lines
