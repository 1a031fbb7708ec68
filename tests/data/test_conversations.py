"""From columns of any layout to conversations: which columns, which roles, and what is refused."""

import json

import pytest
from datasets import Dataset

import makd
from makd.data import DataConfig, hold_out, load_texts
from tests.data.chats import chat


def load(folder, *rows, **settings):
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_texts(DataConfig(path=str(folder), **settings)).train


ONE = chat("What is a list?", "A row of things.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is a list?", "completion": "A row of things."},
        {"prompt": "What is a list?", "response": "A row of things."},
        {"instruction": "What is a list?", "context": "", "response": "A row of things.", "category": "qa"},
        {"instruction": "What is a list?", "input": None, "output": "A row of things."},
        {"instruction": "What is a list?", "output": "A row of things."},
        {"messages": ONE},
        {"prompt": ONE[:1], "completion": ONE[1:]},
        {"prompt_id": "a", "prompt": "What?", "messages": ONE},
        {"conversations": [{"from": "human", "value": ONE[0]["content"]}, {"from": "gpt", "value": ONE[1]["content"]}]},
    ],
    ids=lambda row: ", ".join(row),
)
def test_columns_of_usual_names_are_found_and_told(tmp_path, row, caplog):
    with caplog.at_level("INFO", "makd"):
        rows = load(tmp_path, row)
    assert rows["messages"][0] == ONE
    assert any("are read from" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"place": "Where is it?", "answer": "Here."}, {"prompt_columns": ("place",), "response_column": "answer"}),
        ({"question": "Where is it?", "place": "Here."}, {"prompt_columns": ("question",), "response_column": "place"}),
        ({"place": chat("Where is it?", "Here.")}, {"messages_column": "place"}),
    ],
)
def test_columns_may_be_called_anything(tmp_path, row, named):
    assert load(tmp_path, row, **named)["messages"][0] == chat("Where is it?", "Here.")


def test_prompts_are_joined_by_a_blank_line_without_blank_ones(tmp_path):
    named = {"prompt_columns": ("task", "hint", "text"), "response_column": "answer"}
    rows = load(tmp_path, {"task": "Sum up.", "hint": " ", "text": "Many words.", "answer": "Words."}, **named)
    assert rows["messages"][0] == chat("Sum up.\n\nMany words.", "Words.")


def test_of_several_references_the_first_is_learned_and_all_are_kept(tmp_path):
    rows = load(tmp_path, {"instruction": "Name a colour.", "input": "", "output": ["Red.", "Blue."]})
    assert rows["messages"][0] == chat("Name a colour.", "Red.")
    assert rows["references"][0] == ["Red.", "Blue."]


def test_conversations_under_any_name_are_read_where_they_are_named(tmp_path):
    assert load(tmp_path, {"turns": ONE}, messages_column="turns")["messages"][0] == ONE


def test_a_column_of_text_is_text_whatever_stands_beside_it(tmp_path):
    assert load(tmp_path, {"text": "A text of its own.", "messages": ONE}).column_names == ["text"]


def test_answers_inside_a_prompt_of_messages_are_given(tmp_path):
    prompt, completion = chat("One?", "Yes.", "Two?"), [{"role": "assistant", "content": "No."}]
    rows = load(tmp_path, {"prompt": prompt, "completion": completion})
    assert rows["given"][0] == 3
    assert rows["references"][0] == ["No."]


def test_a_folder_is_read_as_a_file_is(tmp_path):
    for split in ("train", "validation"):
        Dataset.from_list([{"prompt": "One?", "response": "Yes."}]).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert load_texts(DataConfig(path=str(tmp_path))).train["messages"][0] == chat("One?", "Yes.")


@pytest.mark.parametrize("first", [0, 7])
def test_a_column_that_the_first_row_in_hand_lacks_is_read(first):
    rows = [{"instruction": f"Ask {number}", "context": f"Told {number}", "response": "Yes."} for number in range(8)]
    del rows[first]["context"]
    texts = hold_out(rows, DataConfig())
    asked = {row[0]["content"] for part in (texts.train, texts.evaluation) for row in part["messages"]}
    assert asked == {f"Ask {number}" + ("" if number == first else f"\n\nTold {number}") for number in range(8)}


def test_columns_beside_the_conversations_that_nobody_reads_are_told(tmp_path, caplog):
    load(tmp_path, {"messages": ONE, "tools": "[]", "system": None})
    assert "column tools stands beside the conversations and is not read" in caplog.text
    assert "system" not in caplog.text


def test_rows_in_hand_may_be_dicts():
    texts = hold_out([{"prompt": f"{number}?", "response": "Yes."} for number in range(4)], DataConfig())
    assert texts.evaluation["messages"][0][1]["content"] == "Yes."
    assert len(texts.train) == 3


@pytest.mark.parametrize(
    ("turns", "hint"),
    [
        ([*ONE[:1], *ONE], r"row 0: message 1 is of the role 'user', where 'assistant' is next"),
        (ONE[1:], r"row 0: message 0 is of the role 'assistant', where 'user' is next"),
        ([*ONE, *chat(system="Be brief.")], "message 2 is of the role 'system', where 'user' is next"),
        ([{"role": "tool", "content": "3"}], r"message 0: the role is one of system, .*; got 'tool'"),
        ([ONE[0], {**ONE[1], "tool_calls": "add"}], "message 1 has tool_calls, which would be lost"),
    ],
    ids=["twice", "no question", "late system", "unknown", "tools"],
)
def test_roles_that_no_template_takes_are_refused_with_their_place(tmp_path, turns, hint):
    with pytest.raises(makd.MakdError, match=hint):
        load(tmp_path, {"messages": turns})


@pytest.mark.parametrize(
    ("row", "settings", "hint"),
    [
        ({"ask": "a b"}, {"prompt_columns": ("ask",), "response_column": "say"}, "no column 'say'; it has ask"),
        ({"ask": "a b"}, {"messages_column": "chat"}, "no column 'chat'; it has ask"),
        ({"ask": "a b"}, {"messages_column": "ask"}, "'ask' of .* holds 'string', not lists of messages"),
        ({"ask": 3, "say": "a"}, {"prompt_columns": ("ask",), "response_column": "say"}, "holds 'int64', not text"),
        ({"prompt": "a b", "response": 3}, {}, "'response' of .* holds 'int64', not text, or lists of texts"),
    ],
)
def test_columns_that_hold_no_conversations_are_refused(tmp_path, row, settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        load(tmp_path, row, **settings)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"prompt_columns": ("a",)}, "belong together"),
        ({"response_column": "a"}, "belong together"),
        ({"prompt_columns": ("a", "b"), "response_column": "a"}, "name a column twice"),
        (
            {"text_columns": ("a",), "messages_column": "b"},
            r"text_columns and data\.messages_column exclude each other",
        ),
        ({"template": "chatml"}, r"auto, none, or text with \{prompt\} in it once; got 'chatml'"),
        ({"template": "none", "system": "Be brief."}, r"data\.system is a message for the tokenizer's chat template"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        DataConfig(**settings)


def test_rows_in_hand_that_are_no_rows_are_refused():
    with pytest.raises(makd.MakdError, match="do not hold the same in the same columns"):
        hold_out([{"prompt": "a", "response": "b"}, {"prompt": 3, "response": "b"}], DataConfig())
