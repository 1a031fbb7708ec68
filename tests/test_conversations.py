"""A whole run on prompts with responses; and what is refused before any work."""

import json

import pytest

import makd
from makd.loading import load_model, load_tokenizer
from makd.preparation import prepare
from tests.data.chats import PLAIN, with_template
from tests.models import tiny

ROWS = [{"prompt": f"name {number} of a list", "response": f"the class {number} of things"} for number in range(24)]
COMPLETIONS = makd.Plan(
    terms=(
        makd.Term(aspect="hidden", tokens="completion"),
        makd.Term(aspect="logits", tokens="completion"),
        makd.Term(aspect="task"),
    )
)


def recipe(plan=COMPLETIONS, **settings):
    return makd.Recipe(
        plan=plan,
        training=makd.TrainingConfig(steps=2, batch_size=4, save_every=1),
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=4, latency=False),
        device="cpu",
        **settings,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A decoder whose tokenizer has a chat template, and rows in a file."""
    made = tmp_path_factory.mktemp("chat")
    tiny("llama", "causal_lm", vocab_size=300, max_position_embeddings=128).save_pretrained(made / "teacher")
    with_template(tokenizer, PLAIN).save_pretrained(made / "teacher")
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (made / "plain.txt").write_text("\n".join(f"A list of {number} names." * 9 for number in range(40)))
    return made


def data(folder, name="rows.jsonl", **settings):
    return makd.DataConfig(path=str(folder / name), max_length=64, **settings)


def test_a_student_learns_responses_and_is_measured_on_them(folder, tmp_path):
    teacher = str(folder / "teacher")
    found = makd.compress(teacher, data(folder), makd.Budget(keep_linears=0.5), recipe(), tmp_path / "student").metrics
    assert found["tokens"]["training"] > 0
    rows = makd.compress(teacher, ROWS, makd.Budget(keep_linears=0.5), recipe(), tmp_path / "in_hand").metrics
    assert rows["perplexity"]["teacher"] == pytest.approx(found["perplexity"]["teacher"])
    assert (
        makd.evaluate(str(tmp_path / "student"), teacher, data(folder), recipe())["fidelity"]["after"]
        == (found["fidelity"]["after"])
    )


def test_a_teacher_cache_serves_completions(folder, tmp_path):
    teacher, budget = str(folder / "teacher"), makd.Budget(keep_linears=0.5)
    makd.build_cache(teacher, data(folder), recipe(), tmp_path / "cache", settings=makd.CacheConfig(top_k=300))
    live = makd.compress(teacher, data(folder), budget, recipe(), tmp_path / "live").metrics
    cached = recipe(cache=str(tmp_path / "cache"))
    kept = makd.compress(teacher, data(folder), budget, cached, tmp_path / "kept").metrics
    assert kept["perplexity"]["after"] == pytest.approx(live["perplexity"]["after"], rel=1e-2)


def made(folder, tokenizer, config, plan=COMPLETIONS):
    model = tiny("llama", "causal_lm", vocab_size=300, max_position_embeddings=128)
    return prepare(config, tokenizer, model, recipe(plan))


def test_a_plan_of_completions_is_refused_for_plain_text(folder):
    with pytest.raises(makd.MakdError, match=r"counts completions alone .* for 'hidden', and the data have none"):
        made(folder, load_tokenizer(str(folder / "teacher")), data(folder, "plain.txt"))


def test_rows_of_prompts_and_responses_need_a_chat_template_or_words_for_one(folder, tokenizer):
    with pytest.raises(makd.MakdError, match=r"no chat template\. Say with data\.template"):
        made(folder, tokenizer, data(folder))
    assert made(folder, tokenizer, data(folder, template="the name : {prompt} ; ")).has_completions


def test_conversations_in_hand_that_are_cut_are_warned_of_since_nobody_chose_their_length(folder, caplog):
    teacher, words = load_model(str(folder / "teacher")), load_tokenizer(str(folder / "teacher"))
    rows = [{**row, "response": row["response"] * 20} for row in ROWS]
    prepare(rows, words, teacher, recipe())
    (first, *_) = [record for record in caplog.records if "conversations are read" in record.message]
    assert first.levelname == "WARNING"
    assert "cut at the length of texts in hand (of those in a file, data.max_length) = 128 tokens" in first.message


def test_prompts_that_are_too_long_are_refused_before_any_work(folder):
    words = load_tokenizer(str(folder / "teacher"))
    with pytest.raises(makd.MakdError, match=r"rows have a prompt that takes all of data\.max_length = 8"):
        made(folder, words, makd.DataConfig(path=str(folder / "rows.jsonl"), max_length=8))
