"""What `makd bench` measures, and which pairs and settings it refuses."""

import pytest
import torch

import makd
from makd.evaluation.clock import take_turns
from makd.evaluation.pairing import check_pair
from makd.evaluation.speed import measure_speed
from makd.student.folding import factored_linears
from tests.models import tiny

QUICK = makd.BenchConfig(batches=(1, 2), lengths=(8,), repeats=2)


def make_student(teacher, keep=0.5):
    return makd.factorize(teacher, makd.Budget(keep_linears=keep), solver="svd")


@pytest.fixture(scope="module")
def pair():
    teacher = tiny("bert")
    return make_student(teacher), teacher


def test_every_model_is_timed_at_every_batch_and_length(pair):
    student, teacher = pair
    before = makd.fingerprint(student)
    found = measure_speed(student, teacher, makd.BenchConfig(batches=(1, 2), lengths=(4, 8), repeats=2))
    assert {(row.model, row.batch, row.length) for row in found.forwards} == {
        (name, rows, length)
        for name in ("teacher", "factored", "folded", "best")
        for rows in (1, 2)
        for length in (4, 8)
    }
    assert all(row.timing.milliseconds >= row.timing.fastest > 0 for row in found.forwards)
    assert all(row.timing.ratio == 1 for row in found.forwards if row.model == "teacher")
    assert makd.fingerprint(student) == before


def test_every_factored_linear_is_timed_and_best_folds_those_that_are_slower(pair):
    student, teacher = pair
    found = measure_speed(student, teacher, QUICK)
    assert sorted(name for row in found.linears for name in row.linears) == sorted(factored_linears(student))
    assert set(found.fold) == {name for row in found.linears if row.factored.ratio >= 1.02 for name in row.linears}
    sizes = {size.name: size for size in found.models}
    assert sizes["best"].parameters - sizes["factored"].parameters == found.added_parameters
    assert sizes["best"].factored == len(factored_linears(student)) - len(found.fold)
    assert sizes["folded"].parameters == sizes["teacher"].parameters
    assert sizes["folded"].factored == sizes["teacher"].factored == 0


@pytest.mark.parametrize(("name", "head"), [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("gpt2", "base")])
def test_decoders_and_two_stacks_are_timed_too(name, head):
    teacher = tiny(name, head=head)
    found = measure_speed(make_student(teacher), teacher, makd.BenchConfig(batches=(1,), lengths=(4,), repeats=1))
    assert len(found.forwards) == 4


def test_compiled_forwards_are_timed_beside_eager_ones(pair, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    student, teacher = pair
    found = measure_speed(student, teacher, makd.BenchConfig(batches=(1,), lengths=(4,), repeats=1, compile=True))
    compiled = [row for row in found.forwards if row.compiled]
    assert [row.model for row in compiled] == ["teacher", "factored", "folded", "best"]
    assert all(row.compile_seconds > 0 for row in compiled)
    assert all(row.compile_seconds is None for row in found.forwards if not row.compiled)


@pytest.mark.slow
def test_torch_really_compiles_a_student(pair):
    student, teacher = pair
    found = measure_speed(student, teacher, makd.BenchConfig(batches=(1,), lengths=(4,), repeats=1, compile=True))
    assert len(found.forwards) == 8


def test_without_a_compiler_the_text_says_so(pair, monkeypatch):
    def fail(*_arguments, **_named):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(makd.MakdError, match=r"No working C\+\+ compiler.*leave out --compile"):
        measure_speed(*pair, makd.BenchConfig(batches=(1,), lengths=(4,), compile=True))


def test_threads_are_as_before_afterwards(pair):
    before = torch.get_num_threads()
    measure_speed(*pair, makd.BenchConfig(batches=(1,), lengths=(4,), repeats=1, threads=before + 1))
    assert torch.get_num_threads() == before


def test_turns_go_round_and_back_and_ratios_are_to_the_first():
    calls = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"), 1)
    assert calls == ["a", "b", "b", "a", "b", "a", "a", "b"]
    assert found["a"].ratio == 1


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"batches": (0,)}, "batches is one or more whole numbers, each at least 1; got \\[0\\]"),
        ({"lengths": ()}, "lengths is one or more"),
        ({"point": (1, 0)}, "point is a batch and a length"),
        ({"repeats": 0}, "repeats is at least 1"),
        ({"threads": 0}, "threads is at least 1"),
    ],
)
def test_settings_that_are_not_allowed(settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        makd.BenchConfig(**settings)


@pytest.mark.parametrize("settings", [{"lengths": (65,)}, {"lengths": (8,), "point": (1, 65)}])
def test_a_length_beyond_the_positions_names_the_limit(pair, settings):
    with pytest.raises(makd.MakdError, match="65 tokens is beyond the positions of BertModel, which has 64"):
        measure_speed(*pair, makd.BenchConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_hidden_layers": 3}, "it has 2 layers and the teacher 3"),
        ({"intermediate_size": 48}, "'up' in layer 0, the student has 64 x 32 and the teacher has 48 x 32"),
    ],
)
def test_the_student_of_another_teacher_is_refused(pair, changes, hint):
    with pytest.raises(makd.MakdError, match=hint):
        check_pair(pair[0], tiny("bert", **changes))


def test_a_teacher_under_a_head_still_is_the_teacher(pair):
    check_pair(pair[0], tiny("bert", head="masked_lm"))


def test_dense_students_and_factored_teachers_are_refused(pair):
    student, teacher = pair
    with pytest.raises(makd.MakdError, match="no factored linears"):
        check_pair(teacher, teacher)
    with pytest.raises(makd.MakdError, match="teacher has factored linears"):
        check_pair(student, student)
