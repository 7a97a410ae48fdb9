"""A model is saved only if its folder reloads to the same model."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers.tiny import search_, tiny_llama, token_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_dms
from hf_dms import DMSConfig, attach_, prune
from hf_dms.checkpoint.folders import new_folder
from hf_dms.checkpoint.save import save_pruned
from hf_dms.checkpoint.search_state import hard_unit_counts, load_search_state_, save_search_state
from hf_dms.errors import HfDmsError, VerificationError
from hf_dms.gating.attach import gates_of

DAMAGE = "The reloaded model does not compute what the cut model does: .*tolerance 1e-04 for torch.float32"


@pytest.fixture(params=["uniform", "per_layer"])
def pruned(request):
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.6, layout=request.param))
    search_(model)
    return prune(model, inputs=token_batch())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage_after_saving(model, monkeypatch):
    """Let `save_pretrained` of a model write its folder and then spoil one weight in it."""
    save = type(model).save_pretrained

    def save_pretrained(self, folder, **kwargs):
        save(self, folder, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1.0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", save_pretrained)


# ---- the pruned model ----
def test_a_saved_folder_reloads_to_the_same_tensors_and_returns_the_difference(pruned, tmp_path):
    folder = tmp_path / "deep" / "out"
    assert save_pruned(pruned, folder, inputs=token_batch(), files={"README.md": "# card"}) < 1e-5
    assert (folder / "README.md").read_text() == "# card"
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(reloaded) is type(pruned)
    tensors = pruned.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in reloaded.state_dict().items())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_saved_folder_is_readable_and_holds_safetensors_only(pruned, tmp_path):
    save_pruned(pruned, tmp_path / "out", inputs=token_batch())
    assert (tmp_path / "out").stat().st_mode & 0o700 == 0o700
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_processor_travels_with_the_model(pruned, tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    save_pruned(pruned, tmp_path / "out", inputs=token_batch(), processor=tokenizer)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_vocab() == {"a": 0, "b": 1}


def test_a_model_that_reloads_differently_is_not_saved(pruned, tmp_path, monkeypatch):
    damage_after_saving(pruned, monkeypatch)
    with pytest.raises(VerificationError, match=DAMAGE):
        save_pruned(pruned, tmp_path / "out", inputs=token_batch())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(pruned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists and is not empty. Choose another .*overwrite"):
        save_pruned(pruned, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file. Choose another output.path"):
        save_pruned(pruned, tmp_path / "file", overwrite=True)
    assert contents(tmp_path) == {"mine.txt": b"mine", "file": b"mine"}


def test_an_empty_folder_is_taken(pruned, tmp_path):
    (tmp_path / "out").mkdir()
    save_pruned(pruned, tmp_path / "out", inputs=token_batch())
    assert (tmp_path / "out" / "config.json").is_file()


def test_overwrite_replaces_the_whole_folder(pruned, tmp_path):
    (tmp_path / "out" / "inner").mkdir(parents=True)
    (tmp_path / "out" / "inner" / "old.txt").write_text("old")
    save_pruned(pruned, tmp_path / "out", inputs=token_batch(), overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "inner").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_folder_when_the_new_one_fails(pruned, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    damage_after_saving(pruned, monkeypatch)
    with pytest.raises(VerificationError, match=DAMAGE):
        save_pruned(pruned, tmp_path / "out", inputs=token_batch(), overwrite=True)
    assert contents(tmp_path) == {"old.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with new_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new.txt").write_text("new")
        assert (tmp_path / "out" / "old.txt").read_text() == "old"
        assert temporary.parent == tmp_path
    assert contents(tmp_path) == {"new.txt": b"new"}


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "first.txt").write_text("first")
        with pytest.raises(HfDmsError, match="out is being written by another process"), new_folder(tmp_path / "out"):
            pass
    assert contents(tmp_path) == {"first.txt": b"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_lets_go(tmp_path):
    script = tmp_path / "hf-dms"  # by this name, because then `import hf_dms` imports little
    script.write_text(
        "import os, signal, sys; from hf_dms.checkpoint.folders import new_folder\n"
        "with new_folder(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, script, str(tmp_path / "out")])
    script.unlink()
    assert killed.returncode == -signal.SIGKILL
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "second.txt").write_text("second")
    assert contents(tmp_path) == {"second.txt": b"second"}


def test_what_a_kill_left_of_a_result_is_gone_with_the_next(tmp_path):
    for name in (".out.writing", ".out.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    with new_folder(tmp_path / "out") as temporary:
        assert not list(temporary.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- the state of a search ----
def searching(seed=0, **options):
    model = tiny_llama()
    attach_(model, DMSConfig(**({"target": 0.6, "layout": "per_layer"} | options)))
    search_(model, seed)
    return model


def test_search_state_survives_a_round_trip_through_files(tmp_path):
    model, other = searching(), searching(seed=8)
    save_search_state(model, tmp_path)
    load_search_state_(other, tmp_path)
    expected = gates_of(model).search_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in gates_of(other).search_state().items())
    with safe_open(tmp_path / "dms_state.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
    summary = json.loads((tmp_path / "dms_state.json").read_text())
    assert DMSConfig(**summary["dms_config"]) == DMSConfig(target=0.6, layout="per_layer")
    assert summary["kept_units"] == hard_unit_counts(gates_of(model))
    assert summary["resource"] == pytest.approx(float(gates_of(model).resource().detach()))


def test_a_folder_without_search_state_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no dms_state.safetensors: it is not a checkpoint of a DMS search"):
        load_search_state_(searching(), tmp_path)


def test_the_files_of_another_search_are_an_error(tmp_path):
    save_search_state(searching(layout="uniform"), tmp_path)
    with pytest.raises(ValueError, match=r"search state: prune_ratio has shape \(4,\), expected shape \(8,\)"):
        load_search_state_(searching(), tmp_path)


def test_save_pruned_is_public():
    assert hf_dms.save_pruned is save_pruned
