"""Which studies there are, and what is interleaved in each of them."""
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.runtime.candidate import MODES, ON, Candidate, Setting, takes
from benchmarks.runtime.models import BACKBONES, LAYERS, OFF_THE_SHELF, PLACEMENTS, REDUCTIONS, TABLE_7
from benchmarks.runtime.operators import CASES, PASSES, RATES

__all__ = ['AXES', 'BASES', 'MEASURED_FIRST', 'STUDIES', 'Study', 'scaled', 'studies']

BASES = ('tsn', 'tsm')  # what ratios are taken to, wherever networks are compared
_COMPILED = (*BASES, 'cmr')
_SCALED = (*BASES, 'tdrl', 'cmr')
MEASURED_FIRST = ('tsn', 'cmr', 'tsm', 'tei', 'stm', 'tdrl', 'cme', 'sme')  # on CUDA, in the order of their worth
_FIRST_MODES = ('unfolded', 'graph', 'compiled-graph')

# In the order of their worth: a run that is cut off has the first of them. No candidate is in two.
STUDIES = {
    'latency': "one clip: Tables 7, 5 and 3, torchvision's networks, all modes, the goals",
    'operators': 'CME + TIM, with the convolution behind them, and SME, at the shapes of a ResNet-50',
    'training': 'a training step',
    'throughput': 'Table 7: eight clips (on CUDA in all modes, for the goals)',
    'frames': '16 frames: latency',
    'layers': 'one layer against frames, 4 to 64',
    'scaling': 'latency against frames, resolution, clips in a batch and width of the network',
    'precision': 'other data types, and the other memory layout: latency',
    'backbones': 'a ViT-B/16 and a ConvNeXt-T, with temporal layers and without: latency',
}
# How the calls of a study compare with one clip's: fewer rounds for longer ones, on a CPU
_ROUNDS = {'operators': 2., 'training': .5, 'throughput': .34, 'frames': .5, 'scaling': .5, 'precision': .34}

AXES = ('frames', 'size', 'batch', 'width')


class Study(NamedTuple):
    """Candidates that are interleaved with each other."""
    name: str
    candidates: tuple[Candidate, ...]
    passes: int     # how often everything is built and timed anew
    rounds: int     # of each pass

    def first_pass(self, c: Candidate) -> int:
        """The pass that has a candidate first: the first one, or on CUDA, where minutes are few, the one after it."""
        return int(_waits(self.name, c) and not all(_waits(self.name, other) for other in self.candidates))

    def of_pass(self, number: int) -> 'Study':
        """What a pass measures. Compiling takes long, so what is compiled is in its first one only."""
        first = {c: self.first_pass(c) for c in self.candidates}
        candidates = tuple(
            c for c in self.candidates if number == first[c] or (number > first[c] and not c.compiles))
        return self._replace(candidates=candidates)

    def groups(self) -> list['Study']:
        """What is interleaved: everything, or of the operators each by itself, as no two of them are compared."""
        if self.name != 'operators':
            return [self]
        keys = dict.fromkeys((c.model, c.training) for c in self.candidates)
        return [
            self._replace(candidates=tuple(c for c in self.candidates if (c.model, c.training) == key)) for key in keys]


def _waits(name: str, c: Candidate) -> bool:
    """Whether a candidate is left to the second pass, on CUDA.

    A first pass over everything would take 12 to 16 minutes, more than a call gets. So of networks it has Table 7 and
    what the goals are judged by, and of operators what compiles nothing.
    """
    if c.setting.device != 'cuda':
        return False
    if name in ('latency', 'throughput'):
        judged = c.model == 'cmr' or (c.model == 'tsn' and MODES[c.mode].path == 'auto') or (
            c.model == 'released' and name == 'throughput' and c.mode in ('unfolded', 'reference'))
        return not (judged or (c.model in MEASURED_FIRST and c.mode in _FIRST_MODES))
    if name == 'training':
        return c.model not in _COMPILED or (c.mode == 'reference' and c.model != 'cmr')
    return name == 'operators' and c.compiles


def _cross(
        models: Iterable[str], modes: Sequence[str], setting: Setting, training: bool = False) -> Iterator[Candidate]:
    for model in models:
        if takes(model, setting):
            for mode in modes:
                yield Candidate(model, mode, setting, training=training)


def scaled(base: Setting, axis: str) -> list[tuple[Setting, float]]:
    """Settings and widths along an axis. Smaller frames than elsewhere: all axes cross at half the size."""
    half = base._replace(size=base.size // 2)
    if axis == 'frames':
        return [(half._replace(frames=frames), 1) for frames in (4, 8, 16, 32, 64)]
    if axis == 'size':
        return [(half._replace(size=size), 1) for size in (base.size // 4, half.size, base.size * 3 // 4)]
    if axis == 'batch':
        return [(half._replace(batch=batch), 1) for batch in (1, 2, 4, 8)[:4 if base.device == 'cuda' else 3]]
    return [(half, width) for width in (.5, 1, 1.5, 2)]


def _candidates(name: str, base: Setting) -> Iterator[Candidate]:
    cuda = base.device == 'cuda'
    graph = ['graph'] * cuda
    # launches would hide everything else at batch 1, and what is studied with them
    one = 'graph' if cuda else 'unfolded'
    compiled = [mode for mode in ON[base.device] if MODES[mode].compiled]
    if name == 'latency':
        if cuda:
            yield from _measured_first(name, base)
        yield from _cross(TABLE_7, ['reference', 'unfolded', 'folded', *graph], base)
        yield from _cross(OFF_THE_SHELF, ['unfolded'], base)
        yield from _cross([*PLACEMENTS, *REDUCTIONS], [one], base)
        yield from _compiled(compiled, base)  # late: there may be no time for all of them
        yield from _cross(OFF_THE_SHELF, graph, base)  # last: a capture that fails may be the last of its process
    elif name == 'throughput':
        eight = base._replace(batch=8)
        if cuda:
            yield from _measured_first(name, eight)
        yield from _cross(TABLE_7, ['unfolded', *graph], eight)
        if cuda:
            yield from _cross([*_COMPILED, 'released'], ['reference', 'folded'], eight)
            yield from _compiled(compiled, eight)
            yield from _cross(['r3d_18', 'swin3d_t'], ['unfolded', 'graph'], eight)
    elif name == 'operators':
        for rate, kind in RATES.items():
            yield Candidate(rate, 'unfolded', _sized(base, kind.size))
        for case in CASES.values():
            for training in PASSES[case.op]:
                yield from _cross(
                    [case.name], ['reference', 'unfolded', 'compiled-reference'], _sized(base, case.size), training)
    elif name == 'training':
        several = base._replace(batch=8 if cuda else 1)
        yield from _cross(TABLE_7, ['unfolded'], several, training=True)
        yield from _cross([*BASES, 'cmr'], ['reference'], several, training=True)
    elif name == 'frames':
        yield from _cross([*TABLE_7, *OFF_THE_SHELF], [one], base._replace(frames=16))
    elif name == 'layers':
        for frames in (4, 8, 16, 32, 64):
            yield from _cross(
                LAYERS, ['graph'] if cuda else ['reference', 'unfolded'],
                base._replace(frames=frames, size=max(2, base.size // 16)))
    elif name == 'scaling':
        for axis in AXES:
            for setting, width in scaled(base, axis):
                for model in _SCALED:
                    yield Candidate(model, one, setting, width)
    elif name == 'backbones':
        for model in BACKBONES:
            with_layers = model.endswith(' adapted')
            yield from _cross([model], [*['reference'] * with_layers, 'unfolded', *graph], base)
    elif name == 'precision':
        dtypes = ('fp32', 'tf32', 'fp16', 'bf16') if cuda else ('fp32', 'bf16')
        others = [base._replace(dtype=dtype) for dtype in dtypes]
        others.append(base._replace(layout='contiguous' if base.layout == 'channels_last' else 'channels_last'))
        for setting in others:
            if setting != base:  # whose latency is known
                yield from _cross(_COMPILED, [one], setting)


def _measured_first(name: str, setting: Setting) -> Iterator[Candidate]:
    """Table 7 and the goals, on CUDA: what compiles nothing, then what does, the rows of most worth first."""
    modes = ['unfolded', 'graph', 'reference', 'folded', 'compiled-graph', 'compiled', 'compiled-reference',
             'compiled-reference-graph']
    for compiled in (False, True):
        for model in (*MEASURED_FIRST, 'released'):
            mine = [mode for mode in modes if MODES[mode].compiled == compiled]
            yield from (c for c in _cross([model], mine, setting) if not _waits(name, c))


def _compiled(modes: Sequence[str], setting: Setting) -> Iterator[Candidate]:
    for model in _COMPILED:  # only CMR has another path than the reference
        own = [mode for mode in modes if model == 'cmr' or MODES[mode].path != 'reference']
        yield from _cross([model], own, setting)


def _sized(base: Setting, size: int) -> Setting:
    """A setting of frames that are of this size in a network of 224x224."""
    return base._replace(size=max(2, size * base.size // 224))


def studies(
        names: Sequence[str], base: Setting, passes: int, rounds: int, models: Sequence[str] | None = None,
        modes: Sequence[str] | None = None,
) -> list[Study]:
    """The studies of these names.

    Args:
        names: Of :data:`STUDIES`.
        base: The setting that each of them varies.
        passes: How often all is built anew.
        rounds: Of each pass; on a CPU studies of long calls have fewer, and those of short ones more.
        models: Only these, and what ratios and floors are taken to; default: all of the study.
        modes: Only these; default: all of the study.
    """
    kept = None if models is None else {*models, *BASES, *RATES}
    found = []
    for name in names:
        candidates = tuple(dict.fromkeys(
            c for c in _candidates(name, base)
            if (kept is None or c.model in kept) and (modes is None or c.mode in modes or c.model in RATES)))
        asked = [c for c in candidates if (c.model not in RATES if models is None else c.model in models)]
        if asked:
            factor = _ROUNDS.get(name, 1) if base.device == 'cpu' else 1
            found.append(Study(name, candidates, passes, max(1, round(factor * rounds))))
    return found
