"""benchmarks.kernels: what a ResNet-50 launches, compiled for GPUs that are not here, run through its machine code."""
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('triton')
import torch
import triton
import triton.language as tl

from benchmarks.kernels import compiled, emulate, examine, facts, limits, model, network, prediction, record, sass
from benchmarks.kernels.semantics import Program, compute
from cmr_layers.ops import triton_cme_tim

RESULTS = Path(__file__).parents[2] / 'benchmarks/results'


# The kernels of the package

# dtype, layout, frames, stage, modes of the network, architectures
CASES = {
    'bf16, channels_last': ('bf16', True, 8, '256x56', network.MODES, (90,)),
    'bf16, channels_last, inference': ('bf16', True, 8, '256x56', ('folded',), (80,)),
    'bf16, channels_last, inference, sm_120': ('bf16', True, 8, '256x56', ('folded',), (120,)),
    'fp16, contiguous, 5 frames': ('fp16', False, 5, '2048x7', ('training',), (90,)),
    'fp32, channels_last, inference': ('fp32', True, 8, '2048x7', ('folded',), (120,)),
    'fp32, channels_last, training': ('fp32', True, 8, '2048x7', ('training',), (90,)),
    'fp16, channels_last, 32 frames': ('fp16', True, triton_cme_tim.MAX_FRAMES, '2048x7', ('folded',), (90,)),
}


# what is left has each data type, each architecture and each mode
SLOW = (
    'bf16, channels_last, inference, sm_120', 'fp16, contiguous, 5 frames', 'fp32, channels_last, training',
    'fp16, channels_last, 32 frames')


@pytest.mark.parametrize('case', [
    pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_kernels_compile_and_keep_their_limits(case):
    dtype, channels_last, num_frames, stage, modes, capabilities = CASES[case]
    found = network.collect([dtype], [channels_last], [num_frames], [stage], modes)
    assert len({launch.name for launch in found}) >= 6
    messages = {}
    for launch in found:
        for capability in capabilities:
            failed = limits.failures(launch, capability, facts.report(launch, capability))
            messages.setdefault(launch.name, []).extend(failed)
    new = {name: limits.unexpected(name, failed) for name, failed in messages.items()}
    assert not any(new.values()), new
    # what is known to fail is an older version's
    assert triton.__version__.startswith(limits.OF_TRITON) or not any(messages.values()), messages


def test_every_kernel_of_inference_has_a_bound_on_its_time():
    launches = [*network.launches(1), *network.launches(1, mode='fused')]
    assert {launch.name for launch in launches} == set(limits.RATIOS)


@pytest.mark.parametrize('num_frames', [triton_cme_tim.MAX_FRAMES, triton_cme_tim.MAX_FRAMES + 1])
def test_clips_too_long_for_the_kernel_of_the_gates_leave_them_to_a_library(num_frames):
    names = {launch.name for launch in network.launches(1, num_frames)}
    assert '_mix_kernel' in names
    assert ('_gate_kernel' in names) == (num_frames <= triton_cme_tim.MAX_FRAMES)


def test_an_unknown_mode_is_refused():
    with pytest.raises(
            ValueError, match=r"mode must be one of \('folded', 'fused', 'unfolded', 'training'\), got 'fast'"):
        network.launches(mode='fast')


def test_recording_gives_the_kernels_back():
    kernel = triton_cme_tim._mix_kernel
    with pytest.raises(ZeroDivisionError):
        record.record(lambda: 1 / 0)
    assert triton_cme_tim._mix_kernel is kernel


# Small kernels about which everything is known

@triton.jit
def _copy(x, y, n, columns, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = i // columns * stride + i % columns
    tl.store(y + at, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def _sums(x, y, n, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.sum(total, 0)
    for start in range(0, n, BLOCK):
        v = tl.load(x + start + tl.arange(0, BLOCK))
        if INSIDE:
            number += tl.sum(v, 0)
        else:
            total += v
    tl.store(y, number + tl.sum(total, 0))


@triton.jit
def _product(x, w, y, n, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, n, SIZE):
        rows, columns = tl.load(x + i * n + start + j), tl.load(w + j * n + start + i)
        acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
    tl.store(y + i * SIZE + j, acc)


@triton.jit
def _spill(x, y, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    v = tl.load(x + i * SIZE + j)
    for shift in tl.static_range(2):
        v = tl.trans(v) * tl.sum(v, 1)[:, None] + shift
    tl.store(y + i * SIZE + j, v)


def launch(kernel, grid, *args, **options):
    found = []
    record.Recorder(kernel, found)[grid](*args, **options)
    return found[0]


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, device='meta', dtype=dtype)


@pytest.mark.parametrize('n, columns', [(4096, 32), (1000, 7), (1, 1)])
def test_all_programs_together_move_every_element_once(n, columns):
    grid = (-(-n // 256),)
    one = launch(_copy, grid, tensor(4096), tensor(65536), n, columns, 16 * columns + 1, BLOCK=256, num_warps=4)
    moved = {'load': 0, 'store': 0}
    for program in range(*grid):
        trace = examine.run(one, (program, 0, 0))
        assert not trace.unknown
        for (_, kind, _), size in trace.moved.items():
            moved[kind] += size
    assert moved == {'load': 4 * n, 'store': 4 * n}


def test_addresses_follow_a_division():
    # rows of 8 numbers, one sector each, a sector apart: 1024 numbers are 128 sectors; next to each other, too
    apart = launch(_copy, (1,), tensor(1024), tensor(65536), 1024, 8, 16, BLOCK=1024, num_warps=4)
    assert examine.run(apart, (0, 0, 0)).bytes_through_cache == 4096 + 4096
    # rows of 2 numbers in a sector each: 512 sectors
    narrow = launch(_copy, (1,), tensor(1024), tensor(65536), 1024, 2, 8, BLOCK=1024, num_warps=4)
    assert examine.run(narrow, (0, 0, 0)).bytes_through_cache == 4096 + 512 * emulate.SECTOR


@pytest.mark.parametrize('inside', [False, True])
def test_a_loop_costs_as_much_as_it_is_long(inside):
    def look(trips):
        found = examine.examine(launch(_sums, (1,), tensor(2 ** 20), tensor(1), 512 * trips, 512, inside, num_warps=4))
        return len(found.trace.executed), model.walk(found, 1, model.FROM_CACHE)

    counts, cycles = zip(*(look(trips) for trips in (16, 32, 48)))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0
    assert cycles[2] - cycles[1] == pytest.approx(cycles[1] - cycles[0], rel=.02)
    # every trip waits for memory, at least
    assert cycles[1] - cycles[0] > (16 if inside else 4) * model.FROM_CACHE


def test_barriers_in_a_loop_are_found():
    def barriers(inside):
        one = launch(_sums, (1,), tensor(2 ** 20), tensor(1), 8192, 512, inside, num_warps=4)
        return facts.report(one, 90)

    assert barriers(True)['barriers_in_loop'] > 0 and barriers(False)['barriers_in_loop'] == 0
    assert barriers(False)['barriers'] > 0 and barriers(False)['loops'] == 1


def test_conflicts_of_a_product_without_tensor_cores_are_found():
    def report(precision):
        frames, weight, out = tensor(32, 256), tensor(32, 256), tensor(32, 32)
        return facts.report(launch(_product, (1,), frames, weight, out, 256, 32, precision, num_warps=4), 90)

    fma, tf32 = report('ieee'), report('tf32')
    assert not fma['tensor_cores'] and fma['conflicts'] > limits.CONFLICTS and fma['lost'] > limits.LOST
    assert tf32['tensor_cores'] and tf32['conflicts'] <= limits.CONFLICTS
    plain = facts.report(launch(_copy, (1,), tensor(1024), tensor(1024), 1024, 8, 8, BLOCK=1024, num_warps=4), 90)
    assert plain['conflicts'] == 1


def test_a_kernel_that_spills_is_seen():
    one = launch(_spill, (1,), tensor(128, 128), tensor(128, 128), 128, num_warps=2)
    found = facts.report(one, 90)
    assert found['stack'] > limits.STACK and 'bytes of stack memory' in limits.failures(one, 90, found)[0]


def test_bank_conflicts_are_counted():
    def passes(stride, name='LDS', threads=32):
        program = Program(threads, (0, 0, 0), b'', 4096)
        where = np.arange(threads, dtype=np.uint64) * np.uint64(stride)
        one = sass.Instruction(0, '', name, ('R0', '[R1]'))
        return emulate._wavefronts(one, where, np.ones(threads, bool), program.threads // 32)

    assert passes(4) == (1, 1) and passes(8) == (2, 1) and passes(128) == (32, 1)
    assert passes(0) == (1, 1)  # all read the same word
    assert passes(16, 'LDS.128') == (4, 4) and passes(32, 'LDS.128') == (8, 4) and passes(0, 'LDS.128') == (1, 1)
    assert passes(16, 'LDSM.16.M88.4') == (4, 4) and passes(128, 'LDSM.16.M88.4') == (32, 4)
    assert passes(128, threads=64) == (32, 1)  # of a warp


# Instructions

MANY = 32
REGISTERS = {'R1': 7, 'R2': 0xfffffff0, 'R3': 0x80000001, 'R4': 3, 'R5': 0, 'R6': 0xffffffff, 'R7': 0xffffffff}


def execute(text, **predicates):
    program = Program(MANY, (3, 2, 1), bytes(0x210) + (0x1234).to_bytes(4, 'little'), 64)
    program.register.update({name: np.full(MANY, value, np.uint32) for name, value in REGISTERS.items()})
    program.predicate.update({name: np.full(MANY, value) for name, value in predicates.items()})
    one, = sass.parse(f'/*0000*/ {text} ;')
    registers, results = compute(program, one)
    return {name: int(v[0]) for name, v in registers.items()} | {name: bool(v[0]) for name, v in results.items()}


@pytest.mark.parametrize('text, want', [
    ('MOV R0, c[0x0][0x210]', {'R0': 0x1234}),
    ('S2R R0, SR_CTAID.Y', {'R0': 2}),
    ('IMAD R0, R1, R4, 0x5', {'R0': 26}),
    ('IMAD.WIDE R8, R2, R4, RZ', {'R8': 0xffffffd0, 'R9': 0xffffffff}),
    ('IMAD.WIDE.U32 R8, R2, R4, R4', {'R8': 0xffffffd3, 'R9': 2}),
    ('IMAD.HI.U32 R0, R2, R4, RZ', {'R0': 2}),
    ('IADD3 R0, P1, R6, R1, RZ', {'R0': 6, 'P1': True}),
    ('IADD3 R0, P1, R1, -R4, RZ', {'R0': 4, 'P1': True}),
    ('IADD3 R0, P1, R4, -R1, RZ', {'R0': 0xfffffffc, 'P1': False}),
    ('IADD3.X R0, R1, R4, RZ, P0, !PT', {'R0': 11}),
    ('VIADDMNMX R0, R1, R4, R6, PT', {'R0': 0xffffffff}),
    ('VIMNMX.U32 R0, R1, R6, PT', {'R0': 7}),
    ('LEA R0, P1, R2, R6, 0x4', {'R0': 0xfffffeff, 'P1': True}),
    ('LEA.HI R0, R3, R1, RZ, 0x1', {'R0': 8}),
    ('LEA.HI.X.SX32 R0, R3, R4, 0x1, P0', {'R0': 3}),
    ('SHF.L.U32 R0, R1, 0x4, RZ', {'R0': 0x70}),
    ('SHF.L.U64.HI R0, R3, 0x2, R1', {'R0': 30}),
    ('SHF.R.S32.HI R0, RZ, 0x1, R3', {'R0': 0xc0000000}),
    ('SHF.R.U64 R0, R3, 0x1, R1', {'R0': 0xc0000000}),
    ('SGXT R0, R3, 0x1', {'R0': 0xffffffff}),
    ('LOP3.LUT R0, R1, 0x3, RZ, 0xc0, !PT', {'R0': 3}),
    ('LOP3.LUT P1, RZ, R5, 0x3, RZ, 0xc0, !PT', {'RZ': 0, 'P1': False}),
    ('PRMT R0, R3, 0x4321, R1', {'R0': 0x07800000}),
    ('SEL R0, R1, R4, !P0', {'R0': 3}),
    ('IABS R0, R2', {'R0': 16}),
    ('P2R R0, PR, RZ, 0x3', {'R0': 1}),
    ('HFMA2.MMA R0, -RZ, RZ, 0, 2.384185791015625e-07', {'R0': 4}),
    ('ISETP.LT.AND P1, PT, R2, R1, PT', {'P1': True}),
    ('ISETP.LT.U32.AND P1, PT, R2, R1, PT', {'P1': False}),
    ('ISETP.GE.AND.EX P1, PT, R1, 0x7, PT, P0', {'P1': True}),
    ('ISETP.GE.AND.EX P1, PT, R1, 0x7, PT, !P0', {'P1': False}),
    ('PLOP3.LUT P1, PT, P0, PT, PT, 0x80, 0x0', {'P1': True, 'PT': False}),
    ('VOTEU.ANY UP1, P0', {'UP1': True}),
])
def test_instructions(text, want):
    assert execute(text, P0=True) == want


def test_integers_divide_as_the_compiler_has_it():
    # by the reciprocal of a converted number
    program = Program(MANY, (0, 0, 0), b'', 64)
    program.register['R1'] = np.arange(1, MANY + 1, dtype=np.uint32) * np.uint32(97)
    for text in ('I2F.U32.RP R2, R1', 'MUFU.RCP R2, R2', 'F2I.FTZ.U32.TRUNC.NTZ R3, R2'):
        one, = sass.parse(f'/*0000*/ {text} ;')
        if text.startswith('F2I'):  # times 2^32, as the exponent's offset does
            program.register['R2'] = program.register['R2'] + np.uint32(0x0ffffffe)
        program.register.update(compute(program, one)[0])
    quotients = 2 ** 32 / program.register['R1'].astype(float)
    assert np.allclose(program.register['R3'], quotients, rtol=1e-6)


def test_an_instruction_that_is_not_known_is_reported():
    program = Program(MANY, (0, 0, 0), b'', 64)
    trace = emulate.run(sass.parse('/*0000*/ IFROBNICATE R0, R1 ;\n/*0010*/ EXIT ;'), program)
    assert trace.unknown == ['IFROBNICATE'] and trace.executed == [0, 1]
    one = network.launches(1)[0]
    report = {**facts.report(one, 90), 'unknown': trace.unknown}
    assert any('IFROBNICATE' in message for message in limits.failures(one, 90, report))


def test_threads_that_part_meet_again():
    code = sass.parse("""
        /*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ ISETP.LT.AND P0, PT, R0, 0x10, PT ;
        /*0020*/ @P0 BRA 0x50 ;
        /*0030*/ MOV R1, 0x1 ;
        /*0040*/ BRA 0x60 ;
        /*0050*/ MOV R1, 0x2 ;
        /*0060*/ IADD3 R2, R1, R1, RZ ;
        /*0070*/ EXIT ;""")
    program = Program(MANY, (0, 0, 0), b'', 64)
    assert emulate.run(code, program).executed == [0, 1, 2, 3, 4, 5, 6, 7]
    assert program.register['R2'].tolist() == [4] * 16 + [2] * 16


def test_a_program_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(emulate, 'LIMIT', 100)
    code = sass.parse('/*0000*/ NOP ;\n/*0010*/ BRA 0x0 ;\n/*0020*/ EXIT ;')
    with pytest.raises(RuntimeError, match='did not end within 100 instructions'):
        emulate.run(code, Program(MANY, (0, 0, 0), b'', 64))


def test_scheduling_notes_are_no_operands():
    one, _ = sass.parse('/*0000*/ @P0 BRA 0x1260   ?trans6 ;\n/*0010*/ EXIT &req={0} ;')
    assert (one.guard, one.operands, one.target) == ('P0', ('0x1260',), 0x1260)


def test_text_without_code_is_refused():
    with pytest.raises(ValueError, match='text holds no instructions'):
        sass.parse('Fatbin elf code')


# Limits, occupancy and times

@pytest.mark.parametrize('registers, shared, warps, want', [
    (32, 0, 4, (16, 'registers')), (128, 0, 8, (2, 'registers')), (136, 0, 8, (1, 'registers')),
    (24, 100_000, 4, (2, 'shared memory')), (16, 0, 8, (8, 'warps')), (16, 0, 1, (32, 'programs'))])
def test_programs_that_a_multiprocessor_holds(registers, shared, warps, want):
    assert examine.occupancy(compiled.Compiled([], registers, 0, 0, shared, warps, {})) == want


def test_limits_see_what_must_not_ship():
    one = next(v for v in network.launches() if v.operations and '256x56' in network.places([v]))
    good = {**facts.report(one, 90), 'stack': 0, 'barriers': 0, 'resident': 1}
    assert limits.failures(one, 90, good) == [] and limits.failures(one, 80, good) == ['no HMMA']
    for change, message in {
            ('shared', 300000): '300000 bytes of shared memory, 232448 fit',
            ('stack', 128): '128 bytes of stack memory',
            ('wide_loads', 0): 'no 16-byte loads', ('barriers', 97): 'barriers: 97, 96 are allowed',
            ('barriers_in_loop', 13): 'barriers in a loop: 13, 12 are allowed',
            ('narrow_stores', .5): 'stores of less than 16 bytes move 50% of the frames'}.items():
        assert limits.failures(one, 90, {**good, change[0]: change[1]}) == [message]
    conflicts = {**good, 'conflicts': 16., 'lost': .5}
    assert limits.failures(one, 90, conflicts) == ['bank conflicts: 16.0 passes where 1 would do, 50% of the time']
    assert limits.failures(one, 90, {**conflicts, 'lost': .05}) == []  # they are few
    few = one._replace(options=tuple({**dict(one.options), 'num_warps': 4}.items()))
    assert limits.failures(few, 90, good)[0].startswith('warps on a multiprocessor: 4 (')


def test_a_kernel_has_a_bound_on_its_time(monkeypatch):
    row = {'kernel': '_new_kernel', 'batch': 8, 'time': 30., 'floor': 10.}
    assert limits.slow(row) == ['no bound on predicted time: _new_kernel has no entry in RATIOS']
    monkeypatch.setitem(limits.RATIOS, '_new_kernel', (2, 3))
    assert limits.slow(row) == []
    assert limits.slow({**row, 'batch': 1}) == ['predicted 3.0 times its floor, 2 is allowed']


def test_no_prediction_is_below_what_the_bytes_take():
    one = launch(_copy, (4096,), tensor(2 ** 22), tensor(2 ** 22), 2 ** 22, 8, 8, BLOCK=1024, num_warps=4)
    size = 2 * 4 * 2 ** 22
    cache, memory = model.predict(one, False), model.predict(one, True)
    assert cache.time >= model.LAUNCH + size / model.CACHE and memory.time >= model.LAUNCH + size / model.MEMORY
    assert memory.time > cache.time and cache.floor == memory.floor == size / model.MEMORY_PEAK
    assert cache.waves == pytest.approx(4096 / (model.MULTIPROCESSORS * cache.resident))


# The network

def test_a_network_launches_what_its_blocks_say():
    found = network.launches(1)
    names = [launch.name for launch in found]
    assert names.count('_pool_kernel') == 16 and names.count('_motion_kernel') == 4
    assert names.count('_mix_kernel') + names.count('_gated_conv_kernel') == 16
    places = network.places(found)
    assert [places[k] for k, name in enumerate(names) if name == '_pool_kernel'] == (
        ['64x56'] + ['256x56'] * 3 + ['512x28'] * 4 + ['1024x14'] * 6 + ['2048x7'] * 2)
    training = {launch.name for launch in network.launches(mode='training')}
    assert {'_correlate_kernel', '_unmotion_kernel'} <= training - set(names)


def test_fused_stages_pool_only_what_no_block_before_them_could():
    found = network.launches(1, mode='fused')
    names, places = [launch.name for launch in found], network.places(found)
    assert names.count('_end_mean_kernel') == 12 and names.count('_end_similarity_kernel') == 4
    # the stem's output, and what an SME returns
    assert [place for place, name in zip(places, names) if name == '_pool_kernel'] == [
        '64x56', '256x56', '512x28', '1024x14', '2048x7']
    assert '_similarity_kernel' not in names


def test_sums_are_of_the_rows():
    row = {'batch': 1, 'kernel': '_a', 'launches': 3, 'time': 2., 'floor': 1.}
    taken = {**row, 'kernel': prediction.CONVOLUTIONS[0], 'launches': 1, 'time': 50., 'floor': 6.5}
    end = {**row, 'kernel': prediction.SUMS[0], 'time': model.LAUNCH + 5., 'floor': 10.}   # 5 us from the cache
    assert prediction.summary([row, end])['added'] == 6.
    sums = prediction.summary([row, {**row, 'launches': 1}, taken])
    assert sums['kernels']['_a'] == {'time': 8., 'floor': 4., 'launches': 4}
    assert (sums['time'], sums['launches'], sums['added']) == (58., 5, 48.)
    least, most = prediction.PLAIN[1]
    assert sums['ratio'] == [round(1 + 48 / most, 2), round(1 + 48 / least, 2)]


@pytest.mark.parametrize('file', [f'kernels-prediction{name}.json' for name in ('', '-before', '-fused')])
def test_committed_predictions_add_up(file):
    results = json.loads((RESULTS / file).read_text())
    for batch, sums in results['sums'].items():
        rows = [row for row in results['rows'] if str(row['batch']) == batch]
        assert sums == prediction.summary(rows)
        assert 'before' in file or sums['launches'] == len(network.launches(int(batch), mode=results['mode']))


def test_the_committed_prediction_is_what_the_code_gives():
    results = json.loads((RESULTS / 'kernels-prediction.json').read_text())
    if results['versions']['triton'] != triton.__version__:
        pytest.skip(f'it is of triton {results["versions"]["triton"]}')
    rows = prediction.predict_batch(1, stages=['256x56'])
    assert rows == [row for row in results['rows'] if row['batch'] == 1 and row['frames'] == '256x56']
    assert all(math.isfinite(row['time']) and row['time'] > 0 for row in rows)
    messages = {row['kernel']: limits.unexpected(row['kernel'], limits.slow(row)) for row in results['rows']}
    assert not any(messages.values())
