"""Tokenizers are compared by what they do: ids, special tokens, and how a text is read."""

import copy
import json
import shutil

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer

import makd
from makd import caching, pipeline, streaming
from makd.data import check_student_tokenizer, choose_tokenizer, collator
from makd.data.tokenizers import different_ids, different_reading
from makd.errors import DataError, ModelLoadError, SettingError
from makd.loading import load_model, load_tokenizer
from tests.models import tiny

TEXTS = [f"Text number {number}, about lists and names of classes." for number in range(24)]
RECIPE = makd.Recipe(
    factorize=makd.FactorizeConfig(solver="svd"),
    training=makd.TrainingConfig(steps=1),
    evaluation=makd.EvaluationConfig(latency=False),
)
BUDGET = makd.Budget(keep_linears=0.5)


def exchanged(folder, into, one="the", other="of"):
    """A copy of `folder` whose tokenizer has the ids of two tokens exchanged: as many tokens as before."""
    shutil.copytree(folder, into)
    path = into / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    path.write_text(json.dumps(content), encoding="utf-8")
    return into


@pytest.fixture(scope="module")
def student(encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "student"
    teacher = load_model(str(encoder_folder))
    makd.factorize(teacher, BUDGET, solver="svd").save_pretrained(folder)
    load_tokenizer(str(encoder_folder)).save_pretrained(folder)
    return folder


def test_exchanged_ids_are_named(encoder_folder, tmp_path):
    own = AutoTokenizer.from_pretrained(encoder_folder)
    other = AutoTokenizer.from_pretrained(exchanged(encoder_folder, tmp_path / "other"))
    first, second = sorted((own.get_vocab()["the"], own.get_vocab()["of"]))
    names = {number: token for token, number in own.get_vocab().items()}
    told = f"token {first} is {names[first]!r} in the one and {names[second]!r} in the other (1 more differ)"
    assert different_ids(own, other) == told
    assert different_ids(own, copy.deepcopy(own)) is None


def test_another_special_token_and_another_way_to_read_are_differences(tokenizer):
    unmarked, small = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    unmarked.eos_token = None
    small.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert different_reading(tokenizer, unmarked) == "the eos_token is '[SEP]' in the one and None in the other"
    assert different_ids(tokenizer, small) is None
    assert "a text is read as" in different_reading(tokenizer, small)
    assert different_reading(tokenizer, copy.deepcopy(tokenizer)) is None


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_student_of_another_tokenizer_is_refused(student, encoder_folder, tmp_path, command):
    theirs = exchanged(encoder_folder, tmp_path / "teacher")
    more = {} if command == "evaluate" else {"output": tmp_path / "taught"}
    with pytest.raises(makd.MakdError, match=r"tokenizer of the student .* is not the teacher's: token \d+ is"):
        getattr(pipeline, command)(str(student), str(theirs), TEXTS, RECIPE, **more)
    assert not (tmp_path / "taught").exists()


@pytest.mark.parametrize("command", ["compress", "factorize_only", "build_cache", "stream"])
def test_a_setting_that_is_not_the_teachers_tokenizer_is_refused(encoder_folder, tmp_path, command):
    call = {
        "compress": lambda **given: pipeline.compress(str(encoder_folder), TEXTS, BUDGET, RECIPE, **given),
        "factorize_only": lambda **given: pipeline.factorize_only(str(encoder_folder), TEXTS, BUDGET, RECIPE, **given),
        "build_cache": lambda **given: caching.build_cache(str(encoder_folder), TEXTS, RECIPE, **given),
        "stream": lambda **given: streaming.factorize_streamed(str(encoder_folder), TEXTS, BUDGET, RECIPE, **given),
    }[command]
    other = str(exchanged(encoder_folder, tmp_path / "other"))
    with pytest.raises(SettingError, match=r"The setting `tokenizer` is not the tokenizer of .* in the other"):
        call(output=tmp_path / "out", tokenizer=other)


def test_a_tokenizer_that_reads_the_same_ids_otherwise_is_taken_and_told(encoder_folder, tokenizer, caplog):
    small = copy.deepcopy(tokenizer)
    small.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert choose_tokenizer(small, str(encoder_folder)) is small
    assert "is taken, though it is not as the one of" in caplog.text


def test_a_tokenizer_with_a_token_more_is_no_other_one(encoder_folder, tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["nobodyeversaidthis"])
    assert choose_tokenizer(more, str(encoder_folder)) is more


@pytest.mark.parametrize("as_setting", [True, False])
def test_one_in_hand_without_a_padding_token_pads_with_its_end_of_text(tokenizer, encoder_folder, as_setting):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    words = choose_tokenizer(bare, str(encoder_folder)) if as_setting else bare
    batch = collator(words, load_model(str(encoder_folder)))([{"input_ids": [5]}, {"input_ids": [6, 7]}])
    assert batch["input_ids"].tolist() == [[5, bare.eos_token_id], [6, 7]]
    assert bare.pad_token is None


def test_one_in_hand_without_an_end_of_text_either_is_refused(tokenizer, encoder_folder):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ModelLoadError, match="neither a padding nor an end-of-text token"):
        choose_tokenizer(bare, str(encoder_folder))


def test_a_student_is_saved_with_its_own_tokenizer_again(student, encoder_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(student, own)
    settings = json.loads((own / "tokenizer_config.json").read_text(encoding="utf-8"))
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}), encoding="utf-8")
    pipeline.distill(str(own), str(encoder_folder), TEXTS, RECIPE, tmp_path / "taught")
    assert AutoTokenizer.from_pretrained(tmp_path / "taught").model_max_length == 77


def test_a_student_in_hand_has_no_tokenizer_that_could_differ(student, tokenizer):
    assert check_student_tokenizer(load_model(str(student)), tokenizer) is None


def test_a_decoder_that_classifies_looks_for_the_padding_that_the_tokenizer_puts(tokenizer):
    rows = [{"input_ids": list(range(5, 5 + length)), "attention_mask": [1] * length} for length in (9, 4)]
    model = tiny("llama", "sequence_classification")
    batch = collator(tokenizer, model)(rows)
    alone = [collator(tokenizer, model)([row]) for row in rows]
    with torch.no_grad():
        together, one_by_one = model(**batch).logits, torch.cat([model(**one).logits for one in alone])
    torch.testing.assert_close(together, one_by_one)
    for padding in (3, None):
        model.config.pad_token_id = padding
        with pytest.raises(DataError, match=f"padding token, which is {padding} .* the tokenizer pads with 0"):
            collator(tokenizer, model)


@pytest.mark.parametrize(("name", "head"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_other_models_see_from_the_mask_where_a_text_ends(tokenizer, name, head):
    model = tiny(name, head)
    model.config.pad_token_id = 3
    assert collator(tokenizer, model)([{"input_ids": [5, 6], "attention_mask": [1, 1]}])


def test_a_model_without_a_tokenizer_is_not_told_to_name_the_one_that_was_named(encoder_folder, tmp_path, caplog):
    tiny("bert", vocab_size=300).save_pretrained(tmp_path / "bare")
    with caplog.at_level("INFO", logger="makd"):
        assert choose_tokenizer(str(encoder_folder), str(tmp_path / "bare")).get_vocab()
    assert caplog.messages == [f"No tokenizer beside {tmp_path / 'bare'} to compare with"]
