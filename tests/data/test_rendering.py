"""From conversations to tokens: what is learned, by the template's mask, by comparison, or by a written template."""

import pytest
from transformers import PreTrainedTokenizerBase

import makd
from makd.data import Rendering
from makd.data.rendering import answer_ends, make_encoder
from tests.data.chats import ALTERNATING, FORGETFUL, GOES_ON, MARKED, PLAIN, TAILED, chat, spell, with_template


def read(tokenizer: PreTrainedTokenizerBase, turns, given=0, **rendering):
    """The whole text, and the parts of it that are learned, as their tokens spell them."""
    (encoded,) = make_encoder(tokenizer, Rendering(**rendering))([(turns, given)])
    parts, before = [], False
    for token, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned:
            parts = [*parts[:-1], [*parts[-1], token]] if before else [*parts, [token]]
        before = learned
    return spell(tokenizer, encoded.ids), [spell(tokenizer, part) for part in parts]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["compared", "marked"])
class TestByTheChatTemplate:
    def test_every_answer_is_learned_with_its_end_and_nothing_else(self, tokenizer, template):
        text, parts = read(with_template(tokenizer, template), chat("a list", "the names", "a class", "the end"))
        assert text == (
            "user : a list [SEP] assistant : the names [SEP] user : a class [SEP] assistant : the end [SEP]"
        )
        assert parts == ["the names [SEP]", "the end [SEP]"]

    def test_an_answer_that_was_given_is_not_learned(self, tokenizer, template):
        turns = chat("a list", "the names", "a class", "the end")
        assert read(with_template(tokenizer, template), turns, 3)[1] == ["the end [SEP]"]

    def test_what_follows_the_last_answer_is_left_out(self, tokenizer, template):
        text, _ = read(with_template(tokenizer, template), chat("a list", "the names", "and the class"))
        assert text == "user : a list [SEP] assistant : the names [SEP]"

    def test_a_system_message_is_put_first_where_there_is_none(self, tokenizer, template):
        words = with_template(tokenizer, template)
        text, parts = read(words, chat("a list", "the names"), system="one name")
        assert text.startswith("system : one name [SEP] user")
        assert parts == ["the names [SEP]"]
        assert read(words, chat("a list", "the names", system="no name"), system="one name")[0].startswith(
            "system : no"
        )

    def test_the_prompt_is_what_generation_is_given(self, tokenizer, template):
        words = with_template(tokenizer, template)
        (encoded,) = make_encoder(words, Rendering())([(chat("a list", "the names"), 0)])
        given = words.apply_chat_template(chat("a list"), add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encoded.ids[: encoded.learned.index(True)] == given


def test_both_ways_of_finding_answers_agree(tokenizer):
    turns = chat("a list", "the names", "a class", "the end", system="one name")
    encoded = [
        make_encoder(with_template(tokenizer, template), Rendering())([(turns, 0)]) for template in (PLAIN, MARKED)
    ]
    assert encoded[0] == encoded[1]


def test_a_template_that_renders_earlier_answers_otherwise_is_refused_where_there_are_some(tokenizer):
    words = with_template(tokenizer, FORGETFUL)
    assert read(words, chat("a list", "the names"))[1] == ["the names [SEP]"]
    with pytest.raises(makd.MakdError, match=r"renders the beginning of a conversation otherwise .*message 1 of 4"):
        read(words, chat("a list", "the names", "a class", "the end"))


def test_what_the_template_refuses_is_told_with_the_roles(tokenizer):
    with pytest.raises(makd.MakdError, match="refuses a conversation of the roles system, user, assistant: no system"):
        read(with_template(tokenizer, ALTERNATING), chat("a list", "the names", system="one name"))


def test_a_template_that_writes_the_date_is_told_of(tokenizer, caplog):
    dated = "{{ strftime_now('%d') }} " + PLAIN
    make_encoder(with_template(tokenizer, dated), Rendering())
    assert "writes the date of today" in caplog.messages[-1]


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(makd.MakdError, match=r"no chat template\. Say with data\.template"):
        make_encoder(tokenizer, Rendering())


class TestByAWrittenTemplate:
    def test_the_response_and_the_end_of_text_are_learned(self, tokenizer):
        text, parts = read(tokenizer, chat("a list", "the names"), template="the name : {prompt} ; the end : ")
        assert text == "[CLS] the name : a list ; the end : the names [SEP]"
        assert parts == ["the names [SEP]"]

    def test_none_is_the_response_right_after_the_prompt(self, tokenizer):
        text, parts = read(tokenizer, chat("a list : ", "the names"), template="none")
        assert (text, parts) == ("[CLS] a list : the names [SEP]", ["the names [SEP]"])

    def test_braces_in_a_prompt_stay(self, tokenizer):
        text, _ = read(tokenizer, chat("a { 1 } {prompt} list", "the names"), template="none")
        assert text.startswith("[CLS] a { 1 }")

    def test_a_token_that_spans_the_border_is_learned(self, tokenizer):
        _, parts = read(tokenizer, chat("a nam", "e of things"), template="none")
        assert parts[0].startswith("name of")

    def test_conversations_of_several_turns_are_refused(self, tokenizer):
        with pytest.raises(makd.MakdError, match=r"one prompt and one response; .* user, assistant, user, assistant"):
            read(tokenizer, chat("a", "b", "c", "d"), template="none")


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["compared", "marked"])
def test_the_token_by_which_a_template_ends_an_answer_is_found(tokenizer, template):
    other = template.replace("[SEP]", "[MASK]")
    assert answer_ends(with_template(tokenizer, other)) == [tokenizer.mask_token_id]


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('none') }}", PLAIN.replace(" [SEP]", ""), PLAIN.replace("[SEP]", "the")],
    ids=["no template", "one that takes nothing", "one that ends nothing", "one that ends answers by a word"],
)
def test_a_template_that_ends_answers_by_no_token_of_its_own_names_none(tokenizer, template):
    assert answer_ends(with_template(tokenizer, template)) == []


def test_what_a_template_appends_once_after_a_conversation_is_not_learned(tokenizer):
    turns = chat("a list", "the names", "a class", "the end")
    tailed, plain = with_template(tokenizer, TAILED), with_template(tokenizer, PLAIN)
    for given in (turns[:2], turns):
        assert read(tailed, given) == read(plain, given)
    assert answer_ends(tailed) == [tokenizer.sep_token_id]


def test_the_only_token_that_ends_the_last_answer_is_learned(tokenizer):
    """Turns end with a line, and an answer that comes last with [SEP]: that is its end, and no tail."""
    end = "{{ '[SEP]' if loop.last and m.role == 'assistant' else '\\n' }}"
    template = "{% for m in messages %}{{ m.role + ' : ' + m.content }}" + end + "{% endfor %}" + GOES_ON
    assert read(with_template(tokenizer, template), chat("a list", "the names"))[1] == ["the names [SEP]"]
