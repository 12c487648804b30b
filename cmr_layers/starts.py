"""Where the layers that are put into a trained network start."""
from typing import Any, Dict, Sequence

from .checks import check_choice
from .cme import CME
from .sme import SME
from .tim import TIM

__all__ = ['STARTS', 'start_of']

STARTS = ('identity', 'shift', 'paper')


def start_of(start: str, kinds: Sequence[Any]) -> Dict[Any, Dict[str, Any]]:
    """Arguments of each layer of a place, by its class.

    ``'paper'``: none, the layers start as they do alone. ``'identity'``: the network computes what it did. SME starts
    as the identity anyway, TIM with its middle tap 1. A gate in (0, 1) can't be 1, so with a TIM at the same place
    every gate is exactly 1/2 and the tap is 2, and their product is exact. A CME without a TIM starts with its gates
    at 0.98: the network computes nearly the same. ``'shift'``: so, too, but TIM starts as TSM's shift, with the gates'
    factor undone all the same.

    Raises:
        ValueError: start is none of the three, or not 'paper' and a layer is none of the package's three.
    """
    check_choice('start', start, STARTS)
    if start == 'paper':
        return {}
    for kind in kinds:
        if kind not in (CME, SME, TIM):
            raise ValueError(f"start={start!r} is for CME, SME and TIM, got {getattr(kind, '__name__', kind)!r}")
    pair = CME in kinds and TIM in kinds
    return {
        CME: {'gate_init': .5 if pair else .98},
        TIM: {'init': 'identity' if start == 'identity' else 'tsm', 'gain': 2. if pair else 1.}}
