"""Every way in that trusts a model's tensors tries it out first, before anything is written."""

import logging

import pytest
import torch
import transformers

import makd
from makd.errors import SettingError, UnsupportedModelError
from tests.models import tiny
from tests.test_pipeline import BUDGET, TEXTS, quick


def longformer_folder(folder, tokenizer):
    tiny("longformer", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config)


@pytest.mark.parametrize("start", ["compress", "cache", "distil"])
def test_a_model_that_reads_no_text_is_refused_before_anything_is_written(start, pictures, tokenizer, tmp_path):
    calls = {
        "compress": lambda to: makd.compress(pictures, TEXTS, BUDGET, quick(), to, tokenizer=tokenizer),
        "cache": lambda to: makd.build_cache(pictures, TEXTS, quick(), to, tokenizer=tokenizer),
        "distil": lambda to: makd.pipeline.distill(pictures, pictures, TEXTS, quick(), to, tokenizer=tokenizer),
    }
    with pytest.raises(UnsupportedModelError, match="ViTModel cannot be run on token ids"):
        calls[start](tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_what_is_off_once(run, tokenizer, tmp_path, caplog):
    teacher = tiny("roformer", vocab_size=300, max_position_embeddings=128)
    with caplog.at_level(logging.INFO, logger="makd"):
        makd.compress(teacher, TEXTS, BUDGET, quick(steps=1), tmp_path / "out", tokenizer=tokenizer)
    assert sum("aspect attention is off" in record.message for record in caplog.records) == 1


def test_a_run_on_a_model_whose_texts_are_padded_inside_needs_a_solver_without_text(tokenizer, tmp_path):
    teacher = longformer_folder(tmp_path / "teacher", tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"'two_sided' cannot be used on this model.*These can: svd"):
        makd.compress(teacher, TEXTS, BUDGET, quick(steps=1), tmp_path / "student")
    recipe = quick(steps=1, factorize=makd.FactorizeConfig(solver="svd"))
    report = makd.compress(teacher, TEXTS, BUDGET, recipe, tmp_path / "student")
    assert 0 < report.metrics["fidelity"]["after"]["cosine"] <= 1


def test_a_streamed_model_is_looked_at_batch_by_batch(tokenizer, tmp_path):
    teacher = longformer_folder(tmp_path / "teacher", tokenizer)
    recipe = quick(factorize=makd.FactorizeConfig(solver="whitened", share_input="never"))
    with pytest.raises(SettingError, match=r"enter encoder.layer.0 have the shape .* not one state for each token"):
        makd.factorize_streamed(teacher, TEXTS, BUDGET, recipe, tmp_path / "student")


def test_inspect_shows_what_a_trial_found(run, tmp_path, tokenizer):
    code, out, err = run("inspect", longformer_folder(tmp_path / "teacher", tokenizer))
    assert code == 0, err
    shown = " ".join(out.split())
    assert "aspect matrix is off: outputs of encoder.layer.0.attention.self.query (q) have the shape" in shown
    assert "solvers that look at inputs are off" in shown


def test_a_linear_that_reads_its_rows_in_another_order_is_no_source_of_statistics():
    from makd.anatomy.tokens import by_token

    real = torch.ones(2, 3, dtype=torch.bool)
    joined = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(by_token(joined, real, "x"), joined.reshape(2, 3, 4))
    for shape in ((3, 2, 4), (2, 4, 4), (5, 2, 3, 4), (7, 4)):
        with pytest.raises(UnsupportedModelError, match=r"x has the shape .* Solver 'svd'"):
            by_token(torch.zeros(shape), real, "x")
