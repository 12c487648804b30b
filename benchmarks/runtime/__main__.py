"""Time CMR beside its peers: the paper's Table 7, Tables 3 and 5, 16 frames, training, modes, precision, scaling.

    python -m benchmarks.runtime                                          # everything, on a GPU if there is one
    python -m benchmarks.runtime --studies latency --models tsm tdrl cmr  # a part
    python -m benchmarks.runtime --out runtime.json                       # go on where that file ends
    python -m benchmarks.runtime --studies latency --against benchmarks/results/runtime-cpu.json
    python -m benchmarks.runtime --quick                                  # a smoke run

What a study compares is interleaved (benchmarks/timing.py). A run is several passes; in each, every network is built
and warmed up anew. Ratios are medians of those within the rounds, their intervals are bootstrapped over passes and
rounds. Needs the extra [bench].
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.candidates import Setting
from benchmarks.machine import positive
from benchmarks.runtime import render
from benchmarks.runtime.measure import NO_TIME, measure
from benchmarks.runtime.models import MODELS
from benchmarks.runtime.plan import MODES, ON, STUDIES, Candidate, Study, studies

_IDENTITY = ('machine', 'gpu', 'threads', 'versions', 'base', 'rounds', 'quick')


def parse() -> tuple[argparse.Namespace, Setting, list[Study]]:
    parser = timing.arguments(__doc__)
    parser.add_argument(
        '--studies', nargs='+', choices=list(STUDIES), metavar='STUDY', default=list(STUDIES),
        help='; '.join(f'{name}: {text}' for name, text in STUDIES.items()))
    parser.add_argument(
        '--models', nargs='+', choices=list(MODELS), metavar='MODEL',
        help=f'only these, and tsn and tsm, to which ratios are taken: {", ".join(MODELS)}')
    parser.add_argument(
        '--modes', nargs='+', choices=list(MODES), metavar='MODE', help=f'only these: {", ".join(MODES)}')
    parser.add_argument('--passes', type=positive, help='how often all is built anew (default: 3)')
    parser.add_argument(
        '--dtype', choices=['fp32', 'tf32', 'fp16', 'bf16'], help='default: fp16 on CUDA, fp32 on a CPU')
    parser.add_argument('--frames', type=positive, default=8, help='of a clip; default: %(default)s')
    parser.add_argument('--batch', type=positive, default=1, help='clips, for latency; default: %(default)s')
    parser.add_argument('--size', type=positive, help='height and width of the frames; default: 224')
    parser.add_argument('--fresh', action='store_true', help='overwrite --out rather than go on where it ends')
    parser.add_argument('--against', type=Path, help='a result file: say whether its ratios came out again')
    args = parser.parse_args()
    timing.check_device(parser, args)
    cuda = args.device == 'cuda'
    args.dtype = args.dtype or ('fp16' if cuda else 'fp32')
    args.passes = args.passes or (1 if args.quick else 3)
    args.rounds = args.rounds or (2 if args.quick else 15 if cuda else 4)
    args.minutes = args.minutes or (8.5 if cuda else 24 * 60)
    args.size = args.size or (64 if args.quick else 224)
    if args.dtype == 'tf32' and not cuda:
        parser.error('argument --dtype: no tf32 on cpu; choose from fp32, fp16, bf16')
    foreign = [mode for mode in args.modes or () if mode not in ON[args.device]]
    if foreign:
        parser.error(f'argument --modes: no {foreign[0]} on {args.device}; choose from {", ".join(ON[args.device])}')
    if args.size < 64:
        parser.error(f'argument --size: must be 64 or more, got {args.size}')
    for name in args.models or ():
        lengths = MODELS[name].frames
        if lengths and args.frames not in lengths and 'frames' not in args.studies:
            parser.error(f'argument --models: {name} takes {lengths[0]} frames, got --frames {args.frames}')
    if args.against and not args.against.is_file():
        parser.error(f'argument --against: there is no file {str(args.against)!r}')

    base = Setting(args.device, args.dtype, args.batch, args.size, args.layout, args.frames)
    if args.quick and not args.models:
        args.models = ['stm', 'tdrl', 'cme', 'sme', 'cmr', 'first-first', 'layer shift', 'layer pem', 'layer cme']
    if args.quick and args.studies == list(STUDIES):
        args.studies = ['latency', 'throughput', 'placement', 'training', 'scale-frames', 'scale-layers']
    plan = studies(args.studies, base, args.passes, args.rounds, args.models, args.modes)
    if not plan:
        parser.error('nothing is left to measure: no study of --studies has these --models in these --modes')
    return args, base, plan


def header(args: argparse.Namespace, base: Setting) -> dict[str, Any]:
    return {
        **timing.environment(), 'device': args.device, 'base': base._asdict(), 'passes': args.passes,
        'rounds': args.rounds, 'quick': args.quick}


def resume(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Units of an unfinished file. Numbers of two machines are never mixed.

    Raises:
        ValueError: It was measured elsewhere or otherwise.
    """
    old = json.loads(path.read_text())
    differing = [key for key in _IDENTITY if old.get(key) != head[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f'{path} has {key} {json.dumps(old.get(key))}, this run {json.dumps(head[key])}: choose another file, or '
            f'--fresh to overwrite it')
    head['date'], head['command'] = old['date'], old['command']
    units: list[dict[str, Any]] = old['units']
    return units


def save(path: Path, head: dict[str, Any], units: list[dict[str, Any]]) -> None:
    """One line for each unit; whole or not at all."""
    text = json.dumps(head, indent=1)[:-2] + ',\n "units": [\n' + ',\n'.join(map(json.dumps, units)) + '\n]\n}\n'
    part = path.with_suffix('.part')
    part.write_text(text)
    os.replace(part, path)


def bar(total: int, done: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('the progress bar needs tqdm: pip install "cmr-layers[bench]"') from error
    return tqdm(total=total, initial=done, unit='sample', smoothing=.05, mininterval=.5, dynamic_ncols=True)


def main() -> int:
    args, base, plan = parse()
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which measures memory, greets and parts
    torch.backends.cudnn.benchmark = True  # everything is to be as fast as it gets
    head = header(args, base)
    units: list[dict[str, Any]] = []
    if args.out and args.out.exists() and not args.fresh:
        try:
            units = resume(args.out, head)
        except (ValueError, KeyError) as error:
            print(f'argument --out: {error}', file=sys.stderr)
            return 2
    run(args, plan, head, units)
    results = {**head, 'units': units}
    print(render.render(results))
    if args.against:
        verdict = render.compare(results, json.loads(args.against.read_text()))
        print(verdict.text)
        if verdict.apart:
            return 1
    failed = sorted({
        f'{entry["model"]}, {entry["mode"]} ({entry["missing"]})' for unit in units for entry in unit['entries']
        if entry.get('missing', NO_TIME) != NO_TIME})
    if failed:
        print(f'candidates failed: {"; ".join(failed)}', file=sys.stderr)
    return 1 if failed else 0


def run(args: argparse.Namespace, plan: list[Study], head: dict[str, Any], units: list[dict[str, Any]]) -> None:
    """Measure what the units lack. The first pass of all studies comes before the second of any."""
    finished = {(unit['study'], unit['pass']): unit for unit in units}
    todo = [(study, number) for number in range(args.passes) for study in plan if number < study.passes]
    sizes = [len(study.candidates) * (study.rounds + 1) for study, _ in todo]
    done = sum(
        size for (study, number), size in zip(todo, sizes) if _covers(finished.get((study.name, number)), study))
    late: list[str] = []
    deadline, durations = timing.Deadline(60 * args.minutes), dict.fromkeys(STUDIES, 0.)
    with bar(sum(sizes), done) as progress:
        for study, number in todo:
            if _covers(finished.get((study.name, number)), study):
                continue
            progress.set_description(f'{study.name}, pass {number + 1} of {study.passes}')
            if deadline.left() < durations[study.name] or deadline.left() < 0:
                late.append(f'{study.name}, pass {number + 1}')  # one that would be cut off is none
                continue
            start = timing.Deadline(0)
            entries = measure(study, number, deadline, progress.update)
            durations[study.name] = -start.left()
            units[:] = [unit for unit in units if (unit['study'], unit['pass']) != (study.name, number)]
            date = timing.environment()['date']
            units.append({'study': study.name, 'pass': number, 'date': date, 'entries': entries})
            if args.out:
                save(args.out, head, units)
    if late:
        print(f'no time was left for: {"; ".join(late)}', file=sys.stderr)


def _covers(unit: dict[str, Any] | None, study: Study) -> bool:
    """Whether a finished unit has all that is wanted of it."""
    if unit is None:
        return False
    have = {Candidate(e['model'], e['mode'], Setting.of(e), e['width'], e['training'])
            for e in unit['entries'] if 'samples' in e}
    return have.issuperset(study.candidates)


if __name__ == '__main__':
    sys.exit(main())
