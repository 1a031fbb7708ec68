"""What all commands have in common: --json, --quiet, what to try next, and completion in a shell."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from makd.cli.completion import SHELLS, complete, known_words
from makd.cli.main import COMMANDS, main
from makd.cli.outcome import after_student
from makd.shell import command
from tests.cli.test_main import QUICK
from tests.models import tiny

FAST = [*QUICK, "--recipe.factorize.solver", "svd", "--recipe.evaluation.latency", "false"]
TIMED = ["--batches", "[1]", "--lengths", "[8]", "--repeats", "1", "--card", "false"]
EXPERIMENT = {
    "teacher": "nowhere", "tasks": [{"name": "classification", "path": "rows.csv"}], "methods": [{"name": "makd"}],
    "budgets": [{"keep_linears": 0.5}], "output": "results",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder_folder):
    """A folder with a student and rows of a task; not to be written to, but for new outputs."""
    made = tmp_path_factory.mktemp("everywhere")
    words = ["factorize", "--teacher", encoder_folder, "--budget.keep_linears", "0.5", "--output", made / "student"]
    assert main([str(word) for word in [*words, *FAST, "--quiet"]]) == 0
    run = {"teacher": str(encoder_folder), "budget": {"keep_linears": 0.5}, "data": {"path": "pydoc", "max_length": 16},
           "recipe": {"training": {"steps": 1}, "plan": {"preset": "feature"}, "calibration": {"rows": 16},
                      "factorize": {"solver": "svd"}, "evaluation": {"rows": 8}, "device": "cpu"}}  # fmt: skip
    (made / "run.yaml").write_text(yaml.safe_dump(run))
    (made / "rows.csv").write_text(
        "text,label\n" + "".join(f"a good list {n},1\na bad list {n},0\n" for n in range(20))
    )
    (made / "experiment.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "output": str(made / "results")}))
    return made


def words_of(name, folder, encoder_folder):
    """A quick call of each command."""
    teacher, make = ["--teacher", encoder_folder], ["--budget.keep_linears", "0.5"]
    output = ["--output", folder / f"{name}-output", "--overwrite"]
    short = ["--recipe.training.steps", "1", "--recipe.device", "cpu"]
    return [name, *{
        "inspect": [encoder_folder],
        "factorize": [*teacher, *make, *output, *FAST],
        "compress": [*teacher, *make, *output, *FAST],
        "distill": [folder / "student", *teacher, *output, *FAST],
        "cache": [*teacher, *output, *FAST[:6], "--recipe.device", "cpu"],
        "finetune": [encoder_folder, "--task", "classification", "--task_data", folder / "rows.csv",
                     "--task.max_length", "16", *output, *short],
        "evaluate": [folder / "student", *teacher, *FAST],
        "bench": [folder / "student", *teacher, *TIMED],
        "export": [folder / "student", "--to", "dense", *output],
        "report": [folder / "student", "--output", folder / "report.html", "--overwrite"],
        "ablate": [folder / "run.yaml", "--output", folder / "ablation", "--seeds", "[1]"],
        "compare": [folder / "experiment.yaml", "--data", folder, "--dry_run"],
    }[name]]  # fmt: skip


CALLED = [name for name in COMMANDS if name != "demo"]


@pytest.mark.parametrize("name", CALLED)
def test_json_is_all_that_stdout_holds(name, run, folder, encoder_folder):
    code, out, err = run(*words_of(name, folder, encoder_folder), "--json")
    assert code == 0, err
    assert json.loads(out)
    assert "makd: " in err  # the work is shown all the same


@pytest.mark.parametrize("name", CALLED)
def test_quiet_leaves_the_result_and_nothing_else(name, run, folder, encoder_folder):
    code, out, err = run(*words_of(name, folder, encoder_folder), "--quiet")
    assert code == 0, err
    assert out
    assert "next:" not in out
    assert err == ""


def test_what_evaluate_gives_to_machines_has_the_keys_of_metrics_json(run, folder, encoder_folder):
    _, out, _ = run(*words_of("evaluate", folder, encoder_folder), "--json")
    written = json.loads((folder / "student" / "metrics.json").read_text())
    assert json.loads(out)["fidelity"].keys() == written["fidelity"].keys()
    assert json.loads(out)["params"] == written["params"]


def test_errors_are_told_on_stderr_and_stdout_stays_empty(run, tmp_path):
    code, out, err = run("inspect", tmp_path / "nowhere", "--json", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("makd: ")


@pytest.mark.parametrize("switch", ["json", "quiet"])
def test_the_switches_are_not_for_files(switch, run, folder, encoder_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{switch}: true\n")
    code, out, err = run("inspect", encoder_folder, "--config", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "")
    assert f"--{switch} is said on the command line, not in a file" in err


def test_a_file_after_json_is_no_place_to_write_to(run, encoder_folder, tmp_path):
    code, _, err = run("inspect", encoder_folder, "--json", tmp_path / "found.json")
    assert code == 2
    assert "found.json" in err
    assert not (tmp_path / "found.json").exists()


def test_a_run_ends_with_commands_to_try_that_are_there(run, folder, encoder_folder):
    code, out, err = run(*words_of("compress", folder, encoder_folder))
    assert code == 0, err
    lines = [shlex.split(line, comments=True) for line in out.partition("next:\n")[2].splitlines()]
    assert [line[1] for line in lines] == ["report", "bench", "evaluate", "export"]
    for line in lines:
        assert line[:1] + line[2:3] == ["makd", str(folder / "compress-output")]
        flags = {word for word in line if word.startswith("--")}
        assert line[1] == "report" or flags <= set(known_flags(line[1]))


def known_flags(name):
    from makd.cli.main import make_parser

    parser = make_parser(name, COMMANDS[name], COMMANDS[name].load())
    return [flag for action in parser._actions for flag in action.option_strings]


def test_commands_to_try_can_be_pasted_whatever_the_folder_is_called():
    assert shlex.split(command("bench", "my runs/a'b", teacher="x y", fold="")) == [
        "makd", "bench", "my runs/a'b", "--teacher", "x y", "--fold",
    ]  # fmt: skip


def test_commands_to_try_read_the_pair_as_it_was_read():
    lines = [
        shlex.split(line, comments=True) for line in after_student("run", "t", "words", "base", {"perplexity": {}})
    ]
    found = {line[1]: line[2:] for line in lines}
    assert found["bench"] == ["run", "--teacher", "t", "--head", "base"]  # which times no text
    assert found["evaluate"][:7] == ["run", "--teacher", "t", "--tokenizer", "words", "--recipe.head", "base"]


def test_the_next_command_teaches_a_student_under_another_head(run, folder, tokenizer, tmp_path):
    tiny("bert", "masked_lm", vocab_size=300).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "words")
    given = ["--tokenizer", tmp_path / "words", "--recipe.head", "base"]
    code, out, err = run(*words_of("factorize", folder, tmp_path / "teacher"), *given)
    assert code == 0, err
    lines = [shlex.split(line, comments=True) for line in out.partition("next:\n")[2].splitlines()]
    taught, _, bench, *_ = lines
    quick = ["--recipe.training.steps", "1", "--recipe.evaluation.latency", "false"]
    code, _, err = run(*taught[1:], *quick)
    assert code == 0, err
    timed = ["--batches", "[1]", "--lengths", "[8]", "--repeats", "1"]
    code, _, err = run(*bench[1:], *timed)
    assert code == 0, err
    code, _, err = run("bench", bench[2], "--teacher", tmp_path / "teacher", *timed)  # with the teacher's own head
    assert (code, "the student has no head" in err) == (2, True)


def test_a_line_comes_before_anything_heavy_is_imported(run, encoder_folder):
    _, _, err = run("inspect", encoder_folder)
    assert err.startswith("makd: inspect: loading libraries")


@pytest.fixture(scope="module")
def words():
    return known_words()


class TestCompletion:
    def completed(self, script, *typed):
        """What bash offers for the last of these words."""
        line = " ".join(shlex.quote(word) for word in typed)
        told = "printf '%s\\n' \"${COMPREPLY[@]}\""
        ask = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(typed) - 1}; _makd; {told}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        return done.stdout.split()

    @pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
    def test_in_bash_knows_commands_flags_and_values(self, words, tmp_path):
        (tmp_path / "makd.bash").write_text(SHELLS["bash"](words))
        offered = [
            self.completed(tmp_path / "makd.bash", *typed)
            for typed in (
                ("makd", "comp"), ("makd", "compress", "--data.p"), ("makd", "compress", "--effort", ""),
                ("makd", "evaluate", "--qu"), ("makd", "completion", ""), ("makd", "compress", "texts"),
            )
        ]  # fmt: skip
        assert set(offered[0]) == {"compress", "compare", "completion"}
        assert set(offered[1]) == {"--data.path", "--data.prompt_columns"}
        assert offered[2] == ["quick", "normal", "best"]
        assert offered[3] == ["--quiet"]
        assert offered[4] == ["bash", "zsh", "fish"]
        assert offered[5] == []  # bash's own: files

    def test_in_zsh_and_fish_has_the_same_words(self, words):
        assert SHELLS["bash"](words) in SHELLS["zsh"](words)
        fish = SHELLS["fish"](words)
        assert "__fish_seen_subcommand_from compress' -l effort -x -a 'quick normal best'" in fish
        assert all(f"-a {name} " in fish for name in COMMANDS)

    def test_asks_for_a_shell_that_is_known(self, run):
        assert "Did you mean 'bash'" in run("completion", "bas")[2]
        assert "bash, zsh or fish" in run("completion")[2]
        assert "compinit" in complete(["--help"])


def test_a_quiet_run_notes_its_warnings_for_its_report(run, tmp_path, encoder_folder):
    words = ["factorize", "--teacher", encoder_folder, "--budget.keep_linears", "0.5", "--output", tmp_path / "student"]
    few = ["--recipe.factorize.solver", "whitened", "--recipe.calibration.rows", "1"]
    code, _, err = run(*words, *QUICK, *few, "--quiet")
    noted = json.loads((tmp_path / "student" / "report" / "warnings.json").read_text())["rows"]
    assert (code, err) == (0, "")
    assert any(row["level"] == "warning" and "calibration" in row["text"] for row in noted)


def test_a_report_is_written_without_torch(folder):
    code = (
        "import sys; from makd.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or len({'torch', 'transformers', 'datasets'} & {*sys.modules}))"
    )
    words = ["report", folder / "student", "--output", folder / "light.html"]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, env={**os.environ, "COLUMNS": "200"})
