"""The site: `sphinx-build -W --keep-going -n -b html docs build/docs`. It is built offline, and a broken link fails."""
import sys
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).parents[1]))  # the code beside these pages, not an installed one

import cmr_layers

project = 'cmr-layers'
author = 'The cmr-layers developers'
release = cmr_layers.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'{project} {release}'

myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ['Shapes']
napoleon_use_ivar = True  # the attributes of a named tuple are members already
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_preserve_defaults = True

# no types, but the words of a Returns section before its colon
nitpick_ignore = [('py:class', 'clips'), ('py:class', 'frames per clip')]
# the types of other packages, whose pages can't be asked offline
nitpick_ignore_regex = [(r'py:.*', r'(torch|timm|numpy|os|fractions|typing)\..*|(nn|F)\..*')]


def resolve_by_last_name(app: Any, env: Any, node: Any, contnode: Any) -> Optional[Any]:
    """A docstring names what stands in another module by its last name alone, as Python code would after an import."""
    if node.get('refdomain') != 'py':
        return None
    domain, last = env.get_domain('py'), '.' + node['reftarget'].lstrip('.')
    found = [name for name, entry in domain.objects.items() if name.endswith(last) and not entry.aliased]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node['refdoc'], app.builder, node['reftype'], found[0], node, contnode)


def setup(app: Any) -> None:
    app.connect('missing-reference', resolve_by_last_name)
