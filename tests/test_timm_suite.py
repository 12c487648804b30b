"""timm's own tests were run on the whole family, and all of them passed."""
import json
import runpy
from pathlib import Path

import pytest
import timm

import cmr_layers  # noqa: F401  (registers the family)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def suite():
    return runpy.run_path(str(ROOT / 'tests/tools/timm_suite.py'))


def test_committed_result_is_of_the_whole_family_and_of_all_tests(suite):
    results = json.loads((ROOT / 'benchmarks/results/timm_suite.json').read_text())
    family = set(timm.list_models('cmr_*', module='cmr_resnet'))
    assert set(results['outcomes']) == family
    assert all(set(tests) == suite['TESTS'] for tests in results['outcomes'].values())
    assert {outcome for tests in results['outcomes'].values() for outcome in tests.values()} == {'passed'}
    assert results['passed'] == results['wanted'] == len(family) * len(suite['TESTS'])


def test_report_of_a_run_is_read_by_name_and_test_and_one_failure_is_the_names(suite, tmp_path):
    report = tmp_path / 'report.xml'
    report.write_text("""<testsuites><testsuite>
        <testcase name="test_model_forward[1-cmr_resnet18]"/>
        <testcase name="test_model_default_cfgs[meta-1-cmr_resnet18.a1_in1k]"><failure/></testcase>
        <testcase name="test_model_default_cfgs[meta-1-cmr_resnet18.a2_in1k]"/>
        <testcase name="test_model_forward[1-cmr_resnet50]"><skipped/></testcase>
    </testsuite></testsuites>""")
    assert suite['read_report'](report) == {
        'cmr_resnet18': {'test_model_forward': 'passed', 'test_model_default_cfgs': 'failure'},
        'cmr_resnet50': {'test_model_forward': 'skipped'}}
