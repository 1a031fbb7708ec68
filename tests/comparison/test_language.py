"""A comparison on text and instructions, without labels: the teacher as it is, and what is left of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import makd
from makd.cli.compare import load_experiment
from makd.comparison.cells import all_cells, cell_hash, latency_hash
from makd.comparison.same_rows import LEARNED, MEASURED
from makd.comparison.schedule import Schedule
from makd.comparison.search import searched_at
from makd.comparison.setup import place_language, prepare_setup
from makd.data import Source
from makd.errors import DataError, SettingError, UnknownNameError
from makd.loading import load_model, load_tokenizer

TRAINING = makd.TrainingConfig(steps=2, batch_size=4)


def quiet(_):
    """No bars."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two kinds of text and a set of instructions."""
    folder = tmp_path_factory.mktemp("data")
    for name, word in (("lists", "list"), ("tuples", "tuple")):
        (folder / f"{name}.txt").write_text("".join(f"The {word} number {i} has {i} items in it.\n" for i in range(60)))
    rows = [{"prompt": f"What is item {i}?", "output": [f"item {i}", "a list"]} for i in range(3)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def language(**settings):
    asked = makd.InstructionsConfig(path="asked.jsonl", seeds=(1, 2), max_prompt_tokens=40, max_answer_tokens=4)
    return makd.LanguageConfig(
        **{
            "name": "python",
            "text": makd.DataConfig(path="lists.txt", max_length=16),
            "other": makd.DataConfig(path="tuples.txt", max_length=16),
            "instructions": (asked,),
            "rows": 6,
            "batch_size": 4,
            **settings,
        }
    )


def make(data, decoder_folder, output, **settings):
    return makd.Experiment(
        **{
            "teacher": str(decoder_folder),
            "language": (language(),),
            "methods": (makd.MethodConfig(name="low_rank_logits"), makd.MethodConfig(name="makd")),
            "budgets": (makd.Budget(keep_linears=0.6),),
            "seeds": (1, 2),
            "training": TRAINING,
            "calibration": makd.CalibrationConfig(rows=8),
            "data": str(data),
            "latency": False,
            "device": "cpu",
            "output": str(output),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def done(data, decoder_folder, tmp_path_factory):
    """Two methods and two seeds, all run."""
    experiment = make(data, decoder_folder, tmp_path_factory.mktemp("runs") / "whole")
    return experiment, makd.compare(experiment)


def test_every_cell_has_perplexities_agreements_and_rouge_l_beside_the_teachers(done):
    _, lines = done
    assert len(lines) == 4
    for line in lines:
        names = {"score", "perplexity_text", "perplexity_other", "agreement_text", "agreement_other", "rouge_l_asked"}
        assert line["metrics"].keys() == line["teacher"].keys() == names
        assert line["teacher"]["score"] == line["teacher"]["agreement_text"] == 1.0
        assert 0 <= line["metrics"]["agreement_other"] <= 1
        assert line["majority"] is None
        assert line["params"]["student"]["linears"] <= 0.6 * line["params"]["teacher"]["linears"]


def test_all_seeds_are_measured_on_the_same_text(done):
    lines = [cell for cell in map(json.loads, (Path(done[0].output) / "results.jsonl").read_text().splitlines())]
    teachers = [{k: v for k, v in line["teacher"].items() if k.startswith("perplexity")} for line in lines]
    assert {line["cell"]["seed"] for line in lines} == {1, 2}
    assert all(one == teachers[0] for one in teachers)


def test_the_score_is_exp_of_the_mean_gap_of_log_perplexity(done):
    for line in done[1]:
        gaps = [
            math.log(line["metrics"][f"perplexity_{kind}"]) - math.log(line["teacher"][f"perplexity_{kind}"])
            for kind in ("text", "other")
        ]
        assert line["score"] == pytest.approx(math.exp(-sum(gaps) / 2))


def test_the_teacher_is_taken_as_it_is(done, decoder_folder):
    experiment, _ = done
    setup = prepare_setup(experiment, experiment.language[0], 1, quiet)
    assert makd.fingerprint(setup.teacher) == makd.fingerprint(load_model(str(decoder_folder)))
    assert not (Path(experiment.output) / "teachers").exists()
    assert setup.task.evaluate(setup.teacher)["score"] == pytest.approx(1.0)


def test_adapters_are_the_same_whichever_row_was_taught_before(data, decoder_folder, tmp_path):
    rows = {"full": makd.MethodConfig(name="low_rank_objective"), "lora": makd.MethodConfig(name="low_rank_lora")}
    both = make(data, decoder_folder, tmp_path / "both", seeds=(1,), methods=(rows["full"], rows["lora"]))
    alone = make(data, decoder_folder, tmp_path / "alone", seeds=(1,), methods=(rows["lora"],))
    assert makd.compare(both)[1]["fingerprint"] == makd.compare(alone)[0]["fingerprint"]


def test_a_cell_that_is_done_is_not_run_again_and_another_text_is_another_cell(done, data, decoder_folder):
    experiment, lines = done
    assert makd.compare(experiment) == lines
    cell = all_cells(experiment)[0]
    other = language(text=makd.DataConfig(path="tuples.txt", max_length=16))
    assert cell_hash(experiment, cell, {}) == lines[0]["hash"]
    assert cell_hash(experiment, replace(cell, task=other), {}) != lines[0]["hash"]
    assert cell_hash(experiment, replace(cell, seed=2), {}) != lines[0]["hash"]


def test_workers_need_not_wait_for_a_teacher_that_nobody_makes(data, decoder_folder, tmp_path):
    experiment = make(data, decoder_folder, tmp_path / "runs", seeds=(1,))
    schedule = Schedule(experiment, all_cells(experiment))
    first, second = schedule.take(None), schedule.take(None)
    assert first is not None
    assert second is not None
    assert first.setup == second.setup


def test_a_search_beside_a_measurement_on_training_rows_is_refused(data, decoder_folder, tmp_path):
    measured = (language(held_out=0.2),)
    make(data, decoder_folder, tmp_path, language=measured)
    with pytest.raises(SettingError, match=r"chosen on the rows that they are scored on. Leave out one of them"):
        make(data, decoder_folder, tmp_path, language=measured, search=makd.SearchConfig(trials=2))


def test_a_search_holds_back_training_rows_and_asks_nothing(data, decoder_folder, tmp_path):
    search = makd.SearchConfig(trials=2, held_out=0.25)
    experiment = make(data, decoder_folder, tmp_path / "runs", search=search)
    task = searched_at(experiment, all_cells(experiment)[0]).task
    assert (task.other, task.instructions, task.held_out) == (None, (), 0.25)
    whole = prepare_setup(experiment, language(other=None, instructions=()), 1, quiet)
    held = prepare_setup(experiment, task, 1, quiet)
    rows = whole.task.distillation["input_ids"]
    kept = held.task.distillation["input_ids"]
    measured = [row for batch in held.task.texts["text"] for row in batch["input_ids"].tolist()]
    assert len(kept) == len(rows) - math.ceil(0.25 * len(rows))
    assert all(row in list(rows) for row in measured)


def test_a_row_that_writes_its_text_asks_its_teacher_beside_rows_of_a_cache(decoder_folder, tmp_path):
    rows = [{"prompt": f"What is the list number {i}?", "response": f"a sequence of names {i}"} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = makd.DataConfig(
        path="chats.jsonl", prompt_columns=("prompt",), response_column="response", template="none", max_length=48
    )
    methods = tuple(
        makd.MethodConfig(name=name, method="low_rank_objective", settings={"objective": name, "start": "svd"})
        for name in ("kd", "gkd")
    )
    few = (language(text=chats, other=None, instructions=()),)
    experiment = make(
        tmp_path, decoder_folder, tmp_path / "runs", language=few, methods=methods, seeds=(1,), cache=makd.CacheConfig()
    )
    kept, written = makd.compare(experiment)
    assert kept["seconds"]["cache"] > written["seconds"]["cache"] == 0


def test_what_learns_is_the_experiments_where_a_method_does_not_say(data, decoder_folder, tmp_path):
    few = (language(instructions=(), other=None),)

    def row(name, **settings):
        own = {"objective": "logits", "start": "svd", **settings}
        return makd.MethodConfig(name=name, method="low_rank_objective", settings=own)

    experiment = make(
        data, decoder_folder, tmp_path / "runs", language=few, seeds=(1,),
        training=replace(TRAINING, trainable="linears"),
        methods=(row("left"), row("linears", trainable="linears"), row("all", trainable="all")),
    )  # fmt: skip
    left, linears, whole = makd.compare(experiment)
    assert left["fingerprint"] == linears["fingerprint"] != whole["fingerprint"]
    assert left["settings"]["trainable"] == "linears"
    assert left["hash"] == linears["hash"] != whole["hash"]


def test_a_method_that_follows_the_held_out_loss_is_refused_where_it_is_measured_on_those_rows():
    with pytest.raises(SettingError, match="distillm of x follows the loss on held-out rows"):
        makd.MethodConfig(name="x", method="low_rank_objective", settings={"objective": "distillm"})


def test_the_page_has_every_metric_of_every_row(done, tmp_path):
    experiment, _ = done
    text = makd.comparison.write_page(experiment, tmp_path / "page.md").read_text()
    assert "| perplexity (text) | gap, nats (text) | perplexity (other) | gap, nats (other) | " in text
    assert "ROUGE-L (asked)" in text
    assert "python: what is left of the teacher's probability of a token" in text
    table = text.split("| perplexity (text)")[1].split("\n\n")[0]
    teacher, student = (next(line for line in table.split("\n") if name in line) for name in ("*teacher*", "`makd`"))
    own = [line for line in done[1] if line["cell"]["method"] == "makd"]
    gap = sum(math.log(line["metrics"]["perplexity_text"] / line["teacher"]["perplexity_text"]) for line in own) / 2
    assert teacher.split(" | ")[2] == "0.000 ± 0.000"
    assert student.split(" | ")[2].startswith(f"{gap:.3f} ± ")
    assert all(f"| {row} |" in table for row in ("*teacher*", "`low_rank_logits`", "`makd`"))


def test_a_row_of_no_steps_is_what_the_others_begin_from(data, decoder_folder, tmp_path):
    few = language(instructions=(), other=None)
    methods = (
        makd.MethodConfig(name="start", method="low_rank_objective", times_steps=0.0),
        makd.MethodConfig(name="sft", method="low_rank_objective"),
    )
    experiment = make(data, decoder_folder, tmp_path / "runs", language=(few,), methods=methods, seeds=(1,))
    start, taught = makd.compare(experiment)
    assert (start["steps"], start["tokens"], start["seconds"]["train"]) == (0, 0, 0)
    assert taught["steps"] == 2
    assert start["fingerprint"] != taught["fingerprint"]
    setup = prepare_setup(experiment, few, 1, quiet)
    made = makd.factorize(setup.teacher, experiment.budgets[0], calibration=setup.calibration)
    assert start["fingerprint"] == makd.fingerprint(made)
    assert "| `start` | not taught; " in makd.comparison.write_page(experiment, tmp_path / "page.md").read_text()


def test_a_students_text_may_be_in_bfloat16_while_it_learns_in_float32(data, decoder_folder, tmp_path):
    few = language(dtype="bfloat16", instructions=(), other=None)
    method = (makd.MethodConfig(name="low_rank_logits"),)
    experiment = make(data, decoder_folder, tmp_path / "runs", language=(few,), methods=method, seeds=(1,))
    line = makd.compare(experiment)[0]
    assert line["metrics"]["score"] > 0


def test_what_is_wrong_with_texts_and_instructions_is_told_before_anything_runs(data, decoder_folder, tmp_path):
    asked = makd.InstructionsConfig(path="asked.jsonl", reference_column="gold")
    experiment = make(data, decoder_folder, tmp_path / "runs", language=(language(instructions=(asked,)),))
    with pytest.raises(DataError, match="no column 'gold'"):
        makd.compare(experiment)
    missing = language(other=makd.DataConfig(path="nothing.txt"))
    with pytest.raises(DataError, match=r"nothing\.txt"):
        makd.compare(make(data, decoder_folder, tmp_path / "runs", language=(missing,)))


def test_a_teacher_that_predicts_no_next_token_is_refused(data, encoder_folder, tmp_path):
    experiment = make(data, encoder_folder, tmp_path / "runs")
    with pytest.raises(SettingError, match="BertModel is none"):
        makd.compare(experiment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a,b"}, "without , and ="),
        ({"rows": 0}, "rows is at least 1"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"instructions": (makd.InstructionsConfig(path="a/x"), makd.InstructionsConfig(path="b/x"))}, "last part"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        language(**settings)


def test_an_experiment_on_nothing_and_a_name_that_is_there_twice_are_refused(data, decoder_folder, tmp_path):
    with pytest.raises(SettingError, match="at least one of `tasks` or `language`"):
        make(data, decoder_folder, tmp_path, language=())
    with pytest.raises(SettingError, match="python is there twice"):
        make(data, decoder_folder, tmp_path, language=(language(), language()))
    with pytest.raises(UnknownNameError, match="task of the search"):
        make(data, decoder_folder, tmp_path, search=makd.SearchConfig(trials=1, task="pithon"))


def test_an_experiment_on_language_is_read_from_yaml(data, decoder_folder, tmp_path):
    content = {
        "teacher": str(decoder_folder),
        "output": "runs",
        "budgets": [{"keep_linears": 0.8}],
        "methods": [{"name": "makd"}],
        "language": [
            {
                "name": "python",
                "text": {"path": "lists.txt", "max_length": 16},
                "other": {"path": "tuples.txt", "max_length": 16},
                "instructions": [
                    {"path": "asked.jsonl", "seeds": [1, 2], "max_prompt_tokens": 40, "max_answer_tokens": 4}
                ],
                "rows": 6,
                "batch_size": 4,
            }
        ],
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(content))
    assert load_experiment(file).language == (language(),)


def test_the_tokenizer_is_the_teachers(done, decoder_folder):
    experiment, _ = done
    setup = prepare_setup(experiment, experiment.language[0], 1, quiet)
    assert setup.task.tokenizer.get_vocab() == load_tokenizer(str(decoder_folder)).get_vocab()


def test_every_path_of_a_text_is_looked_for_in_the_folder_of_the_data(data):
    sources = tuple(Source(path=name) for name in ("lists.txt", "tuples.txt"))
    placed = place_language(language(text=makd.DataConfig(mixture=sources, max_length=16)), str(data))
    paths = [one.path for one in placed.text.mixture] + [placed.other.path, placed.instructions[0].path]
    assert all(Path(path).is_file() for path in paths)


def test_latencies_of_another_dtype_are_others(data, decoder_folder, tmp_path):
    def identity(**settings):
        experiment = make(data, decoder_folder, tmp_path / "runs", language=(language(**settings),))
        return latency_hash(experiment, all_cells(experiment)[0])

    assert identity(dtype="bfloat16") != identity() == identity(dtype="float32")


def test_the_held_out_text_of_a_language_model_counts_and_so_do_its_prompts(data, decoder_folder, tmp_path):
    experiment = make(data, decoder_folder, tmp_path / "runs")
    (whole,) = experiment.language

    def digests(seed=1, **settings):
        return prepare_setup(experiment, replace(whole, **settings), seed, quiet).digests

    first = digests()
    assert digests() == first
    assert digests(seed=2)[MEASURED] == first[MEASURED]
    assert digests(seed=2)[LEARNED] != first[LEARNED]
    asked = replace(whole.instructions[0], rows=2)
    for other in (digests(rows=3), digests(other=None), digests(instructions=(asked,))):
        assert other[LEARNED] == first[LEARNED]
        assert other[MEASURED] != first[MEASURED]
