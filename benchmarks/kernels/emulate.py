"""Run one program of a launch through its machine code, to see which instructions it executes and what they address.

All threads of the program run, on frames of zeros: trip counts, masks and addresses are those of the real launch, and
only what depends on data is not. A branch on data goes where zeros lead it.
"""
import re
from typing import NamedTuple

import numpy as np

from .sass import Instruction
from .semantics import DATA, Array, Program, address, compute

__all__ = ['Access', 'Trace', 'run']

LIMIT = 2_000_000  # instructions of a program, against a loop that does not end
SECTOR = 32  # bytes that move between the caches together
SAMPLES = 4  # executions of an instruction whose bank conflicts are looked at

BUFFER = 40  # bits of an address within a tensor

_SHARED = {'LDS', 'STS', 'LDSM', 'STSM'}
_GLOBAL = {'LDG', 'STG', 'LDGSTS'}
_NOTHING = {
    'NOP', 'BAR', 'LDGDEPBAR', 'DEPBAR', 'WARPGROUP', 'BSSY', 'BSYNC', 'BREAK', 'WARPSYNC', 'ENDCOLLECTIVE', 'MEMBAR',
    'FENCE', 'CCTL', 'ERRBAR', 'RED', 'BRA', 'HGMMA', 'STL', 'LDL'}


class Access(NamedTuple):
    """What the warps of a program do at one execution of a load or store, on average."""
    wavefronts: float  # passes over shared memory
    ideal: float  # passes that would do without bank conflicts
    sectors: float  # of global memory


class Trace(NamedTuple):
    """One program's run: indices of the instructions in the order of their execution, and its memory accesses."""
    executed: list[int]
    accesses: dict[int, Access]  # by place in ``executed``
    bytes_through_cache: int  # what one program moves between the second-level cache and its multiprocessor
    moved: dict[tuple[int, str, int], int]  # bytes by buffer (address >> BUFFER), 'load' or 'store', and width
    unknown: list[str]  # names of instructions that are not understood; they wrote zeros


def run(code: list[Instruction], program: Program) -> Trace:
    """Execute a program.

    Raises:
        RuntimeError: It does not end, or leaves its shared memory.
    """
    at = {instruction.address: index for index, instruction in enumerate(code)}
    waiting = {0: np.ones(program.threads, bool)}  # threads by the next instruction; the lowest one runs first
    executed: list[int] = []
    memory = _Memory(program)
    unknown: set[str] = set()
    while waiting:
        index = min(waiting)
        threads = waiting.pop(index)
        if index >= len(code):
            continue
        instruction = code[index]
        if len(executed) >= LIMIT:
            raise RuntimeError(f'the program did not end within {LIMIT} instructions, it is at {instruction}')
        executed.append(index)
        active = threads & program.is_true(instruction.guard) if instruction.guard else threads
        base = instruction.base
        following = threads
        if base == 'EXIT':
            following = threads & ~active
        elif base == 'BRA' and instruction.name != 'BRA.DIV' and instruction.target in at:
            jumps = active
            if len(instruction.operands) > 1:
                jumps = jumps & program.is_true(instruction.operands[0])
            following = threads & ~jumps
            if jumps.any():
                _add(waiting, at[instruction.target], jumps)
        elif base in _SHARED or base in _GLOBAL:
            if active.any():
                memory.access(len(executed) - 1, index, instruction, active)
        elif base not in _NOTHING:
            _write(program, instruction, active, unknown)
        if following.any():
            _add(waiting, index + 1, following)
    return Trace(executed, memory.accesses, memory.through_cache(), memory.moved, sorted(unknown))


def _add(waiting: dict[int, Array], index: int, threads: Array) -> None:
    waiting[index] = waiting[index] | threads if index in waiting else threads


def _write(program: Program, instruction: Instruction, active: Array, unknown: set[str]) -> None:
    if instruction.base in DATA and instruction.base != 'HFMA2' and not instruction.operands[0].startswith(('P', 'UP')):
        return  # a register of data stays what it was: nothing that is followed here depends on it
    result = compute(program, instruction)
    if result is None:
        unknown.add(instruction.name)
        return
    everyone = bool(active.all())
    for store, values in ((program.register, result[0]), (program.predicate, result[1])):
        for name, value in values.items():
            if name in ('RZ', 'URZ', 'PT', 'UPT'):
                continue
            before = store.get(name, program.zero.astype(value.dtype))
            store[name] = value if everyone else np.where(active, value, before)


class _Memory:
    """Loads and stores of a program: shared memory really, global memory as zeros."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.accesses: dict[int, Access] = {}
        self.moved: dict[tuple[int, str, int], int] = {}
        self._samples: dict[int, list[Access]] = {}  # by instruction
        self._cached: list[Array] = []  # sectors that the first-level cache keeps
        self._sectors = 0.  # that go past it

    def access(self, place: int, index: int, instruction: Instruction, active: Array) -> None:
        """Do what the instruction of an index does at a place of the run."""
        where = address(self.program, [text for text in instruction.operands if '[' in text][-1])
        if instruction.base in _GLOBAL:
            self.accesses[place] = self._global(instruction, where, active)
            return
        if instruction.base in ('LDS', 'STS'):
            _move(self.program, instruction, where, active)
        samples = self._samples.setdefault(index, [])
        if len(samples) < SAMPLES:
            samples.append(Access(*_wavefronts(instruction, where, active, self.program.threads // 32), 0))
        self.accesses[place] = samples[-1]

    def _global(self, instruction: Instruction, where: Array, active: Array) -> Access:
        program, base, width = self.program, instruction.base, instruction.width
        last = instruction.operands[-1]
        if base == 'LDGSTS' and re.fullmatch(r'!?U?P[T\d]', last):
            active = active & program.is_true(last)
        if base == 'LDG' and instruction.operands[0] != 'RZ':
            first = int(instruction.operands[0][1:])
            for name in (f'R{first + k}' for k in range(max(1, width // 4))):
                program.register[name] = np.where(active, program.zero, program.read(name))
        # no access straddles two sectors: its address is a multiple of its width
        here = where[active]
        sectors = here // np.uint64(SECTOR)
        warp = (program.thread[active] // np.uint32(32)).astype(np.uint64)
        requested = len(np.unique(sectors | warp << np.uint64(56)))
        if base == 'LDG':
            self._cached.append(np.unique(sectors))
        else:
            self._sectors += requested
        if len(here):
            key = int(here[0] >> np.uint64(BUFFER)), 'store' if base == 'STG' else 'load', width
            self.moved[key] = self.moved.get(key, 0) + width * len(here)
        warps = program.threads // 32
        passes = width / 4 if base == 'LDGSTS' else 0.  # into shared memory; the compiler swizzles it
        return Access(passes, passes, requested / warps)

    def through_cache(self) -> int:
        """Bytes between the second-level cache and the multiprocessor; the first level keeps what it once had."""
        distinct = len(np.unique(np.concatenate(self._cached))) if self._cached else 0
        return SECTOR * round(distinct + self._sectors)


def _move(program: Program, instruction: Instruction, place: Array, active: Array) -> None:
    """Between registers and shared memory."""
    store = instruction.base == 'STS'
    name = instruction.operands[-1 if store else 0]
    if name == 'RZ' and not store:
        return
    where = place[active].astype(np.int64)
    if int(where.max()) + instruction.width > len(program.shared):
        raise RuntimeError(f'{instruction} leaves the shared memory of {len(program.shared)} bytes')
    size = min(4, instruction.width)
    for k in range(max(1, instruction.width // 4)):
        register = 'RZ' if name == 'RZ' else f'R{int(name[1:]) + k}'
        value = program.read(register).copy()
        if store:
            for byte in range(size):
                program.shared[where + 4 * k + byte] = value[active] >> np.uint32(8 * byte) & np.uint32(255)
        else:
            value[active] = sum(
                program.shared[where + 4 * k + byte].astype(np.uint32) << np.uint32(8 * byte) for byte in range(size))
            program.register[register] = value


def _wavefronts(instruction: Instruction, place: Array, active: Array, warps: int) -> tuple[float, float]:
    """Passes over the 32 banks of 4 bytes that a warp's access takes, and that it would take without conflicts.

    A pass serves each bank one word, and a word to all threads that want it. That is the lower end: the hardware takes
    wide accesses by quarters of a warp, and may find fewer words in common.
    """
    matrices = instruction.base in ('LDSM', 'STSM')
    passes = ideal = 0
    for warp in range(warps):
        here = place[32 * warp:32 * warp + 32][active[32 * warp:32 * warp + 32]].astype(np.int64)
        if matrices:  # each 8 threads name the rows of a matrix, 16 bytes each
            number = int(instruction.name[-1]) if instruction.name[-2] == '.' else 1
            groups, words = [here[8 * k:8 * k + 8] for k in range(number)], 4
        else:
            groups, words = [here], max(1, instruction.width // 4)
        for group in groups:
            if len(group):
                wanted = np.unique((group // 4)[:, None] + np.arange(words))
                passes += int(np.bincount(wanted % 32).max())
                ideal += -(-len(wanted) // 32)
    return passes / warps, ideal / warps
