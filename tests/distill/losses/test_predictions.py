"""The loss `logits` of every kind of head, live and from a cache, and the loss on labels of each."""

import copy

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import ElectraConfig, ElectraForPreTraining

import makd
from makd.anatomy import predictions_of, resolve
from makd.aspects import activate, label_divergence
from makd.distill.losses.objective import aspect_losses, check_labels, task_loss
from makd.errors import SettingError
from tests.cache.test_cache import Pad, assert_near, build, make_rows, make_trainer
from tests.models import ENCODER, batch, tiny

SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}


def logits_loss(student, teacher, inputs, **term):
    plan = activate(makd.Plan(terms=(makd.Term(aspect="logits", **term),)), resolve(student), resolve(teacher))
    outputs = [model(**inputs) for model in (teacher, student)]
    return aspect_losses(plan, resolve(student), inputs, {}, *outputs)["logits"]


def electra(seed):
    torch.manual_seed(seed)
    model = ElectraForPreTraining(ElectraConfig(**ENCODER, embedding_size=16)).eval()
    model.discriminator_predictions.dense_prediction.weight.data *= 30
    return model


def pair(head="sequence_classification", **settings):
    return [tiny("bert", head, seed=seed, **settings) for seed in (0, 1)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_several_labels_is_the_kl_of_each_label(temperature):
    student, teacher = pair(**SEVERAL)
    inputs = batch(student)
    ours, theirs = (model(**inputs).logits.double() / temperature for model in (student, teacher))
    expected = kl_divergence(Bernoulli(logits=theirs), Bernoulli(logits=ours)).mean() * temperature**2
    loss = logits_loss(student, teacher, inputs, temperature=temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_of_several_labels_learns_as_cross_entropy_with_the_teachers_probabilities_does():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 4, generator=generator).requires_grad_() for _ in range(2))
    (slope,) = torch.autograd.grad(label_divergence(ours, theirs), ours)
    (wanted,) = torch.autograd.grad(binary_cross_entropy_with_logits(ours, theirs.sigmoid()), ours)
    torch.testing.assert_close(slope, wanted)


def test_of_a_discriminator_is_the_kl_of_each_real_token():
    student, teacher = electra(0), electra(1)
    inputs = batch(student)
    real = inputs["attention_mask"].bool()
    ours, theirs = (model(**inputs).logits[real].double() for model in (student, teacher))
    expected = kl_divergence(Bernoulli(logits=theirs), Bernoulli(logits=ours)).mean()
    torch.testing.assert_close(logits_loss(student, teacher, inputs).double(), expected, rtol=1e-4, atol=0)


def test_of_several_numbers_sees_what_they_are_off_by():
    student = tiny("bert", "sequence_classification", num_labels=3, problem_type="regression")
    teacher = copy.deepcopy(student)
    teacher.classifier.bias.data += 100.0
    assert float(logits_loss(student, teacher, batch(student)).detach()) == pytest.approx(10_000.0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "total_variation", "top_k"])
@pytest.mark.parametrize("settings", [SEVERAL, {"num_labels": 1, "problem_type": "multi_label_classification"}])
def test_every_divergence_of_an_identical_copy_is_nothing(divergence, settings):
    student = tiny("bert", "sequence_classification", **settings)
    assert abs(float(logits_loss(student, student, batch(student), divergence=divergence).detach())) < 1e-6


HEADS = {
    "several labels": lambda seed: tiny("bert", "sequence_classification", seed=seed, **SEVERAL),
    "several numbers": lambda seed: tiny(
        "bert", "sequence_classification", seed=seed, num_labels=3, problem_type="regression"
    ),
    "a number a token": lambda seed: tiny("bert", "token_classification", seed=seed, num_labels=1),
    "a discriminator": electra,
}


@pytest.mark.parametrize("head", HEADS)
def test_from_a_float32_cache_it_is_the_same(head, tmp_path):
    teacher, rows, trainers = HEADS[head](0), make_rows(), []
    cache = build(tmp_path / "cache", teacher, rows, "logits", Pad())
    for name, kept in (("live", None), ("cached", cache)):
        trainer = make_trainer(tmp_path / name, teacher, HEADS[head](1), rows, "logits", Pad(), kept)
        trainer.train()
        trainers.append(trainer)
    live, cached = ([log for log in trainer.state.log_history if "logits" in log] for trainer in trainers)
    assert len(live) == 3
    assert_near(live, cached)


class TestLabels:
    def test_rows_of_several_labels_without_any_are_left_out(self):
        student, _ = pair(**SEVERAL)
        inputs = batch(student)
        labels = torch.tensor([[1.0, 0.0, 1.0]] * 4)
        labels[2] = float("nan")
        output = student(**inputs, labels=labels)
        loss = task_loss({**inputs, "labels": labels}, output, predictions_of(student))
        known = [0, 1, 3]
        torch.testing.assert_close(loss, binary_cross_entropy_with_logits(output.logits[known], labels[known]))

    def test_are_refused_where_the_model_has_one_class_a_row(self):
        student, _ = pair(num_labels=3)
        with pytest.raises(SettingError, match="problem_type"):
            check_labels({"labels": torch.zeros(4, 3)}, predictions_of(student))

    def test_of_classes_are_refused_where_the_model_has_several_a_row(self):
        student, _ = pair(**SEVERAL)
        with pytest.raises(SettingError, match=r"0\.0 or 1\.0 for each label"):
            check_labels({"labels": torch.zeros(4, dtype=torch.long)}, predictions_of(student))
