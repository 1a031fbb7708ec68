"""The HTML file of one run or several: what a person finds in it, and that no text in it is taken for markup."""

import html
import json
import re
import subprocess
import sys

import pytest
import yaml

from makd.cli.demo import Demo
from makd.errors import OutputError, SettingError
from makd.registry import Registry
from makd.report import sections, write_report
from makd.report.target import MARK
from makd.run_files import SAMPLES
from tests.report.made_up import METRICS, RECIPE, files, make_run, measured_as
from tests.report.reading import Found, section

GONE = {"format": 1, "missing": "the teacher was streamed"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 '\"> & {{x}} ]]> <!--"


@pytest.fixture
def page(tmp_path):
    def write(**settings):
        path = write_report([make_run(tmp_path / "student", **settings)])
        return path.read_text(encoding="utf-8")

    return write


class TestWhatAPersonFinds:
    def test_how_much_smaller_faster_and_worse_and_where_it_is_worst(self, page):
        told = section(page(layers=3), "glance")
        assert "15.8% smaller" in told  # 1 - 113,281,344 / 134,515,008
        assert "113 million of 135 million parameters" in told
        assert "2.00x as fast" in told
        assert "8.7% worse" in told
        assert "perplexity 33.94, the teacher has 31.22" in told
        assert "Training closed 36.6% of the gap" in told  # (35.51 - 33.94) / (35.51 - 31.22)
        assert "layer 2, down" in told
        assert "the error is 35.0% of the output's variance" in told

    @pytest.mark.parametrize(
        ("measured", "told"),
        [  # teacher, before, after
            ({"perplexity": (31, 35, 31)}, "Training closed 100.0% of the gap"),
            ({"perplexity": (31, 35, 30)}, "Training more than closed the gap"),
            ({"perplexity": (31, 25, 20)}, "Training made it better, and it had no gap to close"),
            ({"perplexity": (31, 20, 30)}, "Training made it worse"),
            ({"perplexity": (12, 10, 14)}, "Training made it worse"),
            ({"perplexity": (12, 14, 14)}, "Training did not help"),
            ({"accuracy": (0.80, 0.85, 0.81)}, "Training made it worse"),
            ({"accuracy": (0.80, 0.81, 0.85)}, "Training made it better, and it had no gap to close"),
            ({"accuracy": (0.80, 0.70, 0.75)}, "Training closed 50.0% of the gap"),
        ],
    )
    def test_what_the_training_did_wherever_the_teacher_is(self, page, measured, told):
        assert told in section(page(metrics=measured_as(**measured)), "glance")

    @pytest.mark.parametrize(
        ("measured", "told"),
        [
            ({"matthews": (0.50, 0.3, 0.45)}, "How much worse 90.0% of the teacher's"),
            ({"matthews": (-0.02, 0.0, -0.04)}, "How much worse -0.04 "),
            ({"r2": (-0.02, 0.0, 0.1)}, "How much worse 0.1 "),
            ({"matthews": (0.0, 0.0, 0.1)}, "How much worse 0.1 "),
        ],
    )
    def test_a_share_of_the_teachers_score_only_where_it_is_above_nothing(self, page, measured, told):
        assert told in section(page(metrics=measured_as(**measured)), "glance")

    def test_nothing_is_said_of_a_training_that_was_not(self, page):
        metrics = {**METRICS, "tokens": {**METRICS["tokens"], "training": 0}}
        gone = {"format": 1, "missing": "the student was not trained in this run"}
        told = section(page(metrics=metrics, others={"training": gone}), "glance")
        assert "8.7% worse" in told
        assert "Training" not in told

    def test_a_student_that_was_not_trained_is_measured_once_and_not_after_a_training(self, page):
        metrics = {**METRICS, "tokens": {**METRICS["tokens"], "training": 0}}
        for part in ("perplexity", "fidelity"):
            metrics[part] = {**METRICS[part], "after": METRICS[part]["before"]}
        gone = {"format": 1, "missing": "the student was not trained in this run"}
        text = page(metrics=metrics, others={"training": gone})
        for name in ("quality", "map", "layers"):
            assert "before" not in section(text, name).replace("layers before", "")
            assert "after training" not in section(text, name)

    def test_one_whose_layers_were_taught_further_has_a_before_and_an_after(self, page):
        metrics = {**METRICS, "layerwise": [{"tokens": 5}], "tokens": {**METRICS["tokens"], "training": 0}}
        gone = {"format": 1, "missing": "the student was not trained in this run"}
        text = page(metrics=metrics, recipe={**RECIPE, "student": "runs/start"}, others={"training": gone})
        assert "after training" in section(text, "layers")

    def test_commands_to_try_next_that_follow_from_the_numbers(self, page):
        told = section(page(), "glance")
        assert "train longer" in told
        assert "--recipe.training.steps 400" in told
        assert "--budget.keep_linears 0.9" in told

    def test_sections_in_the_order_in_which_a_person_asks(self, page):
        ids = [one for one in Found(page()).ids if not one.endswith("-title")]
        order = ["glance", "quality", "map", "spectra", "layers", "training", "samples", "warnings", "recipe"]
        assert [one for one in ids if one in order] == order

    def test_every_linear_with_its_rank_and_errors(self, page):
        told = section(page(), "map")
        assert "14 of 14 linears have factors. Layers count from 0." in told
        assert "model.layers.1.mlp.down_proj 1 down 576 x 1536 192 418" in told

    def test_where_the_two_texts_part_is_marked(self, page):
        text = page()
        assert '<p dir="auto">a text one <mark>two</mark></p>' in text
        assert '<p dir="auto">a text one <mark>three</mark></p>' in text

    @pytest.mark.parametrize(
        ("theirs", "ours", "same"),
        [
            ("北京是首都,人口很多", "北京是首都,人口很少", "北京是首都,人口很"),
            ("ภาษาไทยดี", "ภาษาไทยมี", "ภาษาไทย"),
            ("one cafe\u0301", "one cafe\u0300", "one "),
            ("दिल्ली की", "दिल्ली को", "दिल्ली "),
            ("two words", "two words more", "two "),
        ],
    )
    def test_in_scripts_without_spaces_they_part_at_a_character_else_at_a_word(self, theirs, ours, same):
        told = sections._continued({"prompt": "", "teacher": theirs, "student": ours})
        assert f'<p dir="auto">{same}<mark>{theirs[len(same) :]}</mark></p>' in told

    def test_every_chart_has_a_sentence_and_its_numbers_as_a_table(self, page):
        text = page()
        figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
        assert len(figures) == len(re.findall("data-chart", text)) - 1  # the script's own mention
        assert len(figures) > 10
        for figure in figures:
            assert re.search(r"<figcaption><strong>.+?</strong><span>.+?</span></figcaption>", figure)
            assert re.search(r"<details>.*<table>.*<td", figure, re.DOTALL)
            assert json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL).group(1))

    @pytest.mark.parametrize(("factored", "told"), [(True, "rank 80"), (False, "all stayed dense")])
    def test_a_vocabulary_has_its_rank_among_the_spectra(self, page, factored, told):
        contents, name = files(layers=1), "embeddings.word_embeddings"
        curve = {"name": name, "terms": 576, "ranks": [1, 80], "singular_values": [9.0, 1.0], "errors": [0.9, 0.2]}
        spectra = {**contents["spectra.json"], "curves": [curve]}
        vocabulary = [{"name": name, "rank": 80, "predicted_error": 0.2}] if factored else []
        linears = {**contents["linears.json"], "vocabulary": vocabulary}
        found = section(page(others={"spectra": spectra, "linears": linears}), "spectra")
        assert f"vocabulary {told}" in found

    def test_the_map_colours_linears_that_share_one_a_by_what_is_gone_of_them_together(self, page):
        contents = files(layers=1)
        rows = contents["linears.json"]["linears"]
        names = [row["name"] for row in rows[:3]]
        for row in rows[:3]:  # q, k and v: 960 x 576
            row |= {"rank": 192, "shares_input_with": [name for name in names if name != row["name"]]}
        found = page(layers=1, others={"linears": contents["linears.json"]})
        assert found.count(f"--heat:{100 * (1 - 192 * (960 + 576) / (960 * 576)):.0f}%") == 3

    def test_linears_that_stayed_dense_say_so(self, page):
        contents = files(layers=1)
        linears = [{**row, "rank": None, "why_dense": "no"} for row in contents["linears.json"]["linears"]]
        found = section(page(layers=1, others={"linears": {**contents["linears.json"], "linears": linears}}), "spectra")
        assert found.count("all stayed dense") == len(linears)


class TestWhatIsNotThere:
    def test_a_run_of_an_older_makd_says_what_is_missing_and_how_to_get_it(self, tmp_path):
        nothing = dict.fromkeys(("linears", "spectra", "training", "layers", "samples", "warnings"))
        text = write_report([make_run(tmp_path / "student", others=nothing)]).read_text(encoding="utf-8")
        assert "perplexity 33.94" in section(text, "glance")
        for name in ("map", "spectra", "layers", "training", "warnings"):
            assert "This run was made by a makd that did not keep it. Run it again" in section(text, name)

    def test_the_reason_that_a_run_gave_stands_in_the_place_without_advice_that_would_not_help(self, page):
        told = section(page(others={"layers": GONE}), "layers")
        assert "The teacher was streamed." in told
        assert "Run it again" not in told

    def test_a_file_of_a_later_format_is_not_guessed_at(self, page):
        assert "Its samples.json has format 2, and this makd reads 1" in page(others={"samples": {"format": 2}})


class TestSafety:
    def test_hostile_text_stays_text(self, tmp_path):
        recipe = {**RECIPE, "teacher": HOSTILE}
        path = write_report([make_run(tmp_path / "student", text=HOSTILE, recipe=recipe)])
        found = Found(path.read_text(encoding="utf-8"))
        assert html.unescape(HOSTILE).split()[0] in found.text
        assert not [tag for tag, _ in found.tags if tag == "img"]
        assert not any("alert(1)" in script and "\\u003c/script" not in script for script in found.scripts)
        assert not [attributes for _, attributes in found.tags if any(name.startswith("on") for name in attributes)]

    def test_nothing_is_loaded_from_anywhere(self, page):
        found = Found(page())
        assert not [attributes for tag, attributes in found.tags if "src" in attributes or tag == "link"]
        assert {attributes["href"][0] for tag, attributes in found.tags if "href" in attributes} == {"#"}
        policy = next(attributes for _, attributes in found.tags if attributes.get("http-equiv"))
        assert policy["content"].startswith("default-src 'none'")

    def test_ids_are_used_once_also_with_several_runs(self, tmp_path):
        runs = [make_run(tmp_path / name / "student") for name in ("a", "b")]
        ids = Found(write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")).ids
        assert len(ids) == len({*ids})

    def test_no_torch_is_imported(self, tmp_path):
        run = make_run(tmp_path / "student")
        code = (
            "import sys; sys.argv = ['makd']\nfrom makd.report import write_report\n"
            f"write_report([{str(run)!r}]); assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestTheFile:
    def test_stands_in_the_run_unless_told_otherwise(self, tmp_path):
        run = make_run(tmp_path / "student")
        assert write_report([run]) == run / "report.html"
        assert write_report([run], tmp_path / "new" / "page.html").is_file()

    def test_replaces_a_report_only_when_asked(self, tmp_path):
        run = make_run(tmp_path / "student")
        (run / "report.html").write_text(f"<html>{MARK}")
        with pytest.raises(OutputError, match="--overwrite"):
            write_report([run])
        assert write_report([run], overwrite=True).stat().st_size > 100_000

    def test_never_replaces_anything_else(self, tmp_path):
        (tmp_path / "page.html").write_text("mine")
        with pytest.raises(OutputError, match="no report that makd wrote"):
            write_report([make_run(tmp_path / "student")], tmp_path / "page.html", overwrite=True)
        assert (tmp_path / "page.html").read_text() == "mine"

    def test_a_folder_that_is_no_student_is_told(self, tmp_path):
        with pytest.raises(OutputError, match=r"no metrics\.json"):
            write_report([tmp_path])
        with pytest.raises(OutputError, match="no folder"):
            write_report([tmp_path / "nowhere"])
        (tmp_path / "metrics.json").write_text('{"task": {"after": {}}, "params": {"total": 5}}')
        with pytest.raises(OutputError, match="compares no student"):
            write_report([tmp_path])

    def test_a_damaged_file_is_named(self, tmp_path):
        run = make_run(tmp_path / "student")
        (run / "report" / SAMPLES).write_text("{")
        with pytest.raises(OutputError, match=r"samples\.json is damaged"):
            write_report([run])
        (run / "report" / SAMPLES).write_text('{"format": 1, "kind": "continuations", "rows": [{"prompt": 1}]}')
        with pytest.raises(OutputError, match="is not as makd writes it"):
            write_report([run])

    def test_without_its_library_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SettingError, match=r"pip install 'makd\[report\]'"):
            write_report([make_run(tmp_path / "student")])


class TestTheCommand:
    def test_writes_the_report_and_says_where(self, run, tmp_path):
        student = make_run(tmp_path / "student")
        code, out, _ = run("report", student)
        assert (code, out) == (0, f"report: {student / 'report.html'}\n")

    def test_takes_several_runs(self, run, tmp_path):
        runs = [make_run(tmp_path / name) for name in ("one", "two")]
        assert run("report", *runs, "--output", tmp_path / "both.html")[0] == 0
        code, _, err = run("report", *runs, "--output", tmp_path / "both.html")
        assert code == 2
        assert "--overwrite" in err

    def test_the_demo_ends_with_one(self, run, encoder_folder, tmp_path, monkeypatch):
        recipe = {
            "teacher": str(encoder_folder), "budget": {"keep_linears": 0.6},
            "data": {"path": "pydoc", "max_length": 32},
            "recipe": {"training": {"steps": 1, "batch_size": 2}, "evaluation": {"rows": 8, "latency": False}},
        }  # fmt: skip
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        tiny = Demo(str(tmp_path / "tiny.yaml"), str(tmp_path / "student"), "AutoModel")
        monkeypatch.setattr("makd.cli.demo.DEMOS", Registry("demo", {"tiny": tiny}))
        monkeypatch.setattr("makd.cli.demo.reload_in_new_process", lambda *_: "the same")
        code, out, _ = run("demo", "tiny")
        assert code == 0
        assert f"report: {tmp_path / 'student' / 'report.html'}" in out.splitlines()
        assert "How much smaller" in (tmp_path / "student" / "report.html").read_text(encoding="utf-8")
