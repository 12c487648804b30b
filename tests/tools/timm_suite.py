"""Run timm's own model tests on the CMR-ResNet family.

The tests are those of the sdist of the installed timm, unmodified: eight that choose models by name and three that
choose them by module. Two more load every checkpoint from the hub; ``--hub`` adds them.

    python tests/tools/timm_suite.py                               # all names of the family
    python tests/tools/timm_suite.py cmr_resnet18 cmr_resnet50     # some
"""
import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import timm

import cmr_layers  # noqa: F401  (registers the family)
from benchmarks.machine import describe, result_file

TESTS = {
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript', 'test_model_forward_intermediates_features',
    'test_model_forward_intermediates', 'test_prune_intermediate_layers_contract',
}
HUB_TESTS = {'test_model_load_pretrained', 'test_model_features_pretrained'}


def fetch_sdist(folder: Path) -> Path:
    """Download the sdist of the installed timm with pip and unpack it; return its root."""
    root = folder / f'timm-{timm.__version__}'
    if not (root / 'tests').is_dir():
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:',
             '--dest', str(folder), f'timm=={timm.__version__}'], check=True)
        with tarfile.open(folder / f'timm-{timm.__version__}.tar.gz') as archive:
            archive.extractall(folder, filter='data')
    return root


def run_suite(root: Path, names: list[str], tests: set[str], report: Path) -> int:
    """Run the tests of the unpacked sdist for the names, in a process of its own; return pytest's exit code."""
    here = Path(__file__).resolve().parent
    env = {key: value for key, value in os.environ.items() if key != 'GITHUB_ACTIONS'}  # it drops tests
    env.update(TORCH_BACKEND='cmr_layers', TIMEOUT='900', OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(
        [str(here.parents[1]), str(here), *filter(None, [os.environ.get('PYTHONPATH')])]))
    # ids look like test_model_forward[1-cmr_resnet18] and test_model_default_cfgs[meta-1-cmr_resnet18.a1_in1k]
    chosen_names = ' or '.join(f'{name}] or {name}.' for name in names)
    chosen_tests = ' or '.join(f'{test}[' for test in sorted(tests))
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'timm_plugin', '-p', 'no:cacheprovider', '-q',
         '--numprocesses', 'auto', '--maxprocesses', '4', '-W', 'ignore',
         '--no-header', f'--junitxml={report}', '-k', f'({chosen_names}) and ({chosen_tests})',
         'tests/test_models.py'],
        cwd=root, env=env).returncode


def read_report(report: Path) -> dict[str, dict[str, str]]:
    """Outcomes by name and test: {'cmr_resnet18': {'test_model_forward': 'passed', ...}, ...}."""
    outcomes: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter('testcase'):
        test, _, parameters = case.attrib['name'].rstrip(']').partition('[')
        name = parameters.rsplit('-', 1)[-1].partition('.')[0]
        failed = [child.tag for child in case if child.tag in ('failure', 'error', 'skipped')]
        # some tests run once for each tag of a name: one failure is the name's failure
        outcomes[name][test] = (failed or [outcomes[name].get(test, 'passed')])[0]
    return dict(outcomes)


def main() -> int:
    family = timm.list_models('cmr_*', module='cmr_resnet')
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(family)} (default: all)')
    parser.add_argument('--hub', action='store_true', help='also the two tests that load checkpoints from the hub')
    parser.add_argument('--cache', type=Path, help='folder to keep the sdist in (default: a temporary one)')
    parser.add_argument('--out', type=result_file, help='write the outcomes there, as JSON')
    args = parser.parse_args()
    names = args.names or family
    unknown = sorted(set(names) - set(family))
    if unknown:
        parser.error(f'unknown names {", ".join(unknown)}; choose from {", ".join(family)}')
    tests = TESTS | (HUB_TESTS if args.hub else set())

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = Path(temporary) / 'report.xml'
        code = run_suite(fetch_sdist(folder), names, tests, report)
        outcomes = read_report(report) if report.exists() else {}

    # a test that timm renames or stops choosing for us must not pass by being absent
    wrong = [
        f'{name}: {test} {outcomes.get(name, {}).get(test, "did not run")}'
        for name in names for test in sorted(tests) if outcomes.get(name, {}).get(test) != 'passed']
    passed = sum(outcome == 'passed' for tests in outcomes.values() for outcome in tests.values())
    print(f'timm {timm.__version__}: {passed} passed of {len(names) * len(tests)}', *wrong, sep='\n  ')
    if args.out:
        args.out.write_text(json.dumps(
            {**describe('pytest'), 'passed': passed, 'wanted': len(names) * len(tests), 'outcomes': outcomes},
            indent=1) + '\n')
    return 1 if wrong or code else 0


if __name__ == '__main__':
    sys.exit(main())
