"""Low-rank students that several methods begin from: made once, and the same as if each had made its own."""

import makd
from makd.baselines import BASELINES
from makd.baselines.starts import low_rank_start
from tests.distill.test_trainer import same_weights
from tests.models import batch, tiny

BUDGET = makd.Budget(keep_linears=0.5)


def test_a_second_method_begins_from_a_copy_of_the_first_ones_start():
    teacher = tiny("llama", head="causal_lm")
    calibration = [batch(teacher)]
    first = low_rank_start(teacher, BUDGET, "whitened", "auto", calibration)
    second = low_rank_start(teacher, BUDGET, "whitened", "auto", calibration)
    assert first.saved == 0 < second.saved
    assert first.student is not second.student
    assert same_weights(first.student, second.student)


def test_what_the_first_method_learned_is_not_in_the_seconds_start():
    teacher = tiny("llama", head="causal_lm")
    calibration = [batch(teacher)]
    first = low_rank_start(teacher, BUDGET, "whitened", "auto", calibration).student
    expected = low_rank_start(teacher, BUDGET, "whitened", "auto", calibration).student
    next(iter(first.parameters())).data += 1
    assert same_weights(low_rank_start(teacher, BUDGET, "whitened", "auto", calibration).student, expected)


def test_another_solver_budget_text_or_teacher_is_another_start():
    teacher = tiny("llama", head="causal_lm")
    calibration = [batch(teacher)]
    low_rank_start(teacher, BUDGET, "whitened", "auto", calibration)
    for budget, solver, text in (
        (BUDGET, "svd", calibration),
        (makd.Budget(keep_linears=0.4), "svd", calibration),
        (makd.Budget(keep_linears=0.4), "svd", [batch(teacher)]),
    ):
        assert low_rank_start(teacher, budget, solver, "auto", text).saved == 0
    teacher.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(2)
    again = low_rank_start(teacher, makd.Budget(keep_linears=0.4), "svd", "auto", calibration)
    assert again.saved == 0


def test_seconds_of_a_method_that_begins_from_anothers_start_are_those_of_its_own():
    teacher = tiny("llama", head="causal_lm")
    calibration = [batch(teacher)]
    assert BASELINES["makd"].prepare(teacher, BUDGET, calibration).saved == 0
    assert BASELINES["low_rank_objective"].prepare(teacher, BUDGET, calibration).saved > 0
