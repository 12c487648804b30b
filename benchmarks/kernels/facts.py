"""What a report says about a kernel: facts of its code and of one program, and nothing that is a matter of opinion."""
from typing import Any

from . import sass
from .compiled import build
from .examine import CAPABILITY, examine
from .model import FROM_CACHE, walk
from .record import Launch

__all__ = ['report']


def report(launch: Launch, capability: int) -> dict[str, Any]:
    """Resources and instructions of a kernel on an architecture, and on sm_90 what its programs do.

    ``lost`` is the share of a program's time in which shared memory serves bank conflicts.
    """
    compiled = build(launch, capability)
    found = {
        'shared': compiled.shared, 'reg': compiled.registers, 'stack': compiled.stack, 'local': compiled.local,
        'warps': compiled.warps, **sass.counts(compiled.code)}
    if capability == CAPABILITY:
        examined = examine(launch)
        found |= {
            'programs': examined.programs, 'resident': examined.resident, 'limit': examined.limit,
            'executed': len(examined.trace.executed), 'conflicts': round(examined.conflicts, 2),
            'lost': round(examined.lost / walk(examined, 1, FROM_CACHE), 2),
            'narrow_loads': round(examined.narrow(launch, 'load'), 2),
            'narrow_stores': round(examined.narrow(launch, 'store'), 2), 'unknown': examined.trace.unknown}
    return found
