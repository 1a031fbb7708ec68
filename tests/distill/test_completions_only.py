"""Terms that count completions alone, against a slow reference in float64; and what is refused."""

import pytest
import torch

import makd
from makd.anatomy import resolve
from makd.anatomy.tokens import completion_tokens, predicting_tokens
from makd.aspects import activate
from makd.capture import capture
from makd.distill import DistillTrainer
from makd.distill.losses.layers import LayerLosses
from makd.distill.losses.objective import aspect_losses
from makd.evaluation import fidelity, perplexity
from tests.distill.test_trainer import make_arguments
from tests.models import tiny

IDS = [[5, 9, 12, 7, 30, 31, 2], [6, 8, 40, 41, 2, 0, 0]]
LABELS = [[-100, -100, 12, 7, -100, 31, 2], [-100, -100, -100, 41, 2, -100, -100]]
"""The first row has two answers. The second is padded."""
HIDDEN = [(0, 2), (0, 3), (0, 5), (0, 6), (1, 3), (1, 4)]
PREDICTING = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 2), (1, 3)]
"""(row, token), counted by hand."""


@pytest.fixture
def inputs():
    ids = torch.tensor(IDS)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(LABELS)}


@pytest.fixture(params=["llama", "gemma3_images"])
def pair(request):
    return [tiny(request.param, "causal_lm", seed=seed).double() for seed in (0, 1)]


def places(mask):
    return [tuple(place) for place in mask.nonzero().tolist()]


def test_tokens_of_completions_are_those_with_labels_and_are_predicted_one_earlier(inputs):
    assert places(completion_tokens(inputs)) == HIDDEN
    assert places(predicting_tokens(inputs, 1)) == PREDICTING
    assert places(predicting_tokens(inputs, 0)) == HIDDEN


def test_a_first_token_with_a_label_is_predicted_by_none(inputs):
    inputs["labels"][0, 0] = 5
    assert places(predicting_tokens(inputs, 1)) == PREDICTING


def both(pair, inputs, term):
    """The loss of one term; and what either model gave: (layers' outputs, attentions, logits)."""
    student, teacher = pair
    anatomy = resolve(student)
    plan = activate(makd.Plan(terms=(term,)), anatomy, resolve(teacher))
    with torch.no_grad(), capture(teacher, anatomy, plan.teacher_taps) as recording:
        theirs = teacher(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    layers = LayerLosses(anatomy, inputs, recording, plan)
    with capture(student, anatomy, plan.taps, layers.receive):
        ours = student(**inputs)
    return next(iter(aspect_losses(plan, anatomy, inputs, layers, theirs, ours).values()))


def whole(model, inputs):
    model.set_attn_implementation("eager")
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        return model(**{name: inputs[name] for name in names}, output_hidden_states=True, output_attentions=True)


def kl(theirs, ours):
    return (theirs * (theirs / ours).log()).nansum(-1)


def test_logits_compare_the_predictions_of_completions(pair, inputs):
    loss = both(pair, inputs, makd.Term(aspect="logits", tokens="completion"))
    ours, theirs = (whole(model, inputs).logits.softmax(-1) for model in pair)
    expected = torch.stack([kl(theirs[place], ours[place]) for place in PREDICTING]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_hidden_compares_the_states_at_completions_in_their_own_variance(pair, inputs):
    loss = both(pair, inputs, makd.Term(aspect="hidden", layers=[0], tokens="completion"))
    ours, theirs = (torch.stack([whole(model, inputs).hidden_states[1][place] for place in HIDDEN]) for model in pair)
    expected = (ours - theirs).square().mean() / theirs.var(0, unbiased=False).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_attention_of_completions_is_to_every_token_before(pair, inputs):
    loss = both(pair, inputs, makd.Term(aspect="attention", layers=[0], tokens="completion"))
    ours, theirs = (whole(model, inputs).attentions[0] for model in pair)
    expected = torch.stack([kl(theirs[row, :, token], ours[row, :, token]) for row, token in HIDDEN]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_relations_of_completions_are_to_every_real_token(pair, inputs):
    term = makd.Term(aspect="relation", layers=[0], roles=("v",), relation_heads=1, tokens="completion")
    loss = both(pair, inputs, term)
    found = []
    for row, token in HIDDEN:
        real = inputs["attention_mask"][row].bool()
        sides = []
        for model in pair:
            text = getattr(model.model, "language_model", model.model)
            normed = text.layers[0].input_layernorm(text.embed_tokens(inputs["input_ids"][row]))
            states = text.layers[0].self_attn.v_proj(normed)
            scores = states[token] @ states[real].T / states.shape[-1] ** 0.5
            sides.append(scores.softmax(-1))
        found.append(kl(sides[1], sides[0]))
    torch.testing.assert_close(loss.double(), torch.stack(found).mean(), rtol=1e-6, atol=0)


def test_the_trainer_without_whole_logits_has_the_same_losses(pair, inputs, tmp_path):
    student, teacher = (model.float() for model in pair)
    plan = makd.Plan(terms=(makd.Term(aspect="logits", tokens="completion"), makd.Term(aspect="task")))
    trainer = DistillTrainer(student, teacher, plan, args=make_arguments(tmp_path))
    assert trainer.distillation_forward.label_shift == 1
    trainer.compute_loss(student, inputs)
    logged = trainer.evaluated.take(trainer.args.device)
    ours, theirs = (whole(model, inputs).logits.softmax(-1) for model in (student, teacher))
    expected = torch.stack([kl(theirs[place], ours[place]) for place in PREDICTING]).mean()
    assert logged["logits"] == pytest.approx(float(expected), rel=1e-4)
    hard = [-ours[row, token, IDS[row][token + 1]].log() for row, token in PREDICTING]
    assert logged["task"] == pytest.approx(float(torch.stack(hard).mean()), rel=1e-4)


def test_fidelity_of_completions_counts_their_predictions(pair, inputs):
    student, teacher = pair
    ours, theirs = (whole(model, inputs).logits.softmax(-1) for model in pair)
    expected = torch.stack([kl(theirs[place], ours[place]) for place in PREDICTING]).mean()
    found = fidelity(student, teacher, [inputs], tokens="completion")
    assert found["prediction_kl"] == pytest.approx(float(expected), rel=1e-4)
    assert found != fidelity(student, teacher, [inputs])


def test_perplexity_of_completions_counts_their_tokens(pair, inputs):
    predicted = whole(pair[0], inputs).logits.log_softmax(-1)
    costs = torch.stack([-predicted[row, token, IDS[row][token + 1]] for row, token in PREDICTING])
    assert perplexity(pair[0], [inputs]) == pytest.approx(float(costs.mean().exp()), rel=1e-5)


def test_a_batch_without_labels_is_refused(pair, inputs):
    del inputs["labels"]
    with pytest.raises(makd.MakdError, match=r"Completions alone are to count .* a batch has no labels"):
        both(pair, inputs, makd.Term(aspect="hidden", tokens="completion"))


@pytest.mark.parametrize(
    ("term", "hint"),
    [
        (
            {"aspect": "embedding", "tokens": "completion"},
            "compared: matrix, experts, hidden, attention, relation, logits",
        ),
        ({"aspect": "attention", "tokens": "first"}, "can be compared: matrix, experts, hidden; got 'attention'"),
    ],
)
def test_aspects_that_cannot_count_fewer_tokens_are_refused(term, hint):
    with pytest.raises(makd.MakdError, match=hint):
        makd.Term(**term)


def test_logits_terms_that_count_different_tokens_are_refused(pair):
    terms = (makd.Term(aspect="logits", tokens="completion"), makd.Term(aspect="logits", temperature=2.0))
    with pytest.raises(makd.MakdError, match=r"count different tokens \(all, completion\)"):
        activate(makd.Plan(terms=terms), resolve(pair[0]))


def test_models_that_continue_nothing_have_no_completions():
    with pytest.raises(makd.MakdError, match="what a causal language model continues, and the model is none"):
        activate(makd.Plan(terms=(makd.Term(aspect="hidden", tokens="completion"),)), resolve(tiny("bert")))
