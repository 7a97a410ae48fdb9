"""Weight files of a Hub model are checked before the search too.

`validate` checks the index, and that the Hub has what it names. Files are checked as soon as they are in the cache.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import fresh
from helpers.hub_standin import Repo, environment_of, serve
from helpers.recipes import WORDS, save_tokenizer
from helpers.tiny import TINY
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

SESSION = """
import contextlib, io, json, sys
from hf_dms.cli import main
from transformers import Trainer

results, train = {}, Trainer.train
for name in sys.argv[2:]:
    trained = []
    Trainer.train = lambda self, *args, **kwargs: trained.append(1) or train(self, *args, **kwargs)
    options = [sys.argv[1] + "/recipe.yaml", f"model.path=tester/{name}", f"output.path={sys.argv[1]}/out-{name}"]
    results[name] = []
    for command in ("validate", "prune", "validate"):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main([command, *options])
        results[name].append([code, err.getvalue(), len(trained)])
open(sys.argv[1] + "/results.json", "w").write(json.dumps(results))
"""


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def missing_shard(whole):
    return {name: content for name, content in whole.items() if not name.startswith("model-00002-of-")}


def truncated_shard(whole):
    return {name: content[:-5] if name.startswith("model-00002-of-") else content for name, content in whole.items()}


def damaged_index(whole):
    return whole | {"model.safetensors.index.json": b"{"}


def other_weights(whole):
    config = json.loads(whole["config.json"]) | {"intermediate_size": TINY["intermediate_size"] + 8}
    return whole | {"config.json": json.dumps(config).encode()}


def untrained_head(whole, folder):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder.parent / "headless")
    return {name: content for name, content in whole.items() if "safetensors" not in name} | {
        name: content for name, content in files(folder.parent / "headless").items() if "safetensors" in name
    }


FOUND_WITHOUT_THE_FILES = ("missing-shard", "damaged-index")
BAD = {
    "missing-shard": "lacks model-00002-of-",
    "truncated-shard": "is damaged or cut short",
    "damaged-index": "does not map tensors to files beside it",
    "other-weights": "Is config.json that of the weights?",
    "untrained-head": "has no weights for lm_head.weight, which would be random",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of `validate`, `prune` and `validate` again for each model: exit code, stderr, trainings begun."""
    folder = tmp_path_factory.mktemp("hub_weights")
    dense = folder / "dense"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(dense, max_shard_size="10KB")
    save_tokenizer(dense)
    whole = files(dense)
    models = {
        "whole": whole,
        "missing-shard": missing_shard(whole),
        "truncated-shard": truncated_shard(whole),
        "damaged-index": damaged_index(whole),
        "other-weights": other_weights(whole),
        "untrained-head": untrained_head(whole, dense),
    }
    recipe = {
        "model": {"path": "", "dtype": "float32"},
        "data": {"path": str(folder / "text.txt"), "sequence_length": 16, "held_out": 0.2},
        "dms": {"target": 0.8, "warmup_steps": 1, "pipeline": "p-"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
    }
    (folder / "text.txt").write_text(
        "\n".join(" ".join(WORDS[i * j % len(WORDS)] for j in range(60)) for i in range(9))
    )
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    with serve() as hub:
        for name, content in models.items():
            hub.repos[f"tester/{name}"] = Repo(False, {"1" * 40: content}, {"main": "1" * 40})
        done = fresh.run(["-c", SESSION, str(folder), *models], env=environment_of(hub, folder / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = {kind: [*(folder / "home").rglob(f"models--tester--{kind}/**/*.safetensors")] != [] for kind in BAD}
    return json.loads((folder / "results.json").read_text()) | {"weights in the cache": found}


@pytest.mark.parametrize("kind", BAD)
def test_files_of_the_hub_that_are_not_whole_end_a_run_before_its_search(results, kind):
    first, run, again = results[kind]
    for code, err, trained in (first, run, again) if kind in FOUND_WITHOUT_THE_FILES else (run, again):
        assert (code, trained) == (2, 0)
        assert BAD[kind] in err
        assert "Traceback" not in err
    assert run[1].count("\n") == 1


def test_the_message_says_what_to_delete(results):
    _, (_, err, _), _ = results["truncated-shard"]
    assert "If 'tester/truncated-shard' is complete on the Hub, delete " in err
    assert "models--tester--truncated-shard, and it is downloaded again." in err


def test_a_missing_file_is_found_without_a_download_of_the_others(results):
    assert re.search(
        r"model\.path: the Hub's 'tester/missing-shard' lacks model-00002-of-\d+\.safetensors, which "
        r"model\.safetensors\.index\.json names\. Use another revision",
        results["missing-shard"][0][1],
    )
    assert results["weights in the cache"] == {kind: kind not in FOUND_WITHOUT_THE_FILES for kind in BAD}


def test_whole_files_of_the_hub_pass(results):
    assert [code for code, _, _ in results["whole"]] == [0, 0, 0], results["whole"]
    assert results["whole"][1][2] == 1
