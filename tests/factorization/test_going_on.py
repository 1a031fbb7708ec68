"""A factorization in memory that was stopped goes on where it was, and gives the same student, bit for bit."""

import json

import pytest
import torch

import makd
from makd.calibration.store import DiskStore
from makd.distill import LayerTeacher, LayerwiseConfig
from makd.errors import OutputError
from makd.factorization.factorize import make_student
from makd.factorization.settings import FactorizeConfig
from makd.factorization.work import Work
from tests.models import batch, tiny

HALF = makd.Budget(keep_linears=0.5)
TEACHER = LayerTeacher(
    makd.Plan(terms=(makd.Term(aspect="hidden"),)), LayerwiseConfig(steps=3, held_out_every=2, evaluate_every=2), seed=1
)
CASES = {
    "bert": ("bert", "base", HALF, {}, None),
    "taught": ("bert", "base", HALF, {}, TEACHER),
    "one A": ("llama", "causal_lm", HALF, {"share_input": "always"}, None),
    "whitened": ("llama", "causal_lm", HALF, {"solver": "whitened"}, None),
    "svd": ("bert", "base", HALF, {"solver": "svd"}, None),
    "taught after another solver": ("bert", "base", HALF, {"solver": "two_sided"}, TEACHER),
    "experts": ("mixtral", "causal_lm", HALF, {}, None),
    "vocabulary": ("llama", "causal_lm", makd.Budget(keep=0.5), {"vocabulary": "factored"}, None),
    "fewer layers": ("bert", "base", makd.Budget(keep_linears=0.3), {"depth": 1}, None),
    "fewer layers, taught": ("bert", "base", makd.Budget(keep_linears=0.3), {"depth": 1}, TEACHER),
    "not layer by layer": ("t5", "base", HALF, {}, None),
}
"""Teacher, head, budget, settings, and who teaches layers on the way."""


def make(case, work):
    name, head, budget, settings, teach = CASES[case]
    model = tiny(name, head)
    batches = [batch(model, seed=seed) for seed in range(4)]
    chosen = FactorizeConfig(store="disk", **settings)
    student, student.factorization = make_student(model, budget, chosen, batches, teach, work=work)
    return student


def tensors(student):
    return {**dict(student.named_parameters()), **dict(student.named_buffers())}


def assert_same(found, expected):
    one, two = tensors(found), tensors(expected)
    assert one.keys() == two.keys()
    assert {name: (tensor.dtype, tensor.requires_grad) for name, tensor in one.items()} == {
        name: (tensor.dtype, tensor.requires_grad) for name, tensor in two.items()
    }
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert found.factorization.ranks == expected.factorization.ranks
    assert found.factorization.errors == expected.factorization.errors
    assert dict(found.factorization.lessons) == dict(expected.factorization.lessons)


@pytest.fixture
def writes(monkeypatch):
    """What is written to stores that last; `writes.stop_at` is the number of the write that is an interrupt instead."""
    write = DiskStore.write

    class Writes(list):
        stop_at = None

    written = Writes()

    def noted(self, entry, *arguments, **named):
        if self.lasting:
            if written.stop_at == len(written):
                raise KeyboardInterrupt
            written.append(entry)
        write(self, entry, *arguments, **named)

    monkeypatch.setattr(DiskStore, "write", noted)
    return written


@pytest.mark.parametrize("case", CASES)
def test_however_often_it_is_stopped_the_student_is_the_same_bit_for_bit(case, tmp_path, writes):
    expected = make(case, None)
    work, stops, found = Work(tmp_path), 0, None
    while found is None:
        writes.clear()
        writes.stop_at = 9 + 12 * stops  # what enters the first layer is written each time
        try:
            found = make(case, work)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2
    assert_same(found, expected)


def test_no_layer_is_made_again(tmp_path, writes):
    make("taught", Work(tmp_path / "whole"))
    last = writes.index("learned/0001")
    writes.clear()
    writes.stop_at = last
    with pytest.raises(KeyboardInterrupt):
        make("taught", Work(tmp_path / "cut"))
    writes.clear()
    writes.stop_at = None
    make("taught", Work(tmp_path / "cut"))
    assert {entry for entry in writes if not entry.startswith(("teacher/0000", "done/teacher/0000"))} == {
        *(f"student/0002/0000{index}" for index in range(4)), "learned/0001", "made/0001", "done/student/0002",
    }  # fmt: skip


def test_a_finished_student_is_put_together_again_without_the_states_of_the_text(tmp_path, writes):
    expected = make("taught", Work(tmp_path))
    writes.clear()
    assert not list(tmp_path.rglob("gradients/0000/*"))
    assert not list(tmp_path.rglob("student/0002/*"))
    assert_same(make("taught", Work(tmp_path)), expected)
    assert {entry.partition("/")[2].partition("/")[0] for entry in writes} <= {"0000", "teacher"}


def test_the_work_of_something_else_is_refused_and_thrown_away_where_that_is_asked_for(tmp_path):
    make("bert", Work(tmp_path, lambda: {"budget": 0.5, "text": "a"}))
    with pytest.raises(OutputError, match="its text is a, this one's is b"):
        make("bert", Work(tmp_path, lambda: {"budget": 0.5, "text": "b"}))
    make("bert", Work(tmp_path, lambda: {"budget": 0.5, "text": "b"}, anew=True))
    with pytest.raises(OutputError, match="its text is b, this one's is a"):
        make("bert", Work(tmp_path, lambda: {"budget": 0.5, "text": "a"}))


def test_only_a_run_that_goes_on_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    make("whitened", Work(tmp_path))
    assert "is gone on with" not in caplog.text
    make("whitened", Work(tmp_path))
    assert caplog.text.count("is gone on with") == 1


def test_work_that_other_versions_began_is_gone_on_with_and_they_are_named(tmp_path, caplog):
    make("whitened", Work(tmp_path))
    note = tmp_path / "work.json"
    known = json.loads(note.read_text())
    note.write_text(json.dumps({**known, "versions": {**known["versions"], "torch": "1.0"}}))
    caplog.clear()
    make("whitened", Work(tmp_path, anew=True))
    assert "The factorization was begun with other versions (torch was 1.0, is " in caplog.text


def test_what_is_no_work_of_makds_is_left_alone_also_where_work_may_be_thrown_away(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="something else"):
        make("bert", Work(tmp_path, anew=True))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_nothing_is_made_where_states_are_in_memory(tmp_path):
    model = tiny("bert")
    batches = [batch(model)]
    for store in ("memory", "auto"):
        make_student(model, HALF, FactorizeConfig(store=store), batches, work=Work(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


class TestSearchForADepth:
    """Two layers in the middle do next to nothing, and the budget is too small for all: fewer and fewer are tried."""

    def make(self, work=None, **settings):
        teacher = tiny("bert", num_hidden_layers=4)
        for index in (1, 2):
            layer = teacher.encoder.layer[index]
            for linear in (layer.attention.output.dense, layer.output.dense):
                for parameter in linear.parameters():
                    parameter.data *= 0.01
        batches = [batch(teacher, seed=seed) for seed in range(3)]
        chosen = FactorizeConfig(vocabulary="dense", store="disk" if work else "memory", **settings)
        student, student.factorization = make_student(teacher, makd.Budget(keep=0.3), chosen, batches, work=work)
        return student

    @pytest.mark.parametrize("solver", ["two_sided", "auto"])
    def test_students_of_several_depths_do_not_take_each_others_work(self, solver, tmp_path):
        expected = self.make(solver=solver)
        assert len(expected.factorization.trials) > 1, "only one depth was tried"
        found = self.make(Work(tmp_path), solver=solver)
        assert found.factorization.trials == expected.factorization.trials
        assert_same(found, expected)

    def test_a_search_that_is_stopped_goes_on_to_the_same_student(self, tmp_path, writes):
        expected, stops, found = self.make(), 0, None
        while found is None:
            writes.clear()
            writes.stop_at = 40 + 60 * stops
            try:
                found = self.make(Work(tmp_path))
            except KeyboardInterrupt:
                stops += 1
        assert stops >= 2
        assert_same(found, expected)
