"""Changes to the pages of docs/ before mkdocs builds the site: links to files elsewhere, and equations.

The pages read well on GitHub too, so they link to `../hf_dms/topk.py` and write equations as `$$...$$` and `$...$`. The
site has no folder above it and loads nothing from another host. So the files of `PAGES` become pages, each other linked
file becomes a text file or picture of the site, and each equation becomes MathML, which browsers draw without a script
or a font of ours.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # files outside docs/ that are pages of the site
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
SOURCE = re.compile(r"\]\(\.\./([^)#]+)")
MATHS = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$", re.DOTALL
)

THIN = '<mspace width="0.167em" />'


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`, and the files that pages link to, as `source/PATH`."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=_as_page(path)))
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for text in pages for path in SOURCE.findall(text)} - set(PAGES)):
        if (ROOT / path).is_file():
            files.append(File.generated(config, _on_site(path), content=(ROOT / path).read_bytes()))
    return files


def _as_page(path: str) -> str:
    """The text of a file of `PAGES`, with links as a page in docs/ would write them."""

    def link(match: re.Match) -> str:
        return "](" + posixpath.relpath(posixpath.join(posixpath.dirname(path), match[1]), "docs")

    return LINK.sub(link, (ROOT / path).read_text(encoding="utf-8"))


def _on_site(path: str) -> str:
    """Where the site has a file of the repository. Browsers show `.txt` and do not download it."""
    return PAGES.get(path) or f"source/{path}" + ("" if path.endswith(".png") else ".txt")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files outside docs/ at the site's copies, and turn equations into MathML.

    Raises:
        PluginError: a link to a file that the repository does not have.
    """

    def link(match: re.Match) -> str:
        if not (ROOT / match[1]).is_file():
            raise PluginError(f"{page.file.src_path} links to {match[1]}, which is no file of the repository.")
        return f"]({_on_site(match[1])}"

    return MATHS.sub(_maths, SOURCE.sub(link, markdown))


def _maths(match: re.Match) -> str:
    if match["code"]:
        return match["code"]
    if match["block"]:
        return f'<div class="equation">{_mathml(match["block"].strip(), "block")}</div>'
    # Markdown ends a paragraph at a line that begins with <math>.
    return f"<span>{_mathml(match['inline'], 'inline')}</span>"


def _mathml(equation: str, display: str) -> str:
    """MathML with TeX's space around the name of a function: none before a parenthesis, thin beside a variable."""
    maths = re.sub(r"<m[io]>(log|min|max)</m[io]>", r"<mi>\1</mi>", convert(equation, display=display))
    maths = re.sub(r"(?<=</mi>)(?=<mi>(?:log|min|max)</mi>)", THIN, maths)
    return re.sub(r"(<mi>(?:log|min|max)</mi>)(?=<mi>)", rf"\1{THIN}", maths)
