"""`class DMSSFTTrainer(DMSMixin, SFTTrainer)` is all that a user of TRL has to write, for a search on chat data."""

import pytest
import torch
from datasets import Dataset
from helpers.recipes import WORDS, save_tokenizer
from helpers.searches import QUIET, bit_equal, dms, keep_open_, logged, weights
from helpers.tiny import TINY, tiny_llama, token_batch
from transformers import AutoTokenizer

from hf_dms import DMSMixin

trl = pytest.importorskip("trl")
# TRL's own settings still use the old name
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['content'] + ' ' }}"
    "{% generation %}{{ '</s> ' }}{% endgeneration %}{% endfor %}"
)


class DMSSFTTrainer(DMSMixin, trl.SFTTrainer):
    pass


@pytest.fixture
def chats():
    def turn(role, i):
        return {"role": role, "content": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 4 + i % 3))}

    return Dataset.from_list([{"messages": [turn("user", i), turn("assistant", i + 1)]} for i in range(1, 17)])


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def arguments(folder, **options):
    defaults = dict(max_steps=6, max_length=16, learning_rate=1e-3, bf16=False)
    return trl.SFTConfig(str(folder), **(QUIET | defaults | options))


def searched(folder, chats, tokenizer, dms_options=None, resume=None, seed=0, prepare=None, **options):
    trainer = DMSSFTTrainer(
        model=tiny_llama(seed=seed), dms_config=dms(**(dms_options or {})), args=arguments(folder, **options),
        train_dataset=chats, eval_dataset=chats, processing_class=tokenizer,
    )  # fmt: skip
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_open_masks_without_resource_loss_train_like_the_plain_trainer(chats, tokenizer, tmp_path):
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    plain = trl.SFTTrainer(
        model=tiny_llama(), args=arguments(tmp_path / "plain", **options), train_dataset=chats,
        processing_class=tokenizer,
    )  # fmt: skip
    plain.train()
    open_ = searched(tmp_path / "open", chats, tokenizer, dict(resource_weight=0.0), prepare=keep_open_, **options)
    for key in ("loss", "mean_token_accuracy"):
        assert logged(open_, key) == pytest.approx(logged(plain, key), rel=1e-5)
    assert logged(open_, "task_loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_a_search_by_divergence_alone_works_on_chats_and_half_of_one_is_refused(chats, tokenizer, tmp_path):
    trainer = searched(tmp_path, chats, tokenizer, dict(pipeline="p-", kl_weight=1.0))
    assert all(0 < loss < 1 for loss in logged(trainer, "task_loss")[3:])
    assert float(trainer.gates.prune_ratio.detach().max()) > 0.02
    with pytest.raises(ValueError, match=r"computes its loss without logits .* Write kl_weight: 1"):
        searched(tmp_path, chats, tokenizer, dict(pipeline="p-", kl_weight=0.5))


def test_a_search_on_chats_is_evaluated_cut_and_resumed(chats, tokenizer, tmp_path):
    options = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    whole = searched(tmp_path, chats, tokenizer, **options)
    assert float(whole.gates.prune_ratio.detach().max()) > 0
    assert len(logged(whole, "eval_loss")) == 2
    pruned = whole.prune()
    assert sum(p.numel() for p in pruned.parameters()) <= 0.6 * tiny_llama().num_parameters()
    assert pruned.generate(**token_batch(), max_new_tokens=3).shape == (2, 10)
    again = searched(tmp_path, chats, tokenizer, resume=str(tmp_path / "checkpoint-3"), seed=5, **options)
    assert bit_equal(weights(again.model), weights(whole.model))
    assert bit_equal(again.gates.search_state(), whole.gates.search_state())
    assert TINY["vocab_size"] == pruned.config.vocab_size
    assert all(torch.isfinite(tensor).all() for tensor in pruned.state_dict().values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_a_search_beside_the_adapters_that_sft_puts_on(chats, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = DMSSFTTrainer(
        model=tiny_llama(), dms_config=dms(), args=arguments(tmp_path), train_dataset=chats,
        processing_class=tokenizer, peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    pruned = trainer.prune()
    assert pruned.num_parameters() <= trainer.dms_config.target * tiny_llama().num_parameters()
    assert not any("lora" in name for name in pruned.state_dict())
    adapters = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(p.abs().max() > 0 for p in adapters)
