"""Fidelity, perplexity and costs, against slow references."""

import math

import pytest
import torch
from scipy.stats import spearmanr

import makd
from makd.anatomy import resolve
from makd.evaluation import latency, parameter_counts
from tests.models import batch, tiny


def make_student(teacher):
    return makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def test_a_model_is_faithful_to_itself():
    teacher = tiny("bert")
    scores = makd.fidelity(teacher, teacher, [batch(teacher)])
    assert scores["rank_correlation"] == pytest.approx(1.0)
    assert scores["cosine"] == pytest.approx(1.0)
    classifier = tiny("bert", head="sequence_classification")
    scores = makd.fidelity(classifier, classifier, [batch(classifier)])
    assert scores["prediction_kl"] == pytest.approx(0.0, abs=1e-6)
    assert scores["top1_agreement"] == 1.0


def test_rank_correlation_is_spearmans_over_all_pairs_of_texts():
    teacher = tiny("bert")
    student = make_student(teacher)
    inputs = batch(teacher)
    mask = inputs["attention_mask"].double()[..., None]
    similarities = []
    with torch.no_grad():
        for model in (teacher, student):
            pooled = (model(**inputs)[0].double() * mask).sum(1) / mask.sum(1)
            pairs = [(i, j) for i in range(len(pooled)) for j in range(i + 1, len(pooled))]
            similarities.append([float(torch.cosine_similarity(pooled[i], pooled[j], dim=0)) for i, j in pairs])
    expected = spearmanr(*similarities).statistic
    assert makd.fidelity(student, teacher, [inputs])["rank_correlation"] == pytest.approx(expected, abs=1e-6)


def test_embeddings_of_another_width_have_similarities_alone():
    teacher = tiny("bert")
    scores = makd.fidelity(tiny("bert", hidden_size=16), teacher, [batch(teacher)])
    assert scores.keys() == {"rank_correlation"}


def test_fidelity_does_not_depend_on_how_texts_are_batched():
    teacher = tiny("llama", head="causal_lm")
    student = make_student(teacher)
    inputs = batch(teacher)
    rows = [
        {name: value[index : index + 1] for name, value in inputs.items()} for index in range(len(inputs["input_ids"]))
    ]
    whole, parts = makd.fidelity(student, teacher, [inputs]), makd.fidelity(student, teacher, rows)
    assert whole == pytest.approx(parts, rel=1e-4)


def test_perplexity_is_that_of_a_loop_over_tokens():
    model = tiny("llama", head="causal_lm")
    inputs = batch(model, padded=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            real = ids[mask.bool()]
            scores = model(input_ids=real[None]).logits[0].double().log_softmax(-1)
            for position in range(len(real) - 1):
                total -= float(scores[position, real[position + 1]])
                count += 1
    assert makd.perplexity(model, [inputs]) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_of_nothing_is_refused():
    with pytest.raises(makd.MakdError, match="at least two tokens"):
        makd.perplexity(tiny("llama", head="causal_lm"), [])


def test_fidelity_of_nothing_is_refused():
    teacher = tiny("bert")
    with pytest.raises(makd.MakdError, match="no batches"):
        makd.fidelity(teacher, teacher, [])


def test_parameters_are_counted_once_where_they_are_shared():
    model = tiny("albert")
    counts = parameter_counts(model, resolve(model))
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < counts["linears"] < counts["total"]


def test_latency_is_measured_for_each_model():
    teacher = tiny("bert")
    found = latency({"teacher": teacher, "student": make_student(teacher)}, batch_size=2, tokens=8, repeats=3)
    assert found.keys() == {"teacher", "student"}
    assert all(value > 0 for value in found.values())


def test_the_fingerprint_tells_models_apart_and_equal_ones_not():
    assert makd.fingerprint(tiny("bert")) == makd.fingerprint(tiny("bert"))
    assert makd.fingerprint(tiny("bert")) != makd.fingerprint(make_student(tiny("bert")))


@pytest.mark.parametrize("head", ["question_answering", "token_classification", "masked_lm"])
def test_every_kind_of_prediction_is_compared(head):
    teacher = tiny("bert", head=head)
    scores = makd.fidelity(make_student(teacher), teacher, [batch(teacher)])
    assert scores["prediction_kl"] > 0
    assert 0 <= scores["top1_agreement"] <= 1


def test_latency_waits_for_the_models_device_before_and_after_each_forward(monkeypatch):
    model, waited = tiny("bert"), []
    monkeypatch.setattr("makd.evaluation.costs.wait", waited.append)
    latency({"student": model}, batch_size=1, tokens=8, repeats=1)
    assert waited == [model.device] * 2 * 3  # two forwards before those that count


def test_latency_is_timed_at_as_many_tokens_as_a_model_has_positions_for():
    model = tiny("roberta")  # 64 positions, the first of them padding's
    lengths = []
    model.register_forward_pre_hook(
        lambda _module, _args, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    latency({"student": model}, batch_size=1, tokens=128, repeats=1)
    assert set(lengths) == {63}
