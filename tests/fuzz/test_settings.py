"""Every field of every dataclass of settings, with what does not belong there: in Python, as flags and in YAML."""

import dataclasses
import math
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import makd
from makd.kinds import fit
from tests.fuzz.oracle import generated

SETTINGS = {
    makd.Budget: {"keep": 0.5},
    makd.BenchConfig: {},
    makd.CacheConfig: {},
    makd.CalibrationConfig: {},
    makd.DataConfig: {},
    makd.EvaluationConfig: {},
    makd.Experiment: {
        "teacher": "x", "tasks": (makd.TaskConfig(name="glue/mrpc", path="x"),), "output": "x",
        "methods": (makd.MethodConfig(name="makd"),), "budgets": (makd.Budget(keep=0.5),),
    },
    makd.FactorizeConfig: {},
    makd.FinetuneRecipe: {},
    makd.InstructionsConfig: {"path": "x"},
    makd.LanguageConfig: {"name": "x", "text": makd.DataConfig()},
    makd.MethodConfig: {"name": "makd"},
    makd.Plan: {},
    makd.Recipe: {},
    makd.SearchConfig: {},
    makd.Stage: {},
    makd.TaskConfig: {"name": "glue/mrpc", "path": "x"},
    makd.Term: {"aspect": "hidden"},
    makd.TrainingConfig: {},
}  # fmt: skip
"""With what each needs."""
FIELDS = [(kind, item.name) for kind in SETTINGS for item in dataclasses.fields(kind)]
VALUES = [
    None, True, 0, -1, 1, 2**32, 2**63, 10**400, 0.5, 1.5, -0.0, math.nan, math.inf, -math.inf, 1e308, "", "half",
    "a\0b", "\ud800", "x" * 5000, b"x", [], [1, 2], ["a", "a"], [None], (), {}, {"a": 1}, set(), object(), int,
    range(2), [[[]]], lambda: 3, makd.Plan(), [makd.Plan()], 3j,
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_in_python(cases, kind, name):
    """What is made holds what its annotations say, and nothing that is not finite."""
    kinds = typing.get_type_hints(kind)

    def judge(made):
        held = {item.name: getattr(made, item.name) for item in dataclasses.fields(made)}
        again = {field: fit(value, kinds[field], field) for field, value in held.items()}
        return None if again == held else f"{again} != {held}"

    for value in VALUES:
        cases.call(f"{kind.__name__}.{name}={value!r:.40}", lambda: kind(**{**SETTINGS[kind], name: value}), judge)  # noqa: B023
    cases.settle()


def names(kind=makd.Recipe, above="recipe"):
    """Dotted names of all settings below a recipe."""
    for field, inside in typing.get_type_hints(kind).items():
        yield f"{above}.{field}"
        if dataclasses.is_dataclass(inside):
            yield from names(inside, f"{above}.{field}")


PLACES = [*names(), *names(makd.DataConfig, "data"), *names(makd.Budget, "budget"), "tokenizer", "overwrite", "stream"]
TEXTS = [
    "nan", ".nan", "inf", "-1", "0", "1.5", "half", "", "[]", "{}", "[1, 2]", "{a: b}", "{a: b, a: c}", "null", "true",
    "*a", "!!set {a}", "99999999", "9" * 40, "x" * 3000, "\ud800", "/", ".", "meta", "\n", "[" * 40, "- 1", "a: b: c",
]  # fmt: skip


def test_as_flags(workspace, cases):
    @generated(60)
    @given(place=st.sampled_from(PLACES), text=st.sampled_from(TEXTS))
    def case(place, text):
        words = ["factorize", *workspace.flags(), f"--{place}={text}"]
        cases.command(f"--{place}={text[:40]!r}", words, [workspace.teacher, workspace.text], workspace.output)

    case()
    cases.settle()


def test_in_yaml(workspace, cases):
    @generated(60)
    @given(place=st.sampled_from(PLACES), value=st.sampled_from([v for v in VALUES if yaml_takes(v)]))
    def case(place, value):
        *above, name = place.split(".")
        tree = {name: value}
        for key in reversed(above):
            tree = {key: tree}
        file = workspace.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree))
        words = ["factorize", *workspace.flags(), "--config", file]
        cases.command(f"{place}: {value!r:.40}", words, [workspace.teacher, workspace.text], workspace.output)

    case()
    cases.settle()


def yaml_takes(value):
    """Whether YAML can hold it."""
    try:
        yaml.safe_dump(value)
    except (yaml.YAMLError, ValueError):
        return False
    return True
