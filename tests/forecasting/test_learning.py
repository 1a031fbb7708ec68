"""What teaching a layer is said to take, beside what it then takes."""

import pytest
import torch

import makd
from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.factorization.settings import FactorizeConfig
from makd.forecasting.learning import Lessons
from makd.forecasting.operations import TextShape
from makd.forecasting.shapes import shape_of
from makd.forecasting.student import forecast_factorization
from tests.forecasting.measured import counted, peak_bytes
from tests.models import tiny

HALF = makd.Budget(keep_linears=0.5)
PLANS = {"inside": makd.Plan(preset="full"), "outputs": makd.Plan(terms=(makd.Term(aspect="hidden"),))}
BATCHES = [{"input_ids": torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(n))} for n in range(4)]
TEXT = TextShape(((4, 16),) * 4)


def teacher_and_student():
    """A teacher whose products torch sees, and a student of it."""
    teacher = tiny("llama")
    teacher.set_attn_implementation("eager")
    return teacher, makd.factorize(teacher, HALF, solver="svd", ranks="uniform")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("settings", [{"steps": 6, "evaluate_every": 4}, {"steps": 2, "batch_tokens": 128}], ids=str)
def test_lessons_have_about_the_products_that_torch_counts(plan, settings):
    teacher, student = teacher_and_student()
    lessons = makd.LayerwiseConfig(patience=None, **settings)

    def taught(settings):
        return counted(lambda: makd.teach_layers_(student, teacher, PLANS[plan], BATCHES, settings))

    taken = taught(lessons) - taught(makd.LayerwiseConfig(steps=0))
    anatomy = resolve(teacher)
    layers = shape_of(teacher, anatomy, linear_sizes(teacher, anatomy)).layers
    kept = sum(parameter.numel() for parameter in student.layers[0].parameters())
    kept /= sum(parameter.numel() for parameter in teacher.layers[0].parameters())
    found = Lessons.of(makd.LayerTeacher(PLANS[plan], lessons), anatomy, TEXT)
    assert sum(found.work(layer, TEXT, kept).products for layer in layers) == pytest.approx(taken, rel=0.2)


def test_of_a_plan_that_compares_outputs_alone_the_teachers_layer_is_not_run_again():
    anatomy = resolve(tiny("llama"))
    runs = {name: Lessons.of(makd.LayerTeacher(plan, makd.LayerwiseConfig(steps=1)), anatomy, TEXT).runs_teacher
            for name, plan in PLANS.items()}  # fmt: skip
    assert runs == {"inside": True, "outputs": False}


def test_lessons_hold_about_what_teaching_then_holds():
    teacher, student = teacher_and_student()
    settings = makd.LayerwiseConfig(steps=2)
    teach = makd.LayerTeacher(PLANS["inside"], settings)
    chosen = FactorizeConfig(solver="svd", ranks="uniform")
    found = forecast_factorization(teacher, resolve(teacher), HALF, chosen, TEXT, teach=teach)
    lessons = found.phases[-1]
    assert lessons.when == "lessons"
    models = sum(one.nbytes for model in (teacher, student) for one in model.parameters())
    taken = peak_bytes(lambda: makd.teach_layers_(student, teacher, teach.plan, BATCHES, settings, store="memory"))
    assert taken / 1.5 < lessons.total - models < 1.5 * taken
