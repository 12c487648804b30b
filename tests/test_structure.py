"""How the package is cut: who may import whom, how far a call goes, and how long a file is."""
import ast
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize
from torch import nn

import cmr_layers
from cmr_layers import CME, SME, TIM, CMRBlock
from cmr_layers.ops import path as switch
from cmr_layers.ops import use_path

PACKAGE = Path(cmr_layers.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob('*.py'))}


def imported(name):
    """Files of the package that one of its files imports, anywhere in it."""
    found = set()
    here = ['cmr_layers', *Path(name).parent.parts]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module or '').split('.')] if node.module else base
            modules = [[*base, alias.name] for alias in node.names] + [base]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split('.') for alias in node.names]
        else:
            continue
        for module in modules:
            if module[:1] == ['cmr_layers']:
                path = '/'.join(module[1:])
                found |= {file for file in (f'{path}.py', f'{path}/__init__.py'.lstrip('/')) if file in FILES}
    # the file that holds the package of an imported file is run, too, but not asked for anything
    return {file for file in found if not (file.endswith('__init__.py') and any(
        other != file and other.startswith(file[:-len('__init__.py')]) for other in found))}


def test_the_imports_of_a_file_are_found():
    assert {'ops/path.py', 'ops/plain_cme_tim.py', 'ops/triton_cme_tim.py'} <= imported('ops/cme_tim.py')
    assert {'clip.py', 'bypass.py', 'ops/path.py'} <= imported('sme.py')


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('ops/')])
def test_ops_imports_nothing_of_the_package_but_ops(name):
    assert all(file.startswith('ops/') for file in imported(name))


@pytest.mark.parametrize('name', ['cme.py', 'sme.py', 'tim.py'])
def test_a_layer_imports_little(name):
    others = {file for file in imported(name) if not file.startswith('ops/')}
    # fold_norms is a layer's own `fuse`, and imports no layer
    assert others <= {'clip.py', 'checks.py', 'bypass.py', 'fuse.py'}


@pytest.mark.parametrize('name', FILES)
def test_only_an_operations_file_imports_its_forms(name):
    forms = {file for file in imported(name) if Path(file).name.startswith(('plain_', 'triton_'))}
    allowed = {
        'ops/block_end.py': {'ops/triton_block_end.py'},
        'ops/cme_tim.py': {'ops/plain_cme_tim.py', 'ops/triton_cme_tim.py', 'ops/triton_cme_tim_conv.py'},
        'ops/sme.py': {'ops/plain_sme.py', 'ops/triton_sme.py'},
        'ops/triton_block_end.py': {'ops/triton_cme_tim.py', 'ops/triton_sme.py'},
        'ops/triton_cme_tim.py': {'ops/plain_cme_tim.py'},
        'ops/triton_sme.py': {'ops/plain_sme.py', 'ops/triton_cme_tim.py'}}
    assert forms <= allowed.get(name, set())


@pytest.mark.parametrize('name', FILES)
def test_no_file_is_long(name):
    assert len(FILES[name].read_text().splitlines()) <= 400


# Calls

def is_form(file):
    return file.startswith('ops/plain_')


def entered(function):
    """Files of the package whose functions a call enters, one after the other, up to the first function of a form."""
    files = []

    def look(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == 'call' and PACKAGE in path.parents and not (files and is_form(files[-1])):
            files.append(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(before)
    assert is_form(files[-1]), files
    return files


LAYERS = {'CME': CME, 'SME': SME, 'TIM': TIM}


@pytest.mark.parametrize('train', [False, True])
def test_a_call_reaches_its_form_by_four_files_at_most(kind, train):
    # the layer's file, what it shares with its kind, the operation's, its layout's, and the one that decides; and for
    # an SME, whether its convolution and its norm may be computed without being called
    layer, x = LAYERS[kind](8, num_frames=4).train(train), torch.randn(4, 8, 3, 2)
    with torch.set_grad_enabled(train):
        layer(x)
        files = entered(lambda: layer(x))
    between = set(files) - {f'{kind.lower()}.py'} - {files[-1]}
    assert len(between) <= 4 + (kind == 'SME'), files


class Stack(nn.Module):
    """Blocks whose operations are counted: CME and TIM, each alone, together, with the convolution behind, and SME."""

    def __init__(self):
        super().__init__()
        down = nn.Conv2d(8, 16, 1)
        self.both = CMRBlock(8, 4, downsample=down, num_frames=4, reduction=2)
        self.cme = CMRBlock(16, 4, num_frames=4, tim='none', sme='none')
        self.tim = CMRBlock(16, 4, num_frames=4, cme='none', sme='none')

    def forward(self, x):
        return self.tim(self.cme(self.both(x)))


@pytest.mark.parametrize('path', ['auto', 'plain', 'reference'])
@pytest.mark.parametrize('train', [False, True])
def test_an_operation_decides_once_and_its_backward_pass_never(path, train, monkeypatch):
    model, x = randomize(Stack(), everything=True).train(train), torch.randn(4, 8, 3, 2, requires_grad=train)
    calls, choose = [], switch.choose

    def count(owner, operation, *args, **kwargs):
        calls.append(operation)
        return choose(owner, operation, *args, **kwargs)

    for module in [module for name, module in sys.modules.items() if name.startswith('cmr_layers')]:
        if getattr(module, 'choose', None) is choose:
            monkeypatch.setattr(module, 'choose', count)
    with use_path(path), torch.set_grad_enabled(train):
        y = model(x)
        assert calls == ['CME + TIM', 'SME', 'CME', 'TIM']
        if train:
            y.square().sum().backward()
    assert calls == ['CME + TIM', 'SME', 'CME', 'TIM'] and (x.grad is not None) == train
