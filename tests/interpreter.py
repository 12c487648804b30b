"""Runs the Triton kernels where there is no GPU: on CPU tensors, in Triton's interpreter.

The kernels are the same functions; only what ``triton.jit`` made of them is exchanged, theirs and that of Triton's own
library of small kernels (``tl.sum``, ``tl.cdiv``). With a GPU nothing is exchanged, and the tests run on it.
"""
import contextlib
import functools

import torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@contextlib.contextmanager
def interpreted():
    """Within it, the functions of ``cmr_layers.ops.triton_*`` take tensors on :data:`DEVICE`."""
    if DEVICE == 'cuda':
        yield
        return
    import triton.experimental.gluon  # noqa: F401  (wants to see the library before it is exchanged)
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from cmr_layers.ops import path, triton_block_end, triton_cme_tim, triton_cme_tim_conv, triton_sme

    exchanged = [
        (module, name, value, InterpretedFunction(value.fn))
        for module in (tl, tl.standard, triton_block_end, triton_cme_tim, triton_cme_tim_conv, triton_sme)
        for name, value in vars(module).items() if isinstance(value, JITFunction)]

    def multiply_numbers(function):
        # the interpreter multiplies the bits of bfloat16s, not the numbers
        @functools.wraps(function)
        def wrapped(x, *args, **kwargs):
            return function(x, *args, **{'dot': tl.float32 if x.dtype is torch.bfloat16 else None, **kwargs})
        return wrapped

    exchanged += [
        (module, name, getattr(module, name), multiply_numbers(getattr(module, name)))
        for module, name in ((triton_cme_tim_conv, 'gated_conv'), (triton_sme, 'product'))]
    obstacle = path._triton_obstacle
    # the one obstacle that is gone
    exchanged.append((
        path, '_triton_obstacle', obstacle, lambda x, *args: '' if x.device.type == 'cpu' else obstacle(x, *args)))
    try:
        for module, name, _, value in exchanged:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value, _ in exchanged:
            setattr(module, name, value)
