"""Which text a run takes when nobody says so: that of the model's own recipe, and no other."""

import json

import pytest

import makd
from makd import pipeline
from makd.errors import DataError
from tests.cli.test_main import QUICK
from tests.models import tiny

ASKS = ("a student learns from text of the kind that it will read", "Give --data.path FILE", "--task NAME", "pydoc")
NO_TEXT = [word for word in QUICK if word not in ("--data.path", "pydoc")]


@pytest.mark.parametrize("command", ["compress", "factorize", "cache", "evaluate", "distill"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_without_data_a_model_asks_for_some_at_once(command, kind, run, request, tmp_path):
    teacher = request.getfixturevalue(f"{kind}_folder")
    words = {"evaluate": [teacher], "distill": [teacher], "cache": []}.get(command, ["--budget.keep", "0.8"])
    output = [] if command == "evaluate" else ["--output", tmp_path / "out"]
    code, _, err = run(command, *words, "--teacher", teacher, *output)
    assert code == 2
    for part in ASKS:
        assert part in err
    assert not (tmp_path / "out").exists()


def test_settings_of_data_without_a_place_are_no_data(run, encoder_folder, tmp_path):
    words = ["--teacher", encoder_folder, "--budget.keep", "0.8", "--output", tmp_path / "out"]
    code, _, err = run("compress", *words, *NO_TEXT)
    assert code == 2
    assert "No text was given" in err


def test_python_asks_in_the_same_words(encoder_folder, tmp_path):
    with pytest.raises(makd.MakdError, match="No text was given: a student learns from text"):
        makd.compress(str(encoder_folder), makd.DataConfig(), makd.Budget(keep=0.8), output=tmp_path / "out")


def test_a_teacher_that_was_taught_a_task_brings_its_rows(run, encoder_folder, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"a good list {n},1\na bad list {n},0\n" for n in range(20))
    )
    words = ["--task", "classification", "--task_data", tmp_path / "rows.csv", "--task.max_length", "16"]
    few = ["--recipe.training.steps", "1", "--recipe.device", "cpu"]
    code, _, err = run("finetune", encoder_folder, *words, *few, "--output", tmp_path / "teacher")
    assert code == 0, err
    make = ["--budget.keep_linears", "0.5", *few, "--recipe.factorize.solver", "svd"]
    code, _, err = run("compress", "--teacher", tmp_path / "teacher", *make, "--output", tmp_path / "student")
    assert code == 0, err
    taken = pipeline.data_of(str(tmp_path / "student"))
    assert isinstance(taken, makd.TaskConfig)
    assert taken.path == str(tmp_path / "rows.csv")


def test_a_run_says_which_text_it_reads(run, encoder_folder, tmp_path):
    words = ["--teacher", encoder_folder, "--budget.keep", "0.8", "--output", tmp_path / "out"]
    code, _, err = run("factorize", *words, *QUICK, "--recipe.factorize.solver", "svd")
    assert code == 0, err
    assert "text: pydoc, Python's own documentation: 40 rows to learn from, 8 held out" in err


def test_a_stream_whose_solver_looks_at_no_text_asks_for_none(run, encoder_folder, tmp_path):
    words = ["--teacher", encoder_folder, "--budget.keep_linears", "0.5", "--output", tmp_path / "out", "--stream"]
    code, _, err = run("factorize", *words, "--recipe.factorize.solver", "svd", "--recipe.device", "cpu")
    assert code == 0, err
    code, _, err = run("factorize", *words[:-3], "--output", tmp_path / "other", "--stream")
    assert code == 2
    assert "No text was given" in err


@pytest.fixture
def headed_folder(tokenizer, tmp_path):
    """An encoder with a head, which has a loss of its own where there are labels."""
    tiny("bert", "masked_lm", vocab_size=300, max_position_embeddings=130).save_pretrained(tmp_path / "headed")
    tokenizer.save_pretrained(tmp_path / "headed")
    return str(tmp_path / "headed")


TEXTS = [f"The list number {number} is a sequence of names." for number in range(20)]


def on_text(folder, plan, output, **settings):
    recipe = makd.Recipe(
        plan=plan,
        factorize=makd.FactorizeConfig(solver="svd"),
        training=makd.TrainingConfig(steps=1, batch_size=4, log_every=1),
        evaluation=makd.EvaluationConfig(latency=False),
        device="cpu",
    )
    return makd.compress(folder, TEXTS, makd.Budget(keep_linears=0.5), recipe, output, **settings)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (makd.Plan(terms=(makd.Term(aspect="logits"), makd.Term(aspect="task"))), "has a term 'task'"),
        (makd.Plan(preset="sft"), "is sft, which is 'task' alone"),
    ],
)
def test_a_plan_of_labels_is_refused_on_text_without_any_before_the_work(headed_folder, tmp_path, plan, said):
    stages = []
    with pytest.raises(DataError, match=f"The plan {said}, .* it would teach nothing"):
        on_text(headed_folder, plan, tmp_path / "out", on_progress=lambda told: stages.append(told.what))
    assert set(stages) == {"load"}


def test_a_preset_says_that_its_task_is_off_on_text_without_labels(headed_folder, tmp_path):
    made = on_text(headed_folder, makd.Plan(preset="logits"), tmp_path / "out")
    (training,) = json.loads((made.folder / "report" / "training.json").read_text())["trainings"]
    assert training["off"]["task"] == "the rows have no labels"
    assert "task" not in training["weights"]
