"""What a kernel must be like to ship. A kernel that is new needs a line in RATIOS, and nothing else here.

Forms of a kernel for contiguous frames are there so that those run, too. They have to fit and not to spill, but only
those for channels_last, in half precision, have to be fast.
"""
from typing import Any

from .record import Launch

__all__ = ['KNOWN', 'OF_TRITON', 'RATIOS', 'SHARED', 'STACK', 'failures', 'slow', 'unexpected']

# What a block may have: the architectures' limits.
SHARED = {80: 101376, 90: 232448, 120: 101376}  # sm_80 has more, but what is compiled for it also runs on sm_86, sm_89
TENSOR_CORES = {80: 'HMMA', 90: 'HGMMA', 120: 'HMMA'}
STACK = 64  # bytes a thread: a few registers that ptxas put aside behind a loop cost nothing, hundreds would
BARRIERS = 96  # of a kernel; one that unrolls a loop over frames has many
LOOP_BARRIERS = 12  # of a loop's body: two for a pipeline of copies, others for changes of layout
CONFLICTS = 1.5  # passes over shared memory, for each that would do without bank conflicts,
LOST = .1  # if they take more than this of a program's time
NARROW = .05  # of the bytes of frames may move less than 16 at a time
WARPS = 8  # of a matrix product that a multiprocessor holds, so that some load while others multiply

# Predicted time over the floor, at most, of any stage of a CMR-ResNet-50: at batch 1, where a launch alone is .8 us and
# a floor 1 us at least, and at batch 8. Kernels of vectors are launched for little. Tighten these when one gets better.
RATIOS: dict[str, tuple[float, float]] = {
    '_pool_kernel': (3, 2),
    '_project_kernel': (6.5, 28),
    '_gate_kernel': (8.5, 28),
    '_mix_kernel': (2.5, 1.4),
    '_gated_conv_kernel': (3, 2),
    '_similarity_kernel': (4, 2),
    '_motion_kernel': (3.5, 2.2),
    '_end_mean_kernel': (2, 1.3),
    '_end_similarity_kernel': (2, 1.3),
}

# What is known to fail, by kernel: how its messages begin. Triton 3.6 sums what lies across warps with bank conflicts;
# with newer versions nothing fails (a test says so).
KNOWN: dict[str, tuple[str, ...]] = dict.fromkeys(
    ('_pool_kernel', '_gate_kernel', '_correlate_kernel'), ('bank conflicts',))
OF_TRITON = '3.6'


def failures(launch: Launch, capability: int, report: dict[str, Any]) -> list[str]:
    """Why a kernel must not ship, from :func:`.facts.report`. What is about sm_90 alone is left out elsewhere."""
    wrong = []
    if report['shared'] > SHARED[capability]:
        wrong.append(f'{report["shared"]} bytes of shared memory, {SHARED[capability]} fit')
    for kind in ('stack', 'local'):
        if report[kind] > STACK:
            wrong.append(f'{report[kind]} bytes of {kind} memory')
    if report.get('unknown'):
        wrong.append(f'instructions that semantics.py does not know: {", ".join(report["unknown"])}')
    half = dict(launch.signature).get('x') in ('*fp16', '*bf16')
    if half and launch.operations and TENSOR_CORES[capability] not in report['tensor_cores']:
        wrong.append(f'no {TENSOR_CORES[capability]}')
    frames = launch.frames.values()
    if any(not buffer.channels_last for buffer in frames):
        return wrong
    if half and not report['wide_loads']:
        wrong.append('no 16-byte loads')
    if report['barriers'] > BARRIERS:
        wrong.append(f'barriers: {report["barriers"]}, {BARRIERS} are allowed')
    if report['barriers_in_loop'] > LOOP_BARRIERS:
        wrong.append(f'barriers in a loop: {report["barriers_in_loop"]}, {LOOP_BARRIERS} are allowed')
    if report.get('conflicts', 1) > CONFLICTS and report['lost'] > LOST:
        wrong.append(f'bank conflicts: {report["conflicts"]} passes where 1 would do, {report["lost"]:.0%} of the time')
    if half:
        for kind in ('loads', 'stores'):
            if report.get(f'narrow_{kind}', 0) > NARROW:
                wrong.append(f'{kind} of less than 16 bytes move {report[f"narrow_{kind}"]:.0%} of the frames')
        warps = report.get('resident', 1) * dict(launch.options)['num_warps']
        if launch.operations and warps < WARPS:
            wrong.append(f'warps on a multiprocessor: {warps} ({report["limit"]}), {WARPS} are wanted')
    return wrong


def slow(row: dict[str, Any]) -> list[str]:
    """Why a row of :mod:`.prediction` is too slow."""
    if row['kernel'] not in RATIOS:
        return [f'no bound on predicted time: {row["kernel"]} has no entry in RATIOS']
    bound = RATIOS[row['kernel']][row['batch'] > 1]
    ratio = row['time'] / row['floor']
    return [f'predicted {ratio:.1f} times its floor, {bound} is allowed'] if ratio > bound else []


def unexpected(kernel: str, messages: list[str]) -> list[str]:
    """The messages that are not in KNOWN."""
    return [message for message in messages if not message.startswith(KNOWN.get(kernel, ()))]
