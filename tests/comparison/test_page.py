"""The page and the report of a comparison say what was found."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

import makd
from makd import comparison
from makd.comparison import page as pages
from makd.comparison.all_results import ComparisonResults, introduction
from makd.comparison.cells import all_cells, cell_hash
from makd.comparison.done import RESULTS_FILE
from makd.comparison.plot import draw
from makd.comparison.results import append_line, read_lines
from makd.comparison.setup import majority_score
from makd.comparison.tables import best_baseline
from makd.errors import OutputError
from tests.comparison.experiments import make


class TestPage:
    def test_the_page_has_every_method_the_teacher_the_majority_and_what_was_paid(self, done, tmp_path):
        experiment, lines = done
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        assert "8 of 8 cells" in page
        own = [line["score"] for line in lines if line["cell"]["method"] == "low_rank_svd"]
        assert f"| `low_rank_svd` | {100 * (own[0] + own[2]) / 2:.2f} ± " in page  # mrpc of both seeds
        assert "the best baseline" in page
        row = next(line for line in page.splitlines() if line.startswith("| `makd_paper`"))
        assert ", n 4 |" in row
        assert "| *teacher* |" in page
        assert f"| {lines[0]['params']['student']['linears']:,} |" in page
        assert "learning_rate 0.0001" in page

    def test_a_score_is_told_by_the_metrics_that_it_is_the_mean_of(self, done):
        tasks = (makd.TaskConfig(name="squad", path="squad"), makd.TaskConfig(name="glue/mrpc", path="mrpc"))
        told = introduction(replace(done[0], tasks=tasks), ComparisonResults((), [], {}))
        assert "(squad: F1; mrpc: accuracy and F1)" in told

    def test_the_report_has_the_pages_tables_the_frontier_and_paired_differences(self, done, tmp_path):
        experiment, lines = done
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        own = [line["score"] for line in lines if line["cell"]["method"] == "low_rank_svd"]
        assert f"{100 * (own[0] + own[2]) / 2:.2f} ± " in text  # mrpc of both seeds
        specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        frontier = next(one for one in specs if one["description"].startswith("Quality against size"))
        first, *others = frontier["data"]["values"]
        scores = np.array([[line["score"] for line in lines if line["cell"]["method"] == first["method"]
                            and line["cell"]["seed"] == seed] for seed in (1, 2)]).mean(1)  # fmt: skip
        theirs = np.array([[line["teacher"]["score"] for line in lines if line["cell"]["method"] == first["method"]
                            and line["cell"]["seed"] == seed] for seed in (1, 2)]).mean()  # fmt: skip
        assert first["quality"] == pytest.approx(100 * scores.mean() / theirs)
        assert first["error"] == pytest.approx(100 * scores.std(ddof=1) / 2**0.5 / theirs)
        differences = next(one for one in specs if one["description"].startswith("Paired differences"))
        other = others[0]["method"]
        by_cell = {tuple(line["cell"].values()): line["score"] for line in lines}
        gains = np.array([
            score - by_cell[task, other, seed, budget]
            for (task, method, seed, budget), score in by_cell.items() if method == first["method"]
        ])  # fmt: skip
        row = next(one for one in differences["data"]["values"] if one["name"] == other)
        assert row["gain"] == pytest.approx(100 * gains.mean())
        by_task = gains.reshape(2, 2)  # cells stand by seed, then by task
        assert row["high"] - row["gain"] == pytest.approx(100 * (by_task.var(0, ddof=1).mean() / gains.size) ** 0.5)

    def made_up(self, done, folder, scores):
        """An experiment whose cells have these scores, by method and seed, of every task."""
        methods = tuple(makd.MethodConfig(name=name) for name in scores)
        experiment = replace(done[0], output=str(folder), methods=methods)
        for cell in all_cells(experiment):
            if cell.seed in scores[cell.method.name]:
                line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
                del line["rows"]
                append_line(folder / RESULTS_FILE, {**line, "score": scores[cell.method.name][cell.seed]})
        return experiment

    def test_one_seed_has_no_standard_error_and_is_no_evidence(self, done, tmp_path):
        scores = {"makd_paper": {1: 0.51}, "low_rank_svd": {1: 0.5}, "pkd": {1: 0.49}}
        experiment = self.made_up(done, tmp_path, scores)
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        assert "of one seed, without an SE" in text
        assert "One seed has no standard error: nothing of this can be told from chance" in text
        specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        frontier = next(one for one in specs if one["description"].startswith("Quality against size"))
        assert [row["error"] for row in frontier["data"]["values"]] == [None] * 3

    def test_a_row_of_fewer_seeds_is_no_best_one(self, done, tmp_path):
        scores = {"makd_paper": {1: 0.5, 2: 0.6}, "low_rank_svd": {1: 0.4, 2: 0.5}, "pkd": {2: 0.9}}
        experiment = self.made_up(done, tmp_path, scores)
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        assert '<p class="answer">makd_paper</p>' in text
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        (reference,) = [line for line in page.splitlines() if line.endswith(" | the best baseline |")]
        assert reference.startswith("| `low_rank_svd` |")

    def test_two_rows_that_come_to_the_same_settings_both_stand_there(self, done, tmp_path):
        rows = (makd.MethodConfig(name="makd"), makd.MethodConfig(name="twin", method="makd"))
        experiment = replace(done[0], output=str(tmp_path), methods=rows)
        for cell in all_cells(experiment):
            line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            append_line(tmp_path / RESULTS_FILE, line)
        assert len({line["hash"] for line in read_lines(tmp_path / RESULTS_FILE)}) == 4
        assert len(comparison.done_lines(experiment, all_cells(experiment))) == 8

    def test_the_report_replaces_a_report_and_nothing_else(self, done, tmp_path):
        for _ in range(2):
            comparison.write_comparison_report(done[0], tmp_path / "grid.html")
        (tmp_path / "grid.html").write_text("precious")
        with pytest.raises(OutputError, match="no report that makd wrote"):
            comparison.write_comparison_report(done[0], tmp_path / "grid.html")

    def test_what_was_not_timed_or_set_takes_no_room(self, done, tmp_path):
        experiment, lines = done
        told = {**lines[0]["settings"], "layers": None}
        here = replace(experiment, output=str(tmp_path))
        for line in lines:
            append_line(tmp_path / RESULTS_FILE, {**line, "settings": told})
        page = comparison.write_page(here, tmp_path / "page.md").read_text()
        assert "| seconds |\n" in page
        assert "layers" not in page

    def test_a_page_of_nothing_says_what_to_run(self, data, encoder_folder, tmp_path):
        for name in ("thesis.md", "thesis.svg"):
            (tmp_path / name).write_text("precious")
            with pytest.raises(OutputError, match=f"{name} is there, and not of a page"):
                comparison.write_page(make(data, encoder_folder, tmp_path / "none"), tmp_path / "thesis.md")
            assert (tmp_path / name).read_text() == "precious"
            (tmp_path / name).unlink()
        with pytest.raises(OutputError, match="makd compare"):
            comparison.write_page(make(data, encoder_folder, tmp_path / "none"), tmp_path / "page.md")

    def test_budgets_make_a_plot(self, done, tmp_path):
        assert "page.svg" in self.write_two_budgets(done, tmp_path)
        plot = ElementTree.parse(tmp_path / "page.svg").getroot()
        texts = {element.text for element in plot.iter() if element.tag.endswith("text")}
        assert {
            "low_rank_svd",
            "makd_paper",
            "parameters, of the teacher's",
            "average score, of the teacher's",
        } <= texts

    def write_two_budgets(self, done, tmp_path):
        experiment, lines = done
        two = replace(experiment, output=str(tmp_path), budgets=(*experiment.budgets, makd.Budget(keep_linears=0.8)))
        for cell in all_cells(two):
            copied = {**lines[0], "cell": cell.names, "hash": cell_hash(two, cell, {}), "score": 0.5}
            copied["teacher"] = {"score": 0.5 + 0.1 * cell.budget.keep_linears}
            append_line(tmp_path / RESULTS_FILE, copied)
        return comparison.write_page(two, tmp_path / "page.md").read_text()

    def test_without_matplotlib_the_page_has_no_plot_and_the_log_says_what_brings_it(
        self, done, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(pages, "can_draw", lambda: False)
        page = self.write_two_budgets(done, tmp_path)
        assert "page.svg" not in page
        assert not (tmp_path / "page.svg").exists()
        assert "pip install 'makd[compare]'" in caplog.text

    def test_a_flat_line_can_be_drawn_and_the_same_curves_make_the_same_file(self, tmp_path):
        for name in ("one.svg", "other.svg"):
            draw({"a": [(0.3, 0.5), (0.6, 0.5)]}, "size", "quality", tmp_path / name)
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()

    def test_a_row_with_more_steps_says_so(self, done, tmp_path):
        longer = makd.MethodConfig(name="longer", method="low_rank_svd", times_steps=1.5)
        experiment = replace(done[0], output=str(tmp_path), methods=(longer,), seeds=(1,))
        for cell in all_cells(experiment):
            append_line(
                tmp_path / RESULTS_FILE, {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            )
        assert (
            "| `longer` | 1.5 times the steps; start svd"
            in comparison.write_page(experiment, tmp_path / "page.md").read_text()
        )

    def test_our_own_methods_are_no_baselines(self, done):
        assert best_baseline(done[0], {"makd_paper": {("mrpc", 1): 1.0}}, ["mrpc"]) is None

    def test_without_baselines_rows_are_compared_with_the_first(self, done, tmp_path):
        methods = tuple(
            makd.MethodConfig(name=name, method="makd_paper", settings={"layer_weight": weight})
            for name, weight in (("whole", 1.0), ("half", 0.5))
        )
        experiment = replace(done[0], output=str(tmp_path), methods=methods)
        for cell in all_cells(experiment):
            line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            score = 0.5 if cell.method.name == "whole" else 0.4
            append_line(tmp_path / RESULTS_FILE, {**line, "score": score})
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        assert "difference to `whole` |" in page
        told = [line.rpartition(" % | ")[2] for line in page.splitlines() if line.startswith(("| `whole`", "| `half`"))]
        assert told[:2] == ["`whole` |", "-10.00, n 4 |"]
        assert " minus " not in page

    def test_the_first_rows_lead_over_each_other_one_is_told_by_task(self, done, tmp_path):
        names = ("makd_paper", "low_rank_svd", "pkd", "minilm")
        experiment = replace(
            done[0], output=str(tmp_path), methods=tuple(makd.MethodConfig(name=name) for name in names)
        )
        scores = {"makd_paper": 0.5, "low_rank_svd": 0.4, "pkd": 0.3}
        for cell in all_cells(experiment):
            name = cell.method.name
            if name in scores:
                gain = 0.1 if name == "pkd" and cell.names["task"] == "stsb" and cell.seed == 2 else 0.0
                line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
                append_line(tmp_path / RESULTS_FILE, {**line, "score": scores[name] + gain})
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text().splitlines()
        start = page.index("| `makd_paper` minus | mrpc | stsb | all |")
        assert page[start + 2].startswith("| `low_rank_svd` | 10.00 ± 0.00 | 10.00 ± 0.00 | +10.00, n 4 |")
        assert page[start + 3].startswith(
            "| `pkd` | 20.00 ± 0.00 | 15.00 ± 5.00 "
            "| +17.50 = +7.0 SE over seeds (p 0.02), +7.0 SE over tasks (p 0.09), n 4 |"
        )
        assert page[start + 4] == ""  # no cell of `minilm` was run

    def test_the_majority_class_is_that_of_the_training_rows(self, done, setup):
        _, lines = done
        rows = setup.task.train
        assert majority_score(setup.task) == lines[0]["majority"]
        one = replace(setup.task, train=rows.select([i for i, label in enumerate(rows["label"]) if int(label) == 1]))
        assert majority_score(one) == pytest.approx((0.5 + 2 / 3) / 2)
