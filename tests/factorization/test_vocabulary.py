"""Embeddings and LM head as factors."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

import makd
from makd.calibration.counted import CountedBatches
from makd.factorization.vocabulary import (
    UNSEEN_IN_BANDS,
    decompose_table,
    decompose_tables,
    find_tables,
    table_factors,
    table_sizes,
    token_frequencies,
)
from makd.ranks.allocation import allocate
from makd.solvers import SOLVERS
from makd.student.embedding import LowRankEmbedding
from makd.student.linear import LowRankLinear
from tests.models import CONFIGS, TINY, batch, numbers_in, tiny

HEADS = ("base", "masked_lm", "causal_lm", "sequence_classification")
CASES = [
    *(("bert", head) for head in HEADS),
    *((name, head) for name in ("gpt2", "opt", "llama", "gpt_neox", "qwen2") for head in ("base", "causal_lm")),
    *((name, "masked_lm") for name in ("roberta", "distilbert", "electra", "deberta_v2", "modernbert", "albert")),
]
DENSE = {"gemma2": "does more than look rows up", "gemma3": "does more than look rows up",
         "t5": "encoder and decoder", "t5_gated": "encoder and decoder", "bart": "encoder and decoder"}  # fmt: skip
"""Families whose embeddings stay as they are -> why."""


def make_student(name="bert", head="base", keep=0.35, solver="svd", depth="all", **settings):
    teacher = tiny(name, head, **settings)
    calibration = None if solver == "svd" else [batch(teacher)]
    budget = makd.Budget(keep=keep)
    return makd.factorize(
        teacher, budget, solver=solver, calibration=calibration, vocabulary="factored", depth=depth, rank_multiple=1
    )


class TestDecomposition:
    def test_the_predicted_error_is_the_measured_one_and_no_smaller_rank_is_better(self):
        torch.manual_seed(0)
        table, rows = torch.randn(40, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
        frequencies, metric = torch.rand(40, dtype=torch.float64), rows.T @ rows / 50
        frequencies /= frequencies.sum()
        decomposition = decompose_table(table, frequencies, metric)
        for rank in range(1, 7):
            factors = table_factors(decomposition, rank)
            error = table - factors.expand @ factors.reduce
            measured = torch.einsum("v,vi,ij,vj->", frequencies, error, metric, error)
            assert measured.item() == pytest.approx(decomposition.squared_error(rank), abs=1e-9)

    def test_it_is_the_truncated_svd_of_the_weighted_table(self):
        torch.manual_seed(0)
        table, frequencies = torch.randn(30, 5, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
        lower = torch.linalg.cholesky(torch.eye(5, dtype=torch.float64) + 0.3)
        decomposition = decompose_table(table, frequencies, lower @ lower.T)
        expected = torch.linalg.svdvals(frequencies.sqrt()[:, None] * table @ lower)
        torch.testing.assert_close(decomposition.singular_values, expected)

    def test_both_factors_have_numbers_of_one_size(self):
        table = torch.randn(30, 5)
        decomposition = decompose_table(table, torch.full((30,), 1 / 30), 1e-6 * torch.eye(5))
        factors = table_factors(decomposition, 3)
        torch.testing.assert_close(factors.expand.square().mean(0), factors.reduce.square().mean(1))


def test_tokens_that_calibration_never_saw_keep_half_of_the_weight():
    inputs = {"input_ids": torch.tensor([[1, 1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    found = token_frequencies([inputs], 4)
    torch.testing.assert_close(found, torch.tensor([1 / 8, 1 / 8 + 1 / 3, 1 / 8 + 1 / 6, 1 / 8], dtype=torch.float64))


@pytest.mark.parametrize(("name", "head"), CASES)
class TestEveryHead:
    def test_reloads_bit_for_bit_and_is_stored_once(self, name, head, tmp_path):
        student = make_student(name, head)
        assert isinstance(student.get_input_embeddings(), LowRankEmbedding)
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path)
        assert makd.fingerprint(again) == makd.fingerprint(student)
        stored = numbers_in(tmp_path)
        assert stored == sum(parameter.numel() for parameter in again.parameters())
        assert stored == sum(parameter.numel() for parameter in student.parameters())

    def test_a_tied_head_shares_both_factors_before_and_after(self, name, head, tmp_path):
        student = make_student(name, head)
        tied = tiny(name, head)
        output = tied.get_output_embeddings()
        if output is None or output.weight is not tied.get_input_embeddings().weight:
            return
        student.save_pretrained(tmp_path)
        for model in (student, type(student).from_pretrained(tmp_path)):
            model.tie_weights()
            embeddings, head_linear = model.get_input_embeddings(), model.get_output_embeddings()
            assert isinstance(head_linear, LowRankLinear)
            assert head_linear.expand.weight is embeddings.table.weight
            assert head_linear.reduce.weight is embeddings.directions.weight


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_factored_or_left_dense_with_a_reason(name):
    teacher = TINY[name]()
    tables, left = find_tables(teacher, makd.resolve(teacher))
    assert bool(tables) is (name not in DENSE)
    assert all(DENSE.get(name, "?") in reason for reason in left.values())
    if name in DENSE:
        with pytest.raises(makd.MakdError, match=rf"vocabulary is factored, but .*{DENSE[name]}"):
            makd.factorize(teacher, makd.Budget(keep=0.5), solver="svd", vocabulary="factored")


def test_a_head_that_is_never_called_leaves_the_vocabulary_dense_with_a_reason():
    teacher = tiny("mobilebert", "masked_lm")
    calibration = [batch(teacher)]
    student = makd.factorize(teacher, makd.Budget(keep=0.8), calibration=calibration)
    assert type(student.get_input_embeddings()) is torch.nn.Embedding
    with pytest.raises(makd.MakdError, match="never called as a linear"):
        makd.factorize(teacher, makd.Budget(keep=0.8), calibration=calibration, vocabulary="factored")


def test_all_of_the_budget_gives_back_the_teacher_and_full_rank_is_lossless():
    student = make_student(keep=1.0)
    assert makd.fingerprint(student) == makd.fingerprint(tiny("bert"))
    table = tiny("bert").get_input_embeddings().weight.detach()
    factors = table_factors(decompose_table(table, torch.full((64,), 1 / 64), torch.eye(32)), 32)
    torch.testing.assert_close(factors.expand @ factors.reduce, table, atol=1e-6, rtol=1e-5)


def test_a_student_saved_without_a_head_ties_a_new_one_to_its_factors(tmp_path):
    make_student("bert", tie_word_embeddings=True).save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().expand.weight is again.get_input_embeddings().table.weight


def test_a_student_saved_under_a_head_loads_without(tmp_path):
    student = make_student("bert", "masked_lm")
    student.save_pretrained(tmp_path)
    base, inputs = AutoModel.from_pretrained(tmp_path), batch(student)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], student.bert(**inputs)[0])


def test_weights_without_the_table_raise_instead_of_being_filled_at_random(tmp_path):
    from safetensors.torch import save_file

    make_student("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(key for key in tensors if key.endswith("table.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(makd.MakdError, match="The weight files hold"):
        AutoModel.from_pretrained(tmp_path)


def test_factored_embeddings_refuse_to_be_resized():
    with pytest.raises(TypeError, match="not an instance of"):
        make_student("bert").resize_token_embeddings(70)


def test_a_rank_that_is_no_rank_is_refused():
    with pytest.raises(ValueError, match=r"rank is in 1\.\.8"):
        LowRankEmbedding(20, 8, 9)


@pytest.mark.parametrize("solver", ["whitened", "two_sided", "regression", "two_sided_regression"])
def test_every_solver_factors_the_vocabulary(solver):
    teacher = tiny("gpt2", "causal_lm")
    student = makd.factorize(
        teacher, makd.Budget(keep=0.35), solver=solver, ranks="uniform", calibration=[batch(teacher)],
        vocabulary="factored", depth="all",
    )  # fmt: skip
    report = student.factorization
    assert report.vocabulary.keys() == {"transformer.wte"}
    assert 0 < report.errors["transformer.wte"] < 1
    assert not report.vocabulary.keys() & report.ranks.keys()


def test_linears_that_get_what_a_factored_vocabulary_gives_up_are_told_of(caplog):
    teacher = tiny("llama", "causal_lm")
    makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", vocabulary="factored")
    assert "so that they keep more than 0.5. Give keep or params" in caplog.text
    caplog.clear()
    makd.factorize(teacher, makd.Budget(keep=0.5), solver="svd", vocabulary="factored")
    assert "keep more than" not in caplog.text


class TestBands:
    """Embeddings that no head shares, in bands of tokens by frequency."""

    def in_bands(self, rows=640, dim=8):
        torch.manual_seed(0)
        teacher = tiny("bert", vocab_size=rows, hidden_size=dim, num_attention_heads=2)
        (table,), _ = find_tables(teacher, makd.resolve(teacher), by_frequency=True)
        return teacher, table

    def test_they_are_a_64th_a_16th_and_a_4th_of_the_tokens_and_the_rest(self):
        _, table = self.in_bands()
        assert table.bands == (10, 30, 120, 480)
        assert table.parts == tuple(f"{table.module}[{ends}]" for ends in ("0:10", "10:40", "40:160", "160:640"))

    def test_a_vocabulary_that_is_too_small_for_them_is_one_matrix(self):
        _, table = self.in_bands(rows=500)
        assert table.bands == ()
        assert table.parts == (table.module,)

    def test_embeddings_that_a_head_shares_are_one_matrix(self):
        teacher = tiny("bert", "masked_lm", vocab_size=640)
        (table,), _ = find_tables(teacher, makd.resolve(teacher), by_frequency=True)
        assert table.bands == ()

    def test_each_is_decomposed_by_itself_with_the_frequencies_of_its_tokens(self):
        teacher, table = self.in_bands()
        ids = torch.multinomial(1 / torch.arange(1, 641.0), 400, replacement=True, generator=torch.Generator())
        text = [{"input_ids": ids.view(8, 50), "attention_mask": torch.ones(8, 50)}]
        found = decompose_tables(teacher, [table], SOLVERS["whitened"], {}, {}, text)
        frequencies = token_frequencies(text, 640, UNSEEN_IN_BANDS)
        weight = teacher.get_input_embeddings().weight.detach().double()
        order = sorted(range(640), key=lambda token: (-float(frequencies[token]), token))
        begin = 0
        for name, rows in zip(table.parts, table.bands, strict=True):
            tokens = order[begin : begin + rows]
            begin += rows
            expected = torch.linalg.svdvals(frequencies[tokens].sqrt()[:, None] * weight[tokens])
            torch.testing.assert_close(found.parts[name].singular_values, expected)

    @pytest.mark.parametrize("ranks", [{"solver": "svd"}, {"ranks": "uniform"}])
    def test_without_text_or_errors_to_go_by_all_tokens_have_one_rank(self, ranks):
        teacher, _ = self.in_bands()
        student = makd.factorize(
            teacher, makd.Budget(keep=0.4), vocabulary="factored", depth="all", calibration=[batch(teacher)], **ranks
        )
        assert isinstance(student.get_input_embeddings(), LowRankEmbedding)

    def test_where_some_tokens_are_frequent_they_lose_less_than_one_rank_does(self):
        teacher, table = self.in_bands(rows=2048, dim=32)
        ids = torch.multinomial(1 / torch.arange(1, 2049.0), 2000, replacement=True, generator=torch.Generator())
        text = [{"input_ids": ids.view(40, 50), "attention_mask": torch.ones(40, 50)}]
        bands = decompose_tables(teacher, [table], SOLVERS["whitened"], {}, {}, text)
        weight = teacher.get_input_embeddings().weight.detach()
        one = decompose_table(weight, token_frequencies(text, 2048, UNSEEN_IN_BANDS), torch.eye(32))
        allowance = 8 * (2048 + 32)
        spectra = {name: part.singular_values for name, part in bands.parts.items()}
        ranks = allocate(table_sizes(teacher, table), allowance - 2048, "global", spectra).ranks
        lost = sum(0 if rank is None else bands.parts[name].squared_error(rank) for name, rank in ranks.items())
        assert lost < 0.95 * one.squared_error(8)  # weights at random: no structure helps bands


def test_frequencies_are_those_of_all_the_text_where_the_batches_know_it():
    inputs = {"input_ids": torch.tensor([[1, 1]]), "attention_mask": torch.tensor([[1, 1]])}
    batches = CountedBatches([inputs], lambda: torch.tensor([0, 2, 6]))
    expected = torch.tensor([1 / 8, 1 / 8 + 1 / 8, 1 / 8 + 3 / 8, 1 / 8], dtype=torch.float64)
    torch.testing.assert_close(token_frequencies(batches, 4), expected)


def test_a_student_knows_the_frequencies_of_all_the_text():
    teacher = tiny("bert", vocab_size=640)
    counts = torch.zeros(640, dtype=torch.long)
    counts[600:610] = 50
    batches = CountedBatches([batch(teacher)], lambda: counts)
    student = makd.factorize(teacher, makd.Budget(keep=0.3), vocabulary="factored", depth="all", calibration=batches)
    first = student.get_input_embeddings().order.argsort()[:10]
    assert sorted(first.tolist()) == list(range(600, 610))
