"""The documentation site, made by Sphinx of the pages that the repository has: ``make docs``.

Every page is read where it lies, so that a link leads to the same file on the site and in the repository. The index in
``docs/README.md`` is the navigation. A page ``NAME.md`` with a folder ``NAME/`` has the pages in it below itself. A
line of ``docs/api/`` that names a module becomes its docstrings.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bundle import __version__  # noqa: E402

project = "dinov3_spatial_ar"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "**/.*", "output", "sample_cohort*", "archive", "models", "dist"]

myst_enable_extensions = ["dollarmath"]
highlight_language = "none"  # of blocks that name none
myst_heading_anchors = 6
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # a cell that fails ends the build

napoleon_use_ivar = True  # else attributes that have annotations would be there twice
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"  # which browsers draw themselves: no script, no font, nothing to load

linkcheck_ignore = [r"http://(127\.0\.0\.1|localhost|HOST)\b"]

ROW = re.compile(r"^\| \[[^]]+\]\(([^)#]+)\.(?:md|ipynb)\)", re.MULTILINE)
MODULE = re.compile(r"^- \[(bundle[\w.]+)\]\(.*\.py\)$", re.MULTILINE)
DOCSTRINGS = r"""
## \1

```{eval-rst}
.. automodule:: \1
```
"""


def contents() -> str:
    """The navigation: a table of contents for each heading of the index above the model card."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8").partition("\n# ")[0]
    tables = {"Index": ["docs/README"]}
    for group in index.split("\n## ")[1:]:
        pages = (posixpath.normpath(f"docs/{page}") for page in ROW.findall(group))
        tables[group.splitlines()[0]] = [page for page in pages if page != root_doc]
    return "".join(toctree(pages, caption) for caption, pages in tables.items())


def toctree(pages: list[str], caption: str = "") -> str:
    """A hidden table of contents, in MyST."""
    options = [":hidden:", ":glob:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["\n\n```{toctree}", *options, "", *(f"/{page}" for page in pages), "```\n"])


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the navigation, a page with a folder those in it, and modules their docstrings."""
    if page.startswith("docs/api/"):
        source[0] = MODULE.sub(DOCSTRINGS, source[0])
    if page == root_doc:
        source[0] += contents()
    elif (ROOT / page).is_dir():
        source[0] += toctree([f"{page}/**"])


def add_start(app: Sphinx, error: Exception | None) -> None:
    """Make the first page the one that a server, or a person who opens the folder, looks for."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(f"{app.outdir}/{root_doc}.html", f"{app.outdir}/index.html")


def draw_inline(writer: Any, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def draw_block(writer: Any, node: nodes.math_block) -> None:
    """Write a formula of its own."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register all of it."""
    app.connect("source-read", complete)
    app.connect("build-finished", add_start)
    app.add_html_math_renderer("mathml", (draw_inline, None), (draw_block, None))
