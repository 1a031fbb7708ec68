"""Several sources in exact shares, and rows drawn from streams."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from datasets import Dataset

import makd
from makd.data import DataConfig, Source, load_texts, read_settings
from makd.data.mixture import apportion
from makd.run_folder import plain
from tests.data.chats import chat


@pytest.fixture
def folder(tmp_path):
    for name, count in (("a", 40), ("b", 100)):
        lines = (json.dumps({"text": f"{name} is text number {number}"}) for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = (json.dumps({"messages": chat(f"{number}?", "Yes.")}) for number in range(20))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def mixture(folder, weights, **settings):
    sources = tuple(
        Source(path=str(folder / f"{name}.jsonl"), weight=float(weight)) for name, weight in weights.items()
    )
    return DataConfig(mixture=sources, **settings)


def counts(rows):
    return Counter(text[0] for text in rows["text"])


@pytest.mark.parametrize(
    ("weights", "rows", "expected"),
    [
        ({"a": 1, "b": 3}, 40, {"a": 10, "b": 30}),
        ({"a": 1, "b": 2}, 10, {"a": 3, "b": 7}),
        ({"a": 1, "b": 1}, None, {"a": 1, "b": 1}),  # all that `a` has to train on
        ({"a": 0.1, "b": 0.2}, None, {"a": 1, "b": 2}),
    ],
)
def test_each_source_has_its_share_and_no_row_comes_twice(folder, weights, rows, expected):
    train = load_texts(mixture(folder, weights, rows=rows)).train
    if rows is None:
        have = len(load_texts(DataConfig(path=str(folder / "a.jsonl"))).train)
        expected = {name: share * have for name, share in expected.items()}
    assert counts(train) == expected
    assert len(set(train["text"])) == len(train)


def test_held_out_rows_are_mixed_in_the_same_shares_and_both_are_told(folder, caplog):
    with caplog.at_level("INFO", "makd"):
        texts = load_texts(mixture(folder, {"a": 1, "b": 2}))
    assert 2 * counts(texts.evaluation)["a"] == counts(texts.evaluation)["b"] > 0
    assert not set(texts.evaluation["text"]) & set(texts.train["text"])
    have = counts(texts.train)["a"]
    told = [line for line in caplog.messages if line.startswith(f"A mixture of {3 * have} rows: {have} of {have} of ")]
    assert len(told) == 1
    assert f"{2 * have} of " in told[0]
    assert "(66.7%)" in told[0]


@pytest.mark.parametrize(("count", "expected"), [(6, {"a": 2, "b": 4}), (1, {"b": 1}), (999, None)])
def test_the_first_held_out_rows_are_of_all_sources_in_their_shares(folder, count, expected):
    texts = load_texts(mixture(folder, {"a": 1, "b": 2}))
    found = texts.first_held_out(count)
    assert counts(found) == (expected or counts(texts.evaluation))
    whole = texts.evaluation["text"]
    places = [whole.index(text) for text in found["text"]]
    assert places == sorted(places)
    for name in counts(found):
        assert [text for text in found["text"] if text[0] == name] == [text for text in whole if text[0] == name][
            : counts(found)[name]
        ]


def test_the_first_held_out_rows_of_one_source_are_the_first(folder):
    texts = load_texts(DataConfig(path=str(folder / "b.jsonl")))
    assert texts.first_held_out(3)["text"][:] == texts.evaluation["text"][:3]


def test_the_seed_says_which_rows_are_taken(folder):
    config = mixture(folder, {"a": 1, "b": 3}, rows=20)
    one, two, three = (sorted(load_texts(config, seed).train["text"]) for seed in (1, 1, 2))
    assert one == two != three


def test_left_over_rows_go_to_the_largest_remainders():
    shares = [Fraction(1, 6), Fraction(2, 6), Fraction(3, 6)]
    assert apportion(10, shares) == [2, 3, 5]  # 1.67, 3.33, 5
    assert apportion(12, shares) == [2, 4, 6]


def test_texts_and_conversations_are_not_mixed(folder):
    with pytest.raises(makd.MakdError, match=r"one kind of rows: .*a\.jsonl gives text, .*chats\.jsonl gives given"):
        load_texts(mixture(folder, {"a": 1, "chats": 1}))


def test_a_source_of_which_nothing_would_be_taken_is_refused(folder):
    with pytest.raises(makd.MakdError, match=r"Of a mixture of 10 rows .*a\.jsonl would have none"):
        load_texts(mixture(folder, {"a": 1, "b": 1000}, rows=10))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"mixture": (Source(path="a"),)}, r"two sources or more, .* got 1, and besides nothing"),
        ({"mixture": (Source(path="a"), Source(path="b")), "path": "c"}, r"got 2, and besides data\.path"),
        ({"mixture": (Source(path="a"), Source(path="b"), Source(path="./a", weight=2.0))}, "has a twice, read alike"),
        ({"stream": True, "path": "a.jsonl"}, r"data\.stream draws data\.rows rows .* got data\.rows None"),
        ({"stream": True, "rows": 3}, r"data\.path None"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        DataConfig(**settings)


def test_two_splits_or_columns_of_one_place_are_two_sources():
    sources = (Source(path="a"), Source(path="a", train_split="more"), Source(path="a", text_columns=("title",)))
    assert DataConfig(mixture=sources).paths == ("a", "a", "a")


def test_weights_are_above_zero():
    with pytest.raises(makd.MakdError, match=r"above 0; got 0\.0 for a"):
        Source(path="a", weight=0.0)


def test_what_a_recipe_holds_of_a_mixture_is_read_back(folder):
    config = mixture(folder, {"a": 1, "b": 3}, rows=20)
    assert read_settings(plain(config)) == config


class TestStreams:
    def test_give_as_many_rows_as_asked_for(self, folder):
        texts = load_texts(DataConfig(path=str(folder / "b.jsonl"), stream=True, rows=50, held_out=0.2))
        assert len(texts.train) + len(texts.evaluation) == 50
        assert 4 <= len(texts.evaluation) <= 16  # 0.2 of them by chance
        assert len({*texts.train["text"], *texts.evaluation["text"]}) == 50

    def test_are_drawn_by_the_seed_but_for_those_to_evaluate_on(self, tmp_path):
        for split, count in (("train", 60), ("validation", 30)):
            rows = Dataset.from_dict({"text": [f"{split} has text {number}" for number in range(count)]})
            rows.to_json(str(tmp_path / f"{split}.jsonl"))
        config = DataConfig(path=str(tmp_path), stream=True, rows=30)
        drawn = [load_texts(config, seed) for seed in (1, 1, 2)]
        one, two, three = (sorted(texts.train["text"]) for texts in drawn)
        assert one == two != three
        assert drawn[0].evaluation["text"] == drawn[2].evaluation["text"]

    def test_that_end_early_give_what_there_is(self, folder):
        texts = load_texts(DataConfig(path=str(folder / "a.jsonl"), stream=True, rows=1000, held_out=0.5))
        assert len(texts.train) + len(texts.evaluation) == 40

    def test_draw_from_the_split_for_evaluation_too(self, tmp_path):
        for split, count in (("train", 50), ("validation", 30), ("other", 3)):
            rows = Dataset.from_dict({"text": [f"{split} has text {number}" for number in range(count)]})
            rows.to_parquet(str(tmp_path / f"{split}-00000.parquet"))
        (tmp_path / "other-00000.parquet").unlink()
        texts = load_texts(DataConfig(path=str(tmp_path), stream=True, rows=20, held_out=0.25))
        assert len(texts.train) == 20
        assert len(texts.evaluation) == 5
        assert all(text.startswith("validation") for text in texts.evaluation["text"])

    def test_hold_conversations_too(self, folder):
        texts = load_texts(DataConfig(path=str(folder / "chats.jsonl"), stream=True, rows=10))
        assert texts.train["messages"][0][1]["content"] == "Yes."

    def test_are_mixed(self, folder):
        train = load_texts(mixture(folder, {"a": 1, "b": 3}, stream=True, rows=40)).train
        drawn = counts(train)
        assert 3 * drawn["a"] == drawn["b"] > 0

    def test_of_nothing_are_refused_as_other_data_are(self, folder):
        with pytest.raises(makd.MakdError, match="no split 'dev'; it has train"):
            load_texts(DataConfig(path=str(folder / "a.jsonl"), stream=True, rows=5, evaluation_split="dev"))
