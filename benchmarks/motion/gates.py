"""What do CME's gates know of motion?

    python -m benchmarks.motion.gates --out benchmarks/results/motion-gates-cpu.json --rows cme all --seeds 5 6

CME pools each frame before it compares frames. When a thing moves over a ground that goes on, features move with it,
and their mean over the frame stays. Two questions are asked of each CME, on clips as of Figure 5, whose bar is visible
and moves in every frame:

- Of the variance over clips and frames, which share lies within clips: for features at a place, for their means over
  the frame, and for gates?
- Gates of a clip may be alike and still know how its frames differ. So a linear classifier is taught to tell the class
  from the means, and from the gates, of all frames.

Reads networks that the study has left in its folder. Those that the file has are not measured again.
"""
import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, not_negative, result_file, write
from benchmarks.motion.fit import normalise
from benchmarks.motion.maps import GOES_ON, inputs_of, moving
from benchmarks.motion.run import trained
from benchmarks.motion.size import SIZES, add_size, kept, study_folder
from cmr_layers import CME

__all__ = ['decoded', 'main', 'measure', 'within']

PARTS = 20  # of so many clips as Figure 5's numbers are of
TAUGHT = .75  # share of clips that the classifier learns from
#: Rows that have the paper's CME, or a variant of it, and are trained as the main ones.
GATED = ['cme', 'all', 'only_cme', 'cme_sme', 'shuffled_cme', 'similar', 'alone', 'softmax_t', 'even', 'r1', 'r4',
         'r16']


def within(values: Tensor) -> float:
    """Share of the variance of (B, T, ...) that is within clips, summed over what follows T; nan where nothing varies.

    What all clips have in common at a time, such as what TIM's zero padding does to the last frame, tells nothing on
    motion, and is taken off before. 1 - 1/T is the share of frames that have nothing to do with each other.
    """
    values = values.double() - values.double().mean(0)
    return float(values.var(1, correction=0).mean(0).sum() / values.var((0, 1), correction=0).sum())


def decoded(values: Tensor, labels: Tensor, taught: float = TAUGHT) -> float:
    """Share of labels (B,) that a linear classifier tells from (B, ...), taught on the first clips, of the others.

    Least squares to one-hot labels, on standardised values, with a ridge of a tenth of the clips that it is taught on.
    """
    n = int(taught * len(labels))
    x = values.flatten(1).double()
    x = (x - x[:n].mean(0)) / x[:n].std(0).clamp_min(1e-12)
    y = F.one_hot(labels).double()
    middle = y[:n].mean(0)
    ridge = n / 10 * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x[:n].T @ x[:n] + ridge, x[:n].T @ (y[:n] - middle))
    return float(((x[n:] @ weights + middle).argmax(1) == labels[n:]).double().mean())


@torch.no_grad()
def measure(model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
    """Of each CME, as the network runs through them: what there is to see, and what its gates have of it.

    Args:
        model: In eval mode, with the paper's CMEs.
        batches: uint8 clips (B, T, 3, S, S) and their labels (B,).

    Returns:
        For each CME, shares of the variance within clips for features at a place, for their means over the frame
        ('pooled') and for gates; shares of labels that are decoded from the latter two; the mean of the gates.
    """
    layers = [module for module in model.modules() if isinstance(module, CME)]
    places: list[list[float]] = [[] for _ in layers]
    pooled: list[list[Tensor]] = [[] for _ in layers]
    gates: list[list[Tensor]] = [[] for _ in layers]
    labels = []
    for clips, of_clips in batches:
        labels.append(of_clips.cpu())
        with inputs_of(model, CME) as inputs:
            model(normalise(clips))
        for i, (layer, x) in enumerate(zip(layers, inputs)):
            x = x.unflatten(0, (-1, layer.num_frames))
            places[i].append(within(x))
            pooled[i].append(x.mean((3, 4)).cpu())
            gates[i].append(layer.gate(x).cpu())
    found, classes = [], torch.cat(labels)
    for place, means, gate in zip(places, map(torch.cat, pooled), map(torch.cat, gates)):
        found.append({
            'place': sum(place) / len(place), 'pooled': within(means), 'gates': within(gate),
            'pooled_decoded': decoded(means, classes), 'gates_decoded': decoded(gate, classes),
            'mean': gate.mean().item()})
    return [{name: round(value, 4) for name, value in layer.items()} for layer in found]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, required=True, help='JSON file')
    parser.add_argument('--folder', type=Path, help='of the study; by default, motion-study-SIZE')
    add_size(parser)
    parser.add_argument('--rows', nargs='+', choices=GATED, metavar='ROW', default=['cme'],
                        help=f'of {", ".join(GATED)}; default: cme')
    parser.add_argument('--seeds', type=not_negative, nargs='+', metavar='SEED', default=[0], help='default: 0')
    args = parser.parse_args(argv)
    size, folder = SIZES[args.size], study_folder(args.size, args.folder)
    about = {**describe(), 'size': args.size, 'clips': PARTS * size.maps, 'taught': TAUGHT, 'classes': GOES_ON}
    networks: list[dict[str, Any]] = kept(parser, args.out, args.size, 'networks')
    done = {(network['row'], network['seed']) for network in networks}
    wanted = dict.fromkeys((row, seed) for row in args.rows for seed in args.seeds if (row, seed) not in done)
    try:
        models = {key: trained(folder, *key, size) for key in wanted}
    except ValueError as error:
        parser.error(f'argument {error}')
    for (row, seed), model in models.items():
        parts = (moving(size.maps, size.side, 100 * seed + part) for part in range(PARTS))
        batches = ((made.clips.to(size.device), made.labels) for made in parts)
        networks.append({'row': row, 'seed': seed, 'layers': measure(model, batches)})
    networks.sort(key=lambda network: (GATED.index(network['row']), network['seed']))
    if wanted:
        write(args.out, {**about, 'networks': networks})
    print(f'{len(wanted)} networks measured, {len(networks)} in {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
