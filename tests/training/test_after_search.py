"""Uses of a trainer's result: cut it, whatever the data were; train it further with any Trainer; save it."""

import pytest
import torch
from helpers.searches import arguments, dms
from helpers.tiny import Tokens, tiny_llama, token_batch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_dms import DMSConfig, DMSTrainer, prune, save_pruned


class Stream(IterableDataset):
    """Examples without a length and without indices."""

    def __iter__(self):
        yield from Tokens()


class Empty(IterableDataset):
    def __iter__(self):
        yield from ()


def searched(folder, train=None, evaluation=None):
    model, args = tiny_llama(), arguments(folder, max_steps=4)
    trainer = DMSTrainer(
        model=model, dms_config=dms(), args=args, train_dataset=train or Tokens(), eval_dataset=evaluation
    )
    trainer.train()
    return trainer


# ---- prune ----
@pytest.mark.parametrize("data", [{"train": Stream()}, {"evaluation": Stream()}], ids=["train", "eval"])
def test_a_search_on_a_stream_is_cut_and_proved_on_its_first_example(data, tmp_path):
    trainer = searched(tmp_path, **data)
    assert torch.equal(trainer.example_inputs()["input_ids"][0], Tokens()[0]["input_ids"])
    assert trainer.prune().num_parameters() < tiny_llama().num_parameters()


def test_several_evaluation_sets_give_an_example_of_the_first(tmp_path):
    trainer = searched(tmp_path, evaluation={"one": Tokens(seed=5), "two": Tokens()})
    assert torch.equal(trainer.example_inputs()["input_ids"][0], Tokens(seed=5)[0]["input_ids"])


def test_a_stream_without_examples_leaves_the_proof_to_dummy_inputs(tmp_path):
    trainer = searched(tmp_path, evaluation=Empty())
    assert trainer.example_inputs() is None
    assert trainer.prune().num_parameters() < tiny_llama().num_parameters()


# ---- save_pruned ----
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_a_result_that_an_ordinary_trainer_has_trained_on_is_saved_in_the_mode_that_it_is_in(layout, tmp_path):
    config = DMSConfig(target=0.7, layout=layout)
    with pytest.warns(UserWarning, match="no search has run"):
        pruned = prune(tiny_llama(attention_dropout=0.5), config, token_batch())
    Trainer(model=pruned, args=arguments(tmp_path / "trainer", max_steps=1), train_dataset=Tokens()).train()
    assert pruned.training
    assert save_pruned(pruned, tmp_path / "saved", inputs=token_batch()) < 1e-5
    assert pruned.training
