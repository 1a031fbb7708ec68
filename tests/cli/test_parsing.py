"""Settings that do not parse: one line that says which, what is allowed and what was met, and no page of the parser."""

import pytest

from makd.cli.compare import load_experiment
from makd.cli.main import read_command
from makd.cli.parsing import explain
from makd.errors import SettingError

STARTS = {name: f"makd: {name}: loading libraries " for name in ("compress", "finetune")}
COMPRESS = ["compress", "--teacher", "a-model", "--output", "a-folder"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--keep_linears", "0.5"], "Unknown flag --keep_linears. Did you mean --budget.keep_linears?"),
        (
            ["--learning_rate=1e-4"],
            "Unknown flag --learning_rate. Did you mean --recipe.training.learning_rate or --recipe.layerwise",
        ),
        (["--recipe.trainng.steps", "3"], "Unknown flag --recipe.trainng.steps. Did you mean --recipe.training.steps?"),
        (["--xyz", "3"], "Unknown flag --xyz. See `makd compress --help`."),
        (["--budget.keep", "half"], "budget.keep is a number or null; got half."),
        (["--recipe.training.steps", "1.5"], "recipe.training.steps is a whole number or null; got 1.5."),
        (
            ["--recipe.training.schedule", "step"],
            "recipe.training.schedule is one of linear, cosine, constant_with_warmup; got step.",
        ),
        (["--recipe.training.student_dropout", "often"], "student_dropout is true or false; got often."),
        (["--recipe.stages", "3"], "recipe.stages is a list; got 3. See"),
        (["--data.text_columns", "review"], "data.text_columns is a list or null; got review. Write '[review]'."),
        (
            ["--recipe.stages", "[{plan: {terms: [{aspect: hidden, weight: much}]}}]"],
            "recipe.stages.plan.terms.weight is a number; got much.",
        ),
        (
            ["--recipe.plan.terms", "[{aspect: hidden, wieght: 1}]"],
            "Unknown setting of recipe.plan.terms 'wieght'. Did you mean 'weight'? Known: aspect, weight,",
        ),
        (["--task.rows", "many"], "task.rows is a whole number or null; got many."),
        (["--task", "glue/cole"], "Unknown task 'glue/cole'. Did you mean 'glue/cola'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is no file. Give a YAML file."),
        (
            ["--budget", "0.5"],
            "--budget is a YAML file with settings; got '0.5'. A single setting: --budget.params, --budget.keep, "
            "--budget.keep_linears.",
        ),
    ],
)
def test_of_flags(run, flags, told):
    code, out, err = run(*COMPRESS, *flags)
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert "<class" not in err
    assert out == ""


def test_what_the_settings_themselves_refuse_needs_no_help_text(run):
    code, _, err = run(*COMPRESS, "--budget.keep", "0.5", "--recipe.training.learning_rate", "-1")
    assert code == 2
    assert err == STARTS["compress"] + "makd: training.learning_rate is above 0; got -1.0."


def test_flags_that_are_needed(run):
    code, _, err = run("finetune")
    assert code == 2
    assert (
        err
        == STARTS["finetune"] + "makd: Required, but not given: model, task.name, output. See `makd finetune --help`."
    )


@pytest.mark.parametrize("words", [["--model", "./nowhere"], ["--model=./nowhere"], ["./nowhere"]])
def test_what_stands_without_a_flag_may_have_one(run, words):
    code, _, err = run("inspect", "--head", "base", *words)
    assert code == 2
    assert "./nowhere does not exist" in err


def test_a_flag_without_its_value(run):
    code, _, err = run("distill", "--teacher", "a-model", "--output", "a-folder", "--student")
    assert code == 2
    assert "Required, but not given: student." in err


def test_a_file_of_settings_that_is_no_yaml(run, tmp_path):
    file = tmp_path / "budget.yaml"
    file.write_text("keep: 0.5: 3\n")
    code, _, err = run(*COMPRESS, "--budget", file)
    assert code == 2
    assert "mapping values are not allowed" in err
    assert "line 1" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("latencies: false", "Unknown setting 'latencies'. Did you mean 'latency'"),
        ("training: {epoch: 2}", "Unknown setting of training 'epoch'. Did you mean 'epochs'?"),
        ("finetune: {training: {epoch: 2}}", "Unknown setting of finetune.training 'epoch'. Did you mean 'epochs'?"),
        ("cache: {dtypes: float16}", "Unknown setting of cache 'dtypes'. Did you mean 'dtype'?"),
        ("cache: {dtype: float61}", "cache.dtype is one of float32, float16, bfloat16, int8; got float61."),
        ("cache: 3", "cache is settings with names (dtype, top_k, batch_size, shard_megabytes); got 3."),
        ("tasks: [{nam: glue/mrpc}]", "Unknown setting of tasks 'nam'. Did you mean 'name'?"),
        ("methods: [{method: makd}]", "Required, but not given: methods.name."),
        ("seeds: [1, two]", "seeds is a whole number; got two."),
        ("seeds: 3", "seeds is a list; got 3."),
        ("latency: maybe", "latency is true or false; got maybe."),
    ],
)
def test_of_an_experiment(tmp_path, line, told):
    settings = {
        "teacher": "a-model",
        "output": "a-folder",
        "tasks": "[{name: glue/mrpc}]",
        "methods": "[{name: makd}]",
        "budgets": "[{keep_linears: 0.5}]",
    }
    settings.pop(line.partition(":")[0], None)
    file = tmp_path / "experiment.yaml"
    file.write_text("\n".join([*(f"{name}: {value}" for name, value in settings.items()), line]))
    with pytest.raises(SettingError) as raised:
        load_experiment(file)
    assert str(raised.value).startswith(f"{file}: {told}")


def test_a_message_of_another_kind_stays_as_it_is():
    assert explain(ValueError("argument --steps: expected one argument")) == "argument --steps: expected one argument"


def test_one_of_several_lists_of_reasons_is_not_picked_by_chance():
    message = 'Parser key "a":\n  Errors:\n    - Parser key "b":\n        Expected a <class \'int\'>. Got value: x\n'
    message += "    - Parser key \"c\":\n        Expected a <class 'str'>. Got value: 3"
    assert explain(ValueError(message)) == message


COMMANDS = {
    "data": ("compress", *COMPRESS[1:], "--budget.keep", "0.5"),
    "task": ("compress", *COMPRESS[1:], "--budget.keep", "0.5", "--task.name", "glue/cola"),
    "instructions": ("evaluate", "a-student", "--teacher", "a-model", "--instructions.path", "a-file"),
}


@pytest.mark.parametrize("joined", [False, True], ids=["two words", "one word"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.template", "summarize: {prompt}"),
        ("instructions.template", "summarize: {prompt}"),
        ("instructions.template", "[{prompt}]"),
        ("instructions.template", '"{prompt}"'),
        ("instructions.template", "# {prompt}:\n"),
        ("instructions.template", "- {prompt} "),
        ("instructions.path", "a: b"),
        ("task.path", "{c}"),
    ],
)
def test_a_text_is_taken_as_it_is_typed(joined, setting, value):
    holder, name = setting.split(".")
    command, *needed = COMMANDS[holder]
    words = [f"--{setting}={value}"] if joined else [f"--{setting}", value]
    found = getattr(read_command(command, [*needed, *words])[holder], name)
    assert found == value
    assert type(found) is str, "YAML writes no other"


def test_a_word_that_is_longer_than_any_files_name_is_told_as_any_other(run):
    code, _, err = run(*COMPRESS, "--recipe.layerwise", "x" * 5000)
    assert code == 2
    assert "--recipe.layerwise is a YAML file with settings" in err


def test_the_file_of_a_run_is_no_experiment_and_a_student_is_no_file(run, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("teacher: x\nbudget: {keep: 0.5}\nrecipe: {}\n")
    code, _, err = run("compare", file, "--dry_run")
    assert code == 2
    assert "is the file of one run: it has budget and recipe. Give it to `makd compress --config" in err
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "recipe.yaml").write_text("teacher: x\n")
    code, _, err = run("ablate", tmp_path / "student", "--output", tmp_path / "out")
    assert code == 2
    assert f"is no file. Give a YAML file such as {tmp_path / 'student' / 'recipe.yaml'}" in err
