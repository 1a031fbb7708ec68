"""Students of another depth or width than their teacher: layer maps, and projections that stay outside the student."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import makd
from makd.anatomy import resolve
from makd.aspects import activate, cosine_distance, normalised_mse, relation_kl, spread_layers
from makd.distill.losses.projections import PROJECTIONS
from tests.distill.test_trainer import make_arguments, make_rows, same_weights
from tests.models import batch, tiny

PLAN = makd.Plan(
    terms=(
        makd.Term(aspect="hidden"),
        makd.Term(aspect="matrix", roles=("q",), layers="last"),
        makd.Term(aspect="attention"),
        makd.Term(aspect="relation", layers="last", relation_heads=2),
    )
)


def make_teacher(**settings):
    return tiny("bert", num_hidden_layers=4, **settings)


def make_student(**settings):
    return tiny("bert", **({"seed": 1, "hidden_size": 16} | settings))


def make_trainer(folder, student=None, teacher=None, plan=PLAN, callbacks=None, **settings):
    return makd.DistillTrainer(
        make_student() if student is None else student,
        make_teacher() if teacher is None else teacher,
        plan,
        args=make_arguments(folder, **settings),
        train_dataset=make_rows(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(4, 4, [0, 1, 2, 3]), (2, 4, [1, 3]), (3, 12, [3, 7, 11]), (4, 6, [1, 2, 4, 5]), (1, 6, [5])],
)
def test_layers_are_spread_so_that_the_last_mimics_the_last(student, teacher, expected):
    assert spread_layers(student, teacher) == expected


def test_a_plan_takes_the_layer_map_that_it_is_given():
    plan = makd.Plan(terms=(makd.Term(aspect="hidden", teacher_layers=[0, -1]),))
    active = activate(plan, resolve(make_student()), resolve(make_teacher()))
    assert [(item.tap.layer, item.teacher.layer) for item in active.comparisons] == [(0, 0), (1, 3)]


@pytest.mark.parametrize(("layers", "hint"), [([0], "2 here"), ([0, 4], "Layer 4 does not exist")])
def test_a_layer_map_that_does_not_fit_is_refused(layers, hint):
    plan = makd.Plan(terms=(makd.Term(aspect="hidden", teacher_layers=layers),))
    with pytest.raises(makd.MakdError, match=hint):
        activate(plan, resolve(make_student()), resolve(make_teacher()))


def test_losses_are_those_of_the_mapped_layers_in_the_teachers_width(tmp_path):
    terms = (
        makd.Term(aspect="hidden"),
        makd.Term(aspect="hidden", distance="cosine", tokens="first", layers="last"),
        makd.Term(aspect="relation", roles=("v",), layers="last", relation_heads=4),
    )
    trainer = make_trainer(tmp_path, plan=makd.Plan(terms=terms))
    inputs = batch(trainer.model)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (
            model(**inputs, output_hidden_states=True).hidden_states[1:] for model in (trainer.model, trainer.teacher)
        )
        wide = [trainer.projections.maps["hidden"](states) for states in ours]
        hidden = (normalised_mse(wide[0], theirs[1], mask) + normalised_mse(wide[1], theirs[3], mask)) / 2
        first = torch.zeros_like(mask)
        first[:, 0] = True
        cosine = cosine_distance(wide[1], theirs[3], first)
        values = [
            model.encoder.layer[-1].attention.self.value(states)
            for model, states in ((trainer.model, ours[0]), (trainer.teacher, theirs[2]))
        ]
        relation = relation_kl(*values, mask, 4)
        loss = trainer.compute_loss(trainer.model.eval(), inputs)
    torch.testing.assert_close(loss, hidden + cosine + relation, rtol=1e-5, atol=1e-6)


def test_heads_of_another_width_keep_their_own_scale(tmp_path):
    plan = makd.Plan(terms=(makd.Term(aspect="attention", layers="last"),))
    trainer = make_trainer(tmp_path, plan=plan)
    inputs = batch(trainer.model)
    mask = inputs["attention_mask"].bool()
    maps = []
    for model in (trainer.model, trainer.teacher):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps.append(model(**inputs, output_attentions=True).attentions[-1])
        model.set_attn_implementation("sdpa")
    ours, theirs = maps
    kl = torch.where(theirs > 0, theirs * (theirs / ours.clamp_min(1e-30)).log(), 0).sum(-1).transpose(1, 2)[mask]
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), kl.mean(), rtol=1e-4, atol=1e-6)


def test_projections_learn_and_stay_out_of_the_student(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    before = {name: value.clone() for name, value in trainer.projections.state_dict().items()}
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in trainer.projections.state_dict().items())
    checkpoint = tmp_path / "checkpoint-4"
    kept = {name for name in load_file(checkpoint / "model.safetensors") if name.startswith(PROJECTIONS)}
    assert kept == {f"{PROJECTIONS}.maps.hidden.weight", f"{PROJECTIONS}.maps.q.weight"}
    assert trainer.model.state_dict().keys() == make_student().state_dict().keys()


def test_an_interrupted_run_resumes_with_its_projections(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    make_trainer(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    resumed = make_trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.projections, resumed.projections)


def test_models_of_one_size_need_no_projections(tmp_path):
    trainer = make_trainer(tmp_path, make_student(hidden_size=32))
    assert trainer.projections is None


@pytest.mark.parametrize(
    ("student", "term", "hint"),
    [
        ({"num_attention_heads": 2}, {"aspect": "attention"}, "2 heads and the teacher 4"),
        ({}, {"aspect": "relation", "relation_heads": 3}, "3 relation_heads do not divide .* such as 2"),
        ({}, {"aspect": "embedding"}, "similarity"),
    ],
)
def test_sizes_that_an_aspect_cannot_bridge_are_refused(student, term, hint, tmp_path):
    with pytest.raises(makd.MakdError, match=hint):
        make_trainer(tmp_path, make_student(**student), plan=makd.Plan(terms=(makd.Term(**term),)))


def test_the_task_alone_is_learnt_without_asking_the_teacher(tmp_path):
    teacher = tiny("bert", head="sequence_classification")
    student = tiny("bert", head="sequence_classification", seed=1)
    trainer = make_trainer(tmp_path, student, teacher, makd.Plan(terms=(makd.Term(aspect="task"),)))
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    inputs = batch(student) | {"labels": torch.tensor([0, 1, 1, 0])}
    torch.testing.assert_close(trainer.compute_loss(student.eval(), dict(inputs)), student(**inputs).loss)
    with pytest.raises(makd.MakdError, match="no labels"):
        trainer.compute_loss(student, batch(student))
