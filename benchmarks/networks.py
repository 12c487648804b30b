"""Time ResNet-50, CMR-ResNet-50 and the variant that was released, in one run, against the goals.

    python -m benchmarks.networks --out benchmarks/results/networks-cpu.json
    python -m benchmarks.networks --device cuda --dtype fp16 --out benchmarks/results/networks-cuda.json
    python -m benchmarks.networks --device cuda --dtype bf16 --out benchmarks/results/networks-cuda.json --add
    python -m benchmarks.networks --quick                               # a smoke run

Clips of 8 frames, 224x224. The plain network classifies each frame and takes the mean. All networks of a table are
interleaved (:mod:`benchmarks.timing`); ratios are to the plain network in the same mode and in its best one. Beside
every time stands how far the logits are from those of a float64 network on the reference path.

Modes: eager; folded (batch norms into convolutions); compiled (folded, torch.compile); frozen (folded, torch.compile
with its constants folded; CPU); graph (folded, captured as a CUDA graph); compiled-graph (both).
"""
import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import cmr_layers.released  # noqa: F401  (registers the family, and the released variant)
from benchmarks import timing
from benchmarks.candidates import COMPILED, MODES, Setting, Workshop, trained, trainer
from benchmarks.flops import table

FRAMES = 8  # of a clip
CLASSES = 174

# timm's name, and the path that is forced
NETWORKS = {
    'plain': ('resnet50', 'auto'),
    'cmr': ('cmr_resnet50', 'auto'),
    'cmr reference': ('cmr_resnet50', 'reference'),
    'released': ('released_cmr_resnet50', 'auto'),
    'released reference': ('released_cmr_resnet50', 'reference'),
}
TRAINED = ('plain', 'cmr', 'cmr reference')


class Goal(NamedTuple):
    """A limit on a ratio. Where several modes are named, the best of them counts, on both sides."""
    name: str
    device: str
    batch: int
    network: str
    modes: tuple[str, ...]
    base: str
    base_modes: tuple[str, ...]
    limit: float
    what: str = 'inference'     # or 'training', 'memory'


_GRAPHS = ('graph', 'compiled-graph')
_ALL = MODES['cuda']
GOALS = (
    Goal('latency as a CUDA graph, to plain in its best mode', 'cuda', 1, 'cmr', _GRAPHS, 'plain', _ALL, 1.3),
    Goal('time per clip, best mode, to plain in its best mode', 'cuda', 8, 'cmr', _ALL, 'plain', _ALL, 1.25),
    Goal('dispatched to reference, both eager', 'cuda', 1, 'cmr', ('eager',), 'cmr reference', ('eager',), .5),
    Goal('dispatched to reference, both eager', 'cuda', 8, 'cmr', ('eager',), 'cmr reference', ('eager',), .5),
    Goal('dispatched in its best mode to compiled reference', 'cuda', 1, 'cmr', _ALL, 'cmr reference',
         ('compiled', 'compiled-graph'), 1),
    Goal('dispatched in its best mode to compiled reference', 'cuda', 8, 'cmr', _ALL, 'cmr reference',
         ('compiled', 'compiled-graph'), 1),
    Goal('dispatched to the released arithmetic, both eager', 'cuda', 8, 'cmr', ('eager',), 'released reference',
         ('eager',), .4),
    Goal('training step, to plain', 'cuda', 8, 'cmr', (), 'plain', (), 1.4, 'training'),
    Goal('peak memory of a training step, to plain', 'cuda', 8, 'cmr', (), 'plain', (), 1.25, 'memory'),
    Goal('folded, to plain in its best mode', 'cpu', 1, 'cmr', ('folded',), 'plain', MODES['cpu'], 1.3),
)


class PerFrame(nn.Module):
    """An image network on the frames (B*T, C, H, W) of clips: the mean of its logits."""

    def __init__(self, network: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.network = network
        self.num_frames = num_frames

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x).unflatten(0, (-1, self.num_frames)).mean(1)
        return y


def build(name: str) -> nn.Module:
    """timm's network of a name, of frames: its values are the same at every call."""
    def make() -> nn.Module:
        model = timm.create_model(name, num_classes=CLASSES)
        return PerFrame(model, FRAMES) if name == 'resnet50' else model
    return trained(make)


def plan(device: str, modes: Sequence[str]) -> list[tuple[str, str]]:
    """Candidates, those that have to be compiled last: there may be no time for all of them."""
    pairs = [
        (label, mode) for label in NETWORKS for mode in modes
        # whether the dispatcher helps the released arithmetic too is a question of one mode
        if mode in MODES[device] and (label != 'released reference' or mode == 'eager')]
    return sorted(pairs, key=lambda pair: pair[1] in COMPILED)


def inference(setting: Setting, modes: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Time all networks in all modes, in about as many seconds; a quarter of them is for the rounds."""
    with torch.inference_mode():  # inputs as CUDA graphs have them inside, else everything is compiled twice
        inputs = setting.inputs(4)
    workshop = Workshop(setting, build, inputs[0])
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and each is a new case of it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    results: dict[str, Any] = {}
    calls: dict[str, timing.Call] = {}
    start, spent = timing.Deadline(0), [30.]  # what compiling takes: a guess, then the mean
    last_call = seconds * (.75 if setting.device == 'cuda' else .5)  # a GPU needs little for the rounds
    for label, mode in plan(setting.device, modes):
        name = f'{label}, {mode}'
        network, path = NETWORKS[label]
        shared = workshop.has_compiled(network, path)
        if mode in COMPILED and not shared and -start.left() + sum(spent) / len(spent) > last_call:
            results[name] = {'missing': 'no time to compile'}
            continue
        timing.progress(f'prepare {name}')
        deadline = timing.Deadline(0)
        try:
            run = workshop.candidate(network, path, mode)
            error = timing.relative_error([run(inputs[0])], [workshop.truth(network)])
        except Exception as reason:  # the other candidates are worth their time
            traceback.print_exc()
            results[name] = {'missing': type(reason).__name__}
            continue
        if mode in COMPILED and not shared:
            spent.append(-deadline.left())
        calls[name] = timing.rotate(run, [[x] for x in inputs])
        results[name] = {'error': error}
    timing.progress(f'{len(calls)} candidates, {rounds} rounds')
    samples = timing.interleave(calls, setting.device, rounds, seconds / 4)
    _record(results, samples)
    return results


def _record(results: dict[str, Any], samples: timing.Samples) -> None:
    for name, values in samples.time.items():
        results[name]['seconds'] = timing.summary(values)
        results[name]['samples'] = [float(f'{value:.5g}') for value in values]
        if name in samples.host:
            results[name]['host_seconds'] = timing.summary(samples.host[name])


def training(setting: Setting, rounds: int, seconds: float) -> dict[str, Any]:
    """Time a training step: forward, loss, backward, SGD. In half precision that is autocast over float32 weights."""
    inputs = setting.inputs(4, torch.float32)
    results: dict[str, Any] = {}
    calls: dict[str, timing.Call] = {}
    for label in TRAINED:
        timing.progress(f'train {label}')
        before = torch.cuda.memory_allocated() if setting.device == 'cuda' else 0
        try:
            name, path = NETWORKS[label]
            forward_backward, step, parameters = trainer(setting, build(name), path)
            step(inputs[0])  # it makes the optimizer's state
            if setting.device == 'cuda':  # with the network itself, and not with what else is there
                memory = timing.peak_bytes(lambda step=step: step(inputs[0]), before)  # type: ignore[misc]
            else:
                memory = timing.saved_bytes(
                    lambda run=forward_backward: run(inputs[0]),  # type: ignore[misc]
                    [*parameters, inputs[0]])
        except Exception as reason:
            traceback.print_exc()
            results[label] = {'missing': type(reason).__name__}
            continue
        calls[label] = timing.rotate(step, [[x] for x in inputs])
        results[label] = {'memory_bytes': memory}
    _record(results, timing.interleave(calls, setting.device, rounds, seconds))
    return results


def best(results: dict[str, Any], network: str, modes: Sequence[str]) -> str | None:
    """The fastest of a network's modes that was measured."""
    names = [f'{network}, {mode}' for mode in modes if 'seconds' in results.get(f'{network}, {mode}', {})]
    return min(names, key=lambda name: results[name]['seconds']['median'], default=None)


def _to(results: dict[str, Any], name: str | None, base: str | None) -> dict[str, float] | None:
    entry, other = results.get(name or '', {}), results.get(base or '', {})
    if 'samples' not in entry or 'samples' not in other:
        return None
    return timing.ratio(entry['samples'], other['samples'])


def judge(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with what was measured: one entry for each setting that it is about, or one without a ratio."""
    verdicts = []
    for goal in GOALS:
        entry = {'name': goal.name, 'device': goal.device, 'batch': goal.batch, 'limit': goal.limit}
        found = []
        for setting in settings:
            if (setting['device'], setting['batch']) != (goal.device, goal.batch):
                continue
            if goal.what == 'inference':
                results = setting['inference']
                pair = best(results, goal.network, goal.modes), best(results, goal.base, goal.base_modes)
                ratio = _to(results, *pair)
            else:
                results = setting.get('training', {})
                pair = goal.network, goal.base
                ratio = _to(results, *pair)
                if ratio and goal.what == 'memory':  # it does not vary
                    value = results[goal.network]['memory_bytes'] / results[goal.base]['memory_bytes']
                    ratio = timing.summary([value])
            if ratio:
                found.append({
                    **entry, 'dtype': setting['dtype'], 'of': f'{pair[0]} / {pair[1]}', 'ratio': ratio,
                    'reached': ratio['median'] <= goal.limit})
        verdicts += found or [{**entry, 'dtype': None, 'of': None, 'ratio': None, 'reached': None}]
    return verdicts


def render(results: dict[str, Any]) -> str:
    """All tables of a result file as Markdown."""
    return '\n\n'.join(_render_setting(setting) for setting in results['settings'])


def _render_setting(setting: dict[str, Any]) -> str:
    cuda, batch, results = setting['device'] == 'cuda', setting['batch'], setting['inference']
    plain = best(results, 'plain', MODES[setting['device']])
    head = ['network, mode', *(['ms'] if batch == 1 else ['ms', 'ms per clip']), 'to plain, same mode',
            f'to plain, best mode ({(plain or "").removeprefix("plain, ")})', 'largest error', *['host, ms'] * cuda]
    rows = []
    for name, entry in sorted(results.items(), key=lambda item: list(NETWORKS).index(item[0].rsplit(', ', 1)[0])):
        time = timing.show(entry.get('seconds'), 1e3) or f'({entry["missing"]})'
        clip = [timing.show(entry.get('seconds'), 1e3 / batch)] * (batch > 1)
        same = f'plain, {name.rsplit(", ", 1)[1]}'
        rows.append([
            name, time, *clip, timing.show(_to(results, name, same)), timing.show(_to(results, name, plain)),
            f'{entry["error"]:.0e}' if 'error' in entry else '',
            *[timing.show(entry.get('host_seconds'), 1e3)] * cuda])
    return '\n\n'.join([
        f'**{Setting.of(setting).label}** ({timing.origin(setting)})', table(head, rows),
        *([_render_training(setting['training'], cuda)] if 'training' in setting else [])])


def _render_training(results: dict[str, Any], cuda: bool) -> str:
    head = ['training step', 'ms', 'to plain', 'peak MB' if cuda else 'MB saved for backward', 'to plain',
            *['host, ms'] * cuda]
    rows = []
    for name, entry in results.items():
        sizes = entry.get('memory_bytes'), results.get('plain', {}).get('memory_bytes')
        rows.append([
            name, timing.show(entry.get('seconds'), 1e3) or f'({entry["missing"]})',
            timing.show(_to(results, name, 'plain')), f'{sizes[0] / 1e6:.0f}' if sizes[0] else '',
            f'{sizes[0] / sizes[1]:.2f}' if sizes[0] and sizes[1] else '',
            *[timing.show(entry.get('host_seconds'), 1e3)] * cuda])
    return table(head, rows)


def render_goals(verdicts: Sequence[dict[str, Any]]) -> str:
    """The goals as Markdown, the measured ratio beside each."""
    def row(entry: dict[str, Any]) -> list[str]:
        where = ', '.join(filter(None, [entry['device'], entry['dtype'], f'batch {entry["batch"]}']))
        goal = [entry['name'], where, f'<= {entry["limit"]:g}']
        if entry['ratio'] is None:
            return [*goal, 'not measured yet', '', '']
        return [*goal, timing.show(entry['ratio']), 'yes' if entry['reached'] else 'no', entry['of']]
    return table(['goal', 'where', 'limit', 'measured ratio', 'reached', 'of'], [row(entry) for entry in verdicts])


def measure(setting: Setting, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    timing.progress(setting.label)
    torch.compiler.reset()
    rounds = args.rounds or (2 if args.quick else 30 if setting.device == 'cuda' else 9)
    result: dict[str, Any] = {
        **timing.environment(), **setting._asdict(), 'quick': args.quick,
        'inference': inference(setting, args.modes or MODES[setting.device], rounds, seconds)}
    if setting.batch == max(args.batch):
        result['training'] = training(setting, rounds, seconds / 8)
    return result


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings of two runs, the newer ones in the place of the same older ones."""
    measured = {Setting.of(entry) for entry in new}
    return [*(entry for entry in old if Setting.of(entry) not in measured), *new]


def main() -> int:
    modes = list(dict.fromkeys([*MODES['cpu'], *MODES['cuda']]))
    parser = timing.arguments(__doc__)
    parser.add_argument('--modes', nargs='+', choices=modes, help='default: all of the device; quick: eager, folded')
    parser.add_argument('--batch', nargs='+', type=int, help='clips (default: 1 and 8 on a GPU, 1 on a CPU)')
    parser.add_argument(
        '--dtype', nargs='+', choices=list(timing.DTYPES), help='default: fp16 and bf16 on a GPU, fp32 on a CPU')
    parser.add_argument('--add', action='store_true', help='keep what the file has of other settings')
    args = parser.parse_args()
    timing.check_device(parser, args)
    if args.add and not args.out:
        parser.error('argument --add: wants an --out to add to')
    torch.backends.cudnn.benchmark = True  # the plain network is to be as fast as it gets
    cuda = args.device == 'cuda'
    args.batch = args.batch or ([1, 8] if cuda and not args.quick else [1])
    args.dtype = args.dtype or (['fp16', 'bf16'] if cuda else ['fp32'])
    if args.quick and not args.modes:
        args.modes = ['eager', 'folded']
    foreign = [mode for mode in args.modes or [] if mode not in MODES[args.device]]
    if foreign:
        parser.error(
            f'argument --modes: no {foreign[0]} on {args.device}; choose from {", ".join(MODES[args.device])}')
    if min(args.batch) < 1:
        parser.error(f'argument --batch: must be 1 or more, got {min(args.batch)}')

    deadline = timing.Deadline(60 * (args.minutes or (9 if cuda else 15)))
    todo = [
        Setting(args.device, dtype, batch, 64 if args.quick else 224, args.layout)
        for dtype in args.dtype for batch in args.batch]
    settings: list[dict[str, Any]] = []
    for i, setting in enumerate(todo):
        settings.append(measure(setting, args, deadline.left() / (len(todo) - i)))
    failed = {entry['missing'] for setting in settings for part in ('inference', 'training')
              for entry in setting.get(part, {}).values()
              if entry.get('missing', 'no time to compile') != 'no time to compile'}
    if args.add and args.out.exists():
        settings = merge(json.loads(args.out.read_text())['settings'], settings)
    verdicts = judge(settings)
    results = {**timing.environment(), 'settings': settings, 'goals': verdicts}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + '\n')
    print(render(results), render_goals(verdicts), sep='\n\n')
    if failed:
        print(f'candidates failed: {", ".join(sorted(failed))}', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
