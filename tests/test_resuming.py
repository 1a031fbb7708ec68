"""A run that was stopped goes on as itself, bit for bit, from its newest whole checkpoint; or it says why not."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

import makd
from makd.calibration.store import DiskStore
from makd.distill import DistillTrainer
from makd.distill.resuming.checkpoints import LIST
from makd.distill.resuming.train import without_tied
from makd.errors import OutputError
from makd.pipeline import distill, factorize_only
from tests.models import tiny

TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(10)]
BUDGET = makd.Budget(keep_linears=0.5)
TRAINING = makd.TrainingConfig(steps=4, batch_size=4, save_every=1, student_dropout=True)
RECIPE = makd.Recipe(
    training=TRAINING,
    calibration=makd.CalibrationConfig(rows=8),
    evaluation=makd.EvaluationConfig(rows=2, latency=False),
    device="cpu",
)
STOP_AFTER = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    tiny("bert", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def go(teacher, output, texts=TEXTS, budget=BUDGET, recipe=RECIPE, **more):
    return makd.compress(str(teacher), texts, budget, recipe, output, **more).metrics["fingerprint"]


def stopped(teacher, output, recipe=RECIPE, after=STOP_AFTER, **more):
    """A run that is stopped in the step after so many, counted over all of its stages."""
    step, steps = DistillTrainer.training_step, itertools.count()

    def stop(self, *arguments, **named):
        if next(steps) == after:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            go(teacher, output, recipe=recipe, **more)
    return output.parent / f".{output.name}.makd" / "checkpoints"


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """The student of a run that was never stopped."""
    return go(teacher, tmp_path_factory.mktemp("whole") / "student")


@pytest.fixture(scope="module")
def left(teacher, tmp_path_factory):
    """What a run that was stopped left, to be copied: its folder's parent."""
    parent = tmp_path_factory.mktemp("left")
    checkpoints = stopped(teacher, parent / "student")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    return parent


@pytest.fixture
def run_left(left, tmp_path):
    """A copy of it, in which `student` can be gone on with."""
    shutil.copytree(left, tmp_path / "runs")
    return tmp_path / "runs"


def damage_none(newest):
    pass


def cut_weights(newest):
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def killed_while_writing(newest):
    (newest / LIST).unlink()
    (newest / "trainer_state.json").unlink()


def without_optimizer(newest):
    (newest / "optimizer.pt").unlink()


@pytest.mark.parametrize("damage", [damage_none, cut_weights, killed_while_writing, without_optimizer])
def test_the_student_is_that_of_an_unstopped_run_whatever_befell_the_last_checkpoint(
    teacher, whole, run_left, damage, caplog
):
    damage(run_left / ".student.makd" / "checkpoints" / "checkpoint-3")
    assert go(teacher, run_left / "student", resume=True) == whole
    assert ("checkpoint-3 is not whole" in caplog.text) == (damage is not damage_none)
    assert [path.name for path in run_left.iterdir()] == ["student"]


def test_without_a_whole_checkpoint_the_training_begins_anew_and_the_faults_are_named(teacher, whole, run_left, caplog):
    for step in (2, 3):
        cut_weights(run_left / ".student.makd" / "checkpoints" / f"checkpoint-{step}")
    assert go(teacher, run_left / "student", resume=True) == whole
    assert "no checkpoint is whole (checkpoint-3: model.safetensors is damaged; checkpoint-2" in caplog.text


def test_what_changes_no_weight_may_differ(teacher, whole, run_left):
    training = replace(TRAINING, log_every=1, save_every=None)
    recipe = replace(
        RECIPE,
        training=training,
        evaluation=makd.EvaluationConfig(rows=1, latency=False),
        factorize=makd.FactorizeConfig(store="memory"),
    )
    assert go(teacher, run_left / "student", recipe=recipe, resume=True) == whole


def test_a_training_that_goes_on_saves_and_logs_as_it_is_told_now(teacher, tmp_path):
    longer = replace(TRAINING, steps=9, save_every=2)
    checkpoints = stopped(teacher, tmp_path / "student", replace(RECIPE, training=longer), after=5)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    seen = set()

    def look(_):
        seen.update(int(path.name.partition("-")[2]) for path in checkpoints.glob("checkpoint-*"))

    other = replace(RECIPE, training=replace(longer, save_every=3, log_every=1))
    go(teacher, tmp_path / "student", recipe=other, resume=True, on_progress=look)
    assert seen == {2, 4, 6, 9}
    told = json.loads((tmp_path / "student" / "report" / "training.json").read_text())["trainings"][0]["log"]
    assert [line["step"] for line in told if "loss" in line] == [5, 6, 7, 8, 9]


def test_a_training_that_other_versions_began_is_gone_on_with_and_they_are_named_once(teacher, whole, run_left, caplog):
    note = next((run_left / ".student.makd").rglob("run.json"))
    known = json.loads(note.read_text())
    note.write_text(json.dumps({**known, "versions": {**known["versions"], "torch": "1.0"}}))
    assert go(teacher, run_left / "student", resume=True) == whole
    assert caplog.text.count("The training was begun with other versions (torch was 1.0, is ") == 1


@pytest.fixture
def dialogues(tmp_path):
    """Prompts and responses, for completions that the student writes."""
    file = tmp_path / "dialogues.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {text[:9]}", "response": text}) + "\n" for text in TEXTS))
    return makd.DataConfig(
        path=str(file), prompt_columns=("prompt",), response_column="response", template="none", max_length=64
    )


def test_held_out_rows_may_not_differ_where_the_student_s_share_of_the_text_follows_them(
    decoder_folder, tmp_path, dialogues
):
    plan = makd.Plan(preset="distillm", completions=makd.Completions(adaptive=True, max_new_tokens=2))
    adaptive = replace(RECIPE, plan=plan)
    unstopped = go(decoder_folder, tmp_path / "whole", dialogues, recipe=adaptive)
    stopped(decoder_folder, tmp_path / "student", adaptive, texts=dialogues)
    fewer = replace(adaptive, evaluation=makd.EvaluationConfig(rows=1, latency=False))
    with pytest.raises(OutputError, match=r"held-out rows \(data, evaluation.rows\) was"):
        go(decoder_folder, tmp_path / "student", dialogues, recipe=fewer, resume=True)
    measured_otherwise = replace(adaptive, evaluation=makd.EvaluationConfig(rows=2, latency=False, batch_size=1))
    assert go(decoder_folder, tmp_path / "student", dialogues, recipe=measured_otherwise, resume=True) == unstopped


STAGES = (makd.Stage(training=TRAINING),) * 2
STAGED = replace(RECIPE, training=makd.TrainingConfig(), stages=STAGES)


def learn(**changes):
    return replace(RECIPE, training=replace(TRAINING, **changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": learn(learning_rate=1e-3)}, "training.learning_rate was 0.0001, is 0.001"),
        ({"recipe": learn(steps=6)}, "training.steps was 4, is 6"),
        ({"recipe": learn(batch_size=2)}, "training.batch_size was 4, is 2"),
        ({"recipe": learn(accumulate=2)}, "training.accumulate was 1, is 2"),
        ({"recipe": replace(RECIPE, seed=1)}, "seed was 0, is 1"),
        ({"recipe": replace(RECIPE, dtype="bfloat16")}, "dtype was float32, is bfloat16"),
        ({"recipe": replace(RECIPE, plan=makd.Plan(preset="logits"))}, "plan.preset was full, is logits"),
        ({"recipe": STAGED}, "stages.1.training.steps was None, is 4"),
        ({"budget": makd.Budget(keep_linears=0.4)}, "budget.keep_linears was 0.5, is 0.4"),
        ({"texts": ["Another text."] * len(TEXTS)}, "training rows was [0-9a-f]{12}, is [0-9a-f]{12}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_another_run_is_not_gone_on_with_and_every_difference_is_named(teacher, run_left, changes, told):
    before = sorted(run_left.rglob("*"))
    with pytest.raises(OutputError, match=rf"The run that was stopped is not this one: .*{told}"):
        go(teacher, run_left / "student", resume=True, **changes)
    assert sorted(run_left.rglob("*")) == before


def test_another_teacher_or_tokenizer_is_named(teacher, tmp_path, run_left):
    tiny("bert", seed=1, vocab_size=300, max_position_embeddings=128).save_pretrained(tmp_path / "other")
    with pytest.raises(OutputError, match="teacher's weights was"):
        go(tmp_path / "other", run_left / "student", resume=True, tokenizer=str(teacher))
    words = AutoTokenizer.from_pretrained(teacher)
    words.add_special_tokens({"bos_token": "[MASK]"})
    with pytest.raises(OutputError, match="tokenizer was"):
        go(teacher, run_left / "student", resume=True, tokenizer=words)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_checkpoints_of_an_unknown_run_are_not_gone_on_with(teacher, run_left, damage):
    damage(run_left / ".student.makd" / "run.json")
    with pytest.raises(OutputError, match="does not say which run"):
        go(teacher, run_left / "student", resume=True)


def test_another_command_is_not_gone_on_with(teacher, tmp_path, run_left):
    factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "start")
    with pytest.raises(OutputError, match="unfinished work of another command: factorization"):
        distill(str(tmp_path / "start"), str(teacher), TEXTS, RECIPE, run_left / "student", resume=True)


def test_another_student_is_named(teacher, tmp_path):
    for name, keep in (("one", 0.5), ("other", 0.6)):
        factorize_only(str(teacher), TEXTS, makd.Budget(keep_linears=keep), RECIPE, tmp_path / name)

    def distil(student, **more):
        return distill(str(tmp_path / student), str(teacher), TEXTS, RECIPE, tmp_path / "taught", **more)

    step = DistillTrainer.training_step

    def stop(self, *arguments, **named):
        if self.state.global_step == STOP_AFTER:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            distil("one")
    with pytest.raises(OutputError, match="student before training was"):
        distil("other", resume=True)
    distil("one", resume=True)


def test_a_stage_whose_first_checkpoint_is_not_whole_begins_again(teacher, tmp_path):
    few = replace(TRAINING, steps=2)
    staged = replace(STAGED, stages=(makd.Stage(training=few), makd.Stage(training=TRAINING)))
    unstopped = go(teacher, tmp_path / "whole", recipe=staged)
    checkpoints = stopped(teacher, tmp_path / "student", recipe=staged, after=5)
    for folder in (checkpoints / "stage_2").iterdir():
        cut_weights(folder)
    assert go(teacher, tmp_path / "student", recipe=staged, resume=True) == unstopped


def test_a_stage_that_was_over_is_not_trained_again_though_it_kept_no_checkpoints(teacher, tmp_path):
    first = replace(TRAINING, steps=3, save_every=None)
    staged = replace(STAGED, stages=(makd.Stage(training=first), makd.Stage(training=TRAINING)))
    unstopped = go(teacher, tmp_path / "whole", recipe=staged)
    checkpoints = stopped(teacher, tmp_path / "student", recipe=staged, after=5)
    assert sorted(str(path.relative_to(checkpoints)) for path in checkpoints.glob("*/*")) == [
        "stage_1/checkpoint-3", "stage_2/checkpoint-1", "stage_2/checkpoint-2",
    ]  # fmt: skip
    step, taken = DistillTrainer.training_step, []

    def count(self, *arguments, **named):
        taken.append(self.args.max_steps)
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", count)
        assert go(teacher, tmp_path / "student", recipe=staged, resume=True) == unstopped
    assert taken == [4, 4]


def test_adapters_of_a_stage_are_the_same_where_the_run_was_stopped_before_its_first_checkpoint(teacher, tmp_path):
    adapters = replace(TRAINING, trainable="adapters", adapter_rank=2, learning_rate=1e-2)
    staged = replace(STAGED, stages=(makd.Stage(training=TRAINING), makd.Stage(training=adapters)))
    unstopped = go(teacher, tmp_path / "whole", recipe=staged)
    checkpoints = stopped(teacher, tmp_path / "student", recipe=staged, after=4)
    assert [*checkpoints.glob("stage_*/checkpoint-*")] != []
    assert [*checkpoints.glob("stage_2/checkpoint-*")] == []
    assert go(teacher, tmp_path / "student", recipe=staged, resume=True) == unstopped


def test_a_cache_that_was_moved_is_the_same_and_another_is_not(teacher, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    data = str(tmp_path / "texts.txt")
    for name, dtype in (("cache", "float32"), ("rounded", "float16")):
        makd.build_cache(str(teacher), data, RECIPE, tmp_path / name, settings=makd.CacheConfig(dtype=dtype))
    cached = replace(RECIPE, cache=str(tmp_path / "cache"))
    stopped(teacher, tmp_path / "student", recipe=cached, texts=data)
    for other in (None, str(tmp_path / "rounded")):
        with pytest.raises(OutputError, match="cache was"):
            go(teacher, tmp_path / "student", data, recipe=replace(cached, cache=other), resume=True)
    (tmp_path / "cache").rename(tmp_path / "moved")
    go(teacher, tmp_path / "student", data, recipe=replace(cached, cache=str(tmp_path / "moved")), resume=True)


def test_a_disk_without_room_for_checkpoints_is_told_before_training(teacher, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="keep no checkpoints"):
        go(teacher, tmp_path / "student")
    go(teacher, tmp_path / "student", recipe=learn(save_every=None))


def stop_in_factorization(run, entry="learned/0001"):
    """A run that is stopped when this entry of its factorization is written."""
    write = DiskStore.write

    def stop(self, name, *arguments, **named):
        if name == entry:
            raise KeyboardInterrupt
        write(self, name, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskStore, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.fixture
def fitted(monkeypatch):
    """The layers whose factors are made."""
    write, found = DiskStore.write, []

    def noted(self, name, *arguments, **named):
        found.extend([name] if name.startswith("learned/") else [])
        write(self, name, *arguments, **named)

    monkeypatch.setattr(DiskStore, "write", noted)
    return found


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_stopped_in_its_factorization_goes_on_there(teacher, whole, tmp_path, fitted, caplog, resume):
    stop_in_factorization(lambda: go(teacher, tmp_path / "student"))
    work = tmp_path / ".student.makd" / "factorization"
    assert f"What is done stays in {work}; the same command goes on." in caplog.text
    fitted.clear()
    assert go(teacher, tmp_path / "student", resume=resume) == whole
    assert fitted == ["learned/0001"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_run_that_was_stopped_in_its_training_has_its_start_already(teacher, whole, run_left, fitted):
    assert go(teacher, run_left / "student", resume=True) == whole
    assert fitted == []


def test_a_factorization_of_other_settings_is_not_gone_on_with_unless_it_may_be_thrown_away(
    teacher, whole, tmp_path, fitted
):
    other = makd.Budget(keep_linears=0.4)
    stop_in_factorization(lambda: go(teacher, tmp_path / "student", budget=other))
    with pytest.raises(OutputError, match=r"its budget is .*'keep_linears': 0.4.* start anew with --over"):
        go(teacher, tmp_path / "student")
    fitted.clear()
    assert go(teacher, tmp_path / "student", overwrite=True) == whole
    assert fitted == ["learned/0000", "learned/0001"]


def test_factorize_goes_on_where_its_states_are_on_disk_and_leaves_nothing_where_they_are_in_memory(
    teacher, tmp_path, fitted
):
    def make(output, store):
        recipe = replace(RECIPE, factorize=makd.FactorizeConfig(store=store))
        return factorize_only(str(teacher), TEXTS, BUDGET, recipe, output).metrics["fingerprint"]

    stop_in_factorization(lambda: make(tmp_path / "student", "disk"))
    assert (tmp_path / ".student.makd" / "factorization").is_dir()
    fitted.clear()
    found = make(tmp_path / "student", "disk")
    assert fitted == ["learned/0001"]
    assert found == make(tmp_path / "other", "auto")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makd.pipeline._finish", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "third", "auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "student"]


def test_a_tied_head_is_not_missing_from_a_checkpoint():
    model = tiny("llama", "causal_lm", tie_word_embeddings=True)
    found = model.load_state_dict({**model.state_dict(), "more": model.lm_head.weight}, strict=False)
    found.missing_keys.extend(["lm_head.weight", "model.norm.weight"])
    assert without_tied(found, model).missing_keys == ["model.norm.weight"]
    assert without_tied(found, model).unexpected_keys == ["more"]
