"""The command of :mod:`benchmarks.kernels`."""
import argparse
import json
import sys
from typing import Any

from benchmarks import kernels
from benchmarks.machine import describe, positive, result_file

from .facts import report
from .limits import SHARED, failures, slow, unexpected
from .network import collect
from .prediction import predict_network
from .record import DTYPES


def _verdict(kernel: str, wrong: list[str]) -> tuple[str, bool]:
    """What to print of failures, and whether one of them is new."""
    new = unexpected(kernel, wrong)
    return '; '.join(wrong if new else [f'known: {message}' for message in wrong]) or 'ok', bool(new)


def check(dtypes: list[str], capabilities: list[int], frames: list[int]) -> tuple[dict[str, Any], int]:
    """Compile every kernel; returns the report, and how many fail in a way that is not known."""
    rows, bad = [], 0
    for launch in collect(dtypes, [True, False], frames):
        for capability in capabilities:
            found = report(launch, capability)
            wrong = failures(launch, capability, found)
            verdict, new = _verdict(launch.name, wrong)
            bad += new
            dtype = next((kind for _, kind in launch.signature if kind.startswith('*')), '')
            constants = {
                key: value if isinstance(value, (int, str)) else str(value)
                for key, value in launch.constants if value is not None and key.isupper()}
            rows.append({
                'kernel': launch.name, 'sm': capability, 'dtype': dtype.strip('*'), 'constants': constants,
                'options': dict(launch.options), **found, 'failures': wrong})
            print(f'{launch.name:22} sm_{capability} {dtype:6} reg {found["reg"]:3} shared {found["shared"]:6} '
                  f'stack {found["stack"]:3} wide {found["wide_loads"]:3}/{found["loads"]:3} '
                  f'{",".join(found["tensor_cores"]):5} {verdict}', flush=True)
    print(f'{len(rows)} kernels, {bad} fail')
    return {'kernels': rows}, bad


def predict(
        batches: list[int], names: list[str] | None, stages: list[str] | None, mode: str,
) -> tuple[dict[str, Any], int]:
    """Predict a network's inference, and print it; returns the prediction, and how many rows are too slow."""
    results, bad = predict_network(batches, names, stages, mode), 0
    for row in results['rows']:
        verdict, new = _verdict(row['kernel'], slow(row))
        bad += new
        outputs = f'->{row["outputs"]}' if 'outputs' in row else ''
        print(f'batch {row["batch"]} {row["kernel"]:20} {row["frames"]:>7}{outputs:6} {row["programs"]:6} programs, '
              f'{row["resident"]:2} at once, {row["waves"]:5.2f} waves | '
              f'{row["time"]:7.1f} us, floor {row["floor"]:6.1f}, ratio {row["time"] / row["floor"]:5.1f} | '
              f'x{row["launches"]}, bound by {row["bound"]}, {row["executed"]} instructions run, '
              f'conflicts {row["conflicts"]:.1f} | {verdict}')
    for batch, sums in results['sums'].items():
        for name, part in sums['kernels'].items():
            print(f'batch {batch} {name:20} {part["time"]:7.1f} us, floor {part["floor"]:6.1f}, x{part["launches"]}')
        print(f'batch {batch}: {sums["time"]:.0f} us in {sums["launches"]} launches, floor {sums["floor"]:.0f}; '
              f'{sums["added"]:.0f} us more than plain, '
              f'ratio {" to ".join(map(str, sums.get("ratio", ["?"])))} (predicted)')
    return results, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=kernels.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtypes', nargs='+', choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument('--sm', nargs='+', type=int, choices=list(SHARED), default=list(SHARED))
    parser.add_argument('--frames', nargs='+', type=positive, default=[8], help='frames of a clip')
    parser.add_argument('--predict', action='store_true', help='predict times instead, on an H100 or H200')
    parser.add_argument('--batches', nargs='+', type=positive, default=[1, 8], help='clips, for --predict')
    parser.add_argument(
        '--mode', choices=['folded', 'fused'], default='folded',
        help='for --predict: batch norms folded, and also the stages fused; default: %(default)s')
    parser.add_argument('--kernels', nargs='+', help='parts of names, for --predict')
    parser.add_argument('--stages', nargs='+', help='frames of a stage such as 256x56, for --predict')
    parser.add_argument('--out', type=result_file, help='write the report there, as JSON')
    args = parser.parse_args()
    if args.predict:
        found, bad = predict(args.batches, args.kernels, args.stages, args.mode)
    else:
        found, bad = check(args.dtypes, args.sm, args.frames)
    if args.out:
        args.out.write_text(json.dumps({**describe('triton'), **found}, indent=1) + '\n')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
