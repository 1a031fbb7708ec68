"""What `makd bench` measures, and which pairs and settings it refuses."""

import time

import pytest
import torch

import makd
from makd.evaluation import speed as measuring
from makd.evaluation.clock import take_turns
from makd.evaluation.decoding import time_decoding
from makd.evaluation.pairing import check_own_teacher
from makd.evaluation.speed import measure_speed
from makd.run_folder.speed import fold_line
from makd.student.folding import factored_linears
from tests.models import tiny

QUICK = makd.BenchConfig(batches=(1, 2), lengths=(8,), repeats=2)

QUICK_WITHOUT_GENERATION = makd.BenchConfig(batches=(1,), lengths=(4,), new_tokens=0, repeats=1)


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
    slower = {name for row in found.linears if row.factored.ratio >= 1.02 for name in row.linears}
    assert set(found.fold) in (slower, set())  # none, where the whole forward is no faster
    sizes = {size.name: size for size in found.models}
    assert sizes["best"].parameters - sizes["factored"].parameters == found.added_parameters
    assert sizes["best"].factored == len(factored_linears(student)) - len(found.fold)
    assert sizes["folded"].parameters == sizes["teacher"].parameters
    assert sizes["folded"].factored == sizes["teacher"].factored == 0


@pytest.fixture(scope="module")
def sharing():
    """A student whose queries, keys and values share one A in each layer, and its teacher."""
    teacher = tiny("bert")
    text = [{"input_ids": torch.arange(20).reshape(2, 10)}]
    budget = makd.Budget(keep_linears=0.5)
    return makd.factorize(teacher, budget, calibration=text, solver="svd", share_input="always"), teacher


def test_linears_that_share_one_a_are_timed_as_one_thing(sharing):
    student, teacher = sharing
    products = []
    leader = student.encoder.layer[0].attention.self.query
    hook = leader.reduce.register_forward_hook(lambda *_: products.append(leader))
    found = measure_speed(student, teacher, makd.BenchConfig(batches=(1,), lengths=(8,), repeats=2))
    hook.remove()
    row = next(row for row in found.linears if row.linears[0].endswith("layer.0.attention.self.query"))
    assert [name.rsplit(".", 1)[-1] for name in row.linears[:3]] == ["query", "key", "value"]
    assert (row.members, row.out_features, row.in_features) == (3, 96, 32)
    calls = 3 + 4 * 2  # warm-up and turns, in each of which A x is computed once
    forwards = 3 + 2
    assert calls <= len(products) <= calls + 3 * forwards


@pytest.mark.parametrize("folds_from", [0.0, float("inf")], ids=["all slower", "none slower"])
def test_linears_that_share_one_a_are_folded_together_or_not_at_all(sharing, monkeypatch, folds_from):
    monkeypatch.setattr(measuring, "FOLD_FROM", folds_from)
    found = measure_speed(*sharing, makd.BenchConfig(batches=(1,), lengths=(8,), repeats=1))
    assert len(found.fold) == (len(factored_linears(sharing[0])) if folds_from == 0 else 0)
    sizes = {size.name: size.parameters for size in found.models}
    assert sizes["best"] == sizes["factored"] + found.added_parameters


def test_best_is_the_student_where_the_whole_forward_is_no_faster_with_slow_linears_dense(pair):
    student, teacher = pair
    slow, inside = factored_linears(student)[0], []

    def enter(model, _inputs):
        inside.append(model)
        if not isinstance(model.get_submodule(slow), makd.LowRankLinear):
            time.sleep(0.005)  # what the others lose by a dense one

    hooks = [
        student.register_forward_pre_hook(enter),
        student.register_forward_hook(lambda *_: inside.clear()),
        student.get_submodule(slow).register_forward_hook(lambda *_: None if inside else time.sleep(0.002)),
    ]
    found = measure_speed(student, teacher, makd.BenchConfig(batches=(1,), lengths=(8,), repeats=3))
    for hook in hooks:
        hook.remove()
    assert slow in {name for row in found.linears if row.fold for name in row.linears}
    assert (found.fold, found.added_parameters) == ((), 0)
    assert "the whole forward is no faster: best is the student as it is" in fold_line(found, (1, 8))


@pytest.mark.parametrize(("name", "head"), [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("gpt2", "base")])
def test_decoders_and_two_stacks_are_timed_too(name, head):
    teacher = tiny(name, head=head)
    found = measure_speed(make_student(teacher), teacher, makd.BenchConfig(batches=(1,), lengths=(4,), repeats=1))
    assert len(found.forwards) == 4
    assert len(found.decoding) == (4 if head == "causal_lm" else 0)


def test_generation_is_timed_at_every_batch_and_length_in_tokens_a_second():
    teacher = tiny("llama", head="causal_lm")
    settings = makd.BenchConfig(batches=(1, 2), lengths=(4,), new_tokens=3, repeats=1)
    found = measure_speed(make_student(teacher), teacher, settings)
    assert [(row.model, row.batch) for row in found.decoding] == [
        (name, rows) for rows in (1, 2) for name in ("teacher", "factored", "folded", "best")
    ]
    for row in found.decoding:
        assert row.read_per_second == pytest.approx(row.batch * 4 / (row.prompt.milliseconds / 1000))
        assert row.written_per_second == pytest.approx(row.batch * 3 / (row.writing.milliseconds / 1000))
    assert all(row.prompt.ratio == row.writing.ratio == 1 for row in found.decoding if row.model == "teacher")
    assert not measure_speed(make_student(teacher), teacher, QUICK_WITHOUT_GENERATION).decoding


def test_new_tokens_are_read_one_at_a_time_after_what_is_kept_of_the_prompt():
    model = tiny("llama", head="causal_lm")
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(
            (
                named["input_ids"].shape[1],
                kept.get_seq_length() if (kept := named.get("cache", named.get("past_key_values"))) else 0,
            )
        ),
        with_kwargs=True,
    )
    time_decoding({"teacher": model}, [(2, 5)], 3, 1, lambda *_: None)
    assert seen[:1] == [(5, 0)]
    assert seen[-3:] == [(1, 5), (1, 6), (1, 7)]


def test_a_model_that_keeps_nothing_is_told():
    model = tiny("llama", head="causal_lm")
    model.register_forward_hook(lambda _module, _args, output: setattr(output, "cache", None))
    with pytest.raises(makd.MakdError, match="keeps no keys and values"):
        time_decoding({"teacher": model}, [(1, 4)], 2, 1, lambda *_: None)


def test_new_tokens_beyond_the_positions_name_the_limit():
    teacher = tiny("llama", head="causal_lm")
    with pytest.raises(makd.MakdError, match=r"50 tokens and 32 new ones after them are beyond.*which has 64"):
        measure_speed(make_student(teacher), teacher, makd.BenchConfig(lengths=(50,)))


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
        ({"new_tokens": -1}, "new_tokens is at least 0; got -1"),
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
        check_own_teacher(pair[0], tiny("bert", **changes))


def test_a_teacher_under_another_head_is_refused(pair):
    with pytest.raises(makd.MakdError, match="the student has no head"):
        check_own_teacher(pair[0], tiny("bert", head="masked_lm"))


def test_dense_students_and_factored_teachers_are_refused(pair):
    student, teacher = pair
    with pytest.raises(makd.MakdError, match="no factored linears"):
        check_own_teacher(teacher, teacher)
    with pytest.raises(makd.MakdError, match="teacher has factored linears"):
        check_own_teacher(student, student)
