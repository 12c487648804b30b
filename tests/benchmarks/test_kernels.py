"""benchmarks.kernels: what a ResNet-50 launches, compiled for GPUs that are not here, fits and uses the hardware."""
import pytest
import torch

pytest.importorskip('triton')
from benchmarks import kernels
from cmr_layers.ops import triton_cme_tim

EARLY, LATE = (256, 56, 128), (2048, 7, 512)
CASES = {
    'bf16, channels_last': ('bf16', True, 8, EARLY),
    'fp16, contiguous, 5 frames': ('fp16', False, 5, LATE),
    'fp32, channels_last': ('fp32', True, 8, LATE),
    'fp16, channels_last, 32 frames': ('fp16', True, triton_cme_tim.MAX_FRAMES, LATE),
}


# all cases for one capability, and one case for the others
@pytest.mark.parametrize('case, capability', [
    (case, sm) for case in CASES for sm in kernels.SHARED if sm == 90 or case == 'bf16, channels_last'])
def test_kernels_compile_and_fit(case, capability):
    dtype, channels_last, num_frames, stage = CASES[case]
    launches = kernels.collect([dtype], [channels_last], [num_frames], [stage])
    found = {launch.name for launch in launches}
    wanted = {'_pool_kernel', '_project_kernel', '_gate_kernel', '_mix_kernel', '_correlate_kernel',
              '_similarity_kernel', '_motion_kernel', '_product_kernel', '_unmotion_kernel'}
    wanted |= {'_gated_conv_kernel'} if case == 'bf16, channels_last' else set()
    assert found == wanted
    wrong = {
        (launch.name, launch.constants): failed for launch in launches
        if (failed := kernels.failures(launch, capability, kernels.compile_for(launch, capability)))}
    assert not wrong


def test_the_report_sees_what_must_not_ship():
    launch = next(v for v in kernels.collect(['fp16'], [True], [8], [EARLY]) if v.name == '_motion_kernel')
    good = {'shared': 0, 'reg': 1, 'stack': 0, 'local': 0, 'tensor_cores': ['HGMMA'], 'wide_loads': 1, 'loads': 1}
    assert kernels.failures(launch, 90, good) == []
    assert kernels.failures(launch, 80, good) == ['no HMMA']
    bad = {**good, 'shared': 300000, 'stack': 64, 'wide_loads': 0}
    assert kernels.failures(launch, 90, bad) == [
        '300000 bytes of shared memory, 232448 fit', '64 bytes of stack memory', 'no 16-byte loads']


def test_a_kernel_that_spills_is_seen():
    # 32 frames of 1024 channels at once: far more than the registers hold
    x = torch.empty(32, 1024, 7, 7, device='meta')
    weights = [torch.empty(shape, device='meta') for shape in ((128, 1024), (128, 1024), (1024, 128))]
    launch, = (v for v in kernels.record(lambda: triton_cme_tim.gates(x, 32, *weights, None)) if 'gate' in v.name)
    constants = dict(launch.constants, BLOCK_C=1024)
    spilled = kernels.compile_for(launch._replace(constants=tuple(constants.items())), 90)
    assert spilled['stack'] > kernels.STACK and kernels.failures(launch, 90, spilled)


def test_clips_too_long_for_the_kernel_of_the_gates_leave_them_to_a_library():
    launches = kernels.collect(['fp16'], [True], [33], [LATE])
    assert {launch.name for launch in launches}.isdisjoint({'_pool_kernel', '_project_kernel', '_gate_kernel'})
    assert '_mix_kernel' in {launch.name for launch in launches}


def test_recording_gives_the_kernels_back():
    kernel = triton_cme_tim._mix_kernel
    with pytest.raises(ZeroDivisionError):
        kernels.record(lambda: 1 / 0)
    assert triton_cme_tim._mix_kernel is kernel
