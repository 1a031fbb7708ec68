"""What a factorization is said to make and to hold: against the student that is then made, and against arithmetic."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import makd
from makd.anatomy import resolve
from makd.errors import BudgetError
from makd.factorization.assemble import linear_sizes
from makd.factorization.settings import FactorizeConfig
from makd.forecasting.learning import Lessons
from makd.forecasting.operations import TextShape, forward
from makd.forecasting.shapes import shape_of
from makd.forecasting.student import forecast_factorization
from tests.models import TINY, tiny

HALF = makd.Budget(keep_linears=0.5)
TEXT = TextShape(((4, 12), (4, 10)))


def llama(layers=2, hidden=32):
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=2 * hidden, max_position_embeddings=64,
            )
        )  # fmt: skip


def told(model, budget=HALF, text=TEXT, **settings):
    more = {name: settings.pop(name) for name in ("from_files", "store", "beside", "teach") if name in settings}
    return forecast_factorization(model, resolve(model), budget, FactorizeConfig(**settings), text, **more)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_has_a_forecast(family):
    found = told(tiny(family))
    assert found.memory.total > 0
    assert found.student_linears <= 0.5 * found.teacher_linears
    assert found.operations.products > 0


@pytest.mark.parametrize(
    "settings",
    [{"share_input": "never"}, {"share_input": "always"}, {"share_input": "never", "rank_multiple": 1}],
    ids=str,
)
def test_ranks_that_need_no_text_are_those_of_the_student(settings):
    teacher = tiny("llama")
    found = told(teacher, solver="svd", ranks="uniform", **settings)
    student = makd.factorize(teacher, HALF, solver="svd", ranks="uniform", **settings)
    assert found.are_ranks_known
    assert {name: rank for name, rank in found.ranks.items() if rank} == dict(student.factorization.ranks)
    assert found.student_parameters == sum(parameter.numel() for parameter in student.parameters())


def test_ranks_that_follow_from_spectra_are_said_not_to_be_known():
    found = told(llama())
    assert not found.are_ranks_known
    assert any("uniform" in note for note in found.notes)


def test_a_factored_vocabulary_has_a_rank_too():
    found = told(llama(), makd.Budget(keep=0.3))
    assert "model.embed_tokens" in found.ranks
    assert found.student_parameters <= 0.3 * found.teacher_parameters


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        (HALF, {}),
        (HALF, {"share_input": "always"}),
        (makd.Budget(keep=0.3), {"vocabulary": "factored", "depth": 2}),
        (makd.Budget(keep=0.6), {"depth": 1}),
    ],
    ids=["linears", "a shared A", "vocabulary", "depth"],
)
def test_parameters_of_the_linears_are_those_that_the_student_s_have(budget, settings):
    teacher = tiny("llama")
    settings = {"solver": "svd", "ranks": "uniform", "share_input": "never", **settings}
    text = [{"input_ids": torch.arange(20).reshape(2, 10)}]
    student = makd.factorize(teacher, budget, calibration=text, **settings)
    linears = [student.get_submodule(name) for name in resolve(student).linears]
    counted = {id(one): one.numel() for linear in linears for part in (linear, getattr(linear, "reduce", linear))
               for one in part.parameters()}  # fmt: skip
    assert told(teacher, budget, **settings).student_linears == sum(counted.values())


def test_a_budget_that_no_student_meets_is_refused_as_by_the_run():
    with pytest.raises(BudgetError, match="below the smallest"):
        told(llama(), makd.Budget(params=10))


def test_the_store_holds_the_states_of_every_layer_and_the_moments_of_the_gradients():
    found = told(llama(layers=3))
    states = 3 * 88 * 32 * 4  # layers, tokens, hidden, bytes
    outs = (32, 16, 16, 32, 64, 64, 32)
    assert found.store_bytes == states + 3 * sum(out * (out + 1) // 2 * 4 for out in outs)


def test_without_some_layers_the_store_holds_the_states_of_the_teacher_with_all_besides():
    whole, without = (told(llama(layers=3), makd.Budget(keep_linears=0.3), depth=depth) for depth in ("all", 2))
    assert without.store_bytes - whole.store_bytes == 3 * 88 * 32 * 4  # layers, tokens, hidden, bytes


TEACH = makd.LayerTeacher(makd.Plan(), makd.LayerwiseConfig(steps=3))


@pytest.mark.parametrize("solver", ["svd", "whitened", "two_sided_regression"])
def test_layers_that_are_taught_have_the_states_of_every_layer_of_the_teacher_with_all(solver):
    def states(**settings):
        found = told(llama(layers=3), makd.Budget(keep_linears=0.3), solver=solver, teach=TEACH, **settings)
        return found.store_bytes

    fitted = solver == "two_sided_regression"
    all_layers = states(depth="all")
    assert all_layers >= 3 * 88 * 32 * 4
    assert (all_layers > 3 * 88 * 32 * 4) == fitted  # whose moments of gradients are kept too
    assert states(depth=2) - all_layers == 3 * 88 * 32 * 4


def test_what_stays_of_the_layers_is_taught_by_a_second_walk_through_all():
    model = llama(layers=3)
    found = told(model, makd.Budget(keep_linears=0.3), depth=2, solver="svd", teach=TEACH)
    anatomy, expected = resolve(model), 0.0
    for layer in shape_of(model, anatomy, linear_sizes(model, anatomy)).layers:
        once, ranks = forward(layer, TEXT).products, {size: found.ranks.get(size.name) for size in layer.linears}
        expected += once
        if all(size.name in found.ranks for size in ranks):
            kept = sum(size.weights(rank) for size, rank in ranks.items()) / sum(size.dense for size in ranks)
            expected += (1 + kept) * once + Lessons.of(TEACH, anatomy, TEXT).work(layer, TEXT, kept).products
    assert found.operations.products == pytest.approx(expected)


def test_layers_that_are_not_taught_have_neither_lessons_nor_a_second_walk():
    dropping = {"budget": makd.Budget(keep_linears=0.3), "depth": 2, "solver": "whitened"}
    without, taught = told(llama(layers=3), **dropping), told(llama(layers=3), **dropping, teach=TEACH)
    assert [phase.when for phase in taught.phases if phase not in without.phases][-1] == "lessons"
    assert without.operations.products == pytest.approx(
        2 / 3 * told(llama(layers=3), solver="whitened").operations.products
    )


def test_whitened_holds_the_states_of_two_layers_whatever_their_number():
    assert told(llama(layers=6), solver="whitened").store_bytes == 2 * 88 * 32 * 4


def test_a_store_on_disk_is_not_in_memory():
    memory, disk = (told(llama(layers=8), store=store) for store in ("memory", "disk"))
    assert memory.phases[0].total - disk.phases[0].total == memory.store_bytes
    assert disk.disk - memory.disk == memory.store_bytes


def test_memory_beside_weights_and_store_does_not_grow_with_the_layers():
    few, many = (told(llama(layers=layers), store="disk").phases for layers in (2, 8))
    assert [phase.total - phase.weights for phase in few] == [phase.total - phase.weights for phase in many]


def test_time_grows_as_the_layers():
    two, four, six = (told(llama(layers=layers)).operations.products for layers in (2, 4, 6))
    assert six - four == pytest.approx(four - two, rel=0.01)


def test_from_files_one_layer_is_in_memory_at_a_time():
    few, many = (told(llama(layers=layers), solver="svd", from_files=True, text=TextShape()) for layers in (2, 20))
    assert few.memory.total == many.memory.total
    layers = (told(llama(layers=layers), solver="whitened", from_files=True).memory.weights for layers in (2, 20))
    assert len(set(layers)) == 1


def test_layers_that_cannot_be_run_one_by_one_hold_the_moments_of_all():
    found = told(tiny("t5"))
    assert any("one by one" in note for note in found.notes)
    assert found.store_bytes == 0
    one = 8 * (32**2 + 32**2 + 64**2)  # the least that a layer's inputs have: q, o and down
    assert max(phase.moments for phase in found.phases) > 4 * one


def test_factors_wait_on_disk_up_to_break_even_where_ranks_follow_from_spectra():
    known = told(llama(), solver="whitened", ranks="uniform", from_files=True)
    unknown = told(llama(), solver="whitened", ranks="global", from_files=True)
    assert known.work_bytes < unknown.work_bytes < 4 * known.teacher_linears
