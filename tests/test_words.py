"""Words that the package has one other word for, see docs/terms.md."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {'.py', '.md', '.cfg', '.toml', '.sh'}
PLACES = ['cmr_layers', 'benchmarks', 'tests', 'docs', 'examples', 'README.md']
BANNED = {
    # CME and TIM together are cme_tim; English has "in front of"
    'front': r'(?<!in )(?<!In )\bfront\b|\bfront_|_front\b',
    # a path is the reference or not; PyTorch has an eager mode, and names a backend of its compiler after it
    'eager': r"""(?<!backend=['"])(?<!\baot_)\beager(?! mode)""",
    # operations choose a path
    'dispatched': r'\bdispatched\b',
}


def files():
    for place in PLACES:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob('*')):
            if file.suffix in SUFFIXES and '__pycache__' not in file.parts and file != Path(__file__):
                yield file


@pytest.mark.parametrize('word', BANNED)
def test_one_word_for_one_thing(word):
    found = [
        f'{file.relative_to(ROOT)}:{number}: {line.strip()}' for file in files()
        for number, line in enumerate(file.read_text().splitlines(), 1) if re.search(BANNED[word], line)]
    assert not found, '\n'.join(found)
