"""What a trainer says of aspects that a model cannot offer."""

import copy
import logging

import pytest
from transformers import TrainingArguments

import makd
from makd.errors import SettingError
from tests.models import tiny


def told(caplog, model, plan="full"):
    """(level, text) of the lines about aspects, while a trainer of a model and its copy is made."""
    arguments = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="makd"):
        makd.DistillTrainer(copy.deepcopy(model), model, plan=plan, args=arguments)
    return [(record.levelname, record.message) for record in caplog.records if "aspect" in record.message]


@pytest.mark.parametrize("name", ["roformer", "convbert", "big_bird"])
def test_an_aspect_that_a_model_cannot_offer_is_warned_of_once(name, caplog):
    (line,) = [line for line in told(caplog, tiny(name)) if line[1].startswith("aspect attention is off")]
    assert line[0] == "WARNING"
    assert line[1].endswith("its attention does not go through transformers' attention interface")


def test_what_the_lack_of_a_head_takes_away_is_no_warning(caplog):
    assert {level for level, _ in told(caplog, tiny("bert"))} == {"INFO"}


def test_a_model_that_offers_everything_is_not_spoken_of(caplog):
    assert not [line for line in told(caplog, tiny("llama", "causal_lm")) if line[0] == "WARNING"]


def test_a_plan_of_ones_own_that_asks_for_it_is_refused_with_the_reason():
    model = tiny("longformer")
    arguments = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    plan = makd.Plan(terms=(makd.Term(aspect="matrix"),))
    with pytest.raises(SettingError, match=r"'matrix', but outputs of .*query \(q\) have the shape"):
        makd.DistillTrainer(copy.deepcopy(model), model, plan=plan, args=arguments)


def test_what_only_the_teacher_cannot_offer_is_off_too(caplog):
    teacher = tiny("big_bird")
    student = tiny("big_bird", attention_type="original_full")
    arguments = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    trainer = makd.DistillTrainer(student, teacher, args=arguments)
    assert {"matrix", "hidden"} <= trainer.plan.off.keys()
