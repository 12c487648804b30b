"""What an evaluation leaves: a text to read, figures as JSON, and the scores of each video."""
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from torch import Tensor

from cmr_layers.video.lists import VideoList

from .metrics import Result

__all__ = ['PREDICTIONS', 'as_text', 'class_totals', 'check_predictions', 'write_json', 'write_predictions']

#: Suffixes of the files that :func:`write_predictions` writes.
PREDICTIONS = ('.npz', '.parquet')


def class_totals(result: Result) -> List[int]:
    """Number of videos of each class, with the unreadable ones."""
    return torch.bincount(result.predictions.label, minlength=len(result.per_class)).tolist()


def as_text(result: Result, classes: Sequence[str], worst: int = 10) -> str:
    """The figures with their denominator, and the classes that are recognised worst.

    Args:
        result: What :func:`evaluate` returned.
        classes: Names of the classes.
        worst: Most classes that are listed.
    """
    count = result.count
    k = len(classes)
    lines = [
        f'top-1 {result.top1:7.2%}  ({round(result.top1 * count)} of {count} videos)',
        f'top-5 {result.top5:7.2%}  ({round(result.top5 * count)} of {count} videos'
        + (f'; there are {k} classes)' if k <= 5 else ')'),
        f'mean of the classes {result.mean_per_class:7.2%}; loss {result.loss:.4f}',
    ]
    if result.unreadable:
        lines.append(f'{result.unreadable} of the {count} videos cannot be read: they count as wrong')
    if result.not_finite:
        lines.append(f'{result.not_finite} of the {count} videos got scores that are not finite: they count as wrong')
    rows = _worst(result, classes)[:worst]
    if rows:
        lines.append(f'\n{"the worst classes" if len(rows) < k else "classes, the worst first"}:')
        width = max(len(row[0]) for row in rows)
        for name, share, total, taken_for in rows:
            most = f'  most often taken for {taken_for}' if taken_for else ''
            lines.append(f'  {name:<{width}}  {share:7.2%} of {total:>5}{most}')
    return '\n'.join(lines)


def _worst(result: Result, classes: Sequence[str]) -> List[Any]:
    """Name, share that is right, number of videos, and most frequent error of each class that has videos."""
    totals = class_totals(result)
    rows = []
    for i in sorted(range(len(classes)), key=lambda i: (result.per_class[i], i)):
        if totals[i] == 0:
            continue
        others = result.confusion[i].clone()
        others[i] = 0
        most = int(others.argmax())
        rows.append((classes[i], result.per_class[i], totals[i], classes[most] if others[most] else ''))
    return rows


def write_json(path: Path, result: Result, classes: Sequence[str], how: Dict[str, Any]) -> None:
    """Write the figures.

    Args:
        path: A file.
        result: What :func:`evaluate` returned.
        classes: Names of the classes.
        how: How they came to be, such as the checkpoint, the list and the views.
    """
    totals = class_totals(result)
    content = {
        **how,
        'videos': result.count, 'unreadable': result.unreadable, 'not_finite': result.not_finite,
        'top1': _number(result.top1), 'top5': _number(result.top5),
        'mean_per_class': _number(result.mean_per_class), 'loss': _number(result.loss),
        'per_class': [
            {'name': name, 'videos': totals[i], 'top1': _number(result.per_class[i])}
            for i, name in enumerate(classes)],
        'confusion': result.confusion.tolist(),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8')


def _number(value: float) -> Any:
    # JSON has no nan
    return value if math.isfinite(value) else None


def check_predictions(path: Path) -> None:
    """Raise an error if predictions cannot be written under this name, before hours of evaluation."""
    if path.suffix not in PREDICTIONS:
        raise ValueError(f'--predictions must end in {" or ".join(PREDICTIONS)}, got {str(path)!r}')
    if path.suffix == '.parquet':
        _pyarrow()


def write_predictions(path: Path, result: Result, videos: VideoList) -> None:
    """Write the scores of each video: a ``.npz`` of arrays, or a ``.parquet`` of rows.

    The columns are ``path``, ``start`` and ``end`` (nan without a window), ``label``, ``predicted`` (-1 without a
    prediction), ``unreadable`` and ``scores``.

    Args:
        path: A file that ends in .npz or .parquet.
        result: What :func:`evaluate` returned.
        videos: The list that it evaluated.

    Raises:
        ImportError: pyarrow is missing and wanted.
        ValueError: The name ends in something else.
    """
    check_predictions(path)
    rows = result.predictions
    entries = [videos.entries[i] for i in rows.video.tolist()]
    columns: Dict[str, Any] = {
        'path': np.array([entry.path for entry in entries], dtype=str),
        'start': np.array([math.nan if e.start is None else e.start for e in entries], dtype=float),
        'end': np.array([math.nan if e.end is None else e.end for e in entries], dtype=float),
        'label': rows.label.numpy(),
        'predicted': _predicted(rows.scores).numpy(),
        'unreadable': rows.unreadable.numpy(),
    }
    scores = rows.scores.numpy()
    if path.suffix == '.npz':
        np.savez_compressed(path, **columns, scores=scores, classes=np.array(videos.classes, dtype=str))
        return
    pa, parquet = _pyarrow()
    flat = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), scores.shape[1])
    table = pa.table({**{name: pa.array(column) for name, column in columns.items()}, 'scores': flat})
    parquet.write_table(table.replace_schema_metadata({'classes': json.dumps(videos.classes)}), path)


def _predicted(scores: Tensor) -> Tensor:
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)


def _pyarrow() -> Any:
    try:
        # by name, as it has no types
        return import_module('pyarrow'), import_module('pyarrow.parquet')
    except ImportError as error:
        raise ImportError('a .parquet file needs pyarrow: pip install pyarrow; a .npz file needs nothing') from error
