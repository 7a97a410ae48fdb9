"""A damaged input works or ends in one message: no traceback, and no change of a model.

The slow suite draws 10,000 inputs and more, the ordinary one a few of each kind. What hypothesis draws follows from
the tests themselves (`derandomize` in helpers/fixtures.py), so that a red one stays red.
"""

import contextlib
import json

import pytest
import torch
import yaml
from helpers.mutations import NASTY, damaged_bytes, damaged_json, damaged_trees
from helpers.recipes import WORDS
from helpers.reports import make_report
from helpers.tiny import search_, tiny_llama
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_dms import DMSConfig, HfDmsError, attach_, plan_of, prune
from hf_dms.archs.bind import bind
from hf_dms.archs.registry import spec_for
from hf_dms.checkpoint.search_state import STATE_TENSORS, load_search_state_, save_search_state
from hf_dms.checkpoint.stream import prepare_cut
from hf_dms.cut.plan import plan_to_json
from hf_dms.experiment.eval_command import measure_files, whole_data
from hf_dms.experiment.prepare import prepare
from hf_dms.experiment.recipe import load_recipe
from hf_dms.report.page import show

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of odd values


def inputs(many: int):
    """Mark a test to be run on a few inputs, and on many in the slow suite."""
    return pytest.mark.parametrize("examples", [30, pytest.param(many, marks=pytest.mark.slow)])


def holds_for(strategy, examples, check) -> None:
    """Run a check on inputs. An `HfDmsError` with a message counts as success."""

    drawing = {"phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}  # no shrinking: files are small

    @settings(max_examples=examples, **drawing)
    @given(strategy)
    def run(damaged):
        with contextlib.suppress(HfDmsError):
            check(damaged)

    run()


@pytest.fixture(scope="module")
def values(dense, tmp_path_factory):
    """The values of a recipe that uses many keys."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 60))} for i in range(1, 12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-4, "use_cpu": True, "seed": 3}
    return {
        "model": {"path": str(dense), "dtype": "float32", "task": "text-generation"},
        "data": {"path": str(folder / "text.jsonl"), "sequence_length": 16, "held_out": 0.2},
        "dms": {
            "resource": "macs",
            "target": 0.6,
            "prune": ["kv", "mlp", "layers"],
            "layout": "per_layer",
            "round_to": {"mlp": 4},
            "warmup_steps": 2,
            "pipeline": "p",
        },
        "train": train,
        "lora": {"r": 2, "lora_alpha": 4},
        "recover": {"repair": {"examples": 4, "ridge": 0.1}, "max_steps": 2, "distillation": {"temperature": 2.0}},
        "eval": {"examples": 3, "batch_size": 2, "prompt": "w1 w2", "new_tokens": 3},
        "hub": {"repo_id": None},
        "output": {"path": str(folder / "out"), "overwrite": False},
    }


@inputs(3000)
def test_recipes(values, tmp_path, examples):
    file = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(values).encode()
    recipes = damaged_trees(values).map(lambda damaged: yaml.safe_dump(damaged).encode())

    def check(content):
        file.write_bytes(content)
        prepare(load_recipe(str(file)))

    check(text)
    holds_for(st.one_of(recipes, recipes, damaged_bytes(text)), examples, check)


@inputs(1500)
def test_overrides(values, tmp_path, examples):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    keys = [f"{section}.{key}" for section, inner in values.items() for key in inner]
    keys += [
        "dms",
        "train",
        "x",
        "",
        ".",
        "dms.",
        ".target",
        "dms.round_to.mlp",
        "recover.repair.ridge",
        "dms.target.x",
    ]
    texts = st.one_of(st.sampled_from([str(value) for value in NASTY]), st.text(max_size=8))
    overrides = st.tuples(st.sampled_from(keys), st.sampled_from(["=", "=", "=", "", "=="]), texts).map("".join)
    check = lambda override: prepare(load_recipe(str(file), [override]))  # noqa: E731
    holds_for(overrides, examples, check)


@pytest.fixture(scope="module")
def searched():
    """A searched model, its plan and the sizes of the dense one."""
    model = tiny_llama()
    config = DMSConfig(target=0.6, prune=("kv", "mlp", "layers"), layout="per_layer", resource="params")
    attach_(model, config)
    search_(model)
    return model


@pytest.fixture(scope="module")
def dense_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


@inputs(2500)
def test_plans(searched, dense_files, tmp_path, examples):
    plan = plan_of(searched)
    bound = bind(spec_for(searched.config), tiny_llama())
    content = json.loads(plan_to_json(plan, bound, "per_layer"))
    file = tmp_path / "dms_plan.json"

    def check(damaged):
        file.write_bytes(damaged)
        prepare_cut(dense_files, file)

    file.write_text(json.dumps(content), encoding="utf-8")
    prepare_cut(dense_files, file)
    holds_for(damaged_json(content), examples, check)


@inputs(1500)
def test_headers_of_weights(searched, dense_files, tmp_path, examples):
    plan = tmp_path / "dms_plan.json"
    plan.write_text(plan_to_json(plan_of(searched), bind(spec_for(searched.config), tiny_llama()), "per_layer"))
    file = sorted(dense_files.glob("*.safetensors"))[0]
    content = file.read_bytes()

    def check(damaged):
        file.write_bytes(damaged)
        prepare_cut(dense_files, plan)

    try:
        holds_for(damaged_bytes(content, first=int.from_bytes(content[:8], "little") + 8), examples, check)
    finally:
        file.write_bytes(content)


@inputs(1000)
def test_search_states(searched, tmp_path, examples):
    save_search_state(searched, tmp_path)
    file = tmp_path / STATE_TENSORS
    content = file.read_bytes()
    state = {name: tensor.clone() for name, tensor in searched.dms_gates.search_state().items()}
    weights = {name: tensor for name, tensor in searched.named_parameters() if not name.startswith("dms_gates.")}
    before = {name: tensor.clone() for name, tensor in weights.items()}

    @st.composite
    def states(draw):
        damaged = {name: tensor.clone() for name, tensor in state.items()}
        name = draw(st.sampled_from(sorted(damaged)))
        kind = draw(st.sampled_from(["remove", "shape", "nan", "dtype", "huge", "more"]))
        tensor = damaged.pop(name)
        if kind == "more":
            damaged |= {name: tensor, f"{name}x": tensor}
        elif kind != "remove":
            changes = {
                "shape": lambda: torch.cat([tensor.reshape(-1)] * 2),
                "nan": lambda: torch.full_like(tensor, torch.nan if tensor.is_floating_point() else -1),
                "dtype": lambda: tensor.to(draw(st.sampled_from([torch.float16, torch.int8, torch.float64]))),
                "huge": lambda: tensor * 10**6,
            }
            damaged[name] = changes[kind]()
        return damaged

    def check(damaged):
        if isinstance(damaged, bytes):
            file.write_bytes(damaged)
        else:
            save_file({name: tensor.contiguous().clone() for name, tensor in damaged.items()}, file)
        try:
            load_search_state_(searched, tmp_path)
        except HfDmsError:
            now = searched.dms_gates.search_state()
            assert all(torch.equal(now[name], tensor) for name, tensor in state.items()), "half of a state was taken"
            raise
        finally:
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())
            searched.dms_gates.load_search_state_(state)

    holds_for(st.one_of(states(), damaged_bytes(content)), examples, check)


@pytest.fixture(scope="module")
def pruned_folder(searched, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    prune(searched).save_pretrained(folder)
    for file in dense.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "text.txt").write_text(" ".join(WORDS * 4), encoding="utf-8")
    return folder


@inputs(1000)
def test_per_layer_configs(pruned_folder, examples):
    file = pruned_folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    data = whole_data(str(pruned_folder / "text.txt"))
    measure = lambda: measure_files([str(pruned_folder)], data, [8], 1, 1)  # noqa: E731

    def check(damaged):
        file.write_bytes(damaged)
        measure()

    measure()
    try:
        holds_for(damaged_json(content, most=2), examples, check)
    finally:
        file.write_text(json.dumps(content), encoding="utf-8")


@inputs(2000)
def test_reports(pruned_folder, examples):
    content = make_report()
    file, page = pruned_folder / "dms_report.json", pruned_folder / "report.html"

    def check(damaged):
        file.write_bytes(damaged)
        with contextlib.suppress(FileNotFoundError):
            page.unlink()
        try:
            show(str(pruned_folder))
        except HfDmsError:
            assert not page.exists()
            raise

    holds_for(damaged_json(content), examples, check)
