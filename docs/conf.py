"""Settings of Sphinx: `make docs` builds build/docs. Pages are those of docs and the reports of published profiles."""

import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import reference  # noqa: E402

import schoenbat  # noqa: E402

project = "schoenbat"
release = schoenbat.__version__
copyright = "the authors of schoenbat, MIT licence"

published = re.findall(r"^!/\*/(\w+)/$", (ROOT / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE)
include_patterns = ["docs/*.md", *(f"reports/{profile}/index.md" for profile in published)]
exclude_patterns = [".*", "build", "checkpoints", "data", "logs", "mlruns", "mlartifacts", "runs", "**/__pycache__"]
root_doc = "docs/index"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"schoenbat {release}"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True


def escape_marks(text: str) -> str:
    """`x` is code, |x| an absolute value and * a product: docstrings mean no substitution and no emphasis."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text)
    parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part if part.startswith("``") else f"`{part}`" for part in parts[1::2]]
    return "".join(parts)


class Components(SphinxDirective):
    """The components of a registry of schoenbat, such as KERNELS, with their docstrings and settings.

    Their files are called by their names, which autodoc cannot import where they have a hyphen.
    """

    required_arguments = 1

    def run(self) -> list:
        registry = getattr(schoenbat, self.arguments[0])
        lines: list[str] = []
        for name in registry.names():
            component = registry.get(name)
            lines += [f".. describe:: {name}", ""]
            for text in (component.__doc__, getattr(vars(component).get("Config"), "__doc__", None)):
                # A dataclass without a docstring is given its signature as one.
                if text and not text.startswith("Config("):
                    escaped = escape_marks(inspect.cleandoc(text))
                    lines += [f"   {line}" for line in GoogleDocstring(escaped, self.config).lines()] + [""]
        return self.parse_text_to_nodes("\n".join(lines))


class Reference(SphinxDirective):
    """A page of `reference.py`: settings or commands."""

    required_arguments = 1

    def run(self) -> list:
        page = getattr(reference, f"{self.arguments[0]}_page")()
        return self.parse_text_to_nodes(page, allow_section_headings=True)


def setup(app: Sphinx) -> None:
    def escape(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
        lines[:] = escape_marks("\n".join(lines)).split("\n")

    # Before napoleon, which adds marks that are meant.
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.add_directive("components", Components)
    app.add_directive("reference", Reference)
