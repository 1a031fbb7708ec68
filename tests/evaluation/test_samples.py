"""Samples of what teacher and student make of held-out text."""

import pytest
import torch
from datasets import Dataset

from makd.evaluation.samples import NEAREST, take_samples
from tests.models import tiny


@pytest.fixture(scope="module")
def rows():
    """Tokenized, of three lengths."""
    ids = torch.randint(5, 64, (12, 20), generator=torch.Generator().manual_seed(0)).tolist()
    few = [row[: 20 - 5 * (place % 3)] for place, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": few, "attention_mask": [[1] * len(row) for row in few]})


def test_neighbours_are_those_of_cosines_of_means(tokenizer, rows):
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    found = take_samples(student, teacher, tokenizer, rows, 3)
    assert (found["texts"], found["nearest"], len(found["rows"])) == (12, NEAREST, 3)
    vectors = []
    with torch.no_grad():
        for row in rows:
            hidden = teacher(input_ids=torch.tensor([row["input_ids"]]))[0][0].double()
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    cosines = torch.stack(vectors) @ torch.stack(vectors).T
    cosines.fill_diagonal_(-2)
    expected = cosines[0].sort(descending=True).values[:NEAREST]
    assert [one["cosine"] for one in found["rows"][0]["teacher"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_copy_keeps_all_neighbours(tokenizer, rows):
    teacher = tiny("bert")
    found = take_samples(teacher, teacher, tokenizer, rows, 2)
    assert found["kept"] == 1
    assert all(row["teacher"] == row["student"] for row in found["rows"])


def test_continuations_are_the_likeliest_tokens(tokenizer, rows):
    model = tiny("llama", "causal_lm")
    (row,) = take_samples(model, model, tokenizer, rows, 1)["rows"]
    ids = rows[0]["input_ids"][:10]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    first = " ".join(tokenizer.decode(ids[10:], skip_special_tokens=True).split())
    assert row["teacher"].startswith(first)
    assert row["teacher"] == row["student"]


def test_a_conversation_is_asked_and_one_that_lost_its_answer_is_left_out(tokenizer, rows):
    model = tiny("llama", "causal_lm")
    labels = [[-100] * len(row) for row in rows["input_ids"]]
    labels[0][5:] = rows[0]["input_ids"][5:]
    (row,) = take_samples(model, model, tokenizer, rows.add_column("labels", labels), 3)["rows"]
    words = [" ".join(tokenizer.decode(part).split()) for part in (rows[0]["input_ids"][:5], rows[0]["input_ids"][5:])]
    assert (row["prompt"], row["reference"]) == tuple(words)


def test_no_randomness_is_used(tokenizer, rows):
    before = torch.get_rng_state()
    for model in (tiny("bert"), tiny("llama", "causal_lm")):
        torch.set_rng_state(before)
        take_samples(model, model, tokenizer, rows, 2)
        assert torch.equal(torch.get_rng_state(), before)


def test_none_are_kept_where_none_are_wanted_or_the_model_gives_none(tokenizer, rows):
    model = tiny("bert")
    assert "samples is 0" in take_samples(model, model, tokenizer, rows, 0)["missing"]
    headed = tiny("bert", "sequence_classification")
    assert "neither writes on" in take_samples(headed, headed, tokenizer, rows, 2)["missing"]
    assert "too few" in take_samples(model, model, tokenizer, rows.select([0, 1]), 2)["missing"]
