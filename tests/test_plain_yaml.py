"""YAML is read plainly: no aliases, tags, classes, keys twice, bombs; what is not read is told with its line."""

import pytest
import yaml

from makd.errors import SettingError
from makd.plain_yaml import dump_yaml, load_yaml, read_yaml

MULTIPLYING = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MULTIPLYING, "line 2: aliases (*a) are not read; write it out"),
        ("data: &a {path: *a}", "line 1: aliases (*a) are not read"),
        ("a: 1\nb: {c: 2}\na: 3", "line 3: 'a' is there twice, first in line 1; keep one"),
        ("a:\n  b: 1\n  b: 2", "line 3: 'b' is there twice, first in line 2"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: tags (tag:yaml.org,2002:python/object/apply:os.system)"),
        ("a: !!set {b}", "tags (tag:yaml.org,2002:set) are not read"),
        ("budget: {class_path: os.system}", "class_path is not read: a file names no classes"),
        ("<<: {a: 1}", "names of settings are texts; got '<<'"),
        ("1: a", "names of settings are texts; got '1'"),
        ("? [a]\n: b", "names of settings are texts"),
        ("a: " + "[" * 5000, "line 1: more than 24 levels inside each other"),
        ("a: " + "9" * 5000, "line 1: a whole number has at most 64 bits"),
        ("a:\n  b: 1" + "0" * 400, "line 2: a whole number has at most 64 bits; if it is a name, put quotes around it"),
        ("a: " + "x" * 300_000, "has more than 262,144 characters"),
        ("a: [1", "line 1"),
        ("a: 1\n--- \nb: 2", "but found another document"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_what_settings_do_not_need_is_refused(text, told):
    with pytest.raises(SettingError) as error:
        load_yaml(text)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "text", ["a: 1e-4", "a: [1, -2.5, 1e3, true, null, yes]", "a: 'x'\nb: {c: [d]}", "", "x", "- 1"]
)
def test_what_they_need_is_what_yaml_says(text):
    numbers = {"1e-4": 1e-4, "1e3": 1e3}

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else numbers.get(value, value)

    assert load_yaml(text) == plain(yaml.safe_load(text))
    assert load_yaml("a: 2020-01-01") == {"a": "2020-01-01"}


@pytest.mark.parametrize(
    "value",
    [
        *("1e5", "1e-4", "+1e5", "1_e5", "1e400", "12e4567", ".5e1", "12", "0x1f", "012", "1:30", "2020-01-01"),
        *("yes", "on", "null", "~", "", " a ", "a: b", "# a", "- a", "[a]", "é 中 👍"),
        *("\x00\x85\u2028\ufeff", "\ud83d", "a\nb\n"),
        *(1e5, 1e-5, 1e400, -2.5, 12, True, None, [], {}, [["1e5"], {"1e5": "on"}]),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_written_is_what_is_read(value):
    shared = [value]
    content = {"a": value, "b": [value, {"c": value}], "d": shared, "e": shared}
    read = load_yaml(dump_yaml(content))
    assert read == content
    assert type(read["a"]) is type(value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is no file"),
        ("é: 1".encode("latin-1"), "is not UTF-8 (byte 0)"),
        (b"x" * 300_000, "more than 262,144 bytes"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, told):
    file = tmp_path / "a.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(SettingError) as error:
        read_yaml(file)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("budget: 0.5", "budget is settings with names (params, keep, keep_linears); got 0.5."),
        ("budget: {keep: 0.5}\nrecipe: [1, 2]", "recipe is settings with names (head, calibration,"),
        ("budget: {keep: 0.5}\nrecipe: {training: [1]}", "recipe.training is settings with names (steps, epochs,"),
        ('budget: {keep: 0.5}\noverwrite: "false"', "overwrite is true or false; got 'false'."),
        ("budget: {keep: 0.5}\nrecipe: {training: {epochs: .inf}}", "training.epochs is a finite number; got inf."),
        ("budget: {keep: 0.5}\nrecipe: {training: {epochs: 1%s}}" % ("0" * 400), "line 4: a whole number has at most"),
        ("budget: {keep: .nan}", "budget.keep is a finite number or null; got nan."),
        ("budget: {keep: 0.5}\nrecipe: {seed: 4294967296}", "seed is at least 0 and less than 2^32"),
        ("budget: {keep: 0.5}\nrecipe: {device: meta}", "device 'meta' holds no numbers"),
        ("budget: {keep: 0.5}\nbudget: {keep: 0.6}", "line 4: 'budget' is there twice, first in line 3"),
        ("config: recipe.yaml", "names another file with `config`"),
        ("", "Required, but not given: budget"),
    ],
)
def test_recipes_with_them_are_refused_before_any_work(run, encoder_folder, tmp_path, text, told):
    (tmp_path / "recipe.yaml").write_text(
        f"teacher: {encoder_folder}\noutput: {tmp_path / 'student'}\n{text}\ndata: {{path: pydoc}}"
    )
    code, _, err = run("compress", "--config", tmp_path / "recipe.yaml")
    assert code == 2
    assert told in err or ("budget" in err and text == "")
    assert "Traceback" not in err
    assert not (tmp_path / "student").exists()


def test_a_share_that_leaves_nothing_to_train_on(run, encoder_folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {number}" for number in range(30)))
    words = ["--teacher", encoder_folder, "--budget.keep", "0.9", "--output", tmp_path / "student"]
    code, _, err = run("factorize", *words, "--data.path", tmp_path / "text.txt", "--data.held_out", "0.999")
    assert code == 2
    assert "data.held_out = 0.999 of 30 rows are all of them, which leaves none to train on." in err


def test_a_students_recipe_is_read_as_plainly(run, encoder_folder, tmp_path):
    for content in ("[1]", "data: &a {path: *a}", "data: 3", "null", "task: [1]"):
        (tmp_path / "recipe.yaml").write_text(content)
        code, _, err = run("evaluate", tmp_path, "--teacher", encoder_folder)
        assert code == 2
        assert "recipe.yaml" in err
