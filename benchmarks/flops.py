"""Count operations and parameters of CMR-ResNet-50 and its peers beside the paper's Tables 1 and 3.

    python -m benchmarks.flops --out benchmarks/results/flops.json

Counted with ``torch.utils.flop_counter`` on the meta device: the multiply-accumulates (MACs, half the counter's
FLOPs) of convolutions and matrix products. Pooling, normalisation, products and sums are not counted, as the papers'
counters do not count them.
"""
import argparse
import json
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cmr_layers.released  # noqa: F401  (registers the family, and the released variant)
from benchmarks.machine import describe, result_file
from benchmarks.markdown import table
from benchmarks.runtime.models import NUM_CLASSES, OFF_THE_SHELF, TABLE_7

# What the paper prints, in G: Table 1 for 8 and 16 frames, Table 3 for r1 = r2.
PAPER = {'8 frames': 33, '16 frames': 66, 'r = 1': 55, 'r = 4': 39, 'r = 8': 33, 'r = 16': 32}
PAPER_PEERS = {'tsm': 33, 'tei': 33, 'stm': 33, 'tdrl': 33, 'tea': 35, 'cmr': 33}  # Table 1, 8 frames


def count(model: nn.Module, num_frames: int) -> dict[str, float]:
    """MACs of one clip of 224x224 frames, in G, and parameters, in M."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.empty(num_frames, 3, 224, 224, device='meta'))
    return {
        'gmacs': counter.get_total_flops() / 2e9,
        'mparams': sum(p.numel() for p in model.parameters()) / 1e6,
    }


def build(name: str = 'cmr_resnet50', **kwargs: Any) -> nn.Module:
    return timm.create_model(name, num_classes=NUM_CLASSES, device='meta', **kwargs)


def _on_meta(name: str, num_frames: int) -> nn.Module:
    with torch.device('meta'):
        return {**TABLE_7, **OFF_THE_SHELF}[name].build(num_frames, NUM_CLASSES)


def measure() -> dict[str, dict[str, dict[str, float]]]:
    off: dict[str, Any] = {'cme': 'none', 'tim': 'none', 'sme': 'none'}
    return {
        'layers': {
            'ResNet-50': count(build('resnet50'), 8),
            '+ TIM': count(build(**{**off, 'tim': 'all'}), 8),
            '+ TIM, CME': count(build(sme='none'), 8),
            '+ TIM, SME': count(build(cme='none'), 8),
            '+ TIM, CME, SME (`cmr_resnet50`)': count(build(), 8),
            'as released (`released_cmr_resnet50`)': count(build('released_cmr_resnet50'), 8),
        },
        'table 1': {f'{t} frames': count(build(num_frames=t), t) for t in (8, 16)},
        'table 3': {f'r = {r}': count(build(reduction=r), 8) for r in (1, 4, 8, 16)},
        'table 3, as released': {
            f'r = {r}': count(build('released_cmr_resnet50', reduction=r), 8) for r in (1, 4, 8, 16)},
        'peers': {
            name: {'frames': frames, **count(_on_meta(name, frames), frames)}
            for name, model in {**TABLE_7, **OFF_THE_SHELF}.items()
            for frames in (model.frames or (8,))},
        'family': {name: count(build(name), 8) for name in timm.list_models('cmr_*', module='cmr_resnet')},
    }


def render(results: dict[str, Any]) -> str:
    """The tables of docs/paper.md."""
    def cells(entry: dict[str, float]) -> list[str]:
        return [f'{entry["gmacs"]:.2f}', f'{entry["mparams"]:.2f}']

    layers = table(
        ['8 frames, 224x224, 174 classes', 'GMACs', 'M parameters'],
        [[name, *cells(entry)] for name, entry in results['layers'].items()])
    paper = table(
        ['`cmr_resnet50`', 'GMACs', 'M parameters', 'as released, GMACs', 'paper, "FLOPs"'],
        [[f'Table 1, {name}', *cells(entry), '', f'{PAPER[name]}G'] for name, entry in results['table 1'].items()]
        + [[f'Table 3, {name}', *cells(entry), f'{results["table 3, as released"][name]["gmacs"]:.2f}',
            f'{PAPER[name]}G'] for name, entry in results['table 3'].items()])
    return f'{layers}\n\n{paper}'


def render_peers(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    models = {**TABLE_7, **OFF_THE_SHELF}
    rows = [
        [models[name].label, str(entry['frames']), f'{entry["gmacs"]:.2f}', f'{entry["mparams"]:.2f}',
         f'{PAPER_PEERS[name]}G' if name in PAPER_PEERS else '']
        for name, entry in results['peers'].items()]
    return table(['224x224, 174 classes', 'frames', 'GMACs', 'M parameters', 'CMR paper, "FLOPs"'], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=result_file, help='write the counts there, as JSON')
    args = parser.parse_args()
    results = measure()
    print(render(results), render_peers(results), sep='\n\n')
    if args.out:
        args.out.write_text(json.dumps({**describe(), **results}, indent=1) + '\n')


if __name__ == '__main__':
    main()
