"""pytest plugin for :mod:`.timm_suite`: shows our names to the tests that choose models by module.

timm's suite lists the modules whose models have ``forward_intermediates`` by name, and knows ours as little as any
other package's. The suite itself stays as it is.
"""
from typing import Any

import timm

import cmr_layers  # noqa: F401  (registers the family)

_list_models = timm.list_models


def _list_models_with_ours(filter: Any = '', module: Any = '', **kwargs: Any) -> list[str]:
    if isinstance(module, (list, tuple)) and 'resnet' in module:
        module = [*module, 'cmr_resnet']
    return _list_models(filter, module, **kwargs)


timm.list_models = _list_models_with_ours  # type: ignore[assignment]
