"""The pages show the committed results, between their markers."""
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from benchmark_results import ORIGIN, cells, entry, results

from benchmarks import flops, report
from benchmarks.motion import tables as motion
from benchmarks.runtime import goals, tables

ROOT = Path(__file__).parents[2]
DEVICES = ('cpu', 'cuda')


def kernel(name, sm, reg, failures=()):
    run = {'conflicts': reg / 10, 'resident': reg} if sm == 90 else {}
    return {'kernel': name, 'sm': sm, 'reg': reg, 'shared': 100 * reg, 'stack': 0, 'barriers': 5, 'barriers_in_loop': 2,
            'tensor_cores': ['HMMA'], **run, 'failures': list(failures)}


def test_table_of_kernels_has_the_worst_variant():
    rows, head = cells(report.render_kernels({
        **ORIGIN, 'kernels': [kernel('_a', 80, 30), kernel('_a', 90, 10), kernel('_a', 90, 20, ['no HGMMA']),
                              kernel('_b', 80, 10)]}))
    assert [row[head.index('variants')] for row in rows] == ['3', '1']
    assert [row[head.index('registers')] for row in rows] == ['30', '10']
    assert rows[0][head.index('bytes of shared memory')] == '3000'
    assert [row[head.index('bank conflicts')] for row in rows] == ['2.0', '']
    assert [row[head.index('programs at once')] for row in rows] == ['10', '']
    assert [row[-1] for row in rows] == ['1 fail', 'ok']


def test_predictions_are_compared_and_named_so():
    def sums(time, ratio):
        part = {'time': time, 'floor': 10., 'launches': 2}
        return {'sums': {'1': {**part, 'kernels': {'_a': part}, 'ratio': ratio}}}

    now, before, fused = {**ORIGIN, **sums(20., [1.1, 1.2])}, sums(50., [1.5, 2.]), sums(15., [1.05, 1.1])
    text = report.render_prediction(now, before, fused)
    assert text.startswith('Predicted, not measured.')
    rows, head = cells(text)
    assert [row[0] for row in rows] == ['`_a`', 'all', 'CMR over plain']
    assert head[1:] == [
        'launches before', 'us before', 'launches now', 'us now', 'launches fused', 'us fused', 'floor, us']
    assert rows[0][1:] == ['2', '50', '2', '20', '2', '15', '10']
    assert rows[2][1:] == ['', '1.50 to 2.00', '', '1.10 to 1.20', '', '1.05 to 1.10', '']
    alone, head = cells(report.render_prediction(now))
    assert head[1:] == ['launches now', 'us now', 'floor, us'] and alone[0][1:] == ['2', '20', '10']


def test_every_section_has_its_page():
    found = report.pages()
    assert set(found) == {
        'README.md',
        *(f'docs/{page}.md' for page in (
            'backbones', 'benchmarks', 'motion', 'performance', 'paper', 'testing', 'training'))}
    assert set(found['docs/benchmarks.md']) == {
        'counts', 'goals', *(f'{device}-{name}' for device in DEVICES for name in ('plot', *tables.SECTIONS))}
    assert set(found['docs/performance.md']) == {
        'kernels', 'kernels-prediction', 'gpu-checks', 'gpu-kernels', 'gpu-bf16'}
    assert set(found['docs/paper.md']) == {'flops'} and set(found['docs/testing.md']) == {'timm-suite'}
    assert set(found['docs/motion.md']) == {
        'motion-gates', 'motion-latency', 'motion-search', *motion.SECTIONS}
    assert set(found['README.md']) == {'coverage', 'frozen'} and set(found['docs/training.md']) == {'frozen-training'}


def test_what_has_no_results_says_which_command_makes_them(tmp_path):
    for parts in report.pages(tmp_path).values():
        for name, text in parts.items():
            assert 'not measured yet' in text
            if name == 'goals':
                assert text.count('not measured yet') == len(goals.GOALS)
            elif name.startswith(('gpu-', 'cuda-')) and not name.endswith('plot'):
                assert text == 'not measured yet: `python -m benchmarks.gpu`'
            elif not name.endswith('plot'):
                assert re.fullmatch(r'not measured yet: `python .* --out benchmarks/results/\S+\.json`', text)


def test_pages_are_rewritten_between_their_markers(tmp_path, monkeypatch, capsys):
    pages, folder = {tmp_path / page: parts for page, parts in report.pages(tmp_path).items()}, tmp_path / 'docs'
    folder.mkdir()
    (tmp_path / 'benchmarks/results').mkdir(parents=True)
    for page, parts in pages.items():
        page.write_text(''.join(f'<!-- {name} -->\nOLD TEXT\n<!-- /{name} -->\nMore of {name}.\n' for name in parts))
    run = results([entry('tsn'), entry('tsm'), entry('cmr')])
    (tmp_path / 'benchmarks/results/runtime-cpu.json').write_text(json.dumps(run))
    suite = {'passed': 3, 'wanted': 4}
    (tmp_path / 'benchmarks/results/timm_suite.json').write_text(json.dumps(suite))
    monkeypatch.setattr(report, 'stale_pages', partial(report.stale_pages, tmp_path))
    monkeypatch.setattr(report, 'stale_plots', partial(report.stale_plots, tmp_path))

    def main(*args):
        monkeypatch.setattr(sys, 'argv', ['report', *args])
        return report.main()

    assert main('--check') == 1 and all('OLD TEXT' in page.read_text() for page in pages)
    error = capsys.readouterr().err
    assert all(f'{page.name} is stale' in error for page in pages) and 'benchmarks-cpu.svg is stale' in error
    assert main() == 0
    texts = {page: page.read_text() for page in pages}
    for page, text in texts.items():
        assert 'OLD TEXT' not in text and all(f'More of {name}.' in text for name in pages[page])
    assert 'baseline+CME&SME' in texts[folder / 'benchmarks.md']
    assert '<!-- timm-suite -->\n3 of 4 tests\n<!-- /timm-suite -->' in texts[folder / 'testing.md']
    assert main('--check') == 0
    assert main() == 0 and all(page.read_text() == text for page, text in texts.items())


def test_the_pages_show_the_committed_results():
    assert not report.stale_pages() and not report.stale_plots()


def test_committed_counts_are_what_the_code_gives():
    counts = json.loads((ROOT / 'benchmarks/results/flops.json').read_text())
    assert flops.count(flops.build(), 8) == pytest.approx(counts['table 1']['8 frames'])
    assert counts['table 1']['8 frames']['gmacs'] == pytest.approx(39.46, abs=.01)  # peers' own count


def test_committed_results_name_no_path_of_a_machine():
    for path in (ROOT / 'benchmarks/results').glob('*.json'):
        assert not re.search(r'["\s=]/\w', path.read_text()), path


@pytest.mark.parametrize('text', [
    '', '<!-- a -->', '<!-- /a --> <!-- a -->', '<!-- a --><!-- /a --><!-- a --><!-- /a -->'])
def test_page_without_its_markers(text):
    with pytest.raises(ValueError, match='there must be one <!-- a --> and one <!-- /a --> after it'):
        report.replace(text, {'a': 'new'})
