"""Text that a tokenizer does not know is told, or refused, whichever way it is read."""

import copy
import logging

import pytest
from datasets import Dataset
from tokenizers import normalizers

from makd.data import tokenize
from makd.data.settings import Rendering
from makd.data.unknown import KnownTokens
from makd.errors import DataError
from makd.evaluation.instructions import InstructionsConfig, load_instructions
from makd.evaluation.prompts import encode_prompts
from makd.tasks import TaskConfig
from makd.tasks.features import encode
from tests.data.chats import chat
from tests.models import tiny

KNOWN, THAI = "The names of a class are a list.", "กรุงเทพมหานคร"


def task(kind, columns):
    def read(text, tokenizer, tmp_path):
        config = TaskConfig(name=kind, path="data", max_length=32, stride=4)
        return encode(config, Dataset.from_list([columns(text)]), tokenizer, tiny("bert", vocab_size=300))

    return read


def plain(name, **rendering):
    def read(text, tokenizer, tmp_path):
        model = tiny(name, vocab_size=300) if name == "bert" else tiny(name, "causal_lm", vocab_size=300)
        rows = Dataset.from_dict({"text": [text] * 8})
        return tokenize(rows, tokenizer, model, 8, rendering=Rendering(**rendering))

    return read


def talk(text, tokenizer, tmp_path):
    rows = Dataset.from_list([{"messages": chat("What is a list", text), "given": 1, "references": [text]}])
    model = tiny("llama", "causal_lm", vocab_size=300)
    return tokenize(rows, tokenizer, model, 64, rendering=Rendering(template="none"))


def asked(text, tokenizer, tmp_path):
    file = tmp_path / "questions.jsonl"
    Dataset.from_list([{"prompt": text, "response": "A list."}]).to_json(file)
    config = InstructionsConfig(path=str(file), max_prompt_tokens=32, max_answer_tokens=8)
    return encode_prompts(load_instructions(config), tokenizer, tiny("llama", "causal_lm", vocab_size=300))


WAYS = {
    "rows": plain("bert"),
    "blocks": plain("llama"),
    "apart": plain("llama", documents="apart"),
    "conversations": talk,
    "prompts": asked,
    "classification": task("classification", lambda text: {"text": text}),
    "words": task("token_classification", lambda text: {"tokens": text.split(), "tags": [0] * len(text.split())}),
    "questions": task("question_answering", lambda text: {"question": text, "context": text}),
}


@pytest.mark.parametrize("way", WAYS)
def test_text_of_which_nearly_nothing_is_known_is_refused(tokenizer, tmp_path, way):
    with pytest.raises(DataError, match=r"\(100%\) are '\[UNK\]', which stands for what the tokenizer does not know"):
        WAYS[way](THAI, tokenizer, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_that_much_of_it_is_unknown_is_told(tokenizer, tmp_path, caplog, way):
    with caplog.at_level(logging.WARNING, logger="makd"):
        WAYS[way](f"{THAI} {THAI} {KNOWN}", tokenizer, tmp_path)
        assert "are '[UNK]': the tokenizer does not know what they say" in caplog.text
        caplog.clear()
        WAYS[way](KNOWN, tokenizer, tmp_path)
        assert "UNK" not in caplog.text


@pytest.fixture
def dropping(tokenizer):
    """A tokenizer that drops characters without width, as BERT's do."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    return tokenizer


def test_rows_without_a_token_of_their_own_are_left_out_and_told(dropping, caplog):
    rows = Dataset.from_dict({"text": [KNOWN, "\u200b", "\ufeff\u200b"]})
    with caplog.at_level(logging.WARNING, logger="makd"):
        assert len(tokenize(rows, dropping, tiny("bert", vocab_size=300), 32)) == 1
    assert "2 of 3 rows have no token but the tokenizer's marks" in caplog.text
    with pytest.raises(DataError, match="not one token for any of 2 texts"):
        tokenize(rows.select([1, 2]), dropping, tiny("bert", vocab_size=300), 32)


def test_rows_with_a_label_are_all_measured(dropping):
    rows = Dataset.from_dict({"text": [KNOWN, "\u200b"], "label": [0, 1]})
    assert len(tokenize(rows, dropping, tiny("bert", vocab_size=300), 32)) == 2


def test_an_end_of_text_that_is_called_the_unknown_token_is_not_counted(tokenizer):
    like_gpt2 = copy.deepcopy(tokenizer)
    like_gpt2.unk_token = like_gpt2.eos_token
    end = like_gpt2.eos_token_id
    assert KnownTokens(like_gpt2).count([5, 6, end, end, -100]) == (2, 0)
