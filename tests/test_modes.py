"""Models in hand: a call leaves them in the modes that they had, so that a training goes on with its dropout."""

import pytest

import makd
from makd import pipeline
from makd.errors import MakdError
from makd.export import ExportConfig
from makd.exporting import export
from tests.models import tiny
from tests.test_random_state import BUDGET, RECIPE, TEXTS, build_cache, compress, evaluate


@pytest.fixture
def models():
    """A teacher and a student as one trains them: a part is kept in eval mode."""
    teacher = tiny("bert", vocab_size=300, max_position_embeddings=128)
    student = makd.factorize(teacher, BUDGET, solver="svd")
    for model in (teacher, student):
        model.train()
        model.embeddings.eval()
    return teacher, student


def distill(teacher, student, tokenizer, folder):
    pipeline.distill(student, teacher, TEXTS, RECIPE, folder / "student", tokenizer=tokenizer)


def export_dense(teacher, student, tokenizer, folder):
    export(student, ExportConfig(to="dense"), folder / "dense")


def fail(teacher, student, tokenizer, folder):
    with pytest.raises(MakdError, match="is the teacher"):
        pipeline.distill(teacher, teacher, TEXTS, RECIPE, folder / "student", tokenizer=tokenizer)


@pytest.mark.parametrize("call", [compress, distill, evaluate, build_cache, export_dense, fail])
def test_are_after_a_call_what_they_were(call, models, tokenizer, tmp_path):
    before = [part.training for model in models for part in model.modules()]
    call(*models, tokenizer, tmp_path)
    assert [part.training for model in models for part in model.modules()] == before
