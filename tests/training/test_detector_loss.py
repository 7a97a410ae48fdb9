"""A detector learns boxes and classes from its teacher: with a class for no object, or with a probability per class."""

import itertools
import math

import pytest
import torch
from helpers.scenes import LARGE_SIDE, SIDE, conditional_detr, detector, detr, rt_detr
from torch.nn import functional as F

from hf_dms.training.detectors import bernoulli_divergence, box_distance, paired, sigmoid_divergence
from hf_dms.training.finetune import divergence

QUERIES = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(seed):
    """Random outputs of a detector: 2 images, 3 queries, 4 classes."""
    return {"logits": random(2, QUERIES, 4, seed=seed), "pred_boxes": random(2, QUERIES, 4, seed=seed + 1).sigmoid()}


def reordered(found, order):
    return {name: value[:, order] for name, value in found.items()}


# ---- boxes -----------------------------------------------------------------------------------------------------------
def test_the_boxes_of_a_teacher_count_where_it_sees_an_object():
    boxes = random(1, 2, 4).sigmoid()
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 30.0]]])  # one query sees an object, one sees none
    teacher = {"logits": logits, "pred_boxes": boxes}
    moved = boxes.clone()
    moved[0, 1] += 0.5
    assert float(box_distance({"pred_boxes": moved}, teacher)) == pytest.approx(0, abs=1e-6)
    moved[0, 0] += 0.1
    assert float(box_distance({"pred_boxes": moved}, teacher)) == pytest.approx(5 * 0.4, rel=1e-5)
    assert box_distance({"logits": logits}, {"logits": logits}) == 0


def test_boxes_of_classes_with_a_probability_each_count_by_the_most_probable_one():
    teacher = {"logits": torch.tensor([[[0.0, -30.0], [math.log(3), 0.0]]]), "pred_boxes": torch.zeros(1, 2, 4)}
    student = {"logits": teacher["logits"], "pred_boxes": torch.tensor([[[0.1] * 4, [0.3] * 4]])}
    # Probabilities 1/2 and 3/4, distances 0.4 and 1.2.
    expected = 5 * (0.5 * 0.4 + 0.75 * 1.2) / (0.5 + 0.75)
    assert float(sigmoid_divergence(student, teacher, 1.0, chosen=False)) == pytest.approx(expected, rel=1e-5)


# ---- classes ---------------------------------------------------------------------------------------------------------
def test_the_divergence_of_a_query_is_the_sum_over_its_classes_by_hand():
    """Teacher 3/4 and 1/2, student 1/2 and 1/2: only the first class differs, by 3/4·log(3/2) + 1/4·log(1/2)."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3), 0.0]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(bernoulli_divergence(student, teacher, 1.0)) == pytest.approx(expected, rel=1e-5)
    # A second query that differs in nothing halves the mean over queries.
    both = [torch.cat([each, random(1, 1, 2)], 1) for each in (student, teacher)]
    assert float(bernoulli_divergence(*both, 1.0)) == pytest.approx(expected / 2, rel=1e-5)
    warmer = [2 * each for each in (student, teacher)]
    assert float(bernoulli_divergence(*warmer, 2.0)) == pytest.approx(4 * expected, rel=1e-5)


def test_it_is_the_binary_cross_entropy_but_for_the_entropy_of_the_teacher():
    student, teacher = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1)
    probabilities = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, probabilities, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher, probabilities, reduction="none")
    found = bernoulli_divergence(student, teacher, 1.0)
    assert torch.allclose(found, (cross - entropy).sum(-1).mean())
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.allclose(gradient, (student.sigmoid() - probabilities) / 6, atol=1e-6)


def test_one_class_is_a_softmax_over_it_and_its_absence():
    student, teacher = random(1, 5, 1), random(1, 5, 1, seed=1)
    two = [torch.cat([each, torch.zeros_like(each)], -1).log_softmax(-1) for each in (student, teacher)]
    expected = F.kl_div(*two, log_target=True, reduction="none").sum(-1).mean()
    assert float(bernoulli_divergence(student, teacher, 1.0)) == pytest.approx(float(expected), rel=1e-5)


def test_it_stays_finite_where_a_teacher_is_certain():
    student, teacher = torch.tensor([[[200.0, -200.0]]]).requires_grad_(), torch.tensor([[[-200.0, 200.0]]])
    found = bernoulli_divergence(student, teacher, 1.0)
    found.backward()
    assert float(found.detach()) == pytest.approx(400)
    assert student.grad.isfinite().all()


# ---- queries ---------------------------------------------------------------------------------------------------------
def test_chosen_queries_are_paired_and_those_that_are_weights_are_not():
    teacher = outputs(0)
    student = reordered(teacher, [2, 0, 1])
    assert float(sigmoid_divergence(student, teacher, 1.0, chosen=True)) == pytest.approx(0, abs=1e-6)
    assert float(sigmoid_divergence(student, teacher, 1.0, chosen=False)) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pairs_have_the_smallest_loss_of_all(temperature):
    student, teacher = outputs(0), outputs(7)
    every = [
        float(sigmoid_divergence(reordered(student, list(order)), teacher, temperature, chosen=False))
        for order in itertools.permutations(range(QUERIES))
    ]
    # Both images at once share one order here; alone each may have a better one.
    assert float(sigmoid_divergence(student, teacher, temperature, chosen=True)) <= min(every) + 1e-6
    one = [{name: value[:1] for name, value in each.items()} for each in (student, teacher)]
    alone = [
        float(sigmoid_divergence(reordered(one[0], list(order)), one[1], temperature, chosen=False))
        for order in itertools.permutations(range(QUERIES))
    ]
    assert float(sigmoid_divergence(*one, temperature, chosen=True)) == pytest.approx(min(alone), rel=1e-5)


def test_values_that_are_not_finite_do_not_stop_the_pairing():
    student, teacher = outputs(0), outputs(1)
    student["logits"][0, 0] = math.nan
    order = paired(student, teacher, 1.0, teacher["logits"].sigmoid().amax(-1))
    assert order.sort(-1).values.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("make", [detector, detr, conditional_detr, rt_detr])
def test_a_detector_does_not_differ_from_itself(make):
    model = make()
    side = LARGE_SIDE if make is rt_detr else SIDE
    with torch.no_grad():
        found = model(pixel_values=random(2, 3, side, side))
    assert float(divergence(model, found, found, 2.0, None)) == pytest.approx(0, abs=1e-6)


def test_noisy_copies_of_true_boxes_are_no_queries_to_teach():
    model = rt_detr()
    batch = {"pixel_values": random(2, 3, LARGE_SIDE, LARGE_SIDE)}
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.full((2, 4), 0.3)}] * 2
    with torch.no_grad():
        teacher = model(**batch)
    student = model.train()(**batch, labels=labels)
    copies = student.logits.shape[1] - teacher.logits.shape[1]
    assert copies == 2 * 6  # positive and negative ones
    found = divergence(model, student, teacher, 1.0, labels)
    own = {name: student[name][:, copies:] for name in ("logits", "pred_boxes")}
    assert torch.equal(found, divergence(model, own, teacher, 1.0, labels))
    found.backward()
    assert model.model.decoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0
