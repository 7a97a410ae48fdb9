"""Changes to the pages of docs/ before mkdocs builds the site: links to source files, and equations.

The pages read well on GitHub too, so they link to `../hf_dms/topk.py` and write equations as `$$...$$` and `$...$`. The
site has no folder above it and loads nothing from another host. So each linked source file becomes a text file of the
site, and each equation becomes MathML, which browsers draw without a script or a font of ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"\]\(\.\./([^)#]+)\)")
MATHS = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$", re.DOTALL
)


def on_files(files: Files, config: Any) -> Files:
    """Add the source files that pages link to, as `source/PATH.txt`."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for text in pages for path in SOURCE.findall(text)}):
        if (ROOT / path).is_file():
            content = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, f"source/{path}.txt", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to source files at the site's copies, and turn equations into MathML.

    Raises:
        PluginError: a link to a file that the repository does not have.
    """

    def link(match: re.Match) -> str:
        if not (ROOT / match[1]).is_file():
            raise PluginError(f"{page.file.src_path} links to {match[1]}, which is no file of the repository.")
        return f"](source/{match[1]}.txt)"

    return MATHS.sub(_maths, SOURCE.sub(link, markdown))


def _maths(match: re.Match) -> str:
    if match["code"]:
        return match["code"]
    if match["block"]:
        return f'<div class="equation">{convert(match["block"].strip(), display="block")}</div>'
    return f"<span>{convert(match['inline'])}</span>"  # Markdown ends a paragraph at a line that begins with <math>
