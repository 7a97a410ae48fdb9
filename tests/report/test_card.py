"""The model card: metadata for the Hub, what it takes over from the dense model's card, and what it must not show."""

import json
import math

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from hf_dms.experiment.recipe import build_recipe
from hf_dms.report.card import base_metadata, is_hub_id, model_card
from hf_dms.report.numbers import as_written

BASE = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["en", "de"], "tags": ["x"]}


@pytest.fixture
def report(tmp_path):
    """A function that makes a report of a model and data, as `hf-dms prune` would."""
    (tmp_path / "texts.jsonl").write_text("")

    def make(model="org/dense", data="org/texts", task="text-generation", **more):
        sections = {"model": {"path": str(model), "task": task}, "data": {"path": str(data), "name": "short"}}
        recipe = build_recipe(sections | {"dms": {"target": 0.5}, "output": {"path": "out"}})
        metric = recipe.task.metric
        numbers = {"num_params": 10, "difference": 0.1, "difference_stderr": 0.01}
        written = {
            "recipe": recipe.to_dict(),
            "dense": numbers | {metric: 0.75},
            "pruned": numbers | {metric: 0.625},
            "sizes": {"mlp": [3, 0]},
            "protocol": "8 held-out texts",
            "model_class": "DmsLlamaForCausalLM",
        }
        return as_written(written | more)

    return make


def metadata(text, folder):
    """The metadata of a card. Both readers of huggingface_hub must find the same."""
    (folder / "card.md").write_text(text)
    found = metadata_load(folder / "card.md")
    assert ModelCard(text).data.to_dict() == found
    return found


def test_a_card_names_its_base_data_and_result(report, tmp_path):
    text = model_card(report(), "org/smaller", BASE | {"datasets": "org/pile"})
    found = metadata(text, tmp_path)
    assert {key: found[key] for key in ("base_model", "library_name", "pipeline_tag", "tags", "datasets")} == {
        "base_model": "org/dense",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dms", "pruned"],
        "datasets": ["org/pile", "org/texts"],
    }
    assert {key: found[key] for key in BASE if key != "tags"} == {key: BASE[key] for key in BASE if key != "tags"}
    (result,) = ModelCard(text).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-generation", "perplexity", 0.625)
    assert (result.dataset_type, result.dataset_config) == ("org/texts", "short")
    assert result.dataset_name == "org/texts, 8 held-out texts"
    assert found["model-index"][0]["name"] == "org/smaller"
    assert 'from_pretrained("org/smaller", trust_remote_code=True)' in text


def test_the_result_is_that_of_the_recovered_model(report):
    numbers = {"num_params": 10, "accuracy": 0.7, "difference": -0.05, "difference_stderr": 0.01}
    text = model_card(report(task="text-classification", recovered=numbers), "smaller")
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.7)


def test_no_path_of_a_machine_is_told(report, tmp_path):
    (tmp_path / "dense").mkdir()
    text = model_card(report(tmp_path / "dense", tmp_path / "texts.jsonl"), "smaller")
    assert str(tmp_path) not in text
    assert "`dense` made smaller" in text
    found = metadata(text, tmp_path)
    assert not {"base_model", "datasets", "license", "language"} & set(found)
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == "texts.jsonl"


def test_a_held_out_file_is_named_and_a_split_is_that_of_its_dataset(report, tmp_path):
    (tmp_path / "later.jsonl").write_text("")
    recipe = json.loads(json.dumps(report()["recipe"]))
    for held_out, expected in (
        (str(tmp_path / "later.jsonl"), "later.jsonl"),
        ("test", "org/texts"),
        (0.1, "org/texts"),
    ):
        recipe["data"]["held_out"] = held_out
        (result,) = ModelCard(model_card(report(recipe=recipe), "smaller")).data.eval_results
        assert result.dataset_type == expected


def test_a_result_that_is_no_finite_number_is_in_no_metadata(report, tmp_path):
    numbers = {"num_params": 10, "perplexity": math.inf}
    found = metadata(model_card(report(recovered=numbers), "smaller"), tmp_path)
    assert not {"model-index", "model_name"} & set(found)


def test_a_cut_by_a_plan_has_the_same_card_without_what_nobody_measured(tmp_path):
    sizes = {"num_params": 10}
    written = {"dense": sizes, "pruned": sizes, "sizes": {"mlp": [3, 0]}, "layout": "per_layer"}
    written |= {"model": {"path": "org/dense", "revision": None}, "model_class": "DmsLlamaForCausalLM"}
    text = model_card(as_written(written), "smaller", BASE | {"datasets": ["org/pile"]})
    found = metadata(text, tmp_path)
    assert (found["base_model"], found["license"], found["datasets"]) == ("org/dense", "other", ["org/pile"])
    assert found["pipeline_tag"] == "text-generation"
    assert "model-index" not in found
    assert "`org/dense` cut with" in text
    assert "Nothing was trained or measured after the cut." in text
    assert "| mlp | 3, 0 |" in text
    assert 'processor = AutoTokenizer.from_pretrained("smaller")' in text


def test_metadata_of_a_local_models_card(tmp_path):
    assert base_metadata(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(BASE)}---\n# A model\n")
    assert base_metadata(str(tmp_path)) == BASE
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_metadata(str(tmp_path)) == {}


def test_the_card_of_a_local_base_has_what_its_recipe_card_or_config_knows(report, tmp_path):
    (tmp_path / "dense").mkdir()
    path = str(tmp_path / "dense")
    assert "base_model" not in metadata(model_card(report(path), "smaller", base_metadata(path)), tmp_path)
    (tmp_path / "dense" / "README.md").write_text(f"---\n{yaml.safe_dump(BASE | {'base_model': 'org/first'})}---\n")
    found = metadata(model_card(report(path), "smaller", base_metadata(path)), tmp_path)
    assert (found["base_model"], found["license"], found["license_name"]) == ("org/first", "other", "mine")
    (tmp_path / "dense" / "config.json").write_text('{"_name_or_path": "org/copied"}')
    found = metadata(model_card(report(path), "smaller", base_metadata(path)), tmp_path)
    assert (found["base_model"], found["license"]) == ("org/copied", "other")
    recipe = json.loads(json.dumps(report(path)["recipe"]))
    recipe["model"] |= {"base": "org/said", "license": "mit"}
    found = metadata(model_card(report(path, recipe=recipe), "smaller", base_metadata(path)), tmp_path)
    assert (found["base_model"], found["license"]) == ("org/said", "mit")
    assert "license_name" not in found


def test_a_card_on_the_hub_that_cannot_be_reached_stops_nothing():
    assert base_metadata("org/model-that-nobody-has") == {}


def test_a_hub_id_is_a_name_that_nothing_here_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/llama")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert not is_hub_id("models/llama")
    assert not is_hub_id("/models/llama")
