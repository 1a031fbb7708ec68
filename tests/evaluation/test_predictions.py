"""Fidelity of every kind of prediction, against its definition or scikit-learn."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch.distributions import Bernoulli, kl_divergence
from transformers import ElectraConfig, ElectraForPreTraining

import makd
from tests.models import ENCODER, batch, tiny

SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}


def pair(**settings):
    return [tiny("bert", "sequence_classification", seed=seed, **settings) for seed in (0, 1)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.double()


def test_several_labels_are_compared_label_by_label_and_as_sets():
    student, teacher = pair(**SEVERAL)
    batches = [batch(student, seed=seed) for seed in range(6)]
    ours, theirs = (torch.cat([logits(model, inputs) for inputs in batches]) for model in (student, teacher))
    found = makd.fidelity(student, teacher, batches)
    kl = kl_divergence(Bernoulli(logits=theirs), Bernoulli(logits=ours)).mean()
    assert found["prediction_kl"] == pytest.approx(float(kl), rel=1e-5)
    sets = [np.asarray(side > 0) for side in (ours, theirs)]
    assert found["label_set_agreement"] == pytest.approx(accuracy_score(*sets))  # scikit-learn's is of whole sets
    assert found["label_agreement"] == pytest.approx(float((sets[0] == sets[1]).mean()))
    assert 0 < found["label_set_agreement"] < found["label_agreement"] < 1
    assert "top1_agreement" not in found


def test_several_outputs_that_are_off_by_a_hundred_are_far_away():
    student = tiny("bert", "sequence_classification", num_labels=3, problem_type="regression")
    teacher = copy.deepcopy(student)
    teacher.classifier.bias.data += 100.0
    assert makd.fidelity(student, teacher, [batch(student)]) == {"squared_difference": pytest.approx(10_000.0)}


def test_a_discriminator_is_compared_over_its_real_tokens():
    torch.manual_seed(0)
    student, teacher = (ElectraForPreTraining(ElectraConfig(**ENCODER, embedding_size=16)).eval() for _ in range(2))
    teacher.discriminator_predictions.dense_prediction.weight.data *= 30
    inputs = batch(student)
    real = inputs["attention_mask"].bool()
    ours, theirs = (logits(model, inputs)[real] for model in (student, teacher))
    found = makd.fidelity(student, teacher, [inputs])
    kl = kl_divergence(Bernoulli(logits=theirs), Bernoulli(logits=ours)).mean()
    assert found == {
        "prediction_kl": pytest.approx(float(kl), rel=1e-4),
        "label_agreement": pytest.approx(float(((ours > 0) == (theirs > 0)).double().mean())),
    }


def test_numbers_of_tokens_leave_padding_out():
    student, teacher = (tiny("bert", "token_classification", seed=seed, num_labels=1) for seed in (0, 1))
    inputs = batch(student)
    real = inputs["attention_mask"].bool()
    expected = (logits(student, inputs) - logits(teacher, inputs))[real].square().mean()
    assert makd.fidelity(student, teacher, [inputs])["squared_difference"] == pytest.approx(float(expected), rel=1e-5)
