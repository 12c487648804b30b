"""How long a launch may take on an H100 or H200: an estimate from machine code, never a measurement.

One program is run by :mod:`.emulate`. Then one of its warps is walked through what it executed, with a scoreboard of
registers. The warps that share its scheduler share the turns, and what a multiprocessor has once (shared memory, the
way to the second-level cache, tensor cores) is shared by all programs that it holds. The launch takes as many rounds of
programs as do not fit at once, and no less than its bytes take. Latencies are typical ones of this architecture, and
throughputs are those of NVIDIA's programming guide. Expect +-30 % for what waits on memory; two forms of one kernel
compare better than that.
"""
import math
import re
from functools import lru_cache
from typing import NamedTuple

from . import emulate
from .examine import Examined, examine
from .record import Launch
from .sass import Instruction, registers

__all__ = ['MULTIPROCESSORS', 'Prediction', 'predict', 'walk']

MULTIPROCESSORS = 132
CLOCK = 1755.  # cycles per microsecond
LAUNCH = .8  # microseconds between two kernels of a graph
# bytes per microsecond: second-level cache to multiprocessors, memory as a kernel reaches it, and memory at best
CACHE, MEMORY, MEMORY_PEAK = 6.0e6, 2.7e6, 3.0e6
TENSOR_PEAK = 800e6  # operations per microsecond in half precision, at best
SHORTEST = 1.  # microseconds: no launch is shorter
CACHE_SIZE = 50e6

# Cycles until a result can be used
LATENCY = {
    'LDS': 30, 'LDSM': 33, 'SHFL': 25, 'MUFU': 22, 'I2F': 22, 'F2I': 22, 'S2R': 25, 'S2UR': 25, 'R2UR': 12, 'LDC': 35,
    'HMMA': 33, 'ATOMG': 700, 'BAR': 30}
ARITHMETIC = 5
FROM_CACHE, FROM_MEMORY = 270, 600
BRANCH = 10
# Cycles that an instruction of a warp keeps a unit of its scheduler busy; one that is not here, one cycle of no unit
_UNITS: dict[str, tuple[str, int]] = {
    **dict.fromkeys((
        'IADD3', 'LOP3', 'SHF', 'LEA', 'ISETP', 'SEL', 'PRMT', 'VIMNMX', 'VIADD', 'VIADDMNMX', 'SGXT', 'IABS', 'FMNMX',
        'FSETP', 'FSEL', 'PLOP3', 'F2FP'), ('integer', 2)),
    'IMAD': ('multiply', 2),
    **dict.fromkeys(('MUFU', 'I2F', 'F2I', 'POPC', 'FLO'), ('special', 8))}


class Prediction(NamedTuple):
    """Microseconds of a launch, its floor, and what it depends on."""
    time: float
    floor: float
    bound: str  # 'instructions', 'cache' or 'memory': what takes longest
    programs: int
    resident: int
    waves: float  # rounds of programs
    conflicts: float
    executed: int  # instructions of a warp


def walk(examined: Examined, resident: int, latency: int) -> float:
    """Cycles of a program when its multiprocessor holds some of its kind."""
    code, trace = examined.compiled.code, examined.trace
    warps = examined.compiled.warps * resident
    turn = max(1., warps / 4)  # cycles until it is this warp's turn again
    requested = emulate.SECTOR * sum(a.sectors for a in trace.accesses.values()) * examined.compiled.warps
    missed = min(1., trace.bytes_through_cache / requested) if requested else 0.
    ready: dict[str, float] = {}
    free: dict[str, float] = {}
    time = 0.
    copies: list[float] = []  # asynchronous copies that no group holds yet, then the ends of the groups
    groups: list[float] = []
    products: list[float] = []  # likewise, matrix products of a warp group
    open_products = 0.
    before = -1

    def occupy(unit: str, cycles: float) -> float:
        """Wait for a unit, keep it busy, and return when it is done."""
        free[unit] = max(free.get(unit, 0.), time) + cycles
        return free[unit]

    for place, index in enumerate(trace.executed):
        instruction = code[index]
        base = instruction.base
        written, read = _registers(instruction)
        if index != before + 1:
            time += BRANCH
        before = index
        time = max([time, *(ready[name] for name in read if name in ready)])
        done = time + LATENCY.get(base, ARITHMETIC)
        access = trace.accesses.get(place)
        if access and access.wavefronts:
            done = max(done, occupy('shared memory', access.wavefronts * warps) + LATENCY.get(base, 0))
        if access and access.sectors:
            cycles = access.sectors * emulate.SECTOR / 64 * missed * warps
            arrived = occupy('fill', cycles) + latency
            done = max(done, arrived)
            if base == 'LDGSTS':
                copies.append(arrived)
        if base == 'SHFL':
            done = occupy('shared memory', warps) + LATENCY[base]
        elif base == 'LDGDEPBAR':
            groups.append(max(copies, default=time))
            copies = []
        elif base == 'DEPBAR' and (match := re.search(r'0x(\w+)', instruction.operands[-1])):
            kept = int(match[1], 16)
            time = max([time, *groups[:len(groups) - kept]])
        elif base == 'BAR':
            time = max(time, free.get('shared memory', 0.)) + LATENCY['BAR']
        elif base == 'HMMA':
            done = occupy('tensor core', _product(instruction) / 256 * turn) + LATENCY[base]
        elif base == 'HGMMA':
            open_products = occupy('tensor core', _product(instruction) / 2048 * warps / 4)
            if 'gsb0' in instruction.operands:
                products.append(open_products)
        elif base == 'WARPGROUP' and 'DEPBAR' in instruction.name:
            kept = int(instruction.operands[-1], 16)
            time = max([time, *(products[:len(products) - kept])]) + 20
        elif base in _UNITS or base.removeprefix('U') in _UNITS:
            unit, cycles = _UNITS[base if base in _UNITS else base.removeprefix('U')]
            end = occupy(unit, cycles * turn)
            done = max(done, end - cycles * turn + LATENCY.get(base, ARITHMETIC))
            time = max(time, end - cycles * turn)
        for name in written:
            ready[name] = done
        time += turn
    return max([time, *products, free.get('shared memory', 0.)])


@lru_cache(None)
def _registers(instruction: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    written, read = registers(instruction)
    return tuple(written), tuple(read)


def _product(instruction: Instruction) -> int:
    """Multiplications of a matrix instruction, counted as half-precision ones."""
    size = instruction.name.split('.')[1]
    if match := re.fullmatch(r'(\d+)x(\d+)x(\d+)', size):
        count = math.prod(map(int, match.groups()))
    else:  # HMMA names its shape as 16816, 1688 or 1684
        count = 16 * 8 * int(size[3:])
    return count * (2 if 'TF32' in instruction.name else 1)


def predict(launch: Launch, from_memory: bool) -> Prediction:
    """Estimate a launch in a CUDA graph.

    Args:
        launch: As :func:`.record.record` found it.
        from_memory: Whether its frames come from memory, as those of a large batch do, or from the second-level cache.
            What is small was just written in either case, and is in the cache.
    """
    examined = examine(launch)
    programs, resident = examined.programs, examined.resident
    moved = sum(buffer.size for buffer in launch.buffers.values())
    from_memory = from_memory and moved > CACHE_SIZE / 8
    latency = FROM_MEMORY if from_memory else FROM_CACHE
    at_once = MULTIPROCESSORS * resident
    waves = programs / at_once
    if waves >= 3:  # the multiprocessors do not wait for each other
        instructions = waves * walk(examined, resident, latency)
    else:
        full, rest = divmod(programs, at_once)
        instructions = full * walk(examined, resident, latency) if full else 0.
        instructions += walk(examined, -(-rest // MULTIPROCESSORS), latency) if rest else 0.
    times = {
        'instructions': instructions / CLOCK, 'cache': programs * examined.trace.bytes_through_cache / CACHE,
        'memory': moved / MEMORY if from_memory else 0.}
    bound = max(times, key=lambda name: times[name])
    floor = max(SHORTEST, moved / MEMORY_PEAK, launch.operations / TENSOR_PEAK)
    return Prediction(LAUNCH + times[bound], floor, bound, programs, resident, waves, examined.conflicts,
                      len(examined.trace.executed))
