"""What cells would be refused for, told before the first teacher is made, with the name of the cell."""

from dataclasses import replace

import pytest

import makd
from makd.comparison import run
from makd.comparison.cells import all_cells
from makd.comparison.checks import check_cells
from makd.errors import BudgetError, DataError, SettingError
from tests.comparison.experiments import TRAINING, make
from tests.models import tiny


@pytest.fixture
def refused(data, encoder_folder, tmp_path):
    """Compare, which is to be refused before there is an output folder; gives what is told."""

    def refused(error, teacher=encoder_folder, **settings):
        experiment = make(data, teacher, tmp_path / "runs", **settings)
        with pytest.raises(error) as told:
            makd.compare(experiment)
        assert not (tmp_path / "runs").exists()
        return str(told.value)

    return refused


def row(name, **settings):
    return makd.MethodConfig(name=name, settings=settings)


@pytest.mark.parametrize("name", ["mpnet", "albert"])
def test_layers_that_no_student_can_compute_again(refused, tokenizer, tmp_path, name):
    tiny(name, vocab_size=300).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    told = refused(SettingError, tmp_path / name, training=replace(TRAINING, gradient_checkpointing=True))
    assert told.startswith("mrpc  low_rank_svd  1  keep_linears=0.6: training.gradient_checkpointing is true")


def test_a_fine_tuning_of_a_teacher_that_cannot_be_as_it_is_asked_for(refused):
    adapters = makd.FinetuneRecipe(training=replace(TRAINING, trainable="adapters"))
    assert "no factors to put them on" in refused(SettingError, finetune=adapters)


def test_adapters_on_students_without_factors(refused):
    told = refused(
        SettingError, training=replace(TRAINING, trainable="adapters"), methods=(row("low_rank_svd"), row("distilbert"))
    )
    assert told.startswith("mrpc  distilbert  1  keep_linears=0.6: training.trainable is 'adapters'")


def test_adapters_on_students_with_factors_are_none_to_refuse(data, encoder_folder, tmp_path):
    experiment = make(data, encoder_folder, tmp_path, training=replace(TRAINING, trainable="adapters"))
    check_cells(experiment, all_cells(experiment))


def test_completions_of_plain_text(decoder_folder, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"The list number {i} has {i} items in it.\n" for i in range(60)))
    gkd = makd.MethodConfig(name="gkd", method="low_rank_objective", settings={"objective": "gkd"})
    experiment = makd.Experiment(
        teacher=str(decoder_folder), methods=(row("low_rank_logits"), gkd), budgets=(makd.Budget(keep_linears=0.6),),
        language=(makd.LanguageConfig(name="lists", text=makd.DataConfig(path="text.txt", max_length=16)),),
        training=TRAINING, data=str(tmp_path), device="cpu", output=str(tmp_path / "runs"),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"^lists  gkd  1  keep_linears=0\.6: .*plain text, which has no prompts"):
        makd.compare(experiment)
    assert not (tmp_path / "runs").exists()


def test_completions_of_an_encoder(refused):
    told = refused(SettingError, methods=(row("low_rank_objective", objective="gkd"),))
    assert "causal language models alone; BertForSequenceClassification is none" in told


def test_a_budget_that_a_method_cannot_meet(refused):
    assert "keep_linears=0.001" in refused(BudgetError, budgets=(makd.Budget(keep_linears=0.001),))


def test_a_teacher_that_is_a_student_already(refused, encoder_folder, tokenizer, tmp_path):
    student = makd.factorize(makd.loading.load_model(str(encoder_folder)), makd.Budget(keep_linears=0.5), solver="svd")
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    assert "factored already" in refused(SettingError, tmp_path / "student")


def test_more_stages_than_steps_of_a_searchs_trial(refused):
    search = makd.SearchConfig(trials=2, steps=1)
    assert "2 stages need as many steps; got 1" in refused(SettingError, methods=(row("tinybert"),), search=search)


def test_a_plan_that_only_a_search_would_choose(refused, tokenizer, tmp_path):
    """MiniLMv2's space has the teacher's last layer but one."""
    tiny("bert", vocab_size=300, num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    tokenizer.save_pretrained(tmp_path / "shallow")
    settings = {"teacher": tmp_path / "shallow", "methods": (row("minilm_v2"),)}
    told = refused(SettingError, search=makd.SearchConfig(trials=2), **settings)
    assert "Layer -2 does not exist" in told


def test_cells_that_are_done_are_not_looked_at(done, monkeypatch):
    monkeypatch.setattr(run, "check_cells", None)
    assert makd.compare(done[0]) == done[1]
