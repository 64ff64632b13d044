"""How Sphinx builds the API reference from the docstrings: ``sphinx-build -n -W --keep-going docs out/docs``."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import litgpt
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

import fabric_tp

fabric_tp.estimate.__globals__["Config"] = litgpt.Config  # for its annotations; there it is for type checkers alone

logger = getLogger(__name__)

project = "fabric_tp"
author = copyright = "fabric_tp contributors"
version = release = fabric_tp.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_default_options = {"members": True, "exclude-members": "module_class"}
autodoc_inherit_docstrings = False  # an override is shown if it has something of its own to say
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# What other packages document is not built here, so links to it cannot be checked. Links within fabric_tp must hold.
_elsewhere = "collections|contextlib|datetime|lightning|litgpt|pathlib|torch|transformers|typing"
nitpick_ignore_regex = [(r"py:.*", rf"({_elsewhere})(\..*)?")]

add_module_names = False
html_theme = "alabaster"
html_theme_options = {"description": "Tensor parallelism for Lightning Fabric", "page_width": "72rem"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html", "localtoc.html"]}
html_show_sphinx = False
html_copy_source = False
maximum_signature_line_length = 100


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", warn_of_public_names_left_out)
    app.connect("missing-reference", find_by_short_name)
    app.connect("autodoc-process-signature", show_default_factories)
    app.connect("autodoc-process-docstring", keep_first_lines_of_attributes, priority=400)  # napoleon has 500


def warn_of_public_names_left_out(app: Sphinx, env: BuildEnvironment) -> None:
    """What has no docstring, such as a constant, autodoc leaves out without a word."""
    python = env.get_domain("py")
    for module in python.modules:
        for name in getattr(sys.modules[module], "__all__", ()):
            if not inspect.ismodule(getattr(sys.modules[module], name)) and f"{module}.{name}" not in python.objects:
                logger.warning("%s exports %s, which is not in the reference", module, name)


def find_by_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Link a name that the docstring's own module knows to where it is documented, which may be another namespace.

    Only to the one documented thing of that name: several are a warning, none is a broken reference.
    """
    if node["refdomain"] != "py" or "refdoc" not in node:
        return None
    node["refspecific"] = True
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, content)


def show_default_factories(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Sphinx cannot parse, and so does not link, a dataclass' signature with ``<factory>`` in it."""
    return signature and signature.replace("<factory>", "..."), returns


def keep_first_lines_of_attributes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what is before a colon there for the attribute's type; behind an empty comment it does not."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]
