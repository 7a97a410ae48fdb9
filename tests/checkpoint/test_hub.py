"""Pushing to the Hub and loading from it, over HTTP, against a stand-in on loopback."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import fresh
from helpers.hub_standin import READ_TOKEN, WRITE_TOKEN, environment_of, serve
from helpers.recipes import save_tokenizer
from helpers.tiny import search_, tiny_llama
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dms import DMSConfig, attach_, prune, save_pruned
from hf_dms.checkpoint.hub import push
from hf_dms.cli import main

HERE = Path(__file__).parents[1] / "helpers"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, found = torch.tensor([[3, 1, 4, 1, 5, 9]]), {}
for name, options in {
    "tester/stock": {},
    "tester/per-layer": {"trust_remote_code": True},
    "tester/smaller": {},
    "tester/trained": {},
}.items():
    found[name] = AutoModelForCausalLM.from_pretrained(name, **options).eval()(ids).logits.detach()
model = AutoModelForCausalLM.from_pretrained("tester/stock", revision="layers/differ", trust_remote_code=True)
found["layers/differ"] = model.eval()(ids).logits.detach()
assert AutoTokenizer.from_pretrained("tester/stock")("w1 w2").input_ids
assert "hf_dms" not in sys.modules
save_file(found, sys.argv[1])
"""


def pruned_llama(layout):
    model = tiny_llama()
    attach_(model, DMSConfig(target=0.8, layout=layout, prune=("kv", "mlp")))
    search_(model)
    return prune(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders to push: a stock model with a card, a per-layer model, and a model in two shards."""
    folder = tmp_path_factory.mktemp("hub")
    save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    stock = pruned_llama("uniform")
    card = {"README.md": "---\nlicense: mit\nlanguage: en\n---\n"}
    save_pruned(stock, folder / "stock", processor=tokenizer, files=card)
    save_pruned(pruned_llama("per_layer"), folder / "per_layer", processor=tokenizer)
    stock.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    """The stand-in after hub_session.py has run. `hub.results` has the result of each of its steps."""
    *_, last = sorted((folder / "sharded").glob("*.safetensors"))
    with serve() as hub:
        hub.drops[hashlib.sha256(last.read_bytes()).hexdigest()] = 6  # as often as one upload is tried
        in_a_process(hub, [str(HERE / "hub_session.py"), str(folder)], folder)
        hub.results = json.loads((folder / "results.json").read_text())
        yield hub


def in_a_process(hub, arguments, folder, token=WRITE_TOKEN):
    """Run Python as a user of the stand-in."""
    done = fresh.run(arguments, env=environment_of(hub, folder / "home", token))
    assert done.returncode == 0, done.stderr[-3000:]


def same_files(hub, repo_id, folder, revision="main"):
    pushed = {name: content for name, content in hub.files(repo_id, revision).items() if name != ".gitattributes"}
    return pushed == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_pushed_folder_is_the_local_one(hub, folder):
    assert hub.results["stock"] == {"code": 0, "out": f"Pushed to {hub.url}/tester/stock\n", "err": ""}
    assert same_files(hub, "tester/stock", folder / "stock")
    assert same_files(hub, "tester/per-layer", folder / "per_layer")
    assert not hub.repos["tester/stock"].private
    assert hub.repos["tester/per-layer"].private
    assert hub.repos["tester/per-layer"].messages == ["Layers differ"]


def test_pushing_the_same_again_makes_no_commit(hub):
    assert hub.results["again"]["code"] == 0
    assert hub.repos["tester/stock"].messages.count("Pruned with hf_dms") == 2  # on main, and on the branch


def test_a_branch_is_made_and_main_stays(hub, folder):
    assert hub.results["branch"]["out"] == f"Pushed to {hub.url}/tester/stock/tree/layers/differ\n"
    assert same_files(hub, "tester/stock", folder / "stock")
    assert hub.files("tester/stock", "layers/differ")["config.json"] == (folder / "per_layer/config.json").read_bytes()


def test_weights_of_an_earlier_push_are_replaced(hub, folder):
    assert hub.results["other layout"]["out"] == f"Pushed to {hub.url}/tester/dropped\n"  # the id had no owner
    assert same_files(hub, "tester/dropped", folder / "stock")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("refused token", "The Hub refuses the token (401). Make one with write access and run `hf auth login`"),
        ("read token", "The token may not write to 'tester/vain' (403)"),
        ("no token", "Pushing needs a token of the Hub with write access. Run `hf auth login`, or set HF_TOKEN."),
        ("other namespace", "The token may not write to 'somebody/vain' (403)"),
        ("no namespace", "The Hub has no 'nobody/vain' (404), or the token may not see it"),
        ("no branch", "The Hub refuses the push to 'tester/stock' (400): Invalid reference for a branch"),
        ("dropped", "The connection to the Hub broke while pushing to 'tester/dropped'"),
        ("broken token", "The token of the Hub holds a space, a line break or another character that no token has"),
        ("recipe in vain", "The token may not write to 'somebody/smaller' (403)"),
        ("recipe without token", "Pushing needs a token"),
    ],
)
def test_what_went_wrong_is_told(hub, step, message):
    result = hub.results[step]
    assert result["code"] == 2
    assert message in result["err"]
    assert "Traceback" not in result["err"]


def test_an_upload_that_broke_goes_on_where_it_stopped(hub, folder):
    again = f"To push it again: hf-dms push {folder / 'sharded'} tester/dropped --private"
    assert again in hub.results["dropped"]["err"]
    assert hub.results["after the drop"]["code"] == 0
    arrived = hub.repos["tester/dropped"].commits.values()
    shards = {file.name: file.read_bytes() for file in (folder / "sharded").iterdir()}
    assert any(shards.items() <= files.items() for files in arrived)
    sent = [path for method, path in hub.requests if path.startswith("/lfs/")]
    assert len(sent) == len(set(sent))  # nothing arrived twice


def test_no_token_is_ever_shown(hub):
    shown = json.dumps(hub.results)
    written = b"".join(content for repo in hub.repos for content in hub.files(repo).values())
    for token in (WRITE_TOKEN, READ_TOKEN, "hf_test_long_expired", "hf_test_with"):
        assert token not in shown
        assert token.encode() not in written


def test_a_trainer_pushes_the_pruned_model(hub, folder):
    assert hub.results["trainer"]["out"] == f"{hub.url}/tester/trained"
    assert same_files(hub, "tester/trained", folder / "out/pruned")
    assert hub.repos["tester/trained"].private
    assert hub.repos["tester/trained"].messages == ["Pruned with hf_dms", "From the trainer"]  # and no checkpoints
    assert AutoModelForCausalLM.from_pretrained(folder / "out/pruned").num_parameters() < tiny_llama().num_parameters()


def test_a_trainer_pushes_with_all_that_trainer_takes(hub):
    assert hub.results["trainer later"]["out"] == f"{hub.url}/tester/trained/tree/with-card"
    text = hub.files("tester/trained", "with-card")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license) == ("tester/stock", "mit")
    assert set(data.tags) >= {"mine", "dms", "pruned"}
    assert "# Named" in text
    plain = hub.files("tester/trained")["README.md"].decode()
    assert {"dms", "pruned"} <= set(ModelCard(plain).data.tags)
    assert "# trained" in plain


def test_a_recipe_prunes_a_model_of_the_hub_and_pushes_the_result(hub, folder):
    assert hub.results["recipe"]["code"] == 0
    assert f"Pushed to {hub.url}/tester/smaller" in hub.results["recipe"]["out"]
    assert same_files(hub, "tester/smaller", folder / "recipe")
    text = hub.files("tester/smaller")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.language) == ("tester/stock", "mit", "en")
    assert 'from_pretrained("tester/smaller")' in text
    assert str(folder) not in text


def test_a_result_that_cannot_be_pushed_is_saved(hub, folder):
    assert (
        f"To push it again: hf-dms push '{folder / 'recipe in vain'}' somebody/smaller --private"
        in (hub.results["recipe in vain"]["err"])
    )
    assert (folder / "recipe in vain" / "dms_report.json").is_file()
    assert not (folder / "recipe in vain.unfinished").exists()


def test_models_load_by_their_ids_where_hf_dms_is_not_imported(hub, folder):
    in_a_process(hub, ["-c", LOAD, str(folder / "logits.safetensors")], folder)
    local = {
        "tester/stock": "stock",
        "tester/per-layer": "per_layer",
        "tester/smaller": "recipe",
        "tester/trained": "out/pruned",
        "layers/differ": "per_layer",
    }
    for name, logits in load_file(folder / "logits.safetensors").items():
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder / local[name]).eval()(IDS).logits
        # another process may sum with another number of threads
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_a_failure_that_is_not_the_connections_is_told_as_such(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(ValueError, match="Something failed while pushing to 'tester/x': no memory\n"):
        push(folder / "stock", "tester/x", token="hf_test")


# ---- what is refused before anything is sent ----
def test_a_folder_that_is_no_complete_model_is_refused(tmp_path, folder):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not the folder of a complete model: it has no model\.safetensors"):
        push(tmp_path, "tester/x")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ValueError, match=r"it has no model-00001-of-00001\.safetensors"):
        push(tmp_path, "tester/x")
    with pytest.raises(ValueError, match=r"it has no config\.json, model\.safetensors"):
        push(tmp_path / "nowhere", "tester/x")
    (tmp_path / "dms_state.json").write_text("{}")
    with pytest.raises(ValueError, match="is a checkpoint of a search, not a pruned model"):
        push(tmp_path, "tester/x")


@pytest.mark.parametrize("name", ["a/b/c", "a b", "a--b", ""])
def test_a_name_that_no_repository_can_have_is_refused(folder, name, capsys):
    assert main(["push", str(folder / "stock"), name]) == 2
    assert f"'{name}' cannot be a repository on the Hub; expected namespace/name" in capsys.readouterr().err
