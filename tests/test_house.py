"""Rules of the house that no linter knows."""

import ast
import re
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

EMPTY_CONDITION = re.compile(
    r"^ *\w+: (it|they|one|some) (is|are|does|do|has|have|can|cannot|would|would not|is so|is not|does not|has not)\.$",
    re.M,
)
"""What is said under "Raises" and names no condition."""


def functions(path):
    """Name and docstring of every function in a module that has one."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    return [(node.name.lstrip("_"), ast.get_docstring(node)) for node in nodes if ast.get_docstring(node)]


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


def test_modules_say_the_station_that_the_architecture_gives_their_folder():
    page = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    stations = {folder: number for number, folder in re.findall(r"^\| (\d+) \| `(\w+)/` \|", page, re.MULTILINE)}
    stations |= dict.fromkeys(("comparison", "ablation", "export"), "10")
    said = {
        name(path): match[1]
        for path in MODULES
        if (match := re.match(r'"""Station (\d+)', path.read_text(encoding="utf-8"))) and "/" in name(path)
    }
    assert len(said) > 150
    assert {path: number for path, number in said.items() if stations.get(path.split("/")[0]) != number} == {}


@pytest.mark.parametrize("path", MODULES, ids=name)
class TestEveryFunction:
    def test_that_checks_says_what_it_refuses(self, path):
        assert not [one for one, text in functions(path) if one.startswith("check_") and not text.startswith("Refuse")]

    def test_that_asks_says_whether(self, path):
        asking = [(one, text) for one, text in functions(path) if one.startswith(("is_", "has_"))]
        assert not [one for one, text in asking if not text.startswith("Whether")]

    def test_is_described_without_its_neighbour(self, path):
        assert not [one for one, text in functions(path) if text.startswith("The same")]

    def test_says_when_it_raises(self, path):
        assert not [one for one, text in functions(path) if EMPTY_CONDITION.search(text)]


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
