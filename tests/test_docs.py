"""The documentation says what the code does: links lead somewhere, settings have the defaults that are written down."""

import ast
import dataclasses
import functools
import inspect
import re
import shlex
import types
import typing
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import makd
from makd import errors
from makd.anatomy.families import Fused
from makd.anatomy.table import FAMILIES, REFUSED
from makd.aspects import ASPECTS, PRESETS
from makd.baselines import BASELINES
from makd.cli.main import COMMANDS, main
from makd.data import Source
from makd.measures import LABELS, TASK_LABELS
from makd.ranks.allocation import RANK_RULES
from makd.run_folder import plain
from makd.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
GRIDS = sorted(path for path in (ROOT / "examples").glob("*/*.yaml") if path.parent.name != "accelerate")
CONFIGS = {
    "budget": makd.Budget,
    "cache": makd.CacheConfig,
    "data": makd.DataConfig,
    "data.mixture[]": Source,
    "instructions": makd.InstructionsConfig,
    "recipe": makd.Recipe,
    "recipe.calibration": makd.CalibrationConfig,
    "recipe.factorize": makd.FactorizeConfig,
    "recipe.layerwise": makd.LayerwiseConfig,
    "recipe.plan": makd.Plan,
    "recipe.plan.completions": makd.Completions,
    "recipe.plan.terms[]": makd.Term,
    "recipe.training": makd.TrainingConfig,
    "recipe.evaluation": makd.EvaluationConfig,
    "recipe.stages[]": makd.Stage,
    "task": makd.TaskConfig,
    "finetune.recipe": makd.FinetuneRecipe,
}
"""Where a dataclass stands in YAML -> the dataclass."""
TICKED = re.compile(r"`(makd\.[\w.]+)`")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


DATA_OF_A_RUN = makd.DataConfig(path="pydoc")
MADE = ("runs/", "some/teacher")
"""How names of models begin that an earlier command has made: they know their text, and no other model does."""


class Parsed(Exception):
    """The command line understood its words, and would have begun."""


@pytest.fixture
def parse(monkeypatch):
    """Read `makd WORDS...` as the command line does, dataclasses and their checks too, and do nothing."""
    from makd import comparison, exporting, finetuning, loading, pipeline, speed, streaming
    from makd.cli import cache as cache_command
    from makd.cli import report as report_command

    for name in makd.__all__:  # it keeps what a name meant when it was first used
        getattr(makd, name)

    def stop(*_arguments, **_named):
        raise Parsed

    for name in ("compress", "factorize_only", "distill", "evaluate"):
        monkeypatch.setattr(pipeline, name, stop)
    monkeypatch.setattr(finetuning, "finetune", stop)
    monkeypatch.setattr(streaming, "factorize_streamed", stop)
    monkeypatch.setattr(speed, "bench", stop)
    monkeypatch.setattr(exporting, "export", stop)
    for name in ("compare", "write_page", "write_comparison_report", "done_lines"):
        monkeypatch.setattr(comparison, name, stop)
    monkeypatch.setattr(cache_command, "build_cache", stop)
    monkeypatch.setattr(report_command, "write_report", stop)
    monkeypatch.setattr(loading, "load_model", stop)
    read = pipeline.data_of
    monkeypatch.setattr(
        pipeline, "data_of", lambda model: DATA_OF_A_RUN if str(model).startswith(MADE) else read(model)
    )
    monkeypatch.setattr("makd.cli.main.set_up_logging", lambda quiet: None)
    monkeypatch.chdir(ROOT)

    def parser(*words):
        with pytest.raises(Parsed):
            main([str(word) for word in words])

    return parser


def blocks(language):
    """Code blocks of a language, with the page that they stand in; indentation in lists is taken off."""
    found = []
    for page in PAGES:
        for indent, tag, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if tag == language:
                text = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{len(found)}"))
    return found


def commands():
    """Lines of shell blocks that call makd; a backslash joins lines."""
    lines = {line.strip(): None for block in blocks("sh") for line in block.values[0].replace("\\\n", " ").splitlines()}
    return [line for line in lines if line.startswith("makd ")]


def anchors(page):
    """What `#...` may name in a page, as GitHub makes it from headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page, width):
    """Cells of the table rows of a page that have this many of them."""
    lines = (REFERENCE / page).read_text(encoding="utf-8").splitlines()
    split = ([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [cells for cells in split if len(cells) == width]


def headings(page):
    return re.findall(r"^#+ +(.*)$", (REFERENCE / page).read_text(encoding="utf-8"), re.MULTILINE)


def type_text(annotation):
    """A type as the reference writes it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    return annotation.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "README.md":
            assert f"({page.relative_to(ROOT / 'docs')})" in index


@pytest.mark.parametrize("place", CONFIGS)
def test_every_setting_is_written_down_with_its_type_and_default_in_the_order_of_the_code(place):
    depth = place.count(".") + 1
    written = [
        (name.rpartition(".")[2], kind, default)
        for name, kind, default, _ in ([cells[0].strip("`"), *cells[1:]] for cells in rows("recipe.md", 4))
        if name.startswith(f"{place}.") and name.count(".") == depth
    ]
    fields = dataclasses.fields(CONFIGS[place])
    assert [name for name, *_ in written] == [field.name for field in fields]
    for (name, kind, default), field in zip(written, fields, strict=True):
        assert kind == type_text(field.type), name
        if dataclasses.is_dataclass(field.type):
            continue
        if field.default is dataclasses.MISSING:
            assert default == "required", name
        else:
            assert yaml.safe_load(default.strip("`")) == plain(field.default), name


def settings_in(kind):
    """Every dataclass that a type is, holds or may hold."""
    parts = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        yield kind
        parts = [field.type for field in dataclasses.fields(kind)]
    for part in parts:
        yield from settings_in(part)


def test_every_dataclass_of_settings_is_tested():
    roots = (makd.Budget, makd.CacheConfig, makd.DataConfig, makd.InstructionsConfig, makd.TaskConfig, makd.Recipe,
             makd.FinetuneRecipe)  # fmt: skip
    assert {kind for root in roots for kind in settings_in(root)} == set(CONFIGS.values())


@pytest.mark.parametrize(
    ("page", "names"),
    [("solvers.md", SOLVERS), ("aspects.md", ASPECTS), ("cli.md", COMMANDS), ("solvers.md", RANK_RULES)],
    ids=["solvers", "aspects", "commands", "rank rules"],
)
def test_every_name_has_a_row_in_its_reference(page, names):
    text = (REFERENCE / page).read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"^\| `(makd )?{name}[` ]", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("page", "names"), [("solvers.md", SOLVERS), ("aspects.md", ASPECTS)], ids=["solvers", "aspects"]
)
def test_every_solver_and_aspect_has_a_section(page, names):
    assert set(names) <= set(headings(page))


def test_every_baseline_has_a_row_in_the_order_of_the_code():
    text = (ROOT / "docs" / "explanation" / "baselines.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(BASELINES)


def test_the_table_of_aspects_is_that_of_the_code():
    written = {cells[0].strip("`"): set(re.findall(r"`(\w+)`", cells[3])) for cells in rows("aspects.md", 4)}
    for name in ASPECTS.own:
        aspect = ASPECTS[name]
        assert written[name] == {*aspect.has, *(["tokens"] if len(aspect.tokens) > 1 else [])}


def test_the_table_of_presets_is_that_of_the_code():
    header, *table = (cells for cells in rows("aspects.md", 8) if not cells[0].startswith("-"))
    written = {
        preset.strip("`"): {aspect: cell for aspect, cell in zip(header[1:], cells, strict=True) if cell}
        for preset, *cells in table
    }
    expected = {
        name: {
            term.aspect: (str(term.layers) if term.aspect in ("matrix", "hidden", "attention") else "yes")
            + (f" \u00d7 {term.weight:g}" if term.weight != 1 else "")
            for term in preset.terms
        }
        for name, preset in PRESETS.items()
    }
    assert written == expected


def test_the_table_of_objectives_is_that_of_the_code():
    written = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("aspects.md", 4) if cells[0].startswith("`")}
    for name in ("sft", "kd", "seq_kd", "minillm", "gkd", "distillm"):
        assert [term.divergence for term in PRESETS[name].terms if term.aspect == "logits"] == (
            [written[name]] if written[name] else []
        )


def test_every_error_has_a_section():
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert len(classes) > 5
    assert set(classes) <= set(headings("errors.md"))


def test_every_measurement_is_defined():
    text = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    for name in {*LABELS, *TASK_LABELS, "fingerprint", "latency_ms", "params", "bytes", "seconds", "tokens"}:
        assert re.search(rf"`{name}[.`]", text) or f"`{name}.teacher`" in text, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_every_family_is_in_the_table_with_its_linears(family):
    table = [cells for cells in rows("architectures.md", 6) if f"`{family.model_types[0]}`" in cells[0]]
    text = " ".join(" ".join(cells) for cells in table)
    for model_type in family.model_types:
        assert f"`{model_type}`" in text
    for stack in family.stacks:
        assert f"`{stack.layers}`" in text
        places = [*stack.linears.values(), *stack.down.values(), *(p for v in stack.variants for p in v.values())]
        for place in places:
            assert f"`{place.module if isinstance(place, Fused) else place}" in text
    different = " ".join(" ".join(cells) for cells in rows("architectures.md", 2))
    for aspect in family.off:
        assert f"the `{aspect}` aspect is off" in different
        assert f"`{family.model_types[0]}`" in different


@pytest.mark.parametrize("model_type", REFUSED)
def test_every_refused_type_is_listed_with_its_reason(model_type):
    (reason,) = [
        why for types, why in rows("architectures.md", 2) if f"`{model_type}`" in types and why in REFUSED.values()
    ]
    assert reason == REFUSED[model_type]


def test_every_public_name_is_written_down():
    text = (REFERENCE / "python.md").read_text(encoding="utf-8")
    for name in makd.__all__:
        assert f"`makd.{name}" in text, name


def test_every_name_of_the_python_reference_is_there_and_says_what_its_arguments_are():
    text = (REFERENCE / "python.md").read_text(encoding="utf-8")
    named = {name for cell in re.findall(r"^\| (`makd\..*?) \| ", text, re.MULTILINE) for name in TICKED.findall(cell)}
    assert len(named) > len(makd.__all__)
    for name in named:
        value = functools.reduce(getattr, name.split(".")[1:], makd)
        if inspect.isfunction(value) and name.count(".") == 1:
            described = inspect.getdoc(value) or ""
            arguments = list(inspect.signature(value).parameters)
            assert len(arguments) < 4 or all(f"{one}:" in described for one in arguments), name


def test_the_code_of_the_example_package_is_that_of_its_page():
    page = (ROOT / "docs" / "how-to" / "extend-makd.md").read_text(encoding="utf-8")
    package = ROOT / "examples" / "extension" / "src" / "makd_example"
    for block, name in zip(re.findall(r"```python\n(.*?)```", page, re.DOTALL), ("solver", "aspect"), strict=False):
        assert block in (package / f"{name}.py").read_text(encoding="utf-8")
    (end,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert end in (package / "anatomy.py").read_text(encoding="utf-8")


def test_the_version_is_the_same_wherever_it_stands():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE) == [
        version
    ]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", changes, re.MULTILINE)[0] in ("Unreleased", version)


def test_every_dependency_has_its_reason():
    text = (ROOT / "docs" / "explanation" / "dependencies.md").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packages = re.findall(r'^  "([\w-]+)', listed[1], re.MULTILINE)
    assert len(packages) > 5
    for package in packages:
        assert re.search(rf"^\| {package} \|", text, re.MULTILINE), package


def cells_of(page, title):
    """Rows of the table under a heading of a page of results."""
    text = (ROOT / "docs" / "results" / page).read_text(encoding="utf-8")
    (part,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]


def test_what_was_measured_beside_other_tools_is_what_the_results_say():
    page = (ROOT / "docs" / "explanation" / "other-tools.md").read_text(encoding="utf-8")
    names = {"MiniLM-L6": "minilm", "SmolLM2-135M": "smollm2", "TRL's GKD trainer": "gkd"}
    steps = re.findall(
        r"^\| (.+?) \| (.+?), (\d+) \u00d7 (\d+) \| (\w+).*? \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE
    )
    assert len(steps) == 6
    for tool, model, rows_, tokens, plan, time, memory in steps:
        table = cells_of("distillation.md", f"{names[model]}, {rows_} x {tokens} tokens")
        (row,) = [cells for cells in table if cells[:2] == [plan, names.get(tool, tool.lower())]]
        assert (row[5], f"{float(row[7]):.2f}") == (time, memory)
    starts = re.findall(r"^\| (\w[^|]*?) \| (uniform|global) \| (\S+) \| (\S+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(starts) == 4
    table = cells_of("factorization.md", "smollm2")[:24]
    for method, ranks, *expected, seconds in starts:
        name = re.sub(r"^makd `(\w+)`.*", r"\1", method)
        (row,) = [cells for cells in table if cells[:2] == [name, ranks]]
        assert [row[2].split()[0], row[3].split()[0], row[5]] == [*expected, seconds]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_are_python(code):
    ast.parse(code)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_blocks_are_recipes_or_parts_of_one(code, parse, tmp_path):
    recipe = {"teacher": "some/teacher", "output": "runs/student", "budget": {"keep": 0.5}, **yaml.safe_load(code)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    parse("compress", "--config", tmp_path / "recipe.yaml")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_parse_and_are_described(example, parse):
    parse("compress", "--config", example)
    assert f"({example.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", GRIDS, ids=lambda path: path.name)
def test_grids_parse_and_are_described(example, parse):
    parse("compare", example, "--dry_run")
    assert f"({example.relative_to(ROOT / 'examples')})" in (ROOT / "examples" / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("example", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_read_by_accelerate_and_described(example):
    assert load_config_from_file(str(example)).mixed_precision == "no"  # else a recipe in float32 is refused
    assert f"(accelerate/{example.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_blocks_of_code_are_closed():
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.strip().startswith("```")]
        assert all(fence.strip() == "```" for fence in fences[1::2]), page
        assert len(fences) % 2 == 0, page


def test_the_files_that_the_architecture_names_are_there():
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/[\w/]+\.py)`", page)
    assert len(named) > 50
    assert [
        name for name in named if not (ROOT / "src" / "makd" / name).is_file() and not (ROOT / name).is_file()
    ] == []


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line, parse, tmp_path):
    words = shlex.split(line.split("#")[0].replace("$solver", "svd"))[1:]
    words = [word for word in words if word != "--print_config"]
    for index, word in enumerate(words):
        if word.endswith(".yaml") and not (ROOT / word).exists():  # the reader's own, made earlier on the page
            own = {"teacher": "some/teacher", "output": "runs/student", "budget": {"keep": 0.5}}
            (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
            words[index] = tmp_path / "own.yaml"
    parse(*words)
