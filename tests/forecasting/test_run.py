"""`makd.forecast`, `--dry_run`, and runs that are refused before their work begins."""

import gc
import json
from dataclasses import replace

import pytest
import torch

import makd
from makd import pipeline
from makd.config import CalibrationConfig
from makd.errors import BudgetError, DataError, OutputError, RoomError, SettingError
from makd.factorization.room import Available, Room
from makd.forecasting import run as forecasting
from makd.forecasting.learning import LEARNING_BYTES
from makd.run_folder import OutputFolder
from tests.models import tiny

HALF = makd.Budget(keep_linears=0.5)
QUICK = [
    "--data.path", "pydoc", "--data.rows", "40", "--data.max_length", "16", "--recipe.calibration.rows", "16",
    "--recipe.evaluation.rows", "8",
    "--recipe.evaluation.latency", "false", "--recipe.training.steps", "3", "--recipe.training.batch_size", "4",
    "--recipe.device", "cpu",
]  # fmt: skip
DATA = makd.DataConfig(path="pydoc", rows=40, max_length=16)
RECIPE = makd.Recipe(
    calibration=CalibrationConfig(rows=16), training=makd.TrainingConfig(steps=3, batch_size=4), device="cpu"
)

BY_FOUR = replace(RECIPE, calibration=CalibrationConfig(rows=16, batch_size=4))


@pytest.fixture
def no_room(monkeypatch):
    """A machine with next to no memory."""
    plenty = Room("the disk", 2**40, 2**40)
    little = Available(Room("this machine", 1000, 1000), plenty)
    monkeypatch.setattr(forecasting, "find_available", lambda *_: little)


def words(command, teacher, output, *more):
    return [command, "--teacher", teacher, "--budget.keep_linears", "0.5", "--output", output, *QUICK, *more]


def test_a_forecast_loads_no_weights_and_writes_nothing(encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasting, "load_model", lambda *_: pytest.fail("the teacher was loaded"))
    found = makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path / "student")
    assert not any(tmp_path.iterdir())
    assert found.training.steps == 3
    assert set(found.seconds) == {"factorize", "distill"}
    assert min(found.seconds.values()) > 0
    found.check()


def test_sizes_and_text_are_those_of_the_run(encoder_folder, tmp_path):
    told = makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path / "student", command="factorize")
    made = pipeline.factorize_only(str(encoder_folder), DATA, HALF, RECIPE, tmp_path / "student")
    assert told.student.teacher_parameters == made.metrics["params"]["total"]["teacher"]
    assert told.student.student_parameters >= made.metrics["params"]["total"]["student"]
    assert told.student.text.tokens >= made.metrics["tokens"]["calibration"]
    assert told.training is None


def test_a_model_in_hand_has_the_forecast_of_its_name(encoder_folder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    named = makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    held = makd.forecast(AutoModel.from_pretrained(encoder_folder), DATA, HALF, RECIPE, tmp_path, tokenizer=tokenizer)
    assert held.student.phases == named.student.phases
    assert held.student.operations == named.student.operations


def test_what_the_run_would_refuse_is_refused(encoder_folder, tmp_path):
    with pytest.raises(BudgetError, match="below the smallest"):
        makd.forecast(str(encoder_folder), DATA, makd.Budget(params=1), RECIPE, tmp_path)
    with pytest.raises(SettingError, match="command is compress or factorize; got 'distill'"):
        makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path, command="distill")
    with pytest.raises(SettingError, match="stream is for command factorize"):
        makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path, stream=True)
    taught = replace(RECIPE, layerwise=makd.LayerwiseConfig(steps=3))
    with pytest.raises(DataError, match="Teaching a layer takes at least 2 calibration batches"):
        makd.forecast(str(encoder_folder), DATA, HALF, taught, tmp_path)


@pytest.mark.parametrize(
    ("command", "more", "lines"),
    [
        ("compress", [], ["training: 3 steps", "time, distill", "solver two_sided_regression"]),
        ("factorize", [], ["solver two_sided_regression", "ranks follow from what calibration finds"]),
        ("factorize", ["--stream"], ["solver two_sided_regression, ranks global"]),
        ("factorize", ["--stream", "--recipe.factorize.solver", "svd"], ["solver svd, ranks uniform", "its ranks"]),
    ],
    ids=["compress", "factorize", "stream", "svd"],
)
def test_a_dry_run_prints_a_table_and_does_nothing(run, decoder_folder, tmp_path, command, more, lines):
    code, out, err = run(*words(command, decoder_folder, tmp_path / "student", "--dry_run", *more))
    assert code == 0, err
    text = " ".join(out.replace("┃", " ").replace("│", " ").split())
    for line in ("parameters", "of the linears", "memory, to factorize", "disk", "32 x 64", *lines):
        assert line in text, line
    assert not any(tmp_path.iterdir())


def test_a_stream_that_teaches_its_layers_reads_text_whatever_its_solver(encoder_folder, tmp_path):
    solved = replace(RECIPE, factorize=makd.FactorizeConfig(solver="svd"))
    taught = replace(solved, layerwise=makd.LayerwiseConfig(steps=3), calibration=BY_FOUR.calibration)

    def told(recipe, data=DATA):
        named = str(encoder_folder), data, HALF, recipe, tmp_path
        return makd.forecast(*named, command="factorize", stream=True).student

    missing = makd.DataConfig(path=str(tmp_path / "nowhere.txt"))
    assert "lessons" not in {phase.when for phase in told(solved, missing).phases}
    with pytest.raises(DataError, match="nowhere"):
        told(taught, missing)
    found = told(taught)
    assert found.phases[-1].when == "lessons"
    assert found.text.tokens > 0


@pytest.mark.parametrize(
    ("command", "more"),
    [("compress", []), ("factorize", []), ("factorize", ["--stream"])],
    ids=["compress", "factorize", "stream"],
)
def test_a_run_that_cannot_fit_says_so_before_it_begins(run, decoder_folder, tmp_path, no_room, command, more):
    code, out, err = run(*words(command, decoder_folder, tmp_path / "student", *more))
    assert code == 2
    assert "of memory in its phase" in err
    assert "this machine has 0.0 MB" in err
    assert not any(tmp_path.iterdir())
    code, out, again = run(*words(command, decoder_folder, tmp_path / "student", "--dry_run", *more))
    assert code == 2
    assert "what it takes, about" in out
    assert "of memory in its phase" in again


def test_weights_alone_that_do_not_fit_are_not_loaded(encoder_folder, tmp_path, no_room, monkeypatch):
    from makd import run as stages

    monkeypatch.setattr(stages, "model_of", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(RoomError, match="phase 'weights'"):
        pipeline.factorize_only(str(encoder_folder), DATA, HALF, RECIPE, tmp_path / "student")


def test_a_training_that_does_not_fit_is_refused_though_a_factorization_does(encoder_folder, tmp_path, monkeypatch):
    training = makd.TrainingConfig(steps=3, batch_size=32)
    recipe = makd.Recipe(calibration=CalibrationConfig(rows=4, batch_size=2), training=training, device="cpu")
    told = makd.forecast(str(encoder_folder), DATA, HALF, recipe, tmp_path / "student")
    enough = Room("this machine", told.student.memory.total, None)
    assert told.training.memory.least > enough.size
    monkeypatch.setattr(forecasting, "find_available", lambda *_: Available(enough, Room("the disk", 2**40)))
    pipeline.factorize_only(str(encoder_folder), DATA, HALF, recipe, tmp_path / "start")
    with pytest.raises(RoomError, match="phase 'training'"):
        pipeline.compress(str(encoder_folder), DATA, HALF, recipe, tmp_path / "student")


def test_ranks_stand_by_role_from_the_smallest_to_the_largest(encoder_folder, tmp_path):
    found = makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path)
    row = next(line for line in str(found).splitlines() if line.startswith("│ down"))
    ranks = sorted(rank for name, rank in found.student.ranks.items() if name.endswith("layer.0.output.dense"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:3] == ["down", "32 x 64", "2"]
    assert str(ranks[0]) in cells[3]


def test_of_routed_experts_time_and_memory_are_said_to_be_more(tokenizer, tmp_path):
    teacher = tiny("mixtral", "causal_lm", vocab_size=300)
    lines = str(makd.forecast(teacher, DATA, HALF, RECIPE, tmp_path, tokenizer=tokenizer)).splitlines()
    for stage in ("memory, to factorize", "time, factorize"):
        (row,) = [line for line in lines if stage in line]
        assert row.strip("│").split("│")[1].strip().startswith("over "), row
    assert any("routed experts are not counted" in line for line in lines)


def test_what_is_counted_whole_is_not_said_to_be_more(encoder_folder, tmp_path):
    found = makd.forecast(str(encoder_folder), DATA, HALF, RECIPE, tmp_path)
    assert not found.student.is_least
    assert "over " not in str(found)


def test_who_keeps_checkpoints_has_the_states_of_the_start_on_disk_too(encoder_folder):
    def store(command, **training):
        recipe = replace(RECIPE, training=makd.TrainingConfig(steps=2, batch_size=4, **training))
        return makd.forecast(str(encoder_folder), DATA, HALF, recipe, command=command).student.store

    assert store("compress") == "memory"
    assert store("compress", save_every=1) == "disk"
    assert store("factorize", save_every=1) == "memory"


def test_what_a_run_that_was_stopped_has_on_disk_is_no_more_asked_for(encoder_folder, tmp_path, monkeypatch):
    asked = []

    def find(device, folder, held=0, kept=0):
        asked.append(kept)
        return Available(Room("this machine", 2**40), Room("the disk", 2**40))

    monkeypatch.setattr(forecasting, "find_available", find)
    work = tmp_path / ".student.makd" / "factorization"
    with OutputFolder(tmp_path / "student", kinds=["factorization"]):
        work.mkdir()
        (work / "work.json").write_bytes(bytes(1000))
    recipe = replace(RECIPE, factorize=makd.FactorizeConfig(store="disk"))
    with pytest.raises(OutputError, match="is damaged"):
        pipeline.factorize_only(str(encoder_folder), DATA, HALF, recipe, tmp_path / "student")
    assert asked[-1] == 1000


def test_lessons_of_layers_take_time_and_memory_and_are_said_to_end_sooner(encoder_folder, tmp_path):
    def told(**settings):
        recipe = replace(BY_FOUR, layerwise=makd.LayerwiseConfig(**settings), plan=makd.Plan(preset="full"))
        found = makd.forecast(str(encoder_folder), DATA, HALF, recipe, tmp_path).student
        return found, " ".join(found.notes)

    (none, without), (some, said), (many, _) = told(), told(steps=3), told(steps=30)
    assert none.operations.products < some.operations.products < many.operations.products
    assert [phase.when for phase in some.phases] == [*(phase.when for phase in none.phases), "lessons"]
    assert "may end sooner" in said
    assert "lessons" not in without


def test_the_time_to_write_completions_is_said_not_to_be_counted(decoder_folder, encoder_folder, tmp_path):
    def notes(teacher, recipe, data=DATA):
        return " ".join(makd.forecast(str(teacher), data, HALF, recipe, tmp_path).student.notes)

    written, asked = replace(RECIPE, plan=makd.Plan(preset="gkd")), tmp_path / "asked.jsonl"
    asked.write_text(
        '{"prompt": "What is a list?", "response": "A row of things."}\n{"prompt": "?", "response": "Yes."}\n'
    )
    chats = makd.DataConfig(path=str(asked), template="none", max_length=32)
    assert "time to write completions is not counted" in notes(decoder_folder, written, chats)
    assert "not counted" not in notes(encoder_folder, RECIPE)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "from a cache"])
def test_while_a_student_learns_both_models_are_in_memory_as_is_said(encoder_folder, tmp_path, cached):
    recipe = replace(RECIPE, evaluation=makd.EvaluationConfig(rows=8, latency=False, samples=0))
    if cached:
        makd.build_cache(str(encoder_folder), DATA, recipe, tmp_path / "cache")
        recipe = replace(recipe, cache=str(tmp_path / "cache"))
    told = makd.forecast(str(encoder_folder), DATA, HALF, recipe, tmp_path / "student").training.memory

    def there():
        gc.collect()
        return {id(one): one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)}

    before, seen = there(), []

    def look(progress):
        if progress.what == "distil" and progress.done and not seen:
            seen.append(sum(one.nbytes for one in there().values() if id(one) not in before))

    report = pipeline.compress(str(encoder_folder), DATA, HALF, recipe, tmp_path / "student", on_progress=look)
    parameters = report.metrics["params"]["total"]
    assert seen == [4 * (parameters["teacher"] + parameters["student"])]
    assert told.weights == pytest.approx(seen[0] + LEARNING_BYTES * parameters["student"], rel=0.01)


def test_memory_of_a_training_is_that_of_the_completions_that_may_be_written(decoder_folder, tmp_path):
    """Rows of 9 tokens, and up to 50 that the student may write after their prompts of 6."""
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "a a a a a", "response": "a a"}) + "\n"
    file.write_text(row * 40)
    data = makd.DataConfig(path=str(file), template="none", max_length=16)

    def told(preset, most):
        completions = None if preset == "kd" else makd.Completions(student_share=0.5, max_new_tokens=most)
        plan = makd.Plan(preset=preset, completions=completions)
        recipe = replace(RECIPE, plan=plan, training=makd.TrainingConfig(steps=1, batch_size=4))
        training = makd.forecast(str(decoder_folder), data, HALF, recipe, tmp_path / "student").training
        return training.memory.activations

    one = told("kd", 0)
    assert told("gkd", 2) == one
    assert told("gkd", 50) == pytest.approx(56 / 9 * one, rel=1e-3)
