"""Several texts packed into one row: both models read each of them alone, and configs stay as they are."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, DataCollatorWithFlattening, TrainingArguments

from makd.anatomy.key_cache import without_cache
from makd.distill import DistillTrainer, SupervisedTrainer
from makd.errors import SettingError
from makd.evaluation import fidelity, perplexity
from tests.models import tiny

TEXTS = [list(range(5, 15)), list(range(40, 47)), list(range(20, 32))]


def packed():
    return dict(DataCollatorWithFlattening()([{"input_ids": text} for text in TEXTS]))


def trainer(model, teacher, folder, plan="full", **kwargs):
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=1, **kwargs)
    rows = Dataset.from_dict({"input_ids": TEXTS})
    return DistillTrainer(
        model, teacher, plan, args=arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening()
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_an_identical_copy_has_no_loss_on_packed_rows(tmp_path, name):
    teacher = tiny(name, "causal_lm")
    made = trainer(copy.deepcopy(teacher), teacher, tmp_path)
    made.model.eval()
    made.compute_loss(made.model, packed())
    losses = made.evaluated.take(made.args.device)
    del losses["task"]
    assert set(losses) == {"matrix", "hidden", "attention", "logits"}
    assert max(losses.values()) < 1e-6


@pytest.mark.parametrize("cached", ["student", "teacher"])
def test_fidelity_of_an_identical_copy_is_whole_whichever_config_has_a_cache(cached):
    pair = {"student": tiny("llama", "causal_lm"), "teacher": tiny("llama", "causal_lm")}
    pair["student" if cached == "teacher" else "teacher"].config.use_cache = False
    scores = fidelity(pair["student"], pair["teacher"], [packed()])
    assert scores["prediction_kl"] == pytest.approx(0, abs=1e-6)
    assert scores["top1_agreement"] == 1


def test_perplexity_of_packed_rows_is_that_of_the_texts_alone():
    model = tiny("llama", "causal_lm")
    alone = [{"input_ids": torch.tensor([text])} for text in TEXTS]
    assert perplexity(model, [packed()]) == pytest.approx(perplexity(model, alone), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_student_is_saved_with_the_cache_setting_that_it_had(tmp_path, checkpointing):
    teacher = tiny("llama", "causal_lm")
    made = trainer(copy.deepcopy(teacher), teacher, tmp_path / "work", activation_checkpointing=checkpointing)
    made.train()
    made.model.save_pretrained(tmp_path / "student")
    assert AutoConfig.from_pretrained(tmp_path / "student").use_cache is True
    assert teacher.config.use_cache is True


def test_a_fine_tuned_model_keeps_its_cache_setting(tmp_path):
    model = tiny("llama", "sequence_classification", num_labels=2)
    SupervisedTrainer(model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert model.config.use_cache is True


def test_inside_there_is_no_cache_and_afterwards_all_is_as_before_even_after_an_error():
    model = tiny("llama", "causal_lm")
    with without_cache(model):
        assert model(**packed()).past_key_values is None
    with pytest.raises(AttributeError), without_cache(model):
        model.nothing()
    assert model(**packed()).past_key_values is not None


@pytest.mark.parametrize(("name", "head"), [("bloom", "causal_lm"), ("mpt", "causal_lm"), ("bert", "masked_lm")])
def test_models_that_read_across_texts_of_a_row_are_refused_where_there_are_several(tmp_path, name, head):
    teacher = tiny(name, head)
    made = trainer(copy.deepcopy(teacher), teacher, tmp_path)
    one = dict(DataCollatorWithFlattening()([{"input_ids": TEXTS[0]}]))
    made.compute_loss(made.model, one)
    with pytest.raises(SettingError, match=f"{type(teacher).__name__} would read each with those before it"):
        made.compute_loss(made.model, packed())


def test_a_mask_beside_positions_lets_texts_of_a_row_read_each_other_and_is_refused(tmp_path):
    teacher = tiny("llama", "causal_lm")
    made = trainer(copy.deepcopy(teacher), teacher, tmp_path)
    batch = packed()
    with pytest.raises(SettingError, match="give no attention_mask beside them"):
        made.compute_loss(made.model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})


def test_positions_of_padding_on_the_left_do_not_begin_a_text(tmp_path):
    teacher = tiny("bert", "masked_lm")
    made = trainer(copy.deepcopy(teacher), teacher, tmp_path)
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    made.compute_loss(made.model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
