"""Recipes as YAML text: what people and accidents write into them."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.oracle import generated

TOKENS = [
    ".nan", ".inf", "-.inf", "1e999", "-1", "0", "true", "yes", "null", "~", "[]", "{}", "[1, 2]", "{a: b}", "*a",
    "&a x", "!!python/object/apply:os.system [ls]", "2020-01-01", "1:30", "010", "0x7f", '""', '"a\\0b"', "'false'",
    "!!binary aGk=",
    "9" * 30, "9" * 5000, "x" * 3000, "[" * 60, "{a: " * 60, "?", "-", ":", "@", "`", "%", "|", ">", "\t", "\x07",
    "\u2028", "é", "\U0001f642", "class_path: os.system", "<<: x", "../..", "/", "99999999", "4294967296",
    "meta", "0.999", "half",
]  # fmt: skip


def recipe(workspace):
    """A short one that is right, with most kinds of settings in it."""
    return {
        "teacher": str(workspace.teacher),
        "output": str(workspace.output),
        "overwrite": False,
        "budget": {"keep_linears": 0.5},
        "data": {"path": str(workspace.text), "max_length": 16, "held_out": 0.2, "rows": 20},
        "recipe": {
            "factorize": {"solver": "svd", "ranks": "auto", "rank_multiple": 8, "depth": "auto"},
            "plan": {"preset": "logits", "terms": [{"aspect": "hidden", "layers": "last", "weight": 1.0}]},
            "training": {"steps": 1, "epochs": 1.0, "report_to": "none", "learning_rate": 1e-4},
            "evaluation": {"rows": 4, "latency": False},
            "calibration": {"rows": 4, "batch_size": 2},
            "device": "cpu",
            "seed": 0,
        },
    }


def paths(tree, above=()):
    """Every setting in it, by its keys."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*above, key))


MARK = "MARK"


@pytest.mark.parametrize("command", ["factorize", "compress"])
def test_a_setting_is_something_else(workspace, cases, command):
    """Not where the output is: a folder outside of the case is nobody's."""
    places = [place for place in paths(recipe(workspace)) if place not in (("output",), ("overwrite",))]

    @generated(60)
    @given(place=st.sampled_from(places), token=st.sampled_from(TOKENS))
    def case(place, token):
        tree = recipe(workspace)
        inside = tree
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = MARK
        file = workspace.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree).replace(MARK, token), encoding="utf-8")
        inputs = [workspace.teacher, workspace.text]
        cases.command(f"{place} {token[:30]!r}", [command, "--config", file], inputs, workspace.output)

    case()
    cases.settle()


def test_a_text_is_damaged(workspace, cases):
    @generated(60)
    @given(
        place=st.integers(0, 10**6), length=st.integers(0, 40), token=st.sampled_from(TOKENS),
        encoding=st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-8-sig", "cp037"]),
    )  # fmt: skip
    def case(place, length, token, encoding):
        text = yaml.safe_dump(recipe(workspace))
        place %= len(text)
        file = workspace.folder / "recipe.yaml"
        file.write_bytes((text[:place] + token + text[place + length :]).encode(encoding, "replace"))
        words = ["factorize", "--config", file, "--output", workspace.output, "--teacher", workspace.teacher]
        inputs = [workspace.teacher, workspace.text]
        cases.command(f"{place} {length} {token[:30]!r} {encoding}", words, inputs, workspace.output)

    case()
    cases.settle()


def test_a_line_is_twice_there_or_moved(workspace, cases):
    @generated(40)
    @given(source=st.integers(0, 100), target=st.integers(0, 100), indent=st.sampled_from(["", "  ", "    ", "\t"]))
    def case(source, target, indent):
        lines = yaml.safe_dump(recipe(workspace)).splitlines()
        lines.insert(target % len(lines), indent + lines[source % len(lines)])
        file = workspace.folder / "recipe.yaml"
        file.write_text("\n".join(lines))
        words = ["factorize", "--config", file, "--output", workspace.output]
        cases.command(f"{source} {target} {indent!r}", words, [workspace.teacher, workspace.text], workspace.output)

    case()
    cases.settle()


def test_an_experiment_is_damaged(workspace, cases):
    experiment = yaml.safe_dump(
        {
            "teacher": str(workspace.teacher), "output": str(workspace.output),
            "tasks": [{"name": "glue/mrpc", "path": "x"}],
            "methods": [{"name": "makd", "settings": {"learning_rate": 1e-4}}], "budgets": [{"keep_linears": 0.5}],
            "seeds": [1, 2], "search": {"trials": 0, "held_out": 0.2}, "device": "cpu",
        }
    )  # fmt: skip

    @generated(40)
    @given(place=st.integers(0, 10**6), length=st.integers(0, 30), token=st.sampled_from(TOKENS))
    def case(place, length, token):
        place %= len(experiment)
        file = workspace.folder / "experiment.yaml"
        file.write_text(experiment[:place] + token + experiment[place + length :], encoding="utf-8")
        cases.command(f"{place} {length} {token[:30]!r}", ["compare", file, "--dry_run"], [workspace.teacher])

    case()
    cases.settle()
