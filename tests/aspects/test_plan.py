"""Plans: what a person writes, fitted to a model."""

import pytest

import makd
from makd.anatomy import Role, resolve
from makd.aspects import PRESETS, Plan, Term, activate
from makd.aspects.layers import select_layers
from makd.errors import SettingError
from tests.models import tiny


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last", [5]),
        ("last:2", [4, 5]),
        ("last:9", [0, 1, 2, 3, 4, 5]),
        ("every:2", [1, 3, 5]),
        ("every:4", [1, 5]),
        ([0, -1], [0, 5]),
        ([2, 2], [2]),
    ],
)
def test_layers_are_chosen_by_words_or_indices(layers, chosen):
    assert select_layers(layers, 6) == chosen


@pytest.mark.parametrize(("layers", "hint"), [([6], "0 to 5"), ([-7], "0 to 5"), ("al", "'all'"), ("every:0", "every")])
def test_layers_that_do_not_exist_are_refused_with_what_does(layers, hint):
    with pytest.raises(makd.MakdError, match=hint):
        select_layers(layers, 6)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: Plan(preset="ful"), "'full'"),
        (lambda: Term(aspect="hiden"), "'hidden'"),
        (lambda: Term(aspect="matrix", roles=("query",)), "Unknown role 'query'"),
        (lambda: Term(aspect="hidden", weight=0.0), "above 0; got 0.0"),
        (lambda: Term(aspect="logits", temperature=-1.0), "above 0; got -1.0"),
        (lambda: Term(aspect="hidden", layers="lst"), "'last'"),
        (lambda: Term(aspect="relation", roles=("up",)), "q, k, v; got up"),
        (lambda: Term(aspect="relation", relation_heads=0), "at least 1; got 0"),
    ],
)
def test_wrong_plans_are_refused_when_they_are_made(make, hint):
    with pytest.raises(makd.MakdError, match=hint):
        make()


def test_a_model_without_a_head_mimics_its_embedding_instead_of_logits():
    active = activate(Plan(preset="logits"), resolve(tiny("bert")))
    assert [item.name for item in active.terms] == ["embedding"]
    assert "no head" in active.off["logits"]


def test_a_model_with_a_head_mimics_its_logits_and_task():
    active = activate(Plan(preset="logits"), resolve(tiny("bert", head="sequence_classification")))
    assert [item.name for item in active.terms] == ["logits", "task"]


def test_matrix_distillation_is_the_papers_five_by_default():
    active = activate(Plan(terms=(Term(aspect="matrix", layers="last"),)), resolve(tiny("llama")))
    assert {tap.role for tap in active.taps} == {Role.QUERY, Role.KEY, Role.VALUE, Role.UP, Role.DOWN}


def test_a_role_stands_for_its_cross_attention_too():
    active = activate(Plan(terms=(Term(aspect="matrix", roles=("q",)),)), resolve(tiny("bart")))
    assert {tap.role for tap in active.taps} == {Role.QUERY, Role.CROSS_QUERY}


def test_cross_attention_is_part_of_attention():
    active = activate(Plan(terms=(Term(aspect="attention"),)), resolve(tiny("t5")))
    assert {tap.kind for tap in active.taps} == {"attention", "cross_attention"}


def test_a_preset_leaves_out_what_the_model_lacks_and_says_so():
    active = activate(Plan(preset="full"), resolve(tiny("deberta_v2")))
    assert "attention" in active.off
    assert "attention" not in [item.term.aspect for item in active.terms]


def test_a_plan_of_ones_own_refuses_what_the_model_lacks():
    with pytest.raises(makd.MakdError, match="'attention'"):
        activate(Plan(terms=(Term(aspect="attention"),)), resolve(tiny("deberta_v2")))


def test_two_terms_of_one_aspect_are_told_apart():
    terms = (Term(aspect="hidden"), Term(aspect="hidden", layers="last", weight=3.0))
    active = activate(Plan(terms=terms), resolve(tiny("bert")))
    assert [item.name for item in active.terms] == ["hidden", "hidden_2"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_an_encoder_and_a_decoder(preset):
    models = [tiny("llama", head="causal_lm")]
    models += [] if preset in OBJECTIVES else [tiny("bert"), tiny("t5")]
    for model in models:
        assert activate(Plan(preset=preset), resolve(model)).terms


OBJECTIVES = ("sft", "kd", "seq_kd", "minillm", "gkd", "distillm")
"""Of models with a head."""


@pytest.mark.parametrize("preset", OBJECTIVES)
def test_an_objective_of_predictions_is_refused_for_a_model_that_makes_none(preset):
    with pytest.raises(SettingError, match=r"no aspect to mimic on this model: .*head"):
        activate(Plan(preset=preset), resolve(tiny("bert")))


@pytest.mark.parametrize("layers", [[1, 0], [-1, 0], [0, 1, 1]])
def test_layers_beside_the_teachers_are_in_their_order(layers):
    term = Term(aspect="hidden", layers=layers, teacher_layers=layers)
    with pytest.raises(SettingError, match=r"Write them as \[0, 1\]"):
        activate(Plan(terms=(term,)), resolve(tiny("bert")))


@pytest.mark.parametrize(
    ("aspect", "setting"),
    [
        ("attention", {"distance": "cosine"}), ("logits", {"layers": "last"}), ("task", {"temperature": 2.0}),
        ("hidden", {"divergence": "reverse_kl"}), ("hidden", {"roles": ("q",)}), ("matrix", {"relation_heads": 4}),
        ("attention", {"pooling": "cls"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_an_aspect_does_not_have_is_refused(aspect, setting):
    with pytest.raises(SettingError, match=f"A term's {next(iter(setting))} is of .* and does nothing with {aspect}"):
        Term(aspect=aspect, **setting)


@pytest.mark.parametrize(
    ("divergence", "idle", "having"),
    [
        ("forward_kl", {"beta": 0.9}, "jsd"),
        ("jsd", {"alpha": 0.5}, "skew_forward_kl, skew_reverse_kl"),
        ("skew_reverse_kl", {"k": 3}, "top_k"),
    ],
)
def test_a_setting_that_a_divergence_does_not_have_is_refused(divergence, idle, having):
    with pytest.raises(SettingError, match=f"is of the divergence {having}, and does nothing with {divergence}; got"):
        Term(aspect="logits", divergence=divergence, **idle)


def test_completions_of_a_student_that_writes_none_are_not_kept():
    with pytest.raises(SettingError, match="replay keeps 500 of the student's completions, and it writes none"):
        makd.Completions(teacher_share=1.0, replay=500)
    makd.Completions(student_share=0.1, teacher_share=0.9, replay=500)
