"""Plots of results as SVG, which carry a digest of what they show. Drawing needs the extra [bench]."""
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ['digest', 'stale', 'write']


def digest(shown: Any) -> str:
    """Of what is drawn."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def stale(shown: Any, path: Path) -> bool:
    """Whether a picture shows something else."""
    return not path.exists() or f'data {digest(shown)}' not in path.read_text()


def write(shown: Any, path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> None:
    """Draw a figure of a size in inches, which ``fill`` fills, as SVG: the same bytes for the same figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plots need matplotlib: pip install "cmr-layers[bench]"') from error
    with matplotlib.rc_context({'svg.hashsalt': 'cmr-layers', 'svg.fonttype': 'none', 'font.size': 9}):
        figure = Figure(figsize=size, layout='constrained')
        fill(figure)
        figure.savefig(path, format='svg', metadata={'Date': None, 'Description': f'data {digest(shown)}'})
    path.write_text(re.sub(r' +$', '', path.read_text(), flags=re.MULTILINE))
