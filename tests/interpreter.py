"""Runs the Triton kernels where there is no GPU: on CPU tensors, in Triton's interpreter.

The kernels are the same functions; only what ``triton.jit`` made of them is exchanged, theirs and that of Triton's own
library of small kernels (``tl.sum``, ``tl.cdiv``). With a GPU nothing is exchanged, and the tests run on it.
"""
import contextlib

import torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@contextlib.contextmanager
def interpreted():
    """Within it, the functions of ``cmr_layers.ops.triton_*`` take tensors on :data:`DEVICE`."""
    from cmr_layers.ops import dispatch
    if DEVICE == 'cuda':
        yield
        return
    import triton.experimental.gluon  # noqa: F401  (wants to see the library before it is exchanged)
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from cmr_layers.ops import triton_conv, triton_front, triton_sme

    modules = (tl, tl.standard, triton_conv, triton_front, triton_sme)
    exchanged = [
        (module, name, value) for module in modules for name, value in vars(module).items()
        if isinstance(value, JITFunction)]
    obstacle = dispatch.triton_obstacle
    try:
        for module, name, function in exchanged:
            setattr(module, name, InterpretedFunction(function.fn))
        # the one obstacle that is gone
        dispatch.triton_obstacle = lambda x, *args: '' if x.device.type == 'cpu' else obstacle(x, *args)
        yield
    finally:
        dispatch.triton_obstacle = obstacle
        for module, name, function in exchanged:
            setattr(module, name, function)
