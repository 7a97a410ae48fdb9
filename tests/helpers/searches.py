"""Short searches with DMSTrainer on the tiny Llama."""

import dataclasses

import torch
from helpers.tiny import Tokens, tiny_llama
from transformers import TrainingArguments

from hf_dms import DMSConfig, DMSTrainer

QUIET = dict(
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=1,
    logging_nan_inf_filter=False,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    dataloader_pin_memory=False,
    seed=3,
)


def arguments(folder, **options):
    return TrainingArguments(str(folder), **(QUIET | {"max_steps": 6, "learning_rate": 1e-3} | options))


def dms(**options):
    defaults = dict(target=0.6, layout="per_layer", warmup_steps=2, gate_learning_rate=0.02, target_ramp=0.5)
    return DMSConfig(**(defaults | options))


def trained(folder, dms_options=None, model=None, resume=None, callbacks=(), **options):
    """A trainer that has run."""
    trainer = DMSTrainer(
        model=tiny_llama() if model is None else model,
        dms_config=dms(**(dms_options or {})),
        args=arguments(folder, **options),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=1),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def keep_open_(trainer):
    """Let a search never leave its warm-up. It is set on the gates, because the config's check would refuse it."""
    trainer.gates.schedule = dataclasses.replace(trainer.gates.schedule, warmup_steps=10**6)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def bit_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        pixels = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


class Classified(Tokens):
    """Token sequences with a class each."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"labels": index % 3}


class Poisoned(Images):
    """Images, some of which are NaN."""

    def __init__(self, poisoned=()):
        self.poisoned = set(poisoned)

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return example | {"pixel_values": example["pixel_values"] * float("nan")} if index in self.poisoned else example


def stories(trainer):
    """The log of a search and its evaluations, without the entries that depend on time."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if "second" not in name and "runtime" not in name}
            for entry in entries]  # fmt: skip
