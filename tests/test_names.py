"""What names promise: a function whose name ends in `_` changes its first argument, or its object, and returns None."""

import ast
from pathlib import Path

import hf_dms

PACKAGE = Path(hf_dms.__file__).parent


def test_functions_that_end_in_an_underscore_return_none():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_") and not node.name.endswith("__"):
                where = f"{path.name}:{node.lineno}: {node.name}"
                assert ast.unparse(node.returns or ast.Name("?")) == "None", where
                assert not any(isinstance(each, ast.Yield) for each in ast.walk(node)), where
