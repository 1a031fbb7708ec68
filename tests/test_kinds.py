"""Settings are held to their annotations, in Python as in YAML and flags."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest

import makd
from makd.cli.main import COMMANDS
from makd.errors import SettingError
from makd.kinds import fit

WRONG = {
    'makd.Budget(keep="half")': "budget.keep is a number or null; got 'half'.",
    "makd.Budget(keep=math.nan)": "budget.keep is a finite number or null; got nan.",
    "makd.Budget(params=True)": "budget.params is a whole number or null; got True.",
    "makd.Budget(params=10**30)": "budget.params is a whole number or null; got 1000",
    "makd.TrainingConfig(epochs=math.inf)": "training.epochs is a finite number; got inf.",
    'makd.TrainingConfig(steps="10")': "training.steps is a whole number or null; got '10'.",
    'makd.TrainingConfig(report_to="wandbb")': "training.report_to is one of those that are installed here",
    'makd.Recipe(training={"steps": 1})': "recipe.training is a TrainingConfig; got {'steps': 1}.",
    "makd.Recipe(stages=[1])": "recipe.stages is a list of values, each a Stage; got [1].",
    "makd.Recipe(seed=2**32)": "seed is at least 0 and less than 2^32; got 4294967296.",
    'makd.Recipe(device="meta").find_device()': "device 'meta' holds no numbers",
    "makd.FactorizeConfig(rank_multiple=99_999_999)": "at least 1 and at most 1024; got 99999999.",
    r"""makd.DataConfig(path="a\0b")""": "data.path is a text or null; got 'a\\x00b'.",
    r"""makd.DataConfig(path="\ud800")""": "data.path is a text or null; got",
    'makd.DataConfig(text_columns=("a", "a"))': "names 'a' twice.",
    'makd.TaskConfig(name="glue/mrpc", path="x", text_columns=["a", "a"])': "each another column",
    'makd.Term(aspect="hidden", weight=math.inf)': "plan.terms[].weight is a finite number; got inf.",
    'makd.Term(aspect="hidden", layers=[0.5])': "layers is a text or a list of values, each a whole number",
    "makd.BenchConfig(point=(1, 2, 3))": "a list of 2 values, each a whole number or null; got (1, 2, 3).",
    'makd.CacheConfig(dtype="int4")': "cache.dtype is one of float32, float16, bfloat16, int8; got 'int4'.",
}
"""An expression -> a part of the error. Run without the tests' own checks of types, which are stricter."""

SAME = {
    "makd.Term(aspect='matrix', roles=['q', 'up'])": "makd.Term(aspect='matrix', roles=('q', 'up'))",
    "makd.TrainingConfig(steps=numpy.int64(3), epochs=2)": "makd.TrainingConfig(steps=3, epochs=2.0)",
    "makd.DataConfig(path=pathlib.Path('texts.txt'))": "makd.DataConfig(path='texts.txt')",
}

CODE = """
import json, math, pathlib, sys
import numpy
import makd

def told(expression):
    try:
        return repr(eval(expression))
    except makd.MakdError as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([told(expression) for expression in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def told():
    expressions = [*WRONG, *SAME, *SAME.values()]
    words = [sys.executable, "-c", CODE, json.dumps(expressions)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(expressions, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("expression", WRONG)
def test_a_value_of_another_kind_is_named_with_what_is_allowed(told, expression):
    assert told[expression].startswith("SettingError: ")
    assert WRONG[expression] in told[expression]


@pytest.mark.parametrize("expression", SAME)
def test_what_means_the_same_is_the_same(told, expression):
    assert told[expression] == told[SAME[expression]]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.0, int),
        (True, int),
        ("1", float),
        (1, bool),
        (1, str),
        ("ab", tuple[str, ...]),
        ({1}, list[int]),
        (0, type(None)),
    ],
)
def test_nothing_is_taken_for_something_else(value, kind):
    with pytest.raises(SettingError):
        fit(value, kind, "it")


def settings_below(kind):
    """All dataclasses in an annotation."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for inside in typing.get_type_hints(kind).values():
            yield from settings_below(inside)
    for inside in typing.get_args(kind):
        yield from settings_below(inside)


def test_every_dataclass_that_a_command_takes_is_checked():
    kinds = (
        {
            kind
            for command in COMMANDS.values()
            for name, annotation in typing.get_type_hints(command.load()).items()
            if name != "return"
            for kind in settings_below(annotation)
        }
        | set(settings_below(makd.Experiment))
        | {makd.BenchConfig}
    )
    assert {makd.Recipe, makd.Term, makd.Stage, makd.TaskConfig, makd.MethodConfig} <= kinds
    assert [kind for kind in kinds if "checked" not in kind.__post_init__.__qualname__] == []


@pytest.mark.parametrize(
    ("value", "told"), [("cut \ud83d", "It holds half"), (["a", "cut \ud83d"], "Number 1 is none. It")]
)
def test_a_text_that_is_no_unicode_is_told_as_such(value, told):
    with pytest.raises(SettingError, match=told):
        fit(value, str | list[str], "data")
