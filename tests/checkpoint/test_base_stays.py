"""A pruned or searched model never replaces the model that it was made from, whichever way it is saved or pushed."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from helpers.recipes import save_tokenizer
from helpers.tiny import TINY, Tokens, search_
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, HfDmsError, attach_, detach_, prune, save_pruned
from hf_dms.checkpoint.hub import base_of, check_not_base, push
from hf_dms.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
CONFIG = DMSConfig(target=0.7, warmup_steps=1)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


def searched(base):
    model = load(base)
    attach_(model, CONFIG)
    search_(model)
    return model


def pruned(base):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prune: no search has run", UserWarning)
        return prune(load(base), CONFIG)


def arguments(folder, **options):
    return TrainingArguments(str(folder), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", **options)


def searching(base, output):
    return DMSTrainer(model=load(base), args=arguments(output), dms_config=CONFIG, train_dataset=Tokens())


def adapted(base, output):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    return DMSTrainer(model=model, args=arguments(output), dms_config=CONFIG, train_dataset=Tokens())


def by_a_link(base):
    (base.parent / "link").symlink_to(base)
    return base.parent / "link"


def merged(base):
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(pruned(base), adapters).merge_and_unload()


WAYS = {
    "save_pretrained of what prune returns": lambda base: pruned(base).save_pretrained(base),
    "by another name": lambda base: pruned(base).save_pretrained(by_a_link(base)),
    "as a word": lambda base: pruned(base).save_pretrained(save_directory=f"{base}/../base/"),
    "of a copy": lambda base: copy.deepcopy(pruned(base)).save_pretrained(base),
    "of one in another process": lambda base: pickle.loads(pickle.dumps(pruned(base))).save_pretrained(base),
    "of one with merged adapters": lambda base: merged(base).save_pretrained(base),
    "of one that is loaded from a link": lambda base: pruned(by_a_link(base)).save_pretrained(base),
    "save_pretrained of a model with gates": lambda base: searched(base).save_pretrained(base),
    "save_pretrained of what it was cut to": lambda base: prune(searched(base)).save_pretrained(base),
    "save_pruned": lambda base: save_pruned(pruned(base), base, overwrite=True),
    "a Trainer that goes on": lambda base: Trainer(pruned(base), arguments(base.parent / "x")).save_model(str(base)),
    "a Trainer in the folder": lambda base: Trainer(pruned(base), arguments(base)).save_model(),
    "save_model of the search": lambda base: searching(base, base.parent / "x").save_model(str(base)),
    "save_model beside adapters": lambda base: adapted(base, base.parent / "x").save_model(str(base)),
    "a search in the folder": lambda base: searching(base, base),
    "a search in the folder beside adapters": lambda base: adapted(base, base),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_of_the_dense_model_is_not_replaced(base, way):
    before = contents(base)
    with pytest.raises(HfDmsError, match="which the result is made from and which it would replace"):
        WAYS[way](base)
    assert contents(base) == before


def test_the_folder_is_known_wherever_the_process_goes(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    model = pruned("base")
    trainer = searching("base", "x")
    (base / "below").mkdir()
    monkeypatch.chdir(base / "below")
    with pytest.raises(HfDmsError, match="which the result is made from"):
        model.save_pretrained("..")
    with pytest.raises(HfDmsError, match="which the result is made from"):
        trainer.save_model("..")


def test_other_folders_take_it_and_so_does_this_one_what_is_not_a_result(base, tmp_path):
    model = pruned(base)
    model.save_pretrained(tmp_path / "pruned")
    assert load(tmp_path / "pruned").num_parameters() == model.num_parameters()
    model.save_pretrained(base / "pruned")  # a folder inside the model's folder
    dense = searched(base)
    dense.save_pretrained(tmp_path / "searched")
    detach_(dense)
    assert "save_pretrained" not in vars(dense)
    dense.save_pretrained(base)
    attach_(model, CONFIG)  # the cut model can be searched again
    detach_(model)
    with pytest.raises(HfDmsError, match="which the result is made from"):
        model.save_pretrained(base)


def test_a_model_of_no_folder_is_a_plain_one():
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    attach_(model, CONFIG)
    search_(model)
    assert "save_pretrained" not in vars(model)
    assert "save_pretrained" not in vars(prune(model))


# ---- on the Hub ----
@pytest.mark.parametrize(
    ("repo_id", "revision", "base_revision"),
    [("me/base", None, None), ("Me/Base", "main", None), ("me/base", None, "main"), ("me/base", "v2", "v2")],
)
def test_a_push_over_the_dense_model_is_refused(repo_id, revision, base_revision):
    with pytest.raises(HfDmsError, match="is the model that the pruned one was made from, and this push would replace"):
        check_not_base(repo_id, revision, "me/base", base_revision)


def test_another_repository_or_branch_takes_it():
    for repo_id, revision in (("me/small", None), ("me/base", "small"), ("base", None)):
        check_not_base(repo_id, revision, "me/base")
    check_not_base("me/base", None, None)


def test_the_card_of_what_is_pushed_says_what_it_was_made_from(base, capsys):
    small = base.parent / "small"
    save_pruned(pruned(base), small, files={"README.md": "---\nbase_model: me/base\n---\n"})
    assert base_of(small) == "me/base"
    with pytest.raises(HfDmsError, match="is the model that the pruned one was made from"):
        push(small, "me/base", token="hf_test")
    assert main(["push", str(small), "ME/base"]) == 2
    assert "is the model that the pruned one was made from" in capsys.readouterr().err
    for card in ("no card", "---\nbase_model: [a/b, c/d]\n---\n", "---\nbase_model: [\n---\n"):
        (small / "README.md").write_text(card)
        assert base_of(small) is None


def test_a_trainer_does_not_push_over_it(base):
    model = load(base)
    attach_(model, CONFIG), detach_(model)
    model.name_or_path = "me/base"
    options = dict(hub_model_id="me/base", hub_token="hf_test")
    with pytest.raises(HfDmsError, match="is the model that the pruned one was made from"):
        DMSTrainer(model, arguments(base.parent / "x", push_to_hub=True, **options), dms_config=CONFIG)
    trainer = DMSTrainer(model, arguments(base.parent / "x", **options), dms_config=CONFIG, train_dataset=Tokens())
    with pytest.raises(HfDmsError, match="is the model that the pruned one was made from"):
        trainer.push_to_hub()


@pytest.mark.parametrize("kind", ["model.base", "card"])
def test_a_recipe_does_not_push_over_it(recipe, dense, base, kind, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    (base / "README.md").write_text("---\nbase_model: me/base\n---\n")
    known = {"model.base": ["model.base=me/base"], "card": [f"model.path={base}"]}
    assert recipe("hub.repo_id=me/base", *known[kind], command="validate")[0] == 2
    assert "'me/base' is the model that the pruned one was made from" in capsys.readouterr().err
    assert recipe("hub.repo_id=me/base", "hub.revision=small", *known[kind], command="validate")[0] == 0
