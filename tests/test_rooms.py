"""The structure of the package: the method at the root, then rooms in one order. And the cost of importing it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fresh

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_dms"
BASE = ["errors", "files"]  # every file may import these
METHOD = ["config", "topk", "resource", "gates", "masked_ops"]  # the root of the package: the paper
ROOMS = [  # each imports from the method, from itself and from those above it
    "archs",
    "tasks",
    "gating",
    "cut",
    "refit",
    "checkpoint",
    "training",
    "strategies",
    "measure",
    "report",
    "experiment",
]
DOORS = ["__init__", "__main__", "cli", "commands"]  # they open the package, and may import everything


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path) not in DOORS)


def imports(path):
    """What a file imports, anywhere in it: dotted names, absolute, those of hf_dms without "hf_dms."."""
    package = ["hf_dms", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        yield from names


def own_imports(path):
    """Files of hf_dms that a file imports from: `gates`, `cut.plan`, ..."""
    for name in imports(path):
        first, *rest = name.split(".")
        if first == "hf_dms" and rest[0] not in ("__version__", "__doc__"):
            yield ".".join(rest[:2] if rest[0] in ROOMS else rest[:1])


def packages(name):
    path = PACKAGE / f"{name}.py"
    return {imported.partition(".")[0] for imported in imports(path)}


def test_every_file_is_of_the_method_or_in_a_room():
    assert {module_of(path) for path in FILES} == {*BASE, *METHOD, *ROOMS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_the_method_and_from_rooms_above_it(path):
    order = [*BASE, *METHOD, *ROOMS]
    mine = order.index(module_of(path))
    for module in own_imports(path):
        room = module.partition(".")[0]
        assert room in order, f"{path.name} imports {module}"
        assert order.index(room) <= mine, f"{path.name} imports {module}, which is below it"


def test_no_two_files_import_each_other():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): set(own_imports(path))
        for path in FILES
    }
    for start in graph:
        seen, rest = set(), list(graph[start] - {start})
        while rest:
            module = rest.pop()
            assert module != start, f"{start} imports itself by way of others"
            if module not in seen:
                seen.add(module)
                rest.extend(graph.get(module, ()))


def test_the_documentation_lists_the_rooms_in_order_with_what_each_holds():
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    lines = [f"| `{room}/` | {importlib.import_module(f'hf_dms.{room}').__doc__.strip()} |" for room in ROOMS]
    assert "\n".join(lines) in page, "\n".join(lines)


@pytest.mark.parametrize("name", METHOD)
def test_the_method_knows_no_models(name):
    assert not packages(name) & {"transformers", "accelerate", "huggingface_hub", "safetensors", "datasets", "peft"}


def test_the_config_needs_no_torch():
    assert packages("config") <= sys.stdlib_module_names | {"hf_dms"}


def test_the_file_that_travels_needs_nothing_of_hf_dms():
    assert packages("cut/modeling_dms") <= sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}


# ---- what importing costs ----
def test_the_command_line_waits_for_no_heavy_import():
    heavy = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "peft"}
    code = "import sys; sys.argv[0] = '/usr/bin/hf-dms'; import hf_dms.cli, hf_dms.config; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True).split()
    assert "hf_dms.cli" in loaded
    assert not heavy & set(loaded)


def test_import_loads_neither_datasets_nor_lm_eval_and_registers_the_per_layer_classes():
    code = "import hf_dms, sys, transformers as t; print('dms_llama' in t.CONFIG_MAPPING, *sys.modules)"
    registered, *loaded = fresh.run(["-c", code], PACKAGE.parent).stdout.split()
    assert registered == "True"
    assert not {"datasets", "lm_eval", "peft"} & set(loaded)


def test_every_public_name_is_there_and_others_are_attribute_errors():
    import hf_dms

    for name in hf_dms.__all__:
        assert getattr(hf_dms, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'hf_dms' has no attribute 'nothing'"):
        _ = hf_dms.nothing
