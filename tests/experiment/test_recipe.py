"""Recipes: how they are read, and the message for each mistake."""

import dataclasses
import logging
from pathlib import Path

import pytest
import yaml

from hf_dms import DMSConfig, HfDmsError
from hf_dms.experiment.objects import packing, training_arguments
from hf_dms.experiment.packaged import packaged_recipes, recipe_names
from hf_dms.experiment.recipe import build_recipe, load_recipe

MINIMAL = {
    "model": {"path": "somewhere"},
    "data": {"path": "some/dataset"},
    "dms": {"target": 0.5},
    "output": {"path": "out"},
}


def with_value(path: str, value: object) -> dict:
    values = {section: dict(keys) for section, keys in MINIMAL.items()}
    *sections, key = path.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = value
    return values


def test_numbers_that_yaml_reads_as_strings_become_numbers():
    values = with_value("dms.gate_learning_rate", yaml.safe_load("1e-2"))
    assert isinstance(values["dms"]["gate_learning_rate"], str)  # PyYAML reads 1e-2 as text
    assert build_recipe(values).dms.gate_learning_rate == 0.01


@pytest.mark.parametrize(
    "text", ["dms: {target: 0.6}\ntrain: {}\ndms: {target: 0.9}", "dms: {target: 0.6, target: 0.9}"]
)
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
    """PyYAML takes the last one, so half of a recipe would be ignored without a word."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(HfDmsError, match=r"a.yaml is not valid YAML: .*the key '(dms|target)' stands twice .*line \d"):
        load_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(HfDmsError, match=r"Override .*the key 'a' stands twice"):
        load_recipe("quickstart.yaml", ["data.mix={a: 1, a: 2}"])


def test_a_key_may_replace_one_of_a_merged_mapping(tmp_path):
    values = yaml.safe_dump(MINIMAL) + "train: &t {use_cpu: true, max_steps: 8}\nrecover: {<<: *t, max_steps: 2}\n"
    (tmp_path / "a.yaml").write_text(values)
    assert load_recipe(str(tmp_path / "a.yaml")).recover.train == {"use_cpu": True, "max_steps": 2}


def test_numbers_in_lists_are_converted_too():
    assert build_recipe(with_value("compare.targets", ["1e-1", 1])).compare.targets == [0.1, 1]


@pytest.mark.parametrize("key", ["seed", "data_seed"])
def test_a_seed_that_numpy_would_refuse_is_refused_before_the_run(key):
    recipe = build_recipe(with_value("train", {"max_steps": 1, key: 2**32}))
    with pytest.raises(HfDmsError, match=rf"train.{key} must be in \[0, 4294967295\], got 4294967296"):
        arguments(recipe)


def test_the_data_decides_the_sequence_length_of_the_macs():
    assert build_recipe(with_value("data.sequence_length", 128)).dms.sequence_length == 128
    values = with_value("data.sequence_length", 128)
    values["dms"]["sequence_length"] = 64
    assert build_recipe(values).dms.sequence_length == 64


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dsm", {}, r"Unknown key dsm. Did you mean dms\?"),
        ("dms.targt", 0.5, r"Unknown key dms.targt. Did you mean dms.target\?"),
        ("model.paht", "x", r"Did you mean model.path\?"),
        ("dms.target", 60, "For 60 % write target: 0.6"),
        ("dms.target", "much", r"dms.target must be a number in \(0, 1\], or an amount such as 100M, got 'much'"),
        ("dms.target", 0, r"dms.target must be in \(0, 1\], got 0"),
        ("dms.warmup_steps", 2.5, "dms.warmup_steps must be a whole number"),
        ("dms.layout", "flat", "dms.layout must be one of uniform, per_layer, padded; got 'flat'"),
        ("dms.pipeline", "q", "dms.pipeline must be one of p, np, p-; got 'q'"),
        ("dms.prune", [], "dms.prune is empty"),
        ("dms.prune", "kv", r"dms.prune must be a list, got 'kv'. Write \[kv\]."),
        ("dms.prune", "kv, mlp", r"Write \[kv, mlp\]."),
        ("dms.target", None, "dms.target is required"),
        ("dms.round_to", {"mlp": 0}, "dms.round_to must map a dim to a whole number"),
        ("dms.protect", {"layer": [0]}, "dms.protect has no key 'layer'"),
        ("model.dtype", "int4", "model.dtype must be auto, float32"),
        ("data.path", "missing.jsonl", "data.path: there is no file 'missing.jsonl'"),
        ("data.held_out", 2, r"data.held_out must be a share in \(0, 1\)"),
        ("data.sequence_length", 1, "data.sequence_length must be at least 2"),
        ("eval.examples", 0, "eval.examples must be at least 1, got 0"),
        ("eval.new_tokens", 0, "eval.new_tokens must be at least 1, got 0"),
        ("eval.prompt", ["a", 1], r"eval.prompt must be a text or a list of texts, got \['a', 1\]"),
        ("eval.texts", {"a": 5}, "eval.texts.a must be the path of a file, got 5"),
        ("compare.texts", {"a": 5}, "compare.texts.a must be the path of a file, got 5"),
        ("compare.targets", ["much"], "compare.targets must be a number, got 'much'"),
        ("compare.seeds", ["a"], "compare.seeds must be a whole number, got 'a'"),
        ("compare.seeds", [None], "each of compare.seeds must be a whole number, got None"),
        ("output.sizes", [None], "each of output.sizes must be a number, got None"),
        ("compare.seeds", [-1], r"compare.seeds must be in \[0, 4294967295\], got -1"),
        ("data.mix", {1: 1}, "data.mix must be a section with a path per weight, got 1 as a path"),
        ("data.path", "", "data.path is required"),
        ("output.path", "", "output.path is required"),
        ("output.path", ".", r"output.path must name a folder of its own, got '\.'"),
        ("output.path", "a/..", r"output.path must name a folder of its own, got 'a/\.\.'"),
        ("output.path", "/", "output.path must name a folder of its own, got '/'"),
        ("output.overwrite", "perhaps", "output.overwrite must be true or false"),
        ("hub.private", True, "hub.repo_id is required in a hub section"),
        ("train", [1], "train must be a section"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(path, value, message):
    with pytest.raises(ValueError, match=message):
        build_recipe(with_value(path, value))


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """The shell leaves it in output.path=~/smaller, and a folder called ~ would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    data = {"path": "~/a.jsonl", "held_out": "~/a.jsonl", "mix": {"~/b": 1}}
    texts = {"texts": {"x": "~/a.jsonl"}}
    sections = {"model": {"path": "~/m"}, "data": data, "eval": texts, "compare": texts, "output": {"path": "~/out"}}
    recipe = build_recipe(MINIMAL | sections)
    home, text = str(tmp_path), str(tmp_path / "a.jsonl")
    assert (recipe.model.path, recipe.output.path) == (f"{home}/m", f"{home}/out")
    assert (recipe.data.path, recipe.data.held_out, recipe.data.mix) == (text, text, {f"{home}/b": 1})
    assert recipe.eval.texts == recipe.compare.texts == {"x": text}


@pytest.mark.parametrize("section", ["model", "data", "output"])
def test_required_paths_are_asked_for(section):
    values = {name: keys for name, keys in MINIMAL.items() if name != section}
    with pytest.raises(ValueError, match=f"{section}.path is required"):
        build_recipe(values)


def test_a_missing_target_is_asked_for():
    with pytest.raises(ValueError, match=r"dms.target is required"):
        build_recipe({name: keys for name, keys in MINIMAL.items() if name != "dms"})


def test_overrides_reach_every_section(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(str(file), ["dms.target=0.25", "dms.prune=[mlp]", "train.max_steps=3", "eval.examples=2"])
    assert (recipe.dms.target, recipe.dms.prune, recipe.train, recipe.eval.examples) == (
        0.25,
        ("mlp",),
        {"max_steps": 3},
        2,
    )
    with pytest.raises(ValueError, match=r"An override is section\.key=value"):
        load_recipe(str(file), ["dms.target"])


def test_data_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("words")
    file = tmp_path / "recipe.yaml"
    texts = {section: {"texts": {"x": "text.txt"}} for section in ("eval", "compare")}
    file.write_text(yaml.safe_dump(with_value("data.path", "text.txt") | texts))
    monkeypatch.chdir("/")
    recipe = load_recipe(str(file))
    assert recipe.data.path == str(tmp_path / "text.txt")
    assert recipe.eval.texts == recipe.compare.texts == {"x": str(tmp_path / "text.txt")}


def test_bitsandbytes_does_not_warn_in_each_pass(caplog):
    packing(build_recipe(with_value("model.quantization", "8bit") | {"dms": {"target": 0.5, "pipeline": "p-"}}), None)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "float32")
    logger.warning("another warning")
    assert caplog.messages == ["another warning"]


def test_data_named_at_the_shell_is_found_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for folder in (tmp_path, tmp_path / "here"):
        (folder / "text.txt").write_text("words")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(with_value("data.path", "text.txt")))
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(str(file), ["data.path=text.txt"]).data.path == "text.txt"
    (tmp_path / "here" / "text.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no file 'text.txt' \(looked in .*here\)"):
        load_recipe(str(file), ["data.path=text.txt"])


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.held_out=1e-2", lambda recipe: recipe.data.held_out == 0.01),
        ("train={max_steps: null, num_train_epochs: 1}", lambda recipe: arguments(recipe).num_train_epochs == 1),
        ("train={max_steps: 3, save_strategy: no}", lambda recipe: arguments(recipe).save_strategy == "no"),
        ("train={max_steps: 8}", lambda recipe: arguments(recipe).save_steps == 0.25),
        ("train={max_steps: 8, save_steps: 3}", lambda recipe: arguments(recipe).save_steps == 3),
        ("train={max_steps: 3, learning_rate: null}", lambda recipe: arguments(recipe).learning_rate == 5e-5),
        ("dms.warmup_steps=null", lambda recipe: recipe.dms.warmup_steps == DMSConfig(target=0.5).warmup_steps),
        ("dms.prune=null", lambda recipe: recipe.dms.prune is None),
    ],
)
def test_what_people_write_is_understood(tmp_path, override, found):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    assert found(load_recipe(str(file), [override]))


def arguments(recipe):
    return training_arguments(recipe, "train", Path("out"))


def test_no_length_is_said_whatever_it_is_written_as(tmp_path):
    with pytest.raises(HfDmsError, match=r"train.max_steps is required \(or train.num_train_epochs\)"):
        arguments(build_recipe(with_value("train.max_steps", None)))


def test_a_missing_recipe_lists_those_that_come_with_hf_dms():
    with pytest.raises(ValueError, match=r"no recipe 'nothing\.yaml'.*llama-7b-20.yaml.*quickstart.yaml"):
        load_recipe("nothing.yaml")


def test_a_model_s_folder_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").touch()
    options = [f"data={{path: {tmp_path / 'text.jsonl'}, held_out: 0.5}}"]
    recipe = load_recipe("fashion-mnist-np.yaml", options)
    assert (packaged_recipes() / "shapes" / "resnet-small").samefile(recipe.model.path)
    assert load_recipe("fashion-mnist-np.yaml", [*options, "model.path=shapes/other"]).model.path == "shapes/other"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_sound_and_says_how_to_run_it(name, tmp_path, monkeypatch):
    path = packaged_recipes() / name
    monkeypatch.chdir(tmp_path)
    for place in yaml.safe_load(path.read_text())["data"].values():
        if str(place).startswith("models/"):  # fetched by `make data`
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place).touch()
    recipe = load_recipe(str(path))
    assert dataclasses.asdict(recipe)["dms"]["target"] <= 1
    assert (recipe.dms.target == 1) == (recipe.model.supernet is not None)
    header = path.read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("Run:", "Override:", "Needs:"))
