"""The architecture of the package: three floors, imports go downwards only, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_dms"
FLOORS = {
    "pure": ["config", "topk", "gates", "resource"],
    "surgery": [
        "spec",
        "costs",
        "adapters",
        "attachable",
        "archs",
        "masked_functions",
        "masking",
        "request",
        "rounding",
        "layouts",
        "plans",
        "slicing",
        "streaming",
        "layerwise",
        "repair",
        "verify",
        "checkpoint",
        "modeling_dms",
    ],
    "surface": [
        "distributed",
        "hub",
        "nonfinite",
        "progress",
        "trainer",
        "training",
        "tasks",
        "sections",
        "recipe",
        "preflight",
        "data",
        "retrain",
        "evaluate",
        "speed",
        "shortfall",
        "harness",
        "bench",
        "report",
        "samples",
        "compatibility",
        "charts",
        "html",
        "figures",
        "card",
        "stages",
        "unfinished",
        "pipeline",
        "by_plan",
        "cli",
    ],
}
DOORS = ["__init__", "__main__", "_register"]  # outside the floors: they open the package
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS.values()) for name in names}


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path) not in DOORS)


def imports(path):
    """What a file imports, anywhere in it: (module of hf_dms, or None; top-level package)."""
    package = ["hf_dms", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            yield (rest[0] if first == "hf_dms" and rest else None), first


def test_every_file_has_a_floor():
    assert {module_of(path) for path in FILES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    floor = FLOOR_OF[module_of(path)]
    for module, _ in imports(path):
        if module in DOORS:
            assert module_of(path) in FLOORS["surface"], f"{path.name} imports {module}"
        elif module is not None and module != "__version__":
            assert FLOOR_OF[module] <= floor, f"{path.name} imports {module} from a floor above"


def test_no_two_files_import_each_other():
    graph = {}
    for path in FILES:
        graph.setdefault(module_of(path), set()).update(m for m, _ in imports(path) if m in FLOOR_OF)
    for start in graph:
        seen, rest = set(), list(graph[start] - {start})
        while rest:
            module = rest.pop()
            assert module != start, f"{start} imports itself by way of others"
            if module not in seen:
                seen.add(module)
                rest.extend(graph.get(module, ()))


def packages(name):
    return {package for path in FILES if module_of(path) == name for _, package in imports(path)}


@pytest.mark.parametrize("name", FLOORS["pure"])
def test_pure_files_know_no_models(name):
    assert not packages(name) & {"transformers", "accelerate", "huggingface_hub", "safetensors", "datasets", "peft"}


def test_the_config_needs_no_torch():
    assert packages("config") <= sys.stdlib_module_names


def test_the_file_that_travels_needs_nothing_of_hf_dms():
    assert packages("modeling_dms") <= sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub"}


# ---- what importing costs ----
def loaded_after(code, program="python"):
    """Which of the heavy packages a process has loaded after some code."""
    heavy = ("torch", "transformers", "datasets", "lm_eval", "accelerate", "peft")
    code = f"import sys; sys.argv[0] = {program!r}; {code}; print(*[n for n in {heavy} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_the_command_line_waits_for_no_heavy_import():
    assert loaded_after("import hf_dms.cli, hf_dms.config", program="/usr/bin/hf-dms") == set()


def test_import_loads_neither_datasets_nor_lm_eval_and_registers_the_per_layer_classes():
    code = "import hf_dms; from transformers import CONFIG_MAPPING; assert 'dms_llama' in CONFIG_MAPPING"
    assert not loaded_after(code) & {"datasets", "lm_eval", "peft"}


def test_every_public_name_is_there_and_others_are_attribute_errors():
    import hf_dms

    for name in hf_dms.__all__:
        assert getattr(hf_dms, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'hf_dms' has no attribute 'nothing'"):
        _ = hf_dms.nothing
