"""`output.sizes`: one search gives results of several sizes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_dms.experiment.sizes as sizes
from hf_dms.cut.verify import outputs_of

SEARCH = [
    "dms.pipeline=p-", "dms.target=0.7", "dms.target_ramp=1.0", "dms.warmup_steps=1", "train.max_steps=20",
    "recover={repair: {examples: 4}, max_steps: 2, distillation: {}}",
]  # fmt: skip


def report_of(folder):
    return json.loads((folder / "dms_report.json").read_text())


@pytest.mark.parametrize("option", ["dms.scales=true", pytest.param("dms.layout=per_layer", marks=pytest.mark.slow)])
def test_every_size_is_cut_recovered_measured_and_saved(recipe, tmp_path, option):
    options = [*SEARCH, option, "output.sizes=[0.9, 0.8]"]
    assert recipe(*options)[0] == 0
    reports = {size: report_of(tmp_path / name) for size, name in ((0.7, "out"), (0.8, "out-0.8"), (0.9, "out-0.9"))}
    dense = reports[0.7]["dense"]["num_params"]
    for size, report in reports.items():
        assert report["pruned"]["num_params"] <= size * dense
        assert report["dense"]["perplexity"] == reports[0.7]["dense"]["perplexity"]
        assert {"pruned", "repaired", "recovered"} <= report.keys()
        assert report["recipe"]["dms"]["target"] == size
    assert reports[0.7]["pruned"]["num_params"] < reports[0.8]["pruned"]["num_params"]
    assert reports[0.8]["pruned"]["num_params"] < reports[0.9]["pruned"]["num_params"]
    assert reports[0.9]["recovered"]["perplexity"] != reports[0.9]["repaired"]["perplexity"]
    assert not (tmp_path / "out.unfinished").exists()
    the_result_at_the_target_is_what_it_is_without_further_sizes(recipe, options[:-1], tmp_path)


def the_result_at_the_target_is_what_it_is_without_further_sizes(recipe, options, tmp_path):
    """The other sizes are made after the result, and do not change it."""
    assert recipe(*options, f"output.path={tmp_path / 'other'}")[0] == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "other")]
    batch = {"input_ids": torch.arange(1, 9)[None]}
    assert torch.equal(outputs_of(models[0], batch), outputs_of(models[1], batch))


def test_a_run_that_was_stopped_between_two_sizes_goes_on_there(recipe, tmp_path, monkeypatch):
    options, made = [*SEARCH, "output.sizes=[0.9, 0.8]"], []
    real = sizes._made

    def stop_at_the_second(*args):
        made.append(args[1].recipe.dms.target)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sizes, "_made", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        recipe(*options)
    first = (tmp_path / "out-0.9" / "dms_report.json").stat().st_mtime_ns
    assert recipe(*options)[0] == 0
    assert made == [0.9, 0.8, 0.8]
    assert (tmp_path / "out-0.9" / "dms_report.json").stat().st_mtime_ns == first
    assert (tmp_path / "out-0.8" / "dms_report.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output.sizes=[0.6]"], "has 0.6, which the search does not pass. On its way to 0.7 it passes 0.95"),
        (["output.sizes=[0.83]"], "output.sizes has 0.83, which the search does not pass"),
        (["output.sizes=[0.9]", "dms.pipeline=p", "recover=null"], "a search with frozen weights"),
        (["output.sizes=[0.9]", "dms.target_schedule=constant"], "a falling target"),
        (["output.sizes=[0.9]", "dms.strategy=taylor"], "output.sizes needs a search"),
        (["output.sizes=[half]"], "each of output.sizes must be a number, got 'half'"),
    ],
)  # fmt: skip
def test_sizes_that_no_search_passes_are_refused_before_it(recipe, capsys, options, message):
    assert recipe(*SEARCH, *options, command="validate")[0] == 2
    assert message in capsys.readouterr().err


def test_a_size_that_is_there_already_is_not_overwritten(recipe, tmp_path, capsys):
    (tmp_path / "out-0.9").mkdir()
    (tmp_path / "out-0.9" / "notes.txt").write_text("mine")
    assert recipe(*SEARCH, "output.sizes=[0.9]")[0] == 2
    assert "out-0.9 exists and is not empty" in capsys.readouterr().err
