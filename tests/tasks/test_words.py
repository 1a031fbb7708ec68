"""Words are read as their text is, and none of a long row is lost."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from makd.anatomy.tokens import IGNORE_INDEX
from makd.progress import nobody
from makd.tasks import TaskConfig, load_task, read_task
from makd.tasks.words import NO_WORD, encode_words
from tests.models import tiny
from tests.tasks.test_tasks import SIZES

NAMES = ("O", "B-PER", "I-PER")
SENTENCE = ["The", "documentation", "of", "Guido", "van", "Rossum", "lists", "names"]
TAGS = [0, 0, 0, 1, 2, 2, 0, 0]


def tagged(tmp_path, rows, **settings):
    features = Features(tokens=List(Value("string")), ner_tags=List(ClassLabel(names=list(NAMES))))
    data = Dataset.from_dict(
        {"tokens": [words for words, _ in rows], "ner_tags": [tags for _, tags in rows]}, features=features
    )
    (tmp_path / "ner").mkdir()
    for split in ("train", "validation"):
        data.to_parquet(tmp_path / "ner" / f"{split}.parquet")
    return TaskConfig(name="token_classification", path=str(tmp_path / "ner"), **{"max_length": 32, **settings})


@pytest.fixture(scope="module")
def byte_level():
    """As RoBERTa's: bytes, no space before the first word, and words that come one by one are joined."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words.train_from_iterator([" ".join(SENTENCE)] * 20, trainer)
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>"
    )


def model(**settings):
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {}}
    return tiny("bert", "token_classification", **{**SIZES, "vocab_size": 400, **settings}, **names)


def knowing(task, tokenizer, learner):
    """Let `learner` predict each word's own tag wherever it meets its first piece, and nonsense elsewhere."""
    answers = {}
    for row in task.evaluation["validation"]:
        answers[tuple(row["input_ids"])] = (row["row"], row["words"])
    tags = task.references["validation"]["tags"]

    def answer(_model, _arguments, inputs, output):
        for line, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            row, words = answers[tuple(ids[mask.bool()].tolist())]
            output.logits[line] = 0.0
            for place, word in enumerate(words):
                output.logits[line, place, 1 if word == NO_WORD else tags[row][word]] = 1.0
        return output

    learner.register_forward_hook(answer, with_kwargs=True)
    return learner


def test_a_byte_level_tokenizer_reads_words_as_it_reads_their_text(tmp_path, byte_level):
    joined = byte_level([SENTENCE], is_split_into_words=True)["input_ids"][0]
    text = byte_level(" ".join(SENTENCE))["input_ids"]
    assert joined != text  # what is wrong with words one by one
    rows = read_task(tagged(tmp_path, [(SENTENCE, TAGS)] * 4))
    encoded = encode_words(rows.config, rows.train, byte_level)
    assert all(ids == text for ids in encoded["input_ids"])
    for line in encoded:
        named = [word for word in line["words"] if word != NO_WORD]
        assert named == list(range(len(SENTENCE)))
        assert [tag for tag in line["labels"] if tag != IGNORE_INDEX] == TAGS


def test_a_word_piece_tokenizer_gives_what_it_gives_for_words_one_by_one(tmp_path, tokenizer):
    rows = read_task(tagged(tmp_path, [(SENTENCE, TAGS)] * 4))
    encoded = encode_words(rows.config, rows.train, tokenizer)
    one_by_one = tokenizer([SENTENCE], is_split_into_words=True)
    assert encoded["input_ids"][0] == one_by_one["input_ids"][0]
    words = one_by_one.word_ids(0)
    first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
    expected = [TAGS[word] if real else IGNORE_INDEX for word, real in zip(words, first, strict=True)]
    assert encoded["labels"][0] == expected


class TestLongRows:
    LONG = (SENTENCE * 6, TAGS * 6)

    def test_every_word_has_its_tag_in_one_window(self, tmp_path, byte_level):
        rows = read_task(tagged(tmp_path, [self.LONG] * 2, max_length=16))
        encoded = encode_words(rows.config, rows.train, byte_level)
        assert len(encoded) > 2 * 2
        assert max(map(len, encoded["input_ids"])) <= 16
        for row in (0, 1):
            own = [line for line in encoded if line["row"] == row]
            named = sorted(word for line in own for word in line["words"] if word != NO_WORD)
            assert named == list(range(48))
            for line in own:
                for word, tag in zip(line["words"], line["labels"], strict=True):
                    assert tag == (IGNORE_INDEX if word == NO_WORD else self.LONG[1][word])

    def test_a_word_has_its_tag_where_it_has_most_context(self, tmp_path, tokenizer):
        rows = read_task(tagged(tmp_path, [self.LONG] * 2, max_length=24))
        encoded = [line for line in encode_words(rows.config, rows.train, tokenizer) if line["row"] == 0]
        whole = tokenizer([self.LONG[0]], is_split_into_words=True)
        alone, ids = whole.word_ids(0), whole["input_ids"][0]
        begins = {word: place for place, word in reversed([*enumerate(alone)]) if word is not None}
        ends = [0]  # how far the windows reach in the whole row's tokens, [CLS] first
        margins = {}
        for line in encoded:
            inner = line["input_ids"][1:-1]
            first = next(
                start for start in range(max(0, ends[-1] - 6), ends[-1] + 1)
                if ids[1 + start :][: len(inner)] == inner
            )  # fmt: skip
            for word, place in begins.items():
                inside = place - 1 - first
                if 0 <= inside < len(inner):
                    left = inside if line is not encoded[0] else 99
                    right = len(inner) - 1 - inside if line is not encoded[-1] else 99
                    margins.setdefault(word, []).append((min(left, right), word in line["words"]))
            ends.append(first + len(inner))
        assert any(len(found) == 2 for found in margins.values())
        for found in margins.values():
            assert sum(chosen for _, chosen in found) == 1
            assert max(found, key=lambda pair: pair[0])[0] == next(margin for margin, chosen in found if chosen)

    def test_all_entities_count(self, tmp_path, byte_level):
        learner = model()
        task = load_task(tagged(tmp_path, [self.LONG, (SENTENCE, TAGS)], max_length=16), byte_level, learner)
        predicted, true = task._predict(learner, "validation", task.held_out, 4, nobody)
        assert [len(tags) for tags in true] == [len(tags) for tags in predicted] == [48, 8]
        assert true[0] == [NAMES[tag] for tag in self.LONG[1]]

    def test_a_model_that_knows_all_tags_scores_one(self, tmp_path, byte_level):
        learner = model()
        task = load_task(tagged(tmp_path, [self.LONG, (SENTENCE, TAGS)], max_length=16), byte_level, learner)
        assert task.evaluate(knowing(task, byte_level, learner))["entity_f1"] == 1.0


def test_words_without_a_token_count_as_missed_and_are_said(tmp_path, tokenizer, caplog):
    words = [*SENTENCE[:3], "", *SENTENCE[4:]]  # the entity's first word is empty
    learner = model(vocab_size=300)
    task = load_task(tagged(tmp_path, [(words, TAGS)] * 2), tokenizer, learner)
    assert "2 words of 2 rows have no token of their own" in caplog.text
    found = task.evaluate(knowing(task, tokenizer, learner))
    assert found["entity_recall"] == 0.0  # its end is found, its beginning is not


def test_tags_that_are_missing_are_neither_learned_nor_measured(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["The", "list", "of", "names"], "tags": ["O", None, "B-PER", "O"]}] * 4
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"text_columns": ("tokens",), "label_column": "tags", "labels": NAMES, "max_length": 32}
    task = TaskConfig(name="token_classification", path=str(path), **settings)
    learner = model(vocab_size=300)
    loaded = load_task(task, tokenizer, learner)
    assert [tag for tag in loaded.train[0]["labels"] if tag != IGNORE_INDEX] == [0, 1, 0]
    predicted, true = loaded._predict(learner, "held_out", loaded.held_out, 4, nobody)
    assert true == [["O", "B-PER", "O"]] * len(loaded.held_out)
    assert [len(tags) for tags in predicted] == [3] * len(loaded.held_out)
