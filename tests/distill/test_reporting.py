"""What is told of a training: every step once, with the losses of the last log line, and what evaluations found."""

import logging
from types import SimpleNamespace

import pytest

from makd.distill.reporting import ReportSteps
from makd.progress import Progress


@pytest.fixture
def heard():
    return []


@pytest.fixture
def reporter(heard):
    return ReportSteps(heard.append)


def at(step, tokens=0):
    return SimpleNamespace(global_step=step, max_steps=4, num_input_tokens_seen=tokens)


def control(logs):
    return SimpleNamespace(should_log=logs)


LOSSES = {"loss": 0.5, "matrix": 0.25, "learning_rate": 1e-4, "grad_norm": 2.0, "epoch": 0.5, "train_runtime": 3.0}


def test_a_training_that_goes_on_begins_where_it_was(reporter, heard):
    reporter.on_train_begin(None, at(2), None)
    assert heard == [Progress("distil", 2, 4, "steps")]


def test_every_step_is_told_once_whether_a_log_line_follows_or_not(reporter, heard):
    reporter.on_step_end(None, at(1, 30), control(False))
    reporter.on_step_end(None, at(2, 60), control(True))
    reporter.on_log(None, at(2, 60), None, logs=LOSSES)
    assert [word.done for word in heard] == [1, 2]
    assert [word.tokens for word in heard] == [30, 60]


def test_losses_are_those_of_the_last_log_line_and_nothing_else_of_it(reporter, heard):
    reporter.on_log(None, at(2, 60), None, logs=LOSSES)
    reporter.on_step_end(None, at(3, 90), control(False))
    assert [word.losses for word in heard] == [{"loss": 0.5, "matrix": 0.25}] * 2


def test_what_an_evaluation_found_is_a_line_of_the_log(reporter, heard, caplog):
    with caplog.at_level(logging.INFO, logger="makd"):
        reporter.on_log(None, at(2), None, logs={"eval_loss": 0.75, "eval_hidden": 0.5, "eval_runtime": 9.0})
    assert caplog.messages == ["step 2/4  eval_loss 0.75  eval_hidden 0.5"]
    assert heard == []
