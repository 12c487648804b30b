"""A kernel compiled for an architecture: its machine code, and what it takes of a multiprocessor."""
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .record import Launch

__all__ = ['Compiled', 'build']


class Compiled(NamedTuple):
    """Machine code of a kernel and its resources: registers of a thread, bytes of stack and of shared memory, warps."""
    code: list[sass.Instruction]
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    offsets: dict[str, int]  # of the arguments, from the first one's place in the constant bank


def build(launch: Launch, capability: int) -> Compiled:
    """Compile the kernel of a launch."""
    return _build(launch.specialisation, capability)


@lru_cache(None)
def _build(specialisation: tuple[Any, ...], capability: int) -> Compiled:
    launch = Launch(*specialisation)
    positions = {name: (launch.kernel.arg_names.index(name),) for name, _ in launch.signature}
    source = ASTSource(
        launch.kernel, dict(launch.signature), {positions[name]: value for name, value in launch.constants},
        {positions[name]: [['tt.divisibility', 16]] for name in launch.aligned})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(launch.options))
    usage, code = _disassembled(compiled.asm['cubin'])
    found = {key: int(value) for key, value in re.findall(r'\b(REG|STACK|LOCAL):(\d+)', usage)}
    return Compiled(
        sass.parse(code), found['REG'], found['STACK'], found['LOCAL'], compiled.metadata.shared,
        compiled.metadata.num_warps, _offsets(launch, compiled.asm['ptx']))


def _disassembled(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()

        def run(option: str) -> str:
            command = [str(tools / 'cuobjdump'), option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        return run('--dump-resource-usage'), run('-sass')


def _offsets(launch: Launch, ptx: str) -> dict[str, int]:
    """Where the arguments lie: one after the other, each at a multiple of its size. Triton appends some of its own."""
    signature = dict(launch.signature)
    names = [name for name in launch.kernel.arg_names if signature[name] != 'constexpr']
    sizes = [int(bits) // 8 for bits in re.findall(r'\.param \.[bfsu](\d+) ', ptx.split('.entry')[1].split(')')[0])]
    assert len(sizes) >= len(names), (names, sizes)
    offsets, end = {}, 0
    for name, size in zip(names, sizes):
        start = -(-end // size) * size
        offsets[name], end = start, start + size
    return offsets
