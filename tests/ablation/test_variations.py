"""Which variations an ablation compares."""

import pytest

import makd
from makd.ablation.variations import PREDICTIONS, WHOLE, variations
from makd.anatomy import resolve
from makd.errors import SettingError
from tests.models import tiny


def aspects(recipe):
    return [[term.aspect for term in stage.plan.wanted] for stage in recipe.trainings]


@pytest.fixture(scope="module")
def encoder():
    return resolve(tiny("bert"))


def test_each_aspect_that_the_model_has_is_off_once_and_predictions_are_alone_once(encoder):
    found = variations(makd.Recipe(plan=makd.Plan(preset="balanced")), encoder)
    assert {name: aspects(recipe) for name, recipe in found.items() if name != WHOLE} == {
        "without matrix": [["hidden", "attention", "embedding"]],
        "without hidden": [["matrix", "attention", "embedding"]],
        "without attention": [["matrix", "hidden", "embedding"]],
        "without embedding": [["matrix", "hidden", "attention"]],
        PREDICTIONS: [["embedding"]],
    }


def test_the_terms_that_stay_keep_their_layers_and_weights(encoder):
    recipe = makd.Recipe(plan=makd.Plan(preset="balanced"))
    (stage,) = variations(recipe, encoder)["without hidden"].trainings
    whole = {term.aspect: term for term in recipe.plan.wanted}
    assert all(term == whole[term.aspect] for term in stage.plan.wanted)


def test_a_presets_task_has_no_variation_where_the_rows_have_no_labels():
    headed, recipe = resolve(tiny("bert", "masked_lm")), makd.Recipe(plan=makd.Plan(preset="fast"))
    assert "without task" in variations(recipe, headed)
    found = variations(recipe, headed, labelled=False)
    assert all("task" not in terms for name, own in found.items() if name != WHOLE for terms in aspects(own))


def test_all_terms_of_an_aspect_go_together(encoder):
    terms = (makd.Term(aspect="hidden"), makd.Term(aspect="matrix", layers="last"), makd.Term(aspect="matrix"))
    found = variations(makd.Recipe(plan=makd.Plan(terms=terms)), encoder)
    assert aspects(found["without matrix"]) == [["hidden"]]


def test_a_row_that_would_be_another_once_more_is_left_out(encoder):
    terms = (makd.Term(aspect="hidden"), makd.Term(aspect="embedding"))
    assert [*variations(makd.Recipe(plan=makd.Plan(terms=terms)), encoder)] == [
        WHOLE, "without hidden", "without embedding",
    ]  # fmt: skip


def test_every_stage_loses_the_aspect_and_a_stage_that_would_learn_nothing_leaves_the_row_out(encoder):
    stages = (
        makd.Stage(plan=makd.Plan(terms=(makd.Term(aspect="hidden"), makd.Term(aspect="matrix")))),
        makd.Stage(plan=makd.Plan(terms=(makd.Term(aspect="hidden"), makd.Term(aspect="embedding")))),
        makd.Stage(plan=makd.Plan(terms=(makd.Term(aspect="hidden"),))),
    )
    found = variations(makd.Recipe(stages=stages), encoder)
    assert {name: aspects(recipe) for name, recipe in found.items() if name != WHOLE} == {
        "without matrix": [["hidden"], ["hidden", "embedding"], ["hidden"]],
        "without embedding": [["hidden", "matrix"], ["hidden"], ["hidden"]],
    }


def test_whose_completions_are_learned_from_stays():
    decoder = resolve(tiny("llama", "causal_lm"))
    completions = makd.Completions(student_share=0.5)
    plan = makd.Plan(terms=(makd.Term(aspect="logits"), makd.Term(aspect="hidden")), completions=completions)
    found = variations(makd.Recipe(plan=plan), decoder)
    assert {recipe.plan.writers for recipe in found.values()} == {completions}


def test_no_layer_is_taught_a_second_time(encoder):
    recipe = makd.Recipe(plan=makd.Plan(preset="full"), layerwise=makd.LayerwiseConfig(steps=5))
    assert {own.layer_teacher for own in variations(recipe, encoder).values()} == {None}


def test_a_plan_of_one_aspect_is_refused(encoder):
    recipe = makd.Recipe(plan=makd.Plan(terms=(makd.Term(aspect="hidden"),)))
    with pytest.raises(SettingError, match="has hidden alone"):
        variations(recipe, encoder)


def test_a_recipe_without_training_is_refused(encoder):
    with pytest.raises(SettingError, match=r"training\.steps is 0"):
        variations(makd.Recipe(training=makd.TrainingConfig(steps=0)), encoder)
