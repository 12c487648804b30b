"""What one program of a launch does on sm_90, and how many of them a multiprocessor holds."""
import math
import struct
from functools import lru_cache
from typing import NamedTuple

from . import emulate
from .compiled import Compiled, build
from .record import Buffer, Launch
from .semantics import Program

__all__ = ['CAPABILITY', 'Examined', 'examine', 'occupancy', 'run']

CAPABILITY = 90
PARAMETERS = 0x210  # where the arguments begin in the constant bank


class Examined(NamedTuple):
    """A launch's code, and the run of the slower one of two of its programs."""
    compiled: Compiled
    trace: emulate.Trace
    programs: int
    resident: int  # programs that a multiprocessor can hold
    limit: str  # what keeps it from holding more

    @property
    def conflicts(self) -> float:
        """Passes over shared memory for each that would do; 1 is none."""
        ideal = sum(access.ideal for access in self.trace.accesses.values())
        return sum(access.wavefronts for access in self.trace.accesses.values()) / ideal if ideal else 1.

    @property
    def lost(self) -> float:
        """Cycles that shared memory is busy with the passes beyond those."""
        accesses = self.trace.accesses.values()
        return self.compiled.warps * sum(access.wavefronts - access.ideal for access in accesses)

    def narrow(self, launch: Launch, kind: str) -> float:
        """The share of the frames' bytes that a 'load' or 'store' of less than 16 bytes a thread moves."""
        numbers = [number for number, (name, _) in enumerate(launch.arguments, 1) if name in launch.frames]
        sizes = [(size, width) for (number, way, width), size in self.trace.moved.items()
                 if number in numbers and way == kind]
        total = sum(size for size, _ in sizes)
        return sum(size for size, width in sizes if width < 16) / total if total else 0.


def occupancy(compiled: Compiled) -> tuple[int, str]:
    """Programs that a multiprocessor of sm_90 holds at once, and what limits them."""
    by_warp = math.ceil(max(compiled.registers, 1) * 32 / 256) * 256
    limits = {
        'registers': 65536 // by_warp // compiled.warps,
        'shared memory': 233472 // (math.ceil((compiled.shared + 1024) / 128) * 128),
        'warps': 64 // compiled.warps, 'programs': 32}
    name = min(limits, key=lambda key: limits[key])
    return limits[name], name


def _constants(launch: Launch, compiled: Compiled) -> bytes:
    """The constant bank: the launch's arguments, with every tensor at an address of its own."""
    bank = bytearray(PARAMETERS + 1024)
    struct.pack_into('<III', bank, 0, 32 * compiled.warps, 1, 1)
    struct.pack_into('<III', bank, 12, *(*launch.grid, 1, 1)[:3])
    kinds = dict(launch.signature)
    for number, (name, value) in enumerate(launch.arguments, 1):
        if name in compiled.offsets:
            place = PARAMETERS + compiled.offsets[name]
            if isinstance(value, Buffer):
                struct.pack_into('<Q', bank, place, number << emulate.BUFFER)
            else:
                struct.pack_into({'fp32': '<f', 'i64': '<q'}.get(kinds[name], '<i'), bank, place, value)
    return bytes(bank)


def run(launch: Launch, place: tuple[int, int, int]) -> emulate.Trace:
    """One program of a launch, by its index in the grid."""
    compiled = build(launch, CAPABILITY)
    program = Program(32 * compiled.warps, place, _constants(launch, compiled), compiled.shared)
    return emulate.run(compiled.code, program)


@lru_cache(None)
def examine(launch: Launch) -> Examined:
    """Run the first and the middle program of a launch; the one that executes more stands for all."""
    compiled = build(launch, CAPABILITY)
    grid = (*launch.grid, 1, 1)[:3]
    places = dict.fromkeys([(0, 0, 0), (grid[0] // 2, grid[1] // 2, grid[2] // 2)])
    traces = [run(launch, place) for place in places]
    trace = max(traces, key=lambda trace: len(trace.executed))
    trace = trace._replace(bytes_through_cache=max(other.bytes_through_cache for other in traces))
    return Examined(compiled, trace, math.prod(grid), *occupancy(compiled))
