"""Statistics of batch norms are cut with their units, restored after a frozen search, and measured after a cut."""

import copy

import pytest
import torch
from helpers.laws import batch_for, searched, tiny
from helpers.tiny import search_
from torch import nn
from transformers import ResNetForImageClassification, TrainingArguments

from hf_dms import DMSConfig, DMSTrainer, attach_, detach_, estimate_batch_norms_, prune
from hf_dms.cut.verify import check_same
from hf_dms.errors import VerificationError
from hf_dms.gating.attach import freeze_, frozen_mode_, gates_of
from hf_dms.refit.batch_norms import batch_norms


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": 2 + torch.randn(2, 16, 16, generator=generator), "labels": index % 3}


def statistics(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}


def test_statistics_are_the_mean_over_batches_of_each_batchs_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).eval()
    model.forward = lambda x: nn.Sequential.forward(model, x)
    batches = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(3)]
    estimate_batch_norms_(model, ({"x": batch, "labels": None} for batch in batches))
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert (model[1].momentum, model[1].training, model[0].training) == (0.1, False, False)


def test_without_batches_statistics_stay_and_an_error_says_so():
    model = tiny(ResNetForImageClassification)
    before = statistics(model)
    with pytest.raises(ValueError, match="estimate_batch_norms_ needs at least one batch, got none"):
        estimate_batch_norms_(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())
    linear = nn.Linear(2, 2)
    estimate_batch_norms_(linear, [])  # a model without batch norms needs no batches
    assert batch_norms(linear) == []


def test_statistics_are_cut_with_their_units():
    model = tiny(ResNetForImageClassification)
    searched(model, layout="per_layer")
    pruned = prune(model, inputs=batch_for(model))
    assert pruned.num_parameters() < model.num_parameters()
    before, after = statistics(model), statistics(pruned)
    narrower = [name for name, tensor in after.items() if len(tensor) < len(before[name])]
    assert narrower
    for name in narrower:
        assert set(after[name].tolist()) < set(before[name].tolist())
    for module in batch_norms(pruned):
        assert len(module.weight) == len(module.running_mean)
    wrong = copy.deepcopy(pruned)
    batch_norms(wrong)[-1].running_var.mul_(4)
    with pytest.raises(VerificationError, match="logits has relative difference"):
        check_same(pruned, wrong, batch_for(pruned), ("cut", "reloaded"))


def test_a_frozen_search_gives_the_statistics_back():
    model = tiny(ResNetForImageClassification)
    before = statistics(model)
    attach_(model, DMSConfig(target=0.6, pipeline="p-"))
    freeze_(model)
    model.train()
    frozen_mode_(model)
    model(**batch_for(model))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())
    detach_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(model).items())


def test_masks_touch_no_statistics_of_the_norm_in_front_of_them():
    found = []
    for ratio in (0.0, 0.7):
        model = tiny(ResNetForImageClassification)
        attach_(model, DMSConfig(target=0.999, layout="per_layer", prune=("reduced0",)))
        search_(model, ratios=(ratio, ratio))
        model.train()(**batch_for(model))
        layer = model.resnet.encoder.stages[0].layers[0].layer
        found.append((layer[0].normalization.running_var.clone(), layer[1].normalization.running_var.clone()))
        assert gates_of(model).dims.keys() == {"reduced0"}
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_the_trainers_cut_has_statistics_of_its_own(tmp_path):
    model = tiny(ResNetForImageClassification)
    options = dict(per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    arguments = TrainingArguments(str(tmp_path), max_steps=3, **options)
    request = DMSConfig(target=0.7, layout="per_layer", warmup_steps=1)
    trainer = DMSTrainer(model=model, args=arguments, dms_config=request, train_dataset=Images())
    trainer.train()
    pruned = trainer.prune()
    expected = copy.deepcopy(pruned)
    rows = [Images()[index]["pixel_values"] for index in range(12)]
    estimate_batch_norms_(expected, [{"pixel_values": torch.stack(rows[i : i + 4])} for i in (0, 4, 8)])
    for name, tensor in statistics(pruned).items():
        torch.testing.assert_close(tensor, statistics(expected)[name])
    assert not pruned.training
