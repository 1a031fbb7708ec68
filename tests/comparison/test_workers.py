"""A comparison by several processes: who does what when, and that it comes to the same; and what is timed after it."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import makd
from makd import comparison
from makd.comparison import latencies, workers
from makd.comparison.cells import all_cells
from makd.comparison.latencies import LATENCY_FILE, known_latencies
from makd.comparison.results import append_line, read_lines
from makd.comparison.schedule import Kind, Schedule
from makd.comparison.search import SEARCH_FILE, searched_at, trial_hash
from makd.comparison.setup import teacher_folder
from makd.errors import ModelLoadError, SettingError
from makd.progress import Progress
from makd.run_folder import plain
from tests.comparison.experiments import make


@pytest.fixture
def experiment(data, encoder_folder, tmp_path):
    """Two tasks, two methods and two seeds."""
    return make(data, encoder_folder, tmp_path / "out")


def make_folder(experiment, job):
    """As if the teacher of a job were there."""
    teacher_folder(experiment, job.cell.task, job.cell.seed).mkdir(parents=True)


def find(experiment, job):
    """As if the trials of a search were done."""
    path, identity = Path(experiment.output) / SEARCH_FILE, trial_hash(experiment, job.cell)
    for trial in range(experiment.search.trials):
        append_line(path, {"hash": identity, "trial": trial, "score": 0.5, "settings": {"learning_rate": 3e-4}})


class TestSchedule:
    def test_one_process_goes_through_the_cells_in_their_order(self, experiment):
        schedule, taken, last = Schedule(experiment, all_cells(experiment)), [], None
        while (job := schedule.take(last)) is not None:
            taken.append(job.cell)
            last = job.setup
            schedule.finish(job)
        assert taken == all_cells(experiment)
        assert schedule.open_cells == 0

    def test_a_teacher_that_is_about_to_be_made_is_not_made_twice(self, experiment):
        schedule = Schedule(experiment, all_cells(experiment))
        jobs = [schedule.take(None) for _ in range(4)]
        assert len({job.setup for job in jobs}) == 4
        assert schedule.take(None) is None
        make_folder(experiment, jobs[1])
        joined = schedule.take(None)
        assert joined.setup == jobs[1].setup
        assert schedule.open_cells == 8

    def test_a_process_stays_on_its_setup_and_others_keep_off_it_while_there_is_another(self, experiment):
        schedule = Schedule(experiment, all_cells(experiment))
        first = schedule.take(None)
        make_folder(experiment, first)
        other = schedule.take(None)
        assert other.setup != first.setup
        schedule.finish(first)
        assert schedule.take(first.setup).setup == first.setup

    def test_the_first_budget_is_done_everywhere_and_then_all_others_of_a_setup_before_the_next_one(self, experiment):
        smaller = (makd.Budget(keep_linears=0.8), makd.Budget(keep_linears=0.7))
        three = replace(experiment, budgets=(*experiment.budgets, *smaller), seeds=(1,))
        first, middle, last = three.budgets
        schedule, setup, taken = Schedule(three, all_cells(three)), None, []
        while (job := schedule.take(setup)) is not None:
            taken.append((job.cell.budget, job.cell.task))
            setup = job.setup
            schedule.finish(job)
        mrpc, stsb = three.tasks
        order = [(first, mrpc), (first, stsb), (middle, stsb), (last, stsb), (middle, mrpc), (last, mrpc)]
        assert list(dict.fromkeys(taken)) == order  # it begins the others where it is
        assert len(taken) == len(order) * len(three.methods)

    def test_cells_wait_for_their_search_and_teachers_are_made_meanwhile(self, experiment):
        searched = replace(
            experiment, search=makd.SearchConfig(trials=2, task="stsb", steps=1), seeds=(1,),
            methods=experiment.methods[1:],
        )  # fmt: skip
        schedule = Schedule(searched, all_cells(searched))
        search = schedule.take(None)
        assert (search.kind, search.cell) == (Kind.SEARCH, searched_at(searched, all_cells(searched)[0]))
        teachers = [schedule.take(None) for _ in range(2)]
        assert [(job.kind, job.cell.task) for job in teachers] == [(Kind.TEACHER, task) for task in searched.tasks]
        assert schedule.take(None) is None
        find(searched, search)
        for job in (search, *teachers):
            make_folder(searched, job)
            schedule.finish(job)
        cell = schedule.take(None)
        assert (cell.kind, cell.found) == (Kind.CELL, {"learning_rate": 3e-4})


class TestProcesses:
    def test_two_of_them_write_what_one_does(self, experiment, tmp_path):
        alone = replace(experiment, output=str(tmp_path / "alone"), seeds=(1,))
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))  # as many as each of two gets
        try:
            expected = makd.compare(alone)
        finally:
            torch.set_num_threads(threads)
        told = []
        together = replace(alone, output=str(tmp_path / "together"))
        lines = makd.compare(together, workers=2, on_progress=told.append)
        assert [line["fingerprint"] for line in lines] == [line["fingerprint"] for line in expected]
        assert [line["metrics"] for line in lines] == [line["metrics"] for line in expected]
        assert told[-1] == Progress("cells", 4, 4, "cells")
        logs = [(tmp_path / "together" / "workers" / f"{number}.log").read_text() for number in (1, 2)]
        assert sum(log.count("cell: ") for log in logs) == 4

    def test_an_error_in_one_of_them_is_told_as_it_is(self, experiment):
        nowhere = replace(experiment, teacher=str(Path(experiment.output) / "nowhere"), seeds=(1,))
        with pytest.raises(ModelLoadError, match="nowhere"):
            makd.compare(nowhere, only="task=mrpc,method=low_rank_svd", workers=2)

    def test_one_that_the_system_stopped_is_told_with_what_to_do(self, experiment, monkeypatch):
        class Stopped:
            def __init__(self, *args, **kwargs):
                pass

            def submit(self, *args):
                future = Future()
                future.set_exception(BrokenProcessPool("terminated abruptly"))
                return future

            def shutdown(self, **kwargs):
                pass

        monkeypatch.setattr(workers, "ProcessPoolExecutor", Stopped)
        with pytest.raises(SettingError, match="fewer than 3 --workers"):
            makd.compare(experiment, workers=3)

    def test_lines_that_are_written_at_once_are_all_there(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: append_line(path, {"number": number}), range(64)))
        assert sorted(line["number"] for line in read_lines(path)) == list(range(64))

    @pytest.mark.parametrize("kill", [lambda run: run.kill(), lambda run: os.killpg(run.pid, signal.SIGTERM)])
    def test_a_killed_run_leaves_none_that_works_on_or_keeps_caches(self, kill, tmp_path):
        script = tmp_path / "run.py"
        script.write_text(LEFT_BEHIND)
        run = subprocess.Popen([sys.executable, str(script), str(tmp_path)], start_new_session=True)
        try:
            wait_for(tmp_path / "started", run)
        finally:
            kill(run)
            run.wait()
        (tmp_path / "killed").touch()
        time.sleep(4.0)
        assert not (tmp_path / "late").exists()
        assert (tmp_path / "removed").exists()

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_run_that_is_told_to_stop_ends_at_once_and_removes_its_caches(self, experiment, count, tmp_path):
        endless = replace(experiment, training=makd.TrainingConfig(steps=10**6, batch_size=4), cache=makd.CacheConfig())
        path, temporary = tmp_path / "endless.yaml", tmp_path / "temporary"
        path.write_text(yaml.safe_dump(plain(endless)))
        temporary.mkdir()
        run = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "makd",
                "compare",
                str(path),
                "--only",
                "method=makd_paper",
                "--workers",
                str(count),
            ],
            env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            while len(list(temporary.glob("makd-cells-*/*/*"))) < count:
                assert run.poll() is None, "it ended before"
                time.sleep(0.05)
            run.terminate()
            told = run.communicate(timeout=60)[1]
        finally:
            run.kill()
            run.wait()
        assert run.returncode == 143
        assert "makd: stopped. Outputs that were finished before are as they were." in told
        assert "Traceback" not in told
        assert not list(temporary.glob("makd-cells-*"))


LEFT_BEHIND = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from makd.comparison import workers

def work_on(folder):
    workers._start(None, folder / "worker.log", 1)
    workers._setups.close = (folder / "removed").touch
    (folder / "started").touch()
    while not (folder / "killed").exists():
        time.sleep(0.05)
    time.sleep(2.0)
    (folder / "late").touch()

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(work_on, Path(sys.argv[1])).result()
"""
"""A run with a worker that writes two seconds after the run was killed, unless it ends with it."""


def wait_for(path, process):
    """Until `path` is there."""
    while not path.exists():
        assert process.poll() is None, "it ended before"
        time.sleep(0.05)


class TestLatencies:
    @pytest.fixture
    def timed(self, experiment):
        """A comparison of one cell a method, with latencies."""
        small = replace(experiment, seeds=(1,), tasks=experiment.tasks[:1], latency=True, latency_tokens=4)
        makd.compare(small)
        return small

    def test_every_method_is_timed_once_beside_its_teacher(self, timed, monkeypatch):
        lines = read_lines(Path(timed.output) / LATENCY_FILE)
        assert [line["method"] for line in lines] == ["low_rank_svd", "makd_paper"]
        for line in lines:
            assert line["budget"] == "keep_linears=0.6"
            assert line["latency_ms"].keys() == {"batch1", "batch16"}
            assert all(value > 0 for found in line["latency_ms"].values() for value in found.values())
            assert line["environment"]["device"] == "cpu"
        monkeypatch.setattr(latencies, "latency", lambda *_: pytest.fail("timed again"))
        makd.compare(timed)

    def test_those_of_other_lengths_and_devices_do_not_count(self, timed):
        assert len(known_latencies(timed, all_cells(timed))) == 2
        longer = replace(timed, latency_tokens=5)
        assert not known_latencies(longer, all_cells(longer))
        path = Path(timed.output) / LATENCY_FILE
        path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
        assert not known_latencies(timed, all_cells(timed))

    def test_another_machine_times_all_anew_and_no_column_has_numbers_of_two(self, timed):
        path = Path(timed.output) / LATENCY_FILE
        here = read_lines(path)
        path.write_text("")
        for line in here:
            append_line(path, {**line, "environment": {**line["environment"], "device_name": "elsewhere"}})
        cells = all_cells(timed)
        assert {line["environment"]["device_name"] for line in known_latencies(timed, cells).values()} == {"elsewhere"}
        makd.compare(timed, only="method=low_rank_svd")
        (own,) = known_latencies(timed, cells).values()
        assert own["environment"]["device_name"] == here[0]["environment"]["device_name"]
        makd.compare(timed)
        assert len(known_latencies(timed, cells)) == 2

    def test_rows_of_one_shape_share_a_line(self, experiment, tmp_path):
        rows = (
            makd.MethodConfig(name="low_rank_logits"),
            makd.MethodConfig(name="longer", method="low_rank_logits", times_steps=2.0),
            makd.MethodConfig(name="labels", method="low_rank_logits", settings={"task_weight": 3.0}),
        )
        small = replace(
            experiment, methods=rows, seeds=(1,), tasks=experiment.tasks[:1], latency=True, latency_tokens=4
        )
        makd.compare(small)
        (line,) = read_lines(Path(small.output) / LATENCY_FILE)
        told = f"| {line['latency_ms']['batch16']['student']:.1f} ("
        page = comparison.write_page(small, tmp_path / "page.md").read_text()
        assert sum(told in row for row in page.splitlines() if row.startswith("| `")) == 3

    def test_the_page_has_them_and_says_where_they_were_taken(self, timed, tmp_path):
        page = comparison.write_page(timed, tmp_path / "page.md").read_text()
        line = read_lines(Path(timed.output) / LATENCY_FILE)[0]
        _scores, _lead, row, _settings = (row for row in page.splitlines() if row.startswith("| `low_rank_svd`"))
        told = [
            f"{found['student']:.1f} ({found['student'] / found['teacher']:.2f}x)"
            for found in line["latency_ms"].values()
        ]
        assert row.endswith(f"| {told[0]} | {told[1]} |")
        assert f"Latencies are of: {line['environment']['device_name']}" in page
