"""Benchmarks: commands that documentation names for its numbers are understood, and a method is the one of its name."""

import argparse
import importlib
import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.ranks.allocation import allocate
from tests.models import tiny

ROOT = Path(__file__).parents[1]
NAMED_IN = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")),
        *(ROOT / "docs").rglob("*.md"),
        *(path for folder in ("benchmarks", "examples", "src") for path in (ROOT / folder).rglob("*.py")),
    ]
)
COMMANDS = (
    re.compile(r"`(?:\w+=\S+ )?python benchmarks/(\w+)\.py([^`#|>;]*)"),  # in a sentence, over lines
    re.compile(r"(?<!`)python benchmarks/(\w+)\.py((?:\\\n|[^`#|>;)\n])*)"),
)
"""What comes after one is a comment, a redirection or the rest of a sentence."""


class Parsed(Exception):
    """The benchmark understood its words, and would have begun."""


def commands():
    """Each command once, (script, words); those of the Makefile that hold variables are left out."""
    found = {}
    for path, pattern in itertools.product(NAMED_IN, COMMANDS):
        for script, rest in pattern.findall(path.read_text(encoding="utf-8")):
            if "$" not in rest:
                words = shlex.split(re.sub(r"\\\n|[\[\]]", " ", rest))
                words = ["1" if word.isupper() else word for word in words]  # FOLDER, SHARE
                found[f"{script} {' '.join(words)}".strip()] = script, words
    return [pytest.param(*command, id=name) for name, command in sorted(found.items())]


@pytest.fixture
def trl(monkeypatch):
    """What a benchmark imports of trl, which is not installed for tests: only flags are read here."""
    for module, names in {
        "trl": ["DistillationConfig", "DistillationTrainer"],
        "trl.experimental": [],
        "trl.experimental.gkd": ["GKDConfig", "GKDTrainer"],
    }.items():
        made = types.ModuleType(module)
        for name in names:
            setattr(made, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, module, made)


@pytest.mark.parametrize(("script", "words"), commands())
def test_a_command_that_is_named_is_understood(script, words, trl, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        parse(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *words])
    benchmark = importlib.import_module(script)
    if hasattr(benchmark, "argparse"):
        with pytest.raises(Parsed):
            benchmark.main()
    else:
        assert not words


def test_a_student_of_svd_llm_keeps_the_first_factors_and_later_layers_second_ones_change():
    import factorization as benchmark

    teacher = tiny("bert")
    ids = torch.randint(5, 60, (4, 4, 12))
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    subject = benchmark.Subject(teacher, batches, {})
    benchmark.calibrate(subject)
    sizes = linear_sizes(teacher, resolve(teacher))
    plan = allocate(sizes, int(0.6 * sum(size.parameters(None) for size in sizes)))
    terms = benchmark.decompose(subject, "svd_llm")
    student = benchmark.fitted(subject, "svd_llm", plan, terms)
    factored = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    for name, rank in factored.items():
        assert torch.equal(student.get_submodule(name).reduce.weight, terms[name].factors(rank).reduce)
    name, rank = list(factored.items())[-1]  # it reads what the layers before it, factored, give
    assert not torch.allclose(student.get_submodule(name).expand.weight, terms[name].factors(rank).expand, rtol=1e-3)


def test_sides_below_the_smallest_that_is_timed_are_told_with_what_is_allowed(monkeypatch, capsys):
    stream = importlib.import_module("stream")
    monkeypatch.setattr(sys, "argv", ["stream.py", "--cost", "--largest", "511"])
    with pytest.raises(SystemExit, match="2"):
        stream.main()
    assert "--largest is at least 512, the smallest side that is timed; got 511" in capsys.readouterr().err
