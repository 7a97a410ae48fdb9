"""Text files are read and written as UTF-8, whatever the system's encoding is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("hf_dms", "recipes", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")
)
TEXT = {"read_text": 0, "write_text": 1}  # position of the encoding among the arguments


def is_text_without_encoding(call):
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute) and call.func.attr in TEXT:
        return len(call.args) <= TEXT[call.func.attr]
    is_open = isinstance(call.func, ast.Name) and call.func.id == "open"
    is_path_open = isinstance(call.func, ast.Attribute) and call.func.attr == "open" and not is_module(call.func.value)
    if not is_open and not is_path_open:
        return False
    modes = [argument.value for argument in call.args[1 if is_open else 0 :] if isinstance(argument, ast.Constant)]
    return not any("b" in str(mode) for mode in modes)


def is_module(value):
    """Whether a call is of tarfile.open, gzip.open, Image.open, ..., which open bytes by default."""
    return isinstance(value, ast.Name) and value.id in ("tarfile", "gzip", "Image", "os", "webbrowser")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_its_encoding(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if is_text_without_encoding(call)] == []
