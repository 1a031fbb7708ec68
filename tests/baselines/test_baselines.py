"""What holds for every baseline: its student fits the budget, and its stages teach all of it."""

import dataclasses

import pytest
import torch

import makd
from makd.anatomy import resolve
from makd.aspects import activate
from makd.baselines import BASELINES, Choice, PlannedStage, PreparedStudent
from makd.baselines.sizes import count_linears
from makd.errors import SettingError, UnknownNameError
from tests.distill.test_trainer import make_arguments, make_rows
from tests.models import batch, tiny

LABELS = [0, 1] * 8
BUDGET = makd.Budget(keep_linears=0.5)


@pytest.fixture(scope="module")
def teacher():
    return tiny("bert", head="sequence_classification", num_hidden_layers=4, intermediate_size=128)


def trainer_of(made, teacher, stage, folder, **settings):
    return makd.DistillTrainer(
        made.student,
        teacher,
        stage.plan,
        args=make_arguments(folder, max_steps=2, **settings),
        train_dataset=make_rows(labels=LABELS),
    )


@pytest.mark.parametrize("name", BASELINES)
class TestEveryBaseline:
    def test_stays_within_the_budget_and_at_most_one_percent_below(self, name, teacher):
        made = BASELINES[name].prepare(teacher, BUDGET, [batch(teacher)])
        limit = 0.5 * count_linears(teacher, resolve(teacher))
        assert 0.99 * limit <= count_linears(made.student, resolve(made.student)) <= limit

    def test_gradients_reach_all_of_the_student(self, name, teacher, tmp_path):
        made = BASELINES[name].prepare(teacher, BUDGET, [batch(teacher)])
        reached = set()
        inputs = batch(teacher) | {"labels": torch.tensor([0, 1, 1, 0])}
        for stage in made.stages:
            trainer = trainer_of(made, teacher, stage, tmp_path)
            loss = trainer.compute_loss(made.student.train(), dict(inputs))
            names, parameters = zip(*made.student.named_parameters(), strict=True)
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            reached |= {name for name, slope in zip(names, slopes, strict=True) if slope is not None and slope.any()}
        assert reached == {name for name, _ in made.student.named_parameters()}

    def test_a_step_along_the_gradient_lowers_each_stages_loss(self, name, teacher, tmp_path):
        made = BASELINES[name].prepare(teacher, BUDGET, [batch(teacher)])
        inputs = batch(teacher) | {"labels": torch.tensor([0, 1, 1, 0])}
        for stage in made.stages:
            trainer = trainer_of(made, teacher, stage, tmp_path)
            loss = trainer.compute_loss(made.student.train(), dict(inputs))
            parameters = [parameter for parameter in made.student.parameters() if parameter.requires_grad]
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = sum(slope.square().sum() for slope in slopes if slope is not None).sqrt()
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    if slope is not None:
                        parameter -= 1e-3 * slope / norm
            assert trainer.compute_loss(made.student.train(), dict(inputs)) < loss

    def test_trains_and_leaves_the_teacher_alone(self, name, teacher, tmp_path):
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        made = BASELINES[name].prepare(teacher, BUDGET, [batch(teacher)])
        start = {key: value.clone() for key, value in made.student.state_dict().items()}
        for stage in made.stages:
            trainer = trainer_of(made, teacher, stage, tmp_path)
            trainer.train()
            assert all(loss["loss"] > 0 for loss in trainer.state.log_history[:2])
        assert any(not torch.equal(value, start[key]) for key, value in made.student.state_dict().items())
        assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())

    def test_shares_of_the_steps_add_up_to_all(self, name, teacher):
        made = BASELINES[name].prepare(teacher, BUDGET, [batch(teacher)])
        assert sum(stage.share for stage in made.stages) == pytest.approx(1)
        assert sum(made.steps(101)) == 101

    def test_every_value_of_its_search_space_is_allowed(self, name, teacher):
        baseline = BASELINES[name]
        for field, values in baseline.search.items():
            tried = values.values if isinstance(values, Choice) else (values.low, values.high)
            for value in tried:
                changed = dataclasses.replace(baseline, **{field: value})
                assert getattr(changed, field) == value
        assert "learning_rate" in baseline.search


def test_steps_are_shared_out_with_at_least_one_for_each_stage(teacher):
    stages = tuple(PlannedStage(plan=makd.Plan(), share=share) for share in (0.01, 0.98, 0.01))
    made = PreparedStudent(student=teacher, stages=stages)
    assert made.steps(10) == (1, 8, 1)
    with pytest.raises(makd.MakdError, match="3 stages need as many steps"):
        made.steps(2)


def test_pkd_watches_the_first_token_of_every_layer_but_the_last(teacher):
    made = BASELINES["pkd"].prepare(teacher, BUDGET)
    patient = next(term for term in made.stages[0].plan.terms if term.aspect == "hidden")
    assert (patient.layers, patient.tokens, patient.distance) == ([0], "first", "cosine")


def test_minilm_v2_compares_the_last_layer_with_a_chosen_one(teacher):
    method = dataclasses.replace(BASELINES["minilm_v2"], teacher_layer=-2, relation_heads=8)
    made = method.prepare(teacher, BUDGET)
    active = activate(made.stages[0].plan, resolve(made.student), resolve(teacher))
    assert {(item.tap.layer, item.teacher.layer, item.heads) for item in active.comparisons} == {(3, 2, 8)}
    assert made.student.config.hidden_size % 8 == 0


def test_a_teacher_without_a_head_is_refused(teacher):
    with pytest.raises(makd.MakdError, match="no head"):
        BASELINES["distilbert"].prepare(teacher.bert, BUDGET)


def test_an_aspect_can_be_left_out_of_makds_preset(teacher):
    made = dataclasses.replace(BASELINES["makd"], without="matrix").prepare(teacher, BUDGET, [batch(teacher)])
    assert {term.aspect for term in made.stages[0].plan.terms} == {"hidden", "attention", "logits", "task"}
    with pytest.raises(UnknownNameError, match="matrix, hidden, attention, logits, embedding, task"):
        dataclasses.replace(BASELINES["makd"], without="metrics").prepare(teacher, BUDGET, [batch(teacher)])


def test_layers_are_those_of_the_terms_that_makds_preset_has_at_some(teacher):
    made = dataclasses.replace(BASELINES["makd"], layers="last").prepare(teacher, BUDGET, [batch(teacher)])
    layers = {term.aspect: term.layers for term in made.stages[0].plan.terms}
    assert layers == {"matrix": "last", "attention": "last", "hidden": "all", "logits": "all", "task": "all"}


def test_layers_that_a_preset_does_not_choose_or_nobody_knows_are_refused_before_there_is_a_teacher():
    with pytest.raises(makd.MakdError, match="balanced and fast; got 'last' with full"):
        dataclasses.replace(BASELINES["makd"], preset="full", layers="last")
    with pytest.raises(UnknownNameError, match="Known: all, last, last:N, every:N"):
        dataclasses.replace(BASELINES["makd"], layers="sometimes")


@pytest.mark.parametrize("preset", ["gkd", "seq_kd", "minillm", "distillm", "balanced"])
def test_a_preset_of_makds_is_taught_with_whose_text_it_is_of(preset):
    teacher = tiny("llama", head="causal_lm")
    made = BASELINES["makd"]
    (stage,) = dataclasses.replace(made, preset=preset, start="svd").prepare(teacher, BUDGET, [batch(teacher)]).stages
    assert stage.plan.writers == makd.Plan(preset=preset).writers


@pytest.mark.parametrize(("name", "preset"), [("layer_weight", "logits"), ("task_weight", "gkd")])
def test_a_weight_of_what_a_preset_has_not_is_refused(name, preset):
    with pytest.raises(SettingError, match=f"{name} is 2.0, and the preset {preset} has no"):
        dataclasses.replace(BASELINES["makd"], preset=preset, **{name: 2.0})
