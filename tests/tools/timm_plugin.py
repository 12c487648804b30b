"""pytest plugin for timm_suite.py: shows our names to the tests that choose models by module.

timm's suite lists the modules whose models have ``forward_intermediates`` by name, and knows ours as little as any
other package's. The suite itself stays as it is.
"""
from typing import Any

import timm

import cmr_layers  # noqa: F401  (registers the family)


def pytest_configure() -> None:
    """Before the suite is collected, and only where this is a plugin: our own tests import this file, too."""
    list_models = timm.list_models

    def with_ours(filter: Any = '', module: Any = '', **kwargs: Any) -> list[str]:
        if isinstance(module, (list, tuple)) and 'resnet' in module:
            module = [*module, 'cmr_resnet']
        return list_models(filter, module, **kwargs)

    timm.list_models = with_ours  # type: ignore[assignment]
