"""Rules of the house that no linter knows."""

import ast
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import makd
from makd.solvers.eigen import eigh
from tests.type_checks import with_shapes

SOURCE = Path(makd.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
LONGEST = 400
"""Lines. A longer module has two ideas."""
SAYS_NOTHING = {"utils", "util", "misc", "helpers", "helper", "common", "base", "core"}


def name(path):
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", MODULES, ids=name)
class TestEveryModule:
    def test_says_in_its_first_line_what_it_is(self, path):
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text))

    def test_fits_on_a_few_screens(self, path):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST

    def test_has_a_name_that_says_what_is_in_it(self, path):
        assert not {path.stem, *path.relative_to(SOURCE).parts[:-1]} & SAYS_NOTHING


def test_shapes_in_signatures_are_checked_while_tests_run():
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(TypeCheckError):
            eigh(wrong)
    assert {"makd.solvers.eigen", "makd.aspects.hidden", "makd.student.linear"} <= {*with_shapes()}


def test_public_names_are_listed_once_and_exist():
    assert sorted(makd.__all__) == makd.__all__ == sorted(makd._HOME)
    assert all(hasattr(makd, public) for public in makd.__all__)


def test_the_tree_in_the_readme_is_the_tree():
    readme = Path(__file__).parents[1] / "README.md"
    lines = readme.read_text(encoding="utf-8").split("src/makd/\n", 1)[1].split("```", 1)[0].splitlines()
    listed = {line.split()[0].rstrip("/") for line in lines if line.strip()}
    there = {path.name for path in SOURCE.iterdir()}
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert listed <= there
    assert folders <= listed


def test_each_folder_has_its_tests_in_a_folder_of_its_name():
    tests = Path(__file__).parent
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders == {name for name in folders if [*(tests / name).glob("test_*.py")]}
    assert not [path.name for path in tests.glob("test_*.py") if path.stem.removeprefix("test_") in folders]
