"""Perplexity of one long text, against a loop over tokens and lm-evaluation-harness."""

import math
import re

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import makd
from makd.config import EvaluationConfig, Recipe
from makd.data import DataConfig, Source, hold_out
from makd.errors import DataError, SettingError
from makd.evaluation.rolling import windows
from makd.preparation import prepare
from tests.models import tiny

TEXT = "A list is a mutable sequence.\n\nIts items are of any type; `append` adds one at the end.\n" * 6


@pytest.fixture(scope="module")
def model(decoder_folder) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(decoder_folder).eval()


@pytest.fixture
def plain(tokenizer, decoder_folder):
    """A tokenizer that puts nothing around a text, as SmolLM2's and GPT-2's."""
    own = AutoTokenizer.from_pretrained(decoder_folder)
    own.backend_tokenizer.post_processor = None
    own.bos_token, own.cls_token, own.sep_token = "[CLS]", None, None
    return own


def harness(model, tokenizer, text, window, **settings):
    """Log-likelihood of `text` by lm-evaluation-harness."""
    judge = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=2, device="cpu", **settings)
    return judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]


@pytest.mark.parametrize("window", [16, 64])
def test_a_text_costs_what_lm_evaluation_harness_says(model, plain, window):
    found = makd.rolling_perplexity(model, plain, TEXT, window, batch_size=3)
    theirs = harness(model, plain, TEXT, window)
    assert found.nats == pytest.approx(-theirs, rel=1e-4)
    assert found.word == pytest.approx(math.exp(-theirs / len(re.split(r"\s+", TEXT))), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-theirs / len(TEXT.encode()) / math.log(2), rel=1e-4)


def test_where_a_tokenizer_begins_texts_with_bos_that_is_given_once_as_the_harness_does_when_told_to_add_none(
    model, plain
):
    from tokenizers.processors import TemplateProcessing

    plain.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    found = makd.rolling_perplexity(model, plain, TEXT, 32)
    assert found.nats == pytest.approx(-harness(model, plain, TEXT, 32, add_bos_token=False), rel=1e-4)
    # left alone the harness reads BOS after BOS, and counts what that costs
    assert found.nats != pytest.approx(-harness(model, plain, TEXT, 32), rel=1e-4)


def test_every_token_is_predicted_once_given_all_before_it_in_its_window(model, plain):
    window, stride = 24, 5
    found = makd.rolling_perplexity(model, plain, TEXT, window, stride, batch_size=4)
    ids = plain(TEXT, add_special_tokens=False)["input_ids"]
    stream, nats, begin = [plain.bos_token_id, *ids], 0.0, 0
    with torch.no_grad():
        for place in range(1, len(stream)):
            if place > window:  # a new window begins with each `stride` tokens after the first
                begin = min(window + -(-(place - window) // stride) * stride, len(stream) - 1) - window
            scores = model(input_ids=torch.tensor([stream[begin:place]])).logits[0, -1].double()
            nats -= float(scores.log_softmax(-1)[stream[place]])
    assert found.tokens == len(ids)
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_windows_predict_each_token_after_the_given_ones_in_order():
    ids = list(range(23))
    read = list(windows(ids, given=2, window=8, stride=3))
    assert [token for _, wanted in read for token in wanted] == ids[2:]
    assert all(given[-1] + 1 == wanted[-1] for given, wanted in read)
    assert {len(given) for given, _ in read} == {8}
    assert {len(wanted) for _, wanted in read[1:-1]} == {3}


def test_a_text_shorter_than_the_window_is_read_at_once(model, plain):
    short = "A list is mutable."
    assert makd.rolling_perplexity(model, plain, short).nats == pytest.approx(
        -harness(model, plain, short, 64), rel=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 65}, "at most 64"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 8, "stride": 9}, "1 to 8 tokens"),
        ({"stride": 0}, "1 to 64 tokens"),
    ],
)
def test_windows_that_cannot_be_are_refused(model, plain, settings, message):
    with pytest.raises(SettingError, match=message):
        makd.rolling_perplexity(model, plain, TEXT, **settings)


def test_a_blank_text_and_a_model_that_predicts_no_next_token_are_refused(model, plain):
    with pytest.raises(DataError, match="blank"):
        makd.rolling_perplexity(model, plain, " \n")
    with pytest.raises(SettingError, match="BertModel is none"):
        makd.rolling_perplexity(tiny("bert"), plain, TEXT)


def test_a_run_measures_the_held_out_texts_as_one_where_the_recipe_asks(decoder_folder, tokenizer, model):
    texts = [f"Text number {number} is about lists and what is in them." for number in range(100)]
    settings = EvaluationConfig(rows=3, stride=64, latency=False)
    student, data = str(decoder_folder), list(texts)
    found = makd.evaluate(student, student, data, Recipe(evaluation=settings, device="cpu"))["rolling_perplexity"]
    assert found["after"] == found["teacher"]
    joined = "".join(f"{text}\n" for text in hold_out(texts, DataConfig()).evaluation["text"][:3])
    assert found["after"] == makd.rolling_perplexity(model, tokenizer, joined, 64, 64).scores


def test_the_long_text_of_a_mixture_is_of_all_its_sources(tmp_path, tokenizer, model):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} is text {number}\n" for number in range(60)))
    data = DataConfig(mixture=tuple(Source(path=str(tmp_path / f"{name}.txt")) for name in "ab"), max_length=8)
    recipe = Recipe(evaluation=EvaluationConfig(rows=4, stride=8, latency=False))
    text = prepare(data, tokenizer, model, recipe).long_text.text
    assert [line[0] for line in text.splitlines()] == ["a", "a", "b", "b"]


def test_a_stride_beyond_a_block_is_refused_before_the_work(decoder_folder):
    recipe = Recipe(evaluation=EvaluationConfig(stride=500), device="cpu")
    with pytest.raises(SettingError, match="1 to 64 tokens"):
        makd.evaluate(str(decoder_folder), str(decoder_folder), ["a text", "b text"], recipe)
