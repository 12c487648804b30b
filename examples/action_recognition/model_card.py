"""A trained network as a folder: safetensors, what :func:`cmr_layers.load_model` needs, classes and a model card."""
import json
from pathlib import Path
from typing import Any, List, Mapping, Sequence

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from cmr_layers import load_model, save_model
from cmr_layers.video.augment import normalize

from .graphs import ExportError, Spec

__all__ = ['FILES', 'write_folder']

# the network is none without config.json, which therefore comes first
FILES = ('config.json', 'model.safetensors', 'preprocessor_config.json', 'classes.txt', 'README.md')
METRICS = {'top1': 'top-1 accuracy', 'top5': 'top-5 accuracy'}
SHOWN = 20  # classes that the card lists


def write_folder(
        model: nn.Module, spec: Spec, folder: Path, name: str, evaluations: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a network of the family, a retrofitted or inserted one, or a :class:`cmr_layers.ClipModel`.

    Args:
        model: The network.
        spec: What the files say of it.
        folder: Where to write :data:`FILES`.
        name: Title of the card.
        evaluations: What ``evaluate`` wrote into results.json.

    Raises:
        ExportError: What is loaded again differs from the network in a bit.
        ValueError: See :func:`cmr_layers.save_model`.
    """
    save_model(model, folder)
    noise = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (1, spec.num_frames, 3, spec.size, spec.size), dtype=torch.uint8, generator=noise)
    with torch.no_grad():
        want, got = (net(normalize(clip, spec.mean, spec.std)) for net in (model, load_model(folder)))
    if not torch.equal(want, got):
        raise ExportError(f'the folder must hold the network bit for bit, got logits {(want - got).abs().max():g} off')
    (folder / 'classes.txt').write_text(''.join(f'{label}\n' for label in spec.classes), encoding='utf-8')
    (folder / 'preprocessor_config.json').write_text(json.dumps(spec.preprocessing(), indent=1) + '\n')
    (folder / 'README.md').write_text(_card(model, spec, name, evaluations), encoding='utf-8')


def _card(model: nn.Module, spec: Spec, name: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    results = [
        EvalResult(
            task_type='video-classification', dataset_type=_dataset(found), dataset_name=_dataset(found),
            metric_type='accuracy', metric_name=f'{title}, {_views(found)}', metric_value=round(found[key], 4))
        for found in evaluations for key, title in METRICS.items() if found[key] is not None]
    head = ModelCardData(
        library_name='cmr-layers', pipeline_tag='video-classification', metrics=['accuracy'],
        tags=['video-classification', 'action-recognition', 'cmr-layers', 'safetensors'],
        model_name=name if results else None, eval_results=results or None)
    return _BODY.format(
        head=head.to_yaml(), name=name, network=type(model).__name__, classes=_classes(spec), count=len(spec.classes),
        evaluation=_evaluation(evaluations), T=spec.num_frames, side=spec.short_side, size=spec.size,
        mean=list(spec.mean), std=list(spec.std))


def _dataset(found: Mapping[str, Any]) -> str:
    return Path(found['list'] or 'videos').stem


def _views(found: Mapping[str, Any]) -> str:
    return f'{found["clips"]} clips x {found["crops"]} crops'


def _classes(spec: Spec) -> str:
    lines: List[str] = [f'{i}. {label}' for i, label in enumerate(spec.classes[:SHOWN])]
    rest = len(spec.classes) - SHOWN
    return '\n'.join(lines + ([f'\n{rest} more are in `classes.txt`.'] if rest > 0 else []))


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return 'None was found beside the checkpoint.'
    rows = [
        f'| {_dataset(found)} | {found["videos"]}, {found["unreadable"]} of them unreadable | {_views(found)} | '
        + ' | '.join('' if found[key] is None else f'{found[key]:.2%}' for key in METRICS) + ' |'
        for found in evaluations]
    head = f'| list | videos | views | {" | ".join(METRICS.values())} |'
    return '\n'.join([head, '| --- | --- | --- | ---: | ---: |', *rows])


_BODY = """---
{head}
---

# {name}

It tells {count} actions in videos apart. The network ({network}) takes clips of {T} frames.

## Loading

```python
from cmr_layers import load_model
from cmr_layers.video import ClipTransform, read_clip

model = load_model('.')  # this folder
transform = ClipTransform(size={size}, mean={mean}, std={std})
logits = model(transform(read_clip('video.mp4', num_frames={T}).frames))
```

`pip install "cmr-layers[video]"` installs what this needs. The logits are in the order of `classes.txt`.

## Preprocessing

- {T} frames, the middle ones of {T} equal parts of the video, as RGB
- short side to {side}, centre crop of {size} x {size}
- divided by 255, minus {mean}, divided by {std} (red, green, blue)

`preprocessor_config.json` says the same.

## Classes

{classes}

## Evaluation

{evaluation}

## Limits

- It answers with one of its classes, whatever a video shows.
- Accuracy on other videos (cameras, places, people, lengths) is not known. Measure it on your own first.
- Other numbers of frames and other sizes than those above were not tried.

## License

None is given yet. Whoever publishes this folder chooses one and adds `license:` to the head of this file. The license
of the videos and of the weights that the training began with may restrict the choice.
"""
