"""Time CMR beside its peers, its operators beside their reference, and all of it against the goals.

    python -m benchmarks.runtime                                          # everything, on a GPU if there is one
    python -m benchmarks.runtime --studies latency --models tsm tdrl cmr  # a part
    python -m benchmarks.runtime --out runtime.json                       # go on where that file ends
    python -m benchmarks.runtime --studies latency --against benchmarks/results/runtime-cpu.json
    python -m benchmarks.runtime --quick                                  # a smoke run

What a study compares is interleaved (:mod:`.timing`). A run is several passes; in each, every network is built and
warmed up anew. Times and ratios are medians, with intervals bootstrapped over passes and rounds (:mod:`.interval`).
Needs the extra [bench].
"""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.machine import output_file, positive
from benchmarks.runtime import tables
from benchmarks.runtime.candidate import MODES, ON, Setting
from benchmarks.runtime.compare import compare
from benchmarks.runtime.journal import Journal
from benchmarks.runtime.measure import ProcessLost, measure
from benchmarks.runtime.models import MODELS, OPERATORS
from benchmarks.runtime.plan import STUDIES, Study, studies
from benchmarks.runtime.results import NO_TIME, candidates_of, environment, read, resume, save, unfinished
from benchmarks.runtime.timing import Deadline

RESTARTED = 'CMR_LAYERS_BENCHMARK_RESTARTED'  # how often, and when the time is up
MAX_RESTARTS = 4
_QUICK_STUDIES = ('latency', 'operators', 'training', 'layers')
_QUICK_MODELS = ('tdrl', 'cmr', 'layer cme', 'cme_tim 256')


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Setting, list[Study]]:
    """The arguments, the setting that the studies vary, and these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: %(default)s')
    parser.add_argument('--layout', choices=['channels_last', 'contiguous'], default='channels_last')
    parser.add_argument(
        '--studies', nargs='+', choices=list(STUDIES), metavar='STUDY', default=list(STUDIES),
        help='; '.join(f'{name}: {text}' for name, text in STUDIES.items()))
    parser.add_argument(
        '--models', nargs='+', choices=list(MODELS), metavar='MODEL',
        help=f'only these, and tsn and tsm, to which ratios are taken: {", ".join(MODELS)}')
    parser.add_argument(
        '--modes', nargs='+', choices=list(MODES), metavar='MODE', help=f'only these: {", ".join(MODES)}')
    parser.add_argument('--rounds', type=positive, help='samples of each candidate in a pass')
    parser.add_argument('--passes', type=positive, help='how often all is built anew (default: 3)')
    parser.add_argument(
        '--dtype', choices=['fp32', 'tf32', 'fp16', 'bf16'], help='default: fp16 on CUDA, fp32 on a CPU')
    parser.add_argument('--frames', type=positive, default=8, help='of a clip; default: %(default)s')
    parser.add_argument('--batch', type=positive, default=1, help='clips, for latency; default: %(default)s')
    parser.add_argument('--size', type=positive, help='height and width of the frames; default: 224')
    parser.add_argument('--minutes', type=float, help='time limit; what does not fit is left out and said')
    parser.add_argument('--quick', action='store_true', help='a smoke run: small, few rounds, no numbers to quote')
    parser.add_argument('--out', type=output_file, help='write the results there, as JSON')
    parser.add_argument('--fresh', action='store_true', help='overwrite --out rather than go on where it ends')
    parser.add_argument('--against', type=Path, help='a result file: say whether its ratios came out again')
    args = parser.parse_args(argv)
    cuda = args.device == 'cuda'
    if cuda and not torch.cuda.is_available():
        parser.error('argument --device: cuda, but there is none here; choose cpu')
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f'argument --minutes: must be more than 0, got {args.minutes:g}')
    args.dtype = args.dtype or ('fp16' if cuda else 'fp32')
    args.passes = args.passes or (1 if args.quick else 3)
    args.rounds = args.rounds or (2 if args.quick else 15 if cuda else 6)
    args.minutes = args.minutes or (8.5 if cuda else 24 * 60)
    args.size = args.size or (64 if args.quick else 224)
    if args.dtype == 'tf32' and not cuda:
        parser.error('argument --dtype: no tf32 on cpu; choose from fp32, fp16, bf16')
    foreign = [mode for mode in args.modes or () if mode not in ON[args.device]]
    if foreign:
        parser.error(f'argument --modes: no {foreign[0]} on {args.device}; choose from {", ".join(ON[args.device])}')
    if args.size < 64:
        parser.error(f'argument --size: must be 64 or more, got {args.size}')
    if args.against:
        try:
            args.against = read(args.against)
        except (OSError, ValueError) as error:
            parser.error(f'argument --against: {error}')

    base = Setting(args.device, args.dtype, args.batch, args.size, args.layout, args.frames)
    asked = args.models or ()
    if args.quick and not args.models:
        args.models = list(_QUICK_MODELS)
    if args.quick and args.studies == list(STUDIES):
        args.studies = list(_QUICK_STUDIES)
    plan = studies(args.studies, base, args.passes, args.rounds, args.models, args.modes)
    if args.quick and not args.modes:  # compiling a network takes a minute
        plan = [study._replace(candidates=tuple(
            c for c in study.candidates if not c.compiles or c.model in OPERATORS)) for study in plan]
    planned = {c.model for study in plan for c in study.candidates}
    for name in asked:
        if name not in planned:
            model = MODELS[name]
            wants = ''.join([
                f'; it takes {model.frames[0]} frames' if model.frames else '',
                f'; it takes frames of {model.sizes[0]}x{model.sizes[0]}' if model.sizes else ''])
            parser.error(f'argument --models: {name} is in none of the studies {", ".join(args.studies)}{wants}')
    if not plan:
        parser.error('nothing is left to measure: no study of --studies has these --models in these --modes')
    left_out = [name for name in args.studies if name not in {study.name for study in plan}]
    if left_out:
        print(f'nothing in these --models and --modes: {", ".join(left_out)}', file=sys.stderr)
    return args, base, plan


def header(args: argparse.Namespace, base: Setting) -> dict[str, Any]:
    return {
        **environment(), 'device': args.device, 'base': base._asdict(), 'passes': args.passes,
        'rounds': args.rounds, 'quick': args.quick}


def bar(total: int, done: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('the progress bar needs tqdm: pip install "cmr-layers[bench]"') from error
    return tqdm(total=total, initial=done, unit='sample', smoothing=.05, mininterval=.5, dynamic_ncols=True)


def main() -> int:
    start = Deadline(0)
    args, base, plan = parse()
    deadline = Deadline(60 * args.minutes + start.left())
    restarts, ends = os.environ.get(RESTARTED, '0 0').split()
    if int(restarts):
        deadline.end, args.fresh = float(ends), False
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which measures memory, greets and parts
    torch.backends.cudnn.benchmark = True  # everything is to be as fast as it gets
    head = header(args, base)
    units: list[dict[str, Any]] = []
    if args.out and args.out.exists() and not args.fresh:
        try:
            units = resume(args.out, head, plan)
        except (OSError, ValueError) as error:
            print(f'argument --out: {error}', file=sys.stderr)
            return 2
    journal = Journal(args.out.with_suffix('.journal') if args.out else None)
    if args.fresh:
        journal = journal.anew()
    try:
        run(args, plan, deadline, head, units, journal)
    except ProcessLost as reason:
        print(f'this process is of no more use: {reason}', file=sys.stderr)
        if not args.out or int(restarts) == MAX_RESTARTS:
            print('run the command again, with --out, for what is left', file=sys.stderr)
            return 1
        restart(int(restarts) + 1, deadline)
    if not unfinished(units, plan):
        journal.close()
    results = {**head, 'units': units}
    print(tables.render(results), 'Operations and parameters: python -m benchmarks.flops', sep='\n\n')
    names = {study.name for study in plan}
    failed = sorted({
        f'{entry["model"]}, {entry["mode"]} ({entry["missing"]})'
        for unit in units if unit['study'] in names for entry in unit['entries']
        if entry.get('missing', NO_TIME) != NO_TIME})
    if args.against:
        verdict = compare(results, args.against)
        print('', verdict.text, sep='\n')
        for key in ('machine', 'gpu', 'versions'):
            if results[key] != args.against[key]:
                print(f'note: {key} there {json.dumps(args.against[key])}, here {json.dumps(results[key])}')
        if not verdict.inside + verdict.overlapping:
            failed.append('no ratio of --against came out again')
        elif verdict.apart:
            failed.append(f'{verdict.apart} ratios of --against did not come out again')
    if failed:
        print(f'failed: {"; ".join(failed)}', file=sys.stderr)
    return 1 if failed else 0


def restart(number: int, deadline: Deadline) -> NoReturn:
    """Become a fresh process, which goes on where the file ends."""
    os.environ[RESTARTED] = f'{number} {deadline.end}'
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(
        args: argparse.Namespace, plan: list[Study], deadline: Deadline, head: dict[str, Any],
        units: list[dict[str, Any]], journal: Journal,
) -> None:
    """Measure what the units lack. The first pass of all studies comes before the second of any.

    What a former run had no time for comes behind what no run has tried: it may need more time than a run has.

    Raises:
        ProcessLost: A fresh process has to go on.
    """
    finished = {(unit['study'], unit['pass']): unit for unit in units}
    todo = sorted(unfinished(units, plan), key=lambda pair: (pair[0].name, pair[1]) in finished)
    sizes = [
        (study, number, len(study.of_pass(number).candidates) * (study.rounds + 1))
        for number in range(args.passes) for study in plan if number < study.passes]
    left = {(study.name, number) for study, number in todo}
    done = sum(size for study, number, size in sizes if (study.name, number) not in left)
    late: list[str] = []
    durations = dict.fromkeys(STUDIES, 0.)
    with bar(sum(size for *_, size in sizes), done) as progress:
        for study, number in todo:
            progress.set_description(f'{study.name}, pass {number + 1} of {study.passes}')
            if deadline.left() < durations[study.name] or deadline.left() < 0:
                late.append(f'{study.name}, pass {number + 1}')  # one that would be cut off is none
                continue
            start, lost = Deadline(0), None
            try:
                entries = measure(study, number, deadline, progress.update, journal)
            except ProcessLost as reason:
                entries, lost = reason.entries, reason
            durations[study.name] = -start.left()
            unit = {
                'study': study.name, 'pass': number, 'date': environment()['date'], 'entries': entries}
            cut = [f'{e["model"]}, {e["mode"]}' for e in entries if e.get('missing') == NO_TIME]
            if cut:
                late.append(f'{study.name}, pass {number + 1}: {", ".join(dict.fromkeys(cut))}')
            if len(candidates_of(unit)) > len(candidates_of(finished.get((study.name, number)))):  # it got farther
                units[:] = [unit for unit in units if (unit['study'], unit['pass']) != (study.name, number)]
                units.append(unit)
                if args.out:
                    save(args.out, head, units)
            if lost:
                raise lost
    if late:
        print(f'no time was left for: {"; ".join(late)}', file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
