"""Which files may know an architecture's names, and what a name that ends in `_` promises."""

import ast
import functools
import itertools
import re
from pathlib import Path

import hf_dms
from hf_dms.archs.registry import SPECS

PACKAGE = Path(hf_dms.__file__).parent
COMMON = {"num_labels"}  # every config of transformers has it
TORCH = {
    "LayerNorm",
    "out_features",
    "running_mean",
    "running_var",
}  # names in torch.nn that are also names of modules or config keys


@functools.cache
def trees():
    """Syntax trees of the package, by file."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def names_of_modules():
    """Every part of a module's path in a description, except `weight` and `bias`."""
    for spec in itertools.chain.from_iterable(spec.every_variant() for spec in SPECS):
        lines = [*spec.params, *spec.buffers, *(line for head in spec.heads.values() for line in head)]
        paths = (*spec.unnormed, *spec.channels_first, *spec.response_norms)
        for path in (*lines, *spec.attributes, *spec.stacks.values(), *paths):
            names = {name for name in path.split(".") if re.fullmatch(r"[A-Za-z]\w*", name)}  # no placeholder or number
            yield from names - {"weight", "bias"}


def config_keys():
    """Every config key in a description."""
    for spec in SPECS:
        yield from (key.partition("[")[0] for key in spec.config)
        yield from spec.variants
        yield from (*spec.config_ratios, *spec.config_lists, *spec.config_leaves_out)
        yield from (*spec.must_be_false, *spec.alternative_overrides, *spec.alternative_needs, *spec.build_with)
        for text in (*(key for pair in spec.config_ratios.values() for key in pair), *(dim.size for dim in spec.dims)):
            yield from re.findall(r"[a-z_]\w+", text if isinstance(text, str) else "")


def said(tree):
    """Texts in strings, attributes and keyword arguments of code, without docstrings, with their lines."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, holders) and node.body]
    docstrings = {body.value for body in bodies if isinstance(body, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value.lineno


def known_names(tree):
    """Module names and config keys that code knows, as (line, name).

    A name that is an English word (`dense`, `output`) counts only where two follow each other in a path.
    """
    modules, keys = set(names_of_modules()), set(config_keys())
    dims = {dim.name for spec in SPECS for dim in spec.dims}
    telling = {name for name in modules | keys if re.search(r"[_\dA-Z]", name)} - dims - COMMON - TORCH
    for text, line in said(tree):
        yield from ((line, word) for word in re.findall(r"\w+", text) if word in telling)
        yield from ((line, f"{a}.{b}") for a, b in re.findall(r"(\w+)\.(?=(\w+))", text) if {a, b} <= modules)


def test_nothing_outside_archs_knows_a_module_or_a_config_key_of_an_architecture():
    known = {path: list(known_names(tree)) for path, tree in trees().items() if path.parent.name != "archs"}
    assert {str(path.relative_to(PACKAGE)): names for path, names in known.items() if names} == {}


def test_the_law_above_sees_names_of_every_kind():
    code = """
path = f"{base}.self_attn"
layer.mlp.down_proj
path = "attention.output"
config.hidden_size
Config(num_key_value_heads=2)
getattr(config, "layer_types")
"""
    found = [name for _, name in known_names(ast.parse(code))]
    assert sorted(found) == sorted(
        ["self_attn", "down_proj", "attention.output", "hidden_size", "num_key_value_heads", "layer_types"]
    )


def test_functions_that_end_in_an_underscore_return_none():
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_") and not node.name.endswith("__"):
                where = f"{path.name}:{node.lineno}: {node.name}"
                assert ast.unparse(node.returns or ast.Name("?")) == "None", where
                assert not any(isinstance(each, ast.Yield) for each in ast.walk(node)), where
