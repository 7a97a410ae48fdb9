"""The messages in the tables of the troubleshooting page are messages of the code."""

import ast
import re

from helpers.launching import ROOT
from test_pages import TEXTS, messages

ROW = re.compile(r"^\| (.+?) \| (.+?) \|$", re.MULTILINE)


def rows(heading="message"):
    """(message, explanation) of each row of the tables with this heading."""
    table = rf"^\| {heading} \| .+\n\|---\|---\|\n((?:\|.+\n)+)"
    return [row for found in re.findall(table, TEXTS["troubleshooting.md"], re.MULTILINE) for row in ROW.findall(found)]


def texts_of_the_code():
    """Every text in the code, with `…` for what is filled in."""
    for path in (ROOT / "hf_dms").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_in_the_tables_is_raised_somewhere():
    known = messages()
    assert len(rows()) > 100
    unknown = [quote for quote, _ in rows() if not any(quote in message for message in known)]
    assert unknown == [], "reworded? Then reword docs/troubleshooting.md too"


def test_every_message_is_explained_once():
    quotes = [quote for quote, _ in rows()]
    assert len(set(quotes)) == len(quotes)
    assert all(len(explanation.split()) > 5 for _, explanation in rows())


def test_every_warning_is_a_text_of_the_code():
    known = [*texts_of_the_code()]
    assert len(rows("warning")) > 10
    unknown = [quote for quote, _ in rows("warning") if not any(quote in text for text in known)]
    assert unknown == [], "reworded? Then reword docs/troubleshooting.md too"
