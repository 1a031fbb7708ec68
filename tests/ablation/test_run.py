"""An ablation of a real run on a tiny model: its cells, its resume and its table."""

import json
import re
import shutil
from statistics import mean, stdev

import pytest

import makd
from makd.ablation import Ablation, ablate, ablation_table, write_ablation_report
from makd.ablation.measured import measures_of
from makd.ablation.variations import WHOLE
from makd.errors import OutputError, SettingError
from makd.measures import LABELS
from makd.pipeline import distill, factorize_only

BUDGET = makd.Budget(keep_linears=0.5)
TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(200)]
RECIPE = makd.Recipe(
    plan=makd.Plan(terms=(makd.Term(aspect="hidden"), makd.Term(aspect="embedding"))),
    training=makd.TrainingConfig(steps=2, batch_size=4, learning_rate=1e-2),
    calibration=makd.CalibrationConfig(rows=16),
    evaluation=makd.EvaluationConfig(rows=40, latency=False),
    device="cpu",
)


@pytest.fixture(scope="module")
def found(encoder_folder, tmp_path_factory) -> Ablation:
    return ablate(str(encoder_folder), TEXTS, BUDGET, RECIPE, tmp_path_factory.mktemp("ablation"), seeds=(1, 2))


def test_each_seed_has_a_cell_of_each_variation(found):
    assert [(line["seed"], line["variation"]) for line in found.lines] == [
        (1, WHOLE), (1, "without hidden"), (1, "without embedding"),
        (2, WHOLE), (2, "without hidden"), (2, "without embedding"),
    ]  # fmt: skip


def test_the_cells_of_a_seed_begin_from_one_start_and_end_apart(found):
    of_first = [line["metrics"]["fidelity"] for line in found.lines if line["seed"] == 1]
    assert len({json.dumps(fidelity["before"]) for fidelity in of_first}) == 1
    assert len({fidelity["after"]["cosine"] for fidelity in of_first}) == 3


def test_a_cell_is_what_factorize_and_distill_give_with_its_seed_and_plan(found, encoder_folder, tmp_path):
    recipe = makd.Recipe(**{**vars(RECIPE), "seed": 2})
    factorize_only(str(encoder_folder), TEXTS, BUDGET, recipe, tmp_path / "start")
    only = makd.Recipe(**{**vars(recipe), "plan": makd.Plan(terms=(makd.Term(aspect="embedding"),))})
    report = distill(str(tmp_path / "start"), str(encoder_folder), TEXTS, only, tmp_path / "taught")
    assert found.lines[4]["variation"] == "without hidden"
    assert found.lines[4]["metrics"]["fingerprint"] == report.metrics["fingerprint"]


def test_what_is_done_is_not_done_again_and_other_settings_are(found, encoder_folder, monkeypatch, tmp_path):
    def refuse(*_arguments, **_settings):
        raise AssertionError("a cell was run")

    monkeypatch.setattr("makd.ablation.run.distill", refuse)
    again = ablate(str(encoder_folder), TEXTS, BUDGET, RECIPE, found.folder, seeds=(1, 2))
    assert again.lines == found.lines
    shutil.copy(found.folder / "results.jsonl", tmp_path)
    with pytest.raises(AssertionError, match="a cell was run"):
        ablate(str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.4), RECIPE, tmp_path, seeds=(1,))


def test_nothing_but_lines_and_their_table_stays(found):
    left = {path.name for path in found.folder.iterdir() if path.suffix != ".lock"}
    assert left == {"results.jsonl", "sources.jsonl", "table.md"}
    assert (found.folder / "table.md").read_text() == ablation_table(found.lines).markdown + "\n"


def test_the_table_has_means_and_paired_differences(found):
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ablation_table(found.lines).markdown.splitlines()
    ]
    assert [row[0] for row in table[2:]] == [
        "start, untaught", WHOLE, "without hidden", "without embedding",
    ]  # fmt: skip
    column = table[0].index("rank correlation")
    values = {
        name: [line["metrics"]["fidelity"]["after"]["rank_correlation"] for line in found.lines
               if line["variation"] == name]
        for name in (WHOLE, "without hidden")
    }  # fmt: skip
    own = values["without hidden"]
    assert table[0][1] == "rank correlation"
    assert table[4][column] == f"{mean(own):.4f} ± {stdev(own) / 2**0.5:.4f}"
    gains = [ours - theirs for ours, theirs in zip(own, values[WHOLE], strict=True)]
    assert table[4][-1].startswith(f"{mean(gains):+.4f} = {mean(gains) / (stdev(gains) / 2**0.5):+.1f} SE (p ")
    assert table[3][-1] == ""


def test_the_report_has_the_differences_of_each_measure_and_the_share_of_time(found, tmp_path):
    text = write_ablation_report(found, tmp_path / "ablation.html", "my.yaml").read_text()
    specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    told = {spec["description"].split(".")[0]: spec["data"]["values"] for spec in specs}
    assert [*told] == ["rank correlation", "cosine to teacher", "What it costs"]
    values = {
        name: [line["metrics"]["fidelity"]["after"]["cosine"] for line in found.lines if line["variation"] == name]
        for name in (WHOLE, "without embedding")
    }
    gains = [ours - theirs for ours, theirs in zip(values["without embedding"], values[WHOLE], strict=True)]
    (row,) = [row for row in told["cosine to teacher"] if row["name"] == "without embedding"]
    assert row["gain"] == pytest.approx(mean(gains))
    assert row["high"] - row["gain"] == pytest.approx(stdev(gains) / 2**0.5)
    seconds = {
        name: mean(line["metrics"]["seconds"]["distill"] for line in found.lines if line["variation"] == name)
        for name in (WHOLE, "without hidden")
    }
    (row,) = [row for row in told["What it costs"] if row["name"] == "without hidden"]
    assert row["share"] == pytest.approx(seconds["without hidden"] / seconds[WHOLE])


def _score(value):
    return {"task": {"after": {"score": value}}}


def _fidelity(name):
    return lambda value: {"fidelity": {"after": {name: value}}}


MORE_IS_BETTER = {
    "score": _score,
    **{
        name: _fidelity(name)
        for name in ("rank_correlation", "cosine", "top1_agreement", "label_agreement", "label_set_agreement")
    },
}
LESS_IS_BETTER = {
    "perplexity": lambda value: {"perplexity": {"after": value}},
    **{name: _fidelity(name) for name in ("prediction_kl", "squared_difference")},
}
"""Measurement -> what a run's metrics have of it."""


def _lines(whole, without, metrics=_score):
    """Lines of as many seeds as there are values, of a task's score or another measurement."""
    return [
        {"variation": name, "seed": seed, "metrics": {**metrics(value), "seconds": {"distill": 1.0}}}
        for name, values in ((WHOLE, whole), ("without hidden", without))
        for seed, value in enumerate(values)
    ]


def test_of_every_measurement_it_is_known_whether_more_or_less_is_better():
    assert {*LABELS, "score"} == MORE_IS_BETTER.keys() | LESS_IS_BETTER.keys()


HIGHER, LOWER = [0.80, 0.81, 0.82], [0.70, 0.70, 0.72]


@pytest.mark.parametrize("name", [*MORE_IS_BETTER, *LESS_IS_BETTER])
@pytest.mark.parametrize(("with_aspect", "without"), [(HIGHER, LOWER), (LOWER, HIGHER)])
def test_the_report_names_an_aspect_by_whether_the_plan_does_better_with_it(with_aspect, without, name, tmp_path):
    metrics = (MORE_IS_BETTER | LESS_IS_BETTER)[name]
    is_better = (with_aspect is HIGHER) is (name in MORE_IS_BETTER)
    answers, text = _answers(_lines(with_aspect, without, metrics), tmp_path)
    assert answers == {
        "Missed when it is off": "hidden" if is_better else "none",
        "Better when it is off": "none" if is_better else "hidden",
    }
    assert f"{'more' if name in MORE_IS_BETTER else 'less'} {measures_of(metrics(0.5))[0].label} is better" in text


def test_the_report_names_no_aspect_where_the_difference_is_not_clear(tmp_path):
    answers, _ = _answers(_lines([0.80, 0.70, 0.90], [0.81, 0.68, 0.91]), tmp_path)
    assert answers == {"Missed when it is off": "none", "Better when it is off": "none"}


def _answers(lines, folder):
    """Title -> what the report's tiles of aspects say, and its whole text."""
    text = write_ablation_report(Ablation(folder, tuple(lines)), folder / "ablation.html").read_text()
    return dict(re.findall(r'<h3>([^<]*)</h3><p class="answer">([^<]*)</p>', text)), text


def test_the_report_of_one_seed_says_that_nothing_can_be_told(tmp_path):
    found = Ablation(tmp_path, tuple(_lines([0.8], [0.7])))
    text = write_ablation_report(found, tmp_path / "ablation.html").read_text()
    assert "One seed has no standard error" in text
    assert "Missed when it is off" not in text


def test_the_report_replaces_no_other_file(found, tmp_path):
    (tmp_path / "ablation.html").write_text("precious")
    with pytest.raises(OutputError, match="no report that makd wrote"):
        write_ablation_report(found, tmp_path / "ablation.html")


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_different_and_at_least_one(seeds, encoder_folder, tmp_path):
    with pytest.raises(SettingError, match="seeds are one or more different numbers"):
        ablate(str(encoder_folder), TEXTS, BUDGET, RECIPE, tmp_path, seeds=seeds)


def test_a_line_is_not_of_a_package_that_has_changed(found, encoder_folder, tmp_path, monkeypatch):
    shutil.copy(found.folder / "results.jsonl", tmp_path)
    monkeypatch.setattr(
        "makd.ablation.run.extensions_of", lambda *_: {"aspect 'lengths'": "package 2 (another digest)"}
    )
    monkeypatch.setattr("makd.ablation.run.factorize_only", lambda *_, **__: None)

    def refuse(*_arguments, **_settings):
        raise AssertionError("a cell was run")

    monkeypatch.setattr("makd.ablation.run.distill", refuse)
    with pytest.raises(AssertionError, match="a cell was run"):
        ablate(str(encoder_folder), TEXTS, BUDGET, RECIPE, tmp_path, seeds=(1,))


def test_differences_that_cancel_out_have_their_spread_and_a_page(tmp_path):
    lines = _lines([0.80, 0.82], [0.81, 0.81])
    text = write_ablation_report(Ablation(tmp_path, tuple(lines)), tmp_path / "page.html", "my.yaml").read_text()
    specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    (row,) = next(spec["data"]["values"] for spec in specs if spec["description"].startswith("score"))
    assert row["gain"] == pytest.approx(0, abs=1e-12)
    assert row["high"] - row["gain"] == pytest.approx(0.01)
