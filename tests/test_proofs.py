"""A test of the tests: every comparison is asserted."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PREDICATES = {"equal", "allclose", "isclose", "all", "any", "isinstance", "is_file", "is_dir", "exists", "startswith"}
COMPARISONS = (ast.Compare, ast.BoolOp, ast.UnaryOp)


def name_of(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_comparison(node, predicates):
    return isinstance(node, COMPARISONS) or (isinstance(node, ast.Call) and name_of(node) in predicates)


def predicates_among(trees):
    """Names of functions that return the result of a comparison, with `PREDICATES`."""
    found, before = set(PREDICATES), set()
    while found != before:
        before = set(found)
        for tree in trees:
            for node in ast.walk(tree):
                returns = [each for each in ast.walk(node) if isinstance(each, ast.Return)]
                if isinstance(node, ast.FunctionDef) and any(is_comparison(r.value, found) for r in returns):
                    found.add(node.name)
    return found


def idle_comparisons(tree, predicates):
    """Lines of statements that compare and do not use the result. Inside `with raises(...)` that is allowed."""
    raising = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("raises" in ast.unparse(item) for item in node.items)
        for statement in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and node not in raising and is_comparison(node.value, predicates):
            yield node.lineno


def test_no_test_compares_without_asserting():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TESTS.rglob("*.py"))}
    predicates = predicates_among(trees.values())
    idle = {path.name: list(idle_comparisons(tree, predicates)) for path, tree in trees.items()}
    assert {name: lines for name, lines in idle.items() if lines} == {}


@pytest.mark.parametrize("line", ["a == b", "torch.equal(a, b)", "not a", "same(a, b)", "all(a)"])
def test_an_idle_comparison_is_seen(line):
    tree = ast.parse(f"def same(a, b):\n    return torch.equal(a, b)\n\n{line}\nassert {line}\n")
    assert list(idle_comparisons(tree, predicates_among([tree]))) == [4]
