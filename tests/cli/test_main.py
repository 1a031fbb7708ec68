"""The command line as a user meets it: golden paths, and a clear early error for every wrong input."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from makd.cli.demo import reload_in_new_process
from makd.cli.main import main
from makd.errors import ModelLoadError

QUICK = [
    "--data.path", "pydoc", "--data.rows", "40", "--data.max_length", "16", "--recipe.training.steps", "2",
    "--recipe.training.batch_size", "4",
    "--recipe.evaluation.rows", "8", "--recipe.evaluation.latency_tokens", "8", "--recipe.calibration.rows", "16",
    "--recipe.device", "cpu",
]  # fmt: skip


def compress(teacher, output, *more, keep="0.5"):
    return ["compress", "--teacher", teacher, "--budget.keep_linears", keep, "--output", output, *QUICK, *more]


def test_compress_leaves_a_student_with_everything_that_belongs_to_it(run, encoder_folder, tmp_path):
    code, out, _ = run(*compress(encoder_folder, tmp_path / "student"))
    assert code == 0
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "metrics.json", "environment.json",
            "README.md"} <= names  # fmt: skip
    metrics = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert metrics["params"]["linears"]["student"] <= 0.5 * metrics["params"]["linears"]["teacher"]
    for key in ("before", "after"):
        assert metrics["fidelity"][key].keys() == {"rank_correlation", "cosine"}
    assert metrics["latency_ms"]["student"].keys() == {"batch1", "batch16"}
    assert {"calibrate", "factorize", "distill", "evaluate", "total"} <= metrics["seconds"].keys()
    assert metrics["tokens"]["training"] > 0
    assert f"{metrics['params']['total']['student']:,}" in out


def test_the_written_recipe_repeats_the_run_bit_for_bit(run, encoder_folder, tmp_path):
    run(*compress(encoder_folder, tmp_path / "one"))
    code, _, err = run("compress", "--config", tmp_path / "one" / "recipe.yaml", "--output", tmp_path / "two")
    assert code == 0, err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_decoder_reports_perplexity(run, decoder_folder, tmp_path):
    code, out, _ = run(*compress(decoder_folder, tmp_path / "student", keep="0.8"))
    assert code == 0
    metrics = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert metrics["perplexity"].keys() == {"teacher", "before", "after"}
    assert metrics["fidelity"]["after"].keys() == {"prediction_kl", "top1_agreement"}
    assert "perplexity" in out


def test_every_command_saves_the_cache_setting_of_the_teacher(run, decoder_folder, tmp_path):
    rows = "\n".join(f"a text of number {number},{number % 2}" for number in range(20))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.csv").write_text(f"text,label\n{rows}")
    svd = ["--recipe.factorize.solver", "svd", "--recipe.training.steps", "1", "--recipe.evaluation.latency", "false"]
    few = ["--teacher", decoder_folder, "--budget.keep_linears", "0.8"]
    task = ["--task.name", "classification", "--task.path", tmp_path / "task", "--task.max_length", "16"]
    commands = {
        "compressed": ["compress", *few, *QUICK, *svd],
        "made": ["factorize", *few, *QUICK, *svd],
        "streamed": ["factorize", "--stream", *few, *QUICK[:4], *svd[:2]],
        "taught": ["distill", tmp_path / "made", "--teacher", decoder_folder, *QUICK, *svd[2:]],
        "tuned": ["finetune", decoder_folder, *task, "--recipe.training.steps", "1", "--recipe.device", "cpu"],
    }
    for name, words in commands.items():
        code, _, err = run(*words, "--output", tmp_path / name)
        assert code == 0, err
        assert json.loads((tmp_path / name / "config.json").read_text()).get("use_cache") is True, name


def test_a_demo_compares_its_student_on_the_device_of_the_run(run, encoder_folder, tmp_path):
    """Another device rounds in another way: on the CPU a student of a GPU would not be the same, bit for bit."""
    output = tmp_path / "student"
    assert run(*compress(encoder_folder, output))[0] == 0
    assert "the same, bit for bit" in reload_in_new_process(output, "AutoModel")
    environment = output / "environment.json"
    environment.write_text(environment.read_text().replace('"device": "cpu"', '"device": "elsewhere"'))
    with pytest.raises(ModelLoadError, match="elsewhere"):
        reload_in_new_process(output, "AutoModel")


def test_a_run_that_was_stopped_resumes_to_the_same_student(encoder_folder, tmp_path, monkeypatch, run):
    from makd.distill import DistillTrainer

    settings = ["--recipe.training.save_every", "1", "--recipe.training.steps", "4"]
    run(*compress(encoder_folder, tmp_path / "whole", *settings))
    step = DistillTrainer.training_step

    def stop_at_the_third(self, *arguments, **named):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", stop_at_the_third)
        code, _, err = run(*compress(encoder_folder, tmp_path / "cut", *settings))
    assert code == 130
    assert "Checkpoints up to step 2 stay in" in err
    assert "makd: stopped. Outputs that were finished before are as they were." in err
    code, _, err = run(*compress(encoder_folder, tmp_path / "cut", *settings))
    assert code == 2
    assert "up to step 2. Go on with it by --resume" in err
    assert not (tmp_path / "cut").exists()
    assert run(*compress(encoder_folder, tmp_path / "cut", *settings, "--resume"))[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_factorize_then_distill_then_evaluate(run, encoder_folder, tmp_path):
    start, taught = tmp_path / "start", tmp_path / "taught"
    code, _, err = run("factorize", "--teacher", encoder_folder, "--budget.keep", "0.8", "--output", start, *QUICK)
    assert code == 0, err
    code, _, err = run("distill", start, "--teacher", encoder_folder, "--output", taught, *QUICK)
    assert code == 0, err
    code, out, err = run("evaluate", taught, "--teacher", encoder_folder)
    assert code == 0, err
    assert "rank correlation" in out
    for made, command in ((start, "makd factorize"), (taught, "makd distill")):
        assert f"`{command} --config recipe.yaml --output ANOTHER` repeats the run" in (made / "README.md").read_text()


def test_inspect_prints_layers_roles_and_break_even_ranks(run, encoder_folder):
    code, out, _ = run("inspect", encoder_folder)
    assert code == 0
    text = " ".join(out.split())
    for words in ("BertModel (bert)", "break-even", "64 x 32", "parameters 29,920"):
        assert words in text


def test_a_recipe_in_yaml_is_the_same_as_flags(run, encoder_folder, tmp_path):
    recipe = {
        "teacher": str(encoder_folder),
        "output": str(tmp_path / "student"),
        "budget": {"params": 20000},
        "data": {"path": "pydoc", "rows": 40, "max_length": 16},
        "recipe": {
            "plan": {"terms": [{"aspect": "matrix", "roles": ["q", "up"], "layers": "last"}, {"aspect": "hidden"}]},
            "training": {"steps": 1, "batch_size": 4},
            "evaluation": {"rows": 8, "latency": False},
            "device": "cpu",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = run("compress", "--config", tmp_path / "recipe.yaml")
    assert code == 0, err
    resolved = yaml.safe_load((tmp_path / "student" / "recipe.yaml").read_text())
    assert resolved["recipe"]["plan"]["terms"][0]["roles"] == ["q", "up"]
    assert resolved["recipe"]["training"]["learning_rate"] > 0


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--budget.keep_linears", "0"], "keep_linears"),
        (["--budget.keep_linears", "1.5"], "keep_linears"),
        (["--budget.keep", "-0.1"], "keep"),
        (["--budget.params", "0"], "params"),
        (["--budget.params", "999999999"], "above the teacher"),
        (["--budget.params", "100"], "smallest"),
        (["--budget.keep", "0.5", "--budget.params", "1000"], "exactly one"),
        ([], "budget"),
    ],
)
def test_budgets_that_no_student_can_meet(run, encoder_folder, tmp_path, flags, hint):
    words = ["compress", "--teacher", encoder_folder, "--output", tmp_path / "student", *QUICK, *flags]
    code, _, err = run(*words)
    assert code == 2
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--recipe.factorize.solver", "whitend"], "Did you mean 'whitened'"),
        (["--recipe.factorize.ranks", "unifrom"], "Did you mean 'uniform'"),
        (["--recipe.plan.preset", "ful"], "Did you mean 'full'"),
        (["--recipe.plan.terms", "[{aspect: hiden}]"], "Did you mean 'hidden'"),
        (["--recipe.plan.terms", "[{aspect: hidden, layers: [9]}]"], "Layer 9 does not exist: the model has 2"),
        (["--recipe.plan.terms", "[{aspect: logits}]"], "no head"),
        (["--recipe.training.learning_rate", "-1"], "learning_rate is above 0; got -1"),
        (["--recipe.training.batch_size", "0"], "batch_size is at least 1; got 0"),
        (["--recipe.head", "classifier"], "Unknown head 'classifier'"),
        (["--recipe.dtype", "float8"], "float32, bfloat16, float16"),
        (["--recipe.device", "cuda:99"], "cuda:99"),
        (["--recipe.training.learn_rate", "1"], "learn_rate"),
        (["--data.path", "./nowhere"], "./nowhere does not exist"),
        (["--data.text_columns", "[body]", "--data.path", "{lines}"], "no column 'body'"),
        (["--data.path", "{blank}"], "blank"),
        (["--data.max_length", "512"], "positions for 64"),
        (["--tokenizer", "{empty}"], "no tokenizer"),
    ],
)
def test_settings_that_are_not_allowed(run, encoder_folder, tmp_path, flags, hint):
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "empty").mkdir()
    places = {
        name: tmp_path / file for name, file in (("lines", "lines.txt"), ("blank", "blank.txt"), ("empty", "empty"))
    }
    flags = [flag.format(**places) if flag in ("{lines}", "{blank}", "{empty}") else flag for flag in flags]
    code, _, err = run(*compress(encoder_folder, tmp_path / "student", *flags))
    assert code == 2, err
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "student").exists()


def test_teachers_that_cannot_be_loaded(run, encoder_folder, tmp_path):
    no_weights = tmp_path / "no_weights"
    shutil.copytree(encoder_folder, no_weights)
    (no_weights / "model.safetensors").unlink()
    no_tokenizer = tmp_path / "no_tokenizer"
    shutil.copytree(encoder_folder, no_tokenizer)
    for path in no_tokenizer.glob("token*"):
        path.unlink()
    cases = {
        tmp_path / "nowhere": "does not exist",
        no_weights: "No model could be loaded",
        no_tokenizer: "no tokenizer",
        "package:no_such_package/model": "not installed",
        "some-org/no-such-model": "No tokenizer could be loaded",
    }
    for teacher, hint in cases.items():
        code, _, err = run(*compress(teacher, tmp_path / "student"))
        assert code == 2, (teacher, err)
        assert hint in err
        assert "Traceback" not in err
        assert not (tmp_path / "student").exists()


def test_a_checkpoint_without_a_weight_is_refused_with_one_message(run, encoder_folder, tmp_path):
    lacking = tmp_path / "lacking"
    shutil.copytree(encoder_folder, lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(*compress(lacking, tmp_path / "student"))
    assert code == 2
    assert "lacks weights of a BertModel: encoder.layer.0.output.dense.weight" in err
    assert "LOAD REPORT" not in err


def test_a_student_is_evaluated_from_anywhere_on_the_text_that_it_was_made_with(
    run, encoder_folder, tmp_path, monkeypatch
):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "texts.txt").write_text("\n".join(f"a text of number {number}" for number in range(40)))
    monkeypatch.chdir(home)
    made = ["factorize", "--teacher", encoder_folder, "--budget.keep_linears", "0.5", "--output", "student"]
    code, _, err = run(*made, "--data.path", "texts.txt", "--recipe.factorize.solver", "svd", *QUICK[4:])
    assert code == 0, err
    monkeypatch.chdir(elsewhere)
    code, out, err = run("evaluate", home / "student", "--teacher", encoder_folder, *QUICK[10:])
    assert code == 0, err
    assert "rank correlation" in out


def test_a_student_is_evaluated_on_the_rows_that_its_run_held_out_whatever_its_seed(run, encoder_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"a text of number {number}" for number in range(400)))
    made = ["factorize", "--teacher", encoder_folder, "--budget.keep_linears", "0.5", "--output", tmp_path / "student"]
    data = ["--data.path", tmp_path / "texts.txt", "--recipe.seed", "3"]
    code, _, err = run(*made, *data, "--recipe.factorize.solver", "svd", *QUICK[4:])
    assert code == 0, err
    code, out, err = run("evaluate", tmp_path / "student", "--teacher", encoder_folder, "--json", *QUICK[10:])
    assert code == 0, err
    metrics = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert json.loads(out)["fidelity"]["after"] == metrics["fidelity"]["after"]


def test_nan_in_the_teachers_weights_is_named(run, encoder_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(encoder_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(*compress(broken, tmp_path / "student"))
    assert code == 2
    assert "encoder.layer.1.output.dense.weight holds NaN" in err


def test_an_output_that_is_not_empty_is_kept(run, encoder_folder, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("precious")
    code, _, err = run(*compress(encoder_folder, tmp_path / "student"))
    assert code == 2
    assert "not empty" in err
    assert (tmp_path / "student" / "thesis.txt").read_text() == "precious"
    code, _, err = run(*compress(encoder_folder, tmp_path / "student", "--overwrite", "--budget.keep_linears", "2"))
    assert code == 2
    assert (tmp_path / "student" / "thesis.txt").read_text() == "precious"
    code, _, err = run(*compress(encoder_folder, tmp_path / "student", "--overwrite"))
    assert code == 2
    assert "holds more than an output of makd: thesis.txt" in err
    assert (tmp_path / "student" / "thesis.txt").read_text() == "precious"


def test_the_word_false_in_a_file_does_not_overwrite(run, encoder_folder, tmp_path):
    assert run(*compress(encoder_folder, tmp_path / "student", "--recipe.training.steps", "0"))[0] == 0
    before = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    for value in ('"false"', '"no"', "1", "[]"):
        (tmp_path / "switches.yaml").write_text(f"overwrite: {value}\n")
        code, _, err = run(*compress(encoder_folder, tmp_path / "student", "--config", tmp_path / "switches.yaml"))
        assert code == 2
        assert "overwrite is true or false; got" in err
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "switches.yaml").write_text("overwrite: false\n")
    assert (
        "not empty" in run(*compress(encoder_folder, tmp_path / "student", "--config", tmp_path / "switches.yaml"))[2]
    )


def test_a_teacher_is_not_overwritten_by_its_student(run, tmp_path, encoder_folder):
    assert run(*compress(encoder_folder, tmp_path / "all" / "one", "--recipe.training.steps", "0"))[0] == 0
    one = tmp_path / "all" / "one"
    for output in (one, tmp_path / "all", encoder_folder):
        code, _, err = run("distill", one, "--teacher", encoder_folder, "--output", output, "--overwrite")
        assert code == 2
        assert "which this run reads" in err
    assert (one / "model.safetensors").is_file()
    assert (encoder_folder / "model.safetensors").is_file()


def test_half_a_flag_is_no_flag_and_replaces_nothing(run, encoder_folder, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    code, _, err = run(*compress(encoder_folder, tmp_path / "old", "--overwrit"))
    assert code == 2
    assert "--overwrit" in err
    assert "--overwrite" in err
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"


def more_than_any_machine_has():
    torch.empty(2**50)


def more_than_a_gpu_has():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.")


def more_than_python_gets():
    raise MemoryError


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (more_than_any_machine_has, f"Memory ran out ({2**50 * 4} bytes more were asked for). Smaller batches"),
        (more_than_a_gpu_has, "Memory ran out (2.00 GiB more were asked for). Smaller batches"),
        (more_than_python_gets, "Memory ran out. Smaller batches"),
    ],
)
def test_memory_that_runs_out_is_one_message(run, encoder_folder, tmp_path, monkeypatch, ask, told):
    monkeypatch.setattr("makd.pipeline._finish", lambda *_: ask())
    code, _, err = run("factorize", *compress(encoder_folder, tmp_path / "student")[1:], "--quiet")
    assert code == 2
    assert err.startswith(f"makd: {told}")
    assert len(err.splitlines()) == 1


def test_an_unknown_command_offers_the_nearest(run):
    code, _, err = run("compres")
    assert code == 2
    assert "Did you mean 'compress'" in err


HEAVY = {"torch", "transformers", "datasets", "numpy", "scipy", "sklearn", "jsonargparse", "rich", "yaml"}


def test_help_says_what_every_setting_of_a_recipe_means(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    told = capsys.readouterr().out
    assert "\n\nexample: makd compress --config examples/minilm.yaml\n" in told
    assert "Share of the linears' parameters (weights and biases), in (0, 1]" in told
    silent = re.findall(r"^  (--[\w.]+) \S+\s+\((?:required, )?type: ", told, re.MULTILINE)
    assert len(re.findall(r"^  --(?:budget|data|recipe)\.\S+ ", told, re.MULTILINE)) > 60
    assert silent == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compres"]])
def test_what_needs_no_model_answers_without_importing_anything_heavy(words):
    code = "import sys; from makd.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", ["inspect", "factorize", "distill", "compress", "evaluate", "bench", "demo"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "example: makd " + command in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["evaluate", "distill"])
def test_a_student_that_is_not_there_is_told_at_once_and_only_once(command, run, encoder_folder, tmp_path):
    output = [] if command == "evaluate" else ["--output", tmp_path / "taught"]
    code, _, err = run(command, "runs/nowhere", "--teacher", encoder_folder, "--data.path", "pydoc", *output)
    assert code == 2
    assert err.count("runs/nowhere") == 1
    assert "tokenizer" not in err
