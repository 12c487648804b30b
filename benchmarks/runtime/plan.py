"""Which studies there are, and what is interleaved in each of them."""
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks import candidates
from benchmarks.candidates import COMPILED, Setting
from benchmarks.runtime.models import LAYERS, MODELS, OFF_THE_SHELF, PLACEMENTS, REDUCTIONS, TABLE_7

__all__ = ['BASES', 'MODES', 'ON', 'STUDIES', 'Candidate', 'Study', 'studies', 'takes']

# Which path the layers take, and what is done to the network (benchmarks.candidates). 'eager' is everybody's plain
# PyTorch, CMR's reference path included; 'fused' is what a user of this package gets without asking.
MODES = {
    'eager': ('reference', 'eager'), 'fused': ('auto', 'eager'), 'folded': ('auto', 'folded'),
    'compiled': ('auto', 'compiled'), 'frozen': ('auto', 'frozen'),
    'graph': ('auto', 'graph'), 'compiled-graph': ('auto', 'compiled-graph'),
}
ON = {device: ('eager', 'fused', *modes[1:]) for device, modes in candidates.MODES.items()}
BASES = ('tsn', 'tsm')  # what ratios are taken to: in every study
_FEW = (*BASES, 'cmr')
_SCALED = (*BASES, 'tei', 'tdrl', 'cmr')

STUDIES = {
    'latency': 'Table 7: latency at batch 1, eager, fused and folded (on CUDA as a graph, too)',
    'throughput': 'Table 7: throughput at batch 8',
    'placement': 'Table 5, and the reductions of Table 3: latency',
    'frames': '16 frames: latency, with those of torchvision',
    'training': 'a training step',
    'precision': 'other data types, and the other memory layout: latency',
    'scale-frames': 'latency against frames, 4 to 64',
    'scale-layers': 'one layer against frames, 4 to 64',
    'scale-size': 'latency against resolution',
    'scale-batch': 'latency against clips in a batch',
    'scale-width': 'latency against the width of the network',
    'modes': 'torch.compile',  # last, since it takes long
}


class Candidate(NamedTuple):
    """One model, in one mode, somewhere."""
    model: str
    mode: str
    setting: Setting
    width: float = 1  # of the network: a factor on the channels of all stages
    training: bool = False


class Study(NamedTuple):
    """Candidates that are interleaved with each other."""
    name: str
    candidates: tuple[Candidate, ...]
    passes: int     # how often everything is built and timed anew
    rounds: int     # of each pass


def takes(model: str, setting: Setting) -> bool:
    """Whether a model runs on clips of this length and size."""
    lengths, sizes = MODELS[model].frames, MODELS[model].sizes
    return (lengths is None or setting.frames in lengths) and (sizes is None or setting.size in sizes)


def _cross(
        models: Iterable[str], modes: Sequence[str], setting: Setting, training: bool = False) -> Iterator[Candidate]:
    for model in models:
        if takes(model, setting):
            for mode in modes:
                yield Candidate(model, mode, setting, training=training)


def _candidates(name: str, base: Setting) -> Iterator[Candidate]:
    cuda = base.device == 'cuda'
    # launches would hide everything else at batch 1, and what is studied with them
    one = ('graph',) if cuda else ('fused',)
    if name == 'latency':
        yield from _cross(TABLE_7, ['eager', 'fused', 'folded', *['graph'] * cuda], base)
        yield from _cross(OFF_THE_SHELF, ['fused', *['graph'] * cuda], base)
    elif name == 'throughput':
        yield from _cross(
            [*TABLE_7, *['r3d_18', 'swin3d_t'] * cuda], ['fused', *['graph'] * cuda], base._replace(batch=8))
    elif name == 'placement':
        yield from _cross([*BASES, 'tim', 'cmr', *PLACEMENTS, *REDUCTIONS], one, base)
    elif name == 'frames':
        yield from _cross([*TABLE_7, *OFF_THE_SHELF], one, base._replace(frames=16))
    elif name == 'training':
        yield from _cross(TABLE_7, ['fused'], base._replace(batch=8 if cuda else 1), training=True)
    elif name == 'modes':
        models = [*BASES, 'cmr'] if cuda else [*BASES, 'tdrl', 'cmr']
        yield from _cross(models, ['folded', 'compiled', 'compiled-graph' if cuda else 'frozen'], base)
    elif name == 'precision':
        for dtype in ('fp32', 'tf32', 'fp16', 'bf16') if cuda else ('fp32', 'bf16'):
            yield from _cross(_FEW, one, base._replace(dtype=dtype))
        yield from _cross(_FEW, one, base._replace(
            layout='contiguous' if base.layout == 'channels_last' else 'channels_last'))
    elif name == 'scale-frames':
        for frames in (4, 8, 16, 32, 64):
            yield from _cross(_SCALED, one, base._replace(frames=frames, size=base.size // 2))
    elif name == 'scale-layers':
        for frames in (4, 8, 16, 32, 64):
            yield from _cross(
                LAYERS, ['fused', 'graph'] if cuda else ['eager', 'fused'],
                base._replace(frames=frames, size=max(2, base.size // 16)))
    elif name == 'scale-size':
        for size in (base.size // 2, base.size * 3 // 4, base.size):
            yield from _cross(_SCALED, one, base._replace(size=size - size % 2))
    elif name == 'scale-batch':
        for batch in (1, 2, 4, 8) if cuda else (1, 2, 4):
            yield from _cross(_SCALED, one, base._replace(batch=batch, size=base.size // 2))
    elif name == 'scale-width':
        for width in (.5, 1, 1.5, 2):
            for model in _SCALED:
                yield Candidate(model, *one, base._replace(size=base.size // 2), width)


def studies(
        names: Sequence[str], base: Setting, passes: int, rounds: int, models: Sequence[str] | None = None,
        modes: Sequence[str] | None = None,
) -> list[Study]:
    """The studies of these names.

    Args:
        names: Of :data:`STUDIES`.
        base: The setting that each of them varies.
        passes: How often all is built anew. A study that compiles has one pass, of twice the rounds.
        rounds: Of each pass; studies of long calls have half of them on a CPU.
        models: Only these, and what ratios are taken to; default: all of the study.
        modes: Only these; default: all of the study.
    """
    found = []
    for name in names:
        candidates = tuple(dict.fromkeys(
            c for c in _candidates(name, base)
            if (models is None or c.model in models or (c.model in BASES and name != 'scale-layers'))
            and (modes is None or c.mode in modes)))
        compiles = any(c.mode in COMPILED for c in candidates)
        if candidates:
            slow = base.device == 'cpu' and name in ('throughput', 'frames', 'training', 'precision')
            number = 2 * rounds if compiles else max(1, rounds // 2) if slow else rounds
            found.append(Study(name, candidates, 1 if compiles else passes, number))
    return found
