"""`makd compare` and `makd report` of a comparison."""

import json
from pathlib import Path

import pytest
import yaml

from makd.cli.compare import load_experiment
from makd.cli.main import main
from makd.comparison.done import RESULTS_FILE
from makd.comparison.results import append_line


class TestCommand:
    @pytest.fixture
    def file(self, done, tmp_path):
        from makd.run_folder import plain

        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(plain(done[0])))
        return str(path)

    def test_the_file_is_the_object(self, done, file):
        assert load_experiment(file) == done[0]
        assert load_experiment(file, output="elsewhere").output == "elsewhere"

    def test_what_is_done_is_shown_without_a_run(self, file, capsys):
        assert main(["compare", file, "--only", "task=mrpc,seed=1", "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert out.count("done  mrpc") == 2
        assert "2 of 2 cells are done" in out
        assert "0.0 hours of one process\n" in out

    def test_what_the_others_will_take_is_told(self, file, done, tmp_path, capsys):
        folder = tmp_path / "some"
        folder.mkdir()
        for line in done[1][:2]:
            append_line(folder / RESULTS_FILE, {**line, "seconds": {"total": 4500.0, "cache": 900.0}})
        assert main(["compare", file, "--output", str(folder), "--dry_run"]) == 0
        assert "2.0 hours of one process; the others will take about " in capsys.readouterr().out

    def test_cells_that_are_there_are_printed(self, file, capsys):
        assert main(["compare", file]) == 0
        assert "8 of 8 cells are done" in capsys.readouterr().out

    def test_the_page_is_written(self, file, capsys, tmp_path):
        assert main(["compare", file, "--table", str(tmp_path / "page.md")]) == 0
        assert "standard error" in (tmp_path / "page.md").read_text()
        assert "page.md" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--only", "method=makd"], "Known: low_rank_svd, makd_paper"),
            (["--limit", "0"], "at least 1"),
            (["--workers", "0"], "at least 1 process"),
            (["--table", "x.md", "--limit", "1"], "leave out"),
        ],
    )
    def test_wrong_flags_are_told(self, file, words, told, capsys):
        assert main(["compare", file, *words]) == 2
        assert told in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"methods": [{"name": "mackd"}]}, "Did you mean 'makd'"),
            ({"tasks": [{"name": "glue/colla"}]}, "glue/cola"),
            ({"sedes": [1]}, "sedes"),
        ],
    )
    def test_wrong_files_are_told(self, file, changes, told, tmp_path, capsys):
        content = yaml.safe_load(Path(file).read_text())
        (tmp_path / "wrong.yaml").write_text(json.dumps({**content, **changes}))
        assert main(["compare", str(tmp_path / "wrong.yaml")]) == 2
        assert told in capsys.readouterr().err

    def test_a_file_that_is_not_there_is_told(self, capsys):
        assert main(["compare", "nowhere.yaml"]) == 2
        assert "no file" in capsys.readouterr().err
