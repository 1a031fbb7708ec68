"""A script that all processes run: what one makes, all have; and what one refuses, all are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import makd
from makd.cache.shares import find_gaps, split_between_processes
from makd.cache.write import shards_of
from makd.processes import started
from makd.processes.first import from_first, in_turn
from tests.processes import together
from tests.processes.starting import begin, end
from tests.tasks.test_tasks import PAIRS, write


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return Path(write(tmp_path_factory.mktemp("task") / "mrpc", train=PAIRS, validation=PAIRS[:6]))


@pytest.fixture(scope="module")
def found(encoder_folder, task_folder, tmp_path_factory):
    """What the two processes found, and the folder that they wrote to."""
    output = tmp_path_factory.mktemp("together")
    code, out, err = end(begin(Path(together.__file__), encoder_folder, task_folder, output))
    assert code == 0, out + err
    return *(json.loads((output / f"{rank}.json").read_text()) for rank in range(2)), output


def test_each_knows_which_one_it_is(found):
    assert [one["first"] for one in found[:2]] == [True, False]
    assert [one["called"] for one in found[:2]] == ["process 1 of 2", "process 2 of 2"]


class TestWhatTheFirstMakes:
    def test_is_made_once(self, found):
        assert [one["made"] for one in found[:2]] == [1, 0]

    def test_is_the_same_for_all_in_values_kinds_and_what_is_shared(self, found):
        first, second = (one["holder"] for one in found[:2])
        assert first == second
        assert first["tied"]
        assert "(1, 6)" in first["kinds"]["transposed"]

    def test_leaves_the_same_random_numbers_to_all(self, found):
        assert found[0]["next random number"] == found[1]["next random number"]

    def test_may_ask_for_something_that_the_first_makes(self, found):
        assert [one["nested"] for one in found[:2]] == [0, 0]

    def test_raises_its_error_in_all(self, found):
        told = [name for one in found[:2] for name, text, _ in one["errors"][:2] if text == "this is not allowed"]
        assert told == ["SettingError"] * 4
        assert [error[2] for one in found[:2] for error in one["errors"]] == [False] * 4 + [True] * 4

    def test_is_told_as_its_failure_where_it_is_none_that_a_user_can_mend(self, found):
        assert [error[0] for error in found[0]["errors"][2:]] == ["ZeroDivisionError"] * 2
        assert [error[:2] for error in found[1]["errors"][2:]] == [
            ["MakdError", "The first process failed: ZeroDivisionError: by nothing"]
        ] * 2


def test_a_process_that_was_given_something_else_says_so(found):
    assert found[0]["given something else"] == []
    kind, text, _ = found[1]["given something else"]
    assert kind == "SettingError"
    assert "first: training rows is rows 0 there, rows 1 here." in text


def test_what_is_done_in_turn_each_does(found):
    assert [one["in turn"] for one in found[:2]] == [0, 1]


class TestCompress:
    def test_gives_all_processes_the_same_report_of_a_folder_that_is_there(self, found):
        assert found[0]["compress"] == found[1]["compress"] == [str(found[2] / "student"), *found[0]["compress"][1:]]
        assert found[1]["compress"][2] is True

    def test_gives_the_report_of_one_process(self, found, encoder_folder, tmp_path):
        alone = makd.compress(str(encoder_folder), together.TEXTS, together.BUDGET, together.RECIPE, tmp_path / "one")
        ours = json.loads((found[2] / "student" / "metrics.json").read_text())
        assert ours.keys() == alone.metrics.keys()
        assert ours["fidelity"]["before"] == alone.metrics["fidelity"]["before"]

    def test_tells_its_progress_in_the_first_process_alone(self, found):
        assert {"calibrate", "distil", "save"} <= set(found[0]["told"])
        assert found[1]["told"] == []

    def test_is_refused_in_all_processes_alike(self, found):
        assert found[0]["refused"] == found[1]["refused"]
        assert found[0]["refused"][0] == "OutputError"


def test_layers_are_taught_once_and_all_go_on_with_them(found):
    assert found[0]["distill"] == found[1]["distill"]
    assert found[0]["distill"][1] == 2


def test_an_evaluation_gives_all_the_same(found):
    assert found[0]["evaluate"] == found[1]["evaluate"]


class TestACache:
    def test_is_read_in_parts_by_all(self, found):
        assert found[0]["cache"] == found[1]["cache"]
        rows, (one, other) = found[0]["cache"]
        assert (one[:9], other[9:17]) == ("00000000-", f"{rows:08}")
        assert one[9:17] == other[:8]

    def test_holds_what_one_process_reads(self, found, encoder_folder, tmp_path):
        makd.build_cache(str(encoder_folder), together.TEXTS, together.RECIPE, tmp_path / "one")
        ours, theirs = (whole(folder) for folder in (found[2] / "cache", tmp_path / "one"))
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["rows"], theirs["rows"])
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-3)


def whole(cache):
    """The parts of all shards, one row after the other."""
    shards = [load_file(path) for path in shards_of(cache)]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0] if not name.startswith("offsets")}


def test_a_fine_tuning_leaves_one_model_of_which_all_are_told(found):
    assert found[0]["finetune"] == found[1]["finetune"]
    learner = AutoModelForSequenceClassification.from_pretrained(found[2] / "learner")
    assert makd.fingerprint(learner) == found[0]["finetune"]


class TestSharingOut:
    def test_a_gap_is_what_lies_between_what_is_done(self):
        assert find_gaps([(0, 3), (5, 6)], 8) == [(3, 5), (6, 8)]
        assert find_gaps([], 2) == [(0, 2)]
        assert find_gaps([(0, 2)], 2) == []

    def test_each_reads_about_as_many_tokens(self):
        assert split_between_processes([(0, 6)], [1, 1, 1, 1, 2, 2], 2) == [[(0, 4)], [(4, 6)]]

    def test_all_gaps_are_read_by_somebody_once(self):
        shares = split_between_processes([(1, 3), (5, 9)], [3] * 10, 3)
        assert [place for share in shares for start, end in share for place in range(start, end)] == [1, 2, 5, 6, 7, 8]
        assert shares == [[(1, 3)], [(5, 7)], [(7, 9)]]

    def test_where_there_is_less_than_processes_some_read_nothing(self):
        assert split_between_processes([], [1, 2], 2) == [[], []]
        assert sorted(split_between_processes([(0, 1)], [5], 3)) == [[], [], [(0, 1)]]


class TestOneProcess:
    def test_is_the_first_of_one(self, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("WORLD_SIZE", "7")  # of something else
        assert (started.process_count(), started.process_index(), started.is_first()) == (1, 0, True)

    def test_opens_nothing(self, monkeypatch):
        monkeypatch.setattr(started, "_open", lambda: pytest.fail("opened"))
        assert from_first(lambda: 3) == in_turn(lambda: 3) == 3


class TestSeveralProcesses:
    @pytest.fixture(autouse=True)
    def second_of_two(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")

    def test_do_not_share_an_accelerator_that_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
        started.check_device(torch.device("cuda"))
        started.check_device(torch.device("cuda:1"))
        with pytest.raises(makd.MakdError, match="device is cuda:0"):
            started.check_device(torch.device("cuda:0"))

    def test_do_not_train_on_mps(self):
        with pytest.raises(makd.MakdError, match="mps"):
            started.check_device(torch.device("mps"))
