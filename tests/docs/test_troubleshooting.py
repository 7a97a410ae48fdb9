"""The messages in the tables of the troubleshooting page are messages of the code."""

import re

from test_pages import TEXTS, messages

ROW = re.compile(r"^\| (.+?) \| (.+?) \|$", re.MULTILINE)


def rows():
    """(message, explanation) of each row of the tables headed `message`."""
    tables = re.findall(r"^\| message \| .+\n\|---\|---\|\n((?:\|.+\n)+)", TEXTS["troubleshooting.md"], re.MULTILINE)
    return [row for table in tables for row in ROW.findall(table)]


def test_every_message_in_the_tables_is_raised_somewhere():
    known = messages()
    assert len(rows()) > 100
    unknown = [quote for quote, _ in rows() if not any(quote in message for message in known)]
    assert unknown == [], "reworded? Then reword docs/troubleshooting.md too"


def test_every_message_is_explained_once():
    quotes = [quote for quote, _ in rows()]
    assert len(set(quotes)) == len(quotes)
    assert all(len(explanation.split()) > 5 for _, explanation in rows())
