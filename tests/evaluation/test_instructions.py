"""Answers to instructions: which prompts a model reads, what it writes, and how that is scored."""

import copy
import json
import re

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import makd
from makd.errors import DataError, SettingError
from makd.evaluation.instructions import InstructionsConfig, load_instructions
from makd.evaluation.prompts import encode_prompts, warn_asked_otherwise
from makd.evaluation.rouge import mean_rouge_l, warn_wordless
from makd.generation import Sampling, generate, stop_tokens
from makd.words import words_of
from tests.data.chats import PLAIN, spell, with_template
from tests.models import tiny

ROWS = [
    {"prompt": "What is a list?", "output": ["A list is a mutable sequence.", "a sequence"], "input": ""},
    {"prompt": "Name two sequences.", "output": ["list and tuple"], "input": "of Python"},
    {"prompt": "How is a list made, and where may it be used in a program?", "output": ["with brackets"], "input": " "},
]
FEW = {"max_prompt_tokens": 45, "max_answer_tokens": 6, "seeds": (1, 2), "batch_size": 2}


@pytest.fixture
def file(tmp_path):
    """Write rows of instructions; gives their path."""

    def write(rows=ROWS):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def model(decoder_folder):
    return AutoModelForCausalLM.from_pretrained(decoder_folder).eval()


def prompts_of(config, tokenizer, model):
    return encode_prompts(load_instructions(config), tokenizer, model)


def test_prompts_are_given_as_they_are_after_what_the_tokenizer_puts_before_a_text(file, tokenizer, model):
    ids = prompts_of(InstructionsConfig(path=file(), **FEW), tokenizer, model).ids
    assert [tokenizer.decode(row) for row in ids][1] == "[CLS] " + tokenizer.decode(
        tokenizer(ROWS[1]["prompt"], add_special_tokens=False)["input_ids"]
    )
    assert all(row[-1] != tokenizer.eos_token_id for row in ids)


def test_columns_are_joined_and_blank_ones_left_out(file):
    config = InstructionsConfig(path=file(), prompt_columns=("prompt", "input"))
    assert load_instructions(config).prompts == [
        ROWS[0]["prompt"],
        "Name two sequences.\n\nof Python",
        ROWS[2]["prompt"],
    ]


def test_a_chat_template_ends_where_the_answer_begins(file, decoder_folder, model):
    own = AutoTokenizer.from_pretrained(decoder_folder)
    own.chat_template = (
        "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %} answer {% endif %}"
    )
    config = InstructionsConfig(path=file(), template="auto", **{**FEW, "max_prompt_tokens": 50})
    ids = prompts_of(config, own, model).ids[0]
    assert own.decode(ids) == own.decode(
        own(f"[CLS] user {ROWS[0]['prompt']} [SEP] answer", add_special_tokens=False)["input_ids"]
    )


def test_a_template_that_is_written_out_stands_around_the_prompt(file, tokenizer, model):
    config = InstructionsConfig(path=file(), template="Question: {prompt} Answer:", **{**FEW, "max_prompt_tokens": 55})
    ids = prompts_of(config, tokenizer, model).ids[1]
    text = f"Question: {ROWS[1]['prompt']} Answer:"
    assert ids == [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_row_with_one_reference_may_hold_it_as_a_text(file):
    rows = [{"ask": row["prompt"], "gold": row["output"][0]} for row in ROWS]
    config = InstructionsConfig(path=file(rows), prompt_columns=("ask",), reference_column="gold")
    assert load_instructions(config).references[1] == ["list and tuple"]


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "Why?", "response": "So."}, "Why?", "So."),
        ({"prompt": "Why?", "completion": "So."}, "Why?", "So."),
        ({"instruction": "Sum up", "context": "a b", "response": "ab", "category": "c"}, "Sum up\n\na b", "ab"),
        # as MiniLLM's rows have it: the prompt is made of the others, and stands besides
        ({"instruction": "Sum", "input": "1 2", "prompt": "## Sum: 1 2", "output": "3"}, "## Sum: 1 2", "3"),
    ],
)
def test_columns_are_found_by_the_names_that_they_usually_have(file, caplog, row, prompt, reference):
    with caplog.at_level("INFO"):
        found = load_instructions(InstructionsConfig(path=file([row])))
    assert (found.prompts, found.references) == ([prompt], [[reference]])
    assert "prompts are read from" in caplog.text


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a list"},
    {"role": "assistant", "content": "of names"},
    {"role": "user", "content": "and of it"},
    {"role": "assistant", "content": "a list of it"},
    {"role": "user", "content": "thanks"},
]


def test_conversations_are_asked_up_to_their_last_answer_through_the_chat_template(file, tokenizer, model):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}answer{% endif %}"
    )
    config = InstructionsConfig(path=file([{"messages": CHAT}]), template="auto", **FEW)
    found = load_instructions(config)
    assert (found.prompts, found.messages, found.references) == (["and of it"], [CHAT[:4]], [["a list of it"]])
    (ids,) = prompts_of(config, chatting, model).ids
    text = "system Be short. [SEP] user Name a list [SEP] assistant of names [SEP] user and of it [SEP] answer"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompts_and_completions_may_be_lists_of_messages_as_trl_has_them(file):
    path = file([{"prompt": CHAT[:4], "completion": CHAT[4:5]}])
    found = load_instructions(InstructionsConfig(path=path, template="auto"))
    assert (found.prompts, found.messages, found.references) == (["and of it"], [CHAT[:4]], [["a list of it"]])
    with pytest.raises(SettingError, match=r"holds conversations in 'prompt' and 'completion'.*template auto"):
        load_instructions(InstructionsConfig(path=path))


def test_a_conversation_that_the_chat_template_refuses_is_told_with_its_roles(file, tokenizer, model):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{{ raise_exception('no system role') }}"
    config = InstructionsConfig(path=file([{"messages": CHAT}]), template="auto", **FEW)
    with pytest.raises(DataError, match=r"of the roles system, user, assistant, user: no system role"):
        prompts_of(config, chatting, model)


def test_conversations_are_not_asked_past_the_chat_template_and_need_an_answer(file):
    with pytest.raises(SettingError, match=r"holds conversations in 'messages'.*template auto"):
        load_instructions(InstructionsConfig(path=file([{"messages": CHAT}])))
    with pytest.raises(DataError, match=r"1 of 1 rows.*no reference"):
        load_instructions(InstructionsConfig(path=file([{"messages": CHAT[:2]}]), template="auto"))


def test_prompts_that_go_past_the_chat_template_are_told(file, tokenizer, model, caplog):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with caplog.at_level("INFO"):
        prompts_of(InstructionsConfig(path=file(), **FEW), chatting, model)
    assert "instructions.template auto asks through the chat template" in caplog.text


def test_rouge_l_is_the_best_f1_over_references_of_stemmed_words():
    # "lists of numbers" and "list of number" are one after stemming: precision 3/4, recall 1
    expected = 100 * (2 * 0.75 * 1.0 / 1.75 + 0.0) / 2
    found = mean_rouge_l(["the lists of numbers", "nothing"], [["a tuple", "list of number"], ["else"]])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "half"),
    [("Ответ на вопрос", "Ответ другой вопрос"), ("η απάντηση είναι", "η ερώτηση είναι"), ("答案是三", "答案不三")],
)
def test_words_of_any_script_are_words(reference, half):
    words = 4 if reference.startswith("答") else 3
    assert words_of([[reference]]) == "unicode"
    assert mean_rouge_l([reference], [[reference]]) == pytest.approx(100)
    # one word of all is another one
    assert mean_rouge_l([half], [[reference]]) == pytest.approx(100 * (words - 1) / words)
    assert mean_rouge_l(["nothing"], [[reference]]) == 0


def test_an_accent_in_english_leaves_the_numbers_that_rouge_score_gives():
    references = [["The café in the old town is where we met him"]]
    assert words_of(references) == "english"
    own = RougeScorer(["rougeL"], use_stemmer=True).score(references[0][0], "a caf where we meet")["rougeL"].fmeasure
    assert mean_rouge_l(["a caf where we meet"], references) == pytest.approx(100 * own)


def test_rows_of_another_script_count_though_their_letters_are_few():
    references = [["A long answer in English. " * 12]] * 8 + [["北京是中国的首都。"]] * 4
    assert words_of(references) == "unicode"
    assert mean_rouge_l([several[0] for several in references], references) == pytest.approx(100)


@pytest.mark.parametrize("wordless", ["👍", "١٢٣", "<=", "北京"])
def test_a_reference_without_words_is_compared_as_a_whole_and_told(wordless, caplog):
    references = [["An answer in English"]] * 20 + [[wordless]]
    same, other = ["An answer in English"] * 20 + [wordless], ["An answer in English"] * 20 + ["else"]
    assert words_of(references) == "english"
    assert mean_rouge_l(same, references) == pytest.approx(100)
    assert mean_rouge_l(other, references) == pytest.approx(100 * 20 / 21)
    with caplog.at_level("WARNING", logger="makd"):
        warn_wordless(references)
    assert "1 of 21 rows have a reference without a word" in caplog.text


def test_the_same_seed_writes_the_same_and_leaves_torch_as_it_was(file, tokenizer, model):
    config = InstructionsConfig(path=file(), **FEW)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = makd.answer(model, tokenizer, config)
    assert torch.equal(torch.rand(3), expected)
    assert makd.answer(model, tokenizer, config) == first
    assert first.texts[0] != first.texts[1]
    assert first.mean == pytest.approx(sum(first.rouge_l) / 2)
    assert first.deviation == pytest.approx(abs(first.rouge_l[0] - first.rouge_l[1]) / 2**0.5)


def test_greedy_answers_are_those_of_a_loop_over_tokens_whatever_stands_beside_them(file, tokenizer, model):
    prompts = prompts_of(InstructionsConfig(path=file(), **FEW), tokenizer, model).ids
    stops = stop_tokens(model, tokenizer)
    settings = {"seed": 0, "batch_size": 3}
    written = generate(model, prompts, Sampling(temperature=0.0, max_new_tokens=6), stops, 0, **settings)
    for prompt, row in zip(prompts, written, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] not in stops):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row == ids[len(prompt) :]


def test_sampling_is_from_the_whole_distribution_whatever_the_model_says_of_itself(tokenizer, model):
    before = generate(model, [[2, 9, 17]], Sampling(max_new_tokens=20), [3], 0, seed=1, batch_size=1)
    own = GenerationConfig(temperature=0.01, top_k=1, repetition_penalty=5.0, do_sample=True)
    model.generation_config = own
    assert generate(model, [[2, 9, 17]], Sampling(max_new_tokens=20), [3], 0, seed=1, batch_size=1) == before
    assert model.generation_config is own


def test_an_answer_ends_with_the_first_stop_token_of_tokenizer_or_model(tokenizer, model):
    model.generation_config.eos_token_id = [7, 8]
    stops = stop_tokens(model, tokenizer)
    assert stops == [3, 7, 8]
    every = list(range(300))
    assert len(generate(model, [[2, 9]], Sampling(max_new_tokens=5), every, 0, seed=1, batch_size=1)[0]) == 1


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"reference_column": "answer"}, "no column 'answer'.*it has prompt, output, input"),
        (ROWS, {"prompt_columns": ("ask",)}, "no column 'ask'"),
        (ROWS, {"prompt_columns": ("output",)}, "'output'.*not text"),
        (ROWS, {"split": "test"}, "no split 'test'"),
        ([*ROWS, {"prompt": "Why?", "output": [], "input": ""}], {}, "1 of 4 rows.*no reference, the first is row 3"),
        ([*ROWS, {"prompt": " ", "output": ["x"], "input": ""}], {}, "1 of 4 rows.*no prompt"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(file, rows, settings, message):
    with pytest.raises(DataError, match=message):
        load_instructions(InstructionsConfig(path=file(rows), **settings))


def test_a_prompt_beyond_the_limit_is_refused_dropped_or_cut_as_asked(file, tokenizer, model):
    few = {**FEW, "max_prompt_tokens": 20}
    with pytest.raises(DataError, match=r"1 of 3 prompts.*max_prompt_tokens = 20 tokens; the longest has \d+"):
        prompts_of(InstructionsConfig(path=file(), **few), tokenizer, model)
    dropped = prompts_of(InstructionsConfig(path=file(), longer="drop", **few), tokenizer, model)
    assert (dropped.dropped, dropped.rows.prompts) == (1, [row["prompt"] for row in ROWS[:2]])
    cut = prompts_of(InstructionsConfig(path=file(), longer="cut", **few), tokenizer, model)
    assert (cut.cut, [len(row) for row in cut.ids][2]) == (1, 20)


def test_what_cannot_answer_is_refused(file, tokenizer, model):
    config = InstructionsConfig(path=file(), **FEW)
    with pytest.raises(SettingError, match="BertModel is none"):
        prompts_of(config, tokenizer, tiny("bert"))
    with pytest.raises(SettingError, match="has no chat template"):
        prompts_of(InstructionsConfig(path=file(), template="auto", **FEW), tokenizer, model)
    with pytest.raises(SettingError, match="are 512, but LlamaForCausalLM has positions for 64"):
        prompts_of(InstructionsConfig(path=file()), tokenizer, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "seeds is a list of at least one"),
        ({"seeds": (1, 1)}, "all different"),
        ({"temperature": 0.0}, "there are 5 seeds"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"template": "auto", "longer": "cut"}, "would cut off the end of a template"),
        ({"template": "{prompt} {prompt}"}, "with {prompt} in it once"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        InstructionsConfig(path="rows.jsonl", **settings)


def test_the_command_shows_teacher_and_student_and_gives_both_to_machines(run, file, decoder_folder):
    words = [
        "evaluate", decoder_folder, "--teacher", decoder_folder, "--instructions", file(), "--data.path", "pydoc",
        "--instructions.max_prompt_tokens=45", "--instructions.max_answer_tokens=4", "--instructions.seeds=[1, 2]",
        "--data.max_length=32", "--recipe.evaluation.rows=4", "--recipe.evaluation.latency=false",
        "--recipe.device=cpu",
    ]  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    assert "ROUGE-L, 2 seeds" in out
    code, out, err = run(*words, "--json")
    assert code == 0, err
    found = json.loads(out)["instructions"]
    assert found["rouge_l"]["student"] == found["rouge_l"]["teacher"]  # one model is both
    assert found["rows"] == 3
    assert found["samples"][1]["references"] == ["list and tuple"]


def test_prompts_that_the_student_learned_from_are_counted(run, file, decoder_folder, tmp_path):
    learned = [{"prompt": row["prompt"], "response": "Something."} for row in ROWS[:2]]
    texts = tmp_path / "texts"
    texts.mkdir()
    for split, rows in (("train", learned), ("validation", [{"prompt": "What is new?", "response": "Nothing."}])):
        (texts / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(
        "evaluate", decoder_folder, "--teacher", decoder_folder, "--data.path", texts, "--data.template", "none",
        "--instructions", file(), "--instructions.max_prompt_tokens=45",
        "--data.max_length=32", "--instructions.max_answer_tokens=4", "--instructions.seeds=[1]",
        "--recipe.evaluation.latency=false", "--recipe.device=cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "rows.jsonl: 2 of 3 prompts are among those to train on, word for word" in " ".join(err.split())


def test_rows_that_are_wrong_are_told_before_the_models_are_loaded(run, file, decoder_folder):
    words = ("--instructions", file(), "--instructions.reference_column", "gold", "--data.path", "pydoc")
    code, _, err = run("evaluate", decoder_folder, "--teacher", "nowhere/at-all", *words)
    assert code == 2
    assert "no column 'gold'" in err


def test_a_system_message_is_put_before_conversations_that_have_none(file, tokenizer, model):
    chatting = with_template(tokenizer, PLAIN)
    without, own = CHAT[1:3], [{"role": "system", "content": "one name"}, *CHAT[1:3]]
    config = InstructionsConfig(
        path=file([{"messages": without}, {"messages": own}]), template="auto", system="the list", **FEW
    )
    first, second = (spell(chatting, ids) for ids in prompts_of(config, chatting, model).ids)
    assert first.startswith("system : the list [SEP] user")
    assert second.startswith("system : one name [SEP] user")


def test_a_system_message_needs_the_chat_template():
    with pytest.raises(SettingError, match=r"instructions\.template is 'none'\. Give instructions\.template auto"):
        InstructionsConfig(path="x", system="Be short.")


@pytest.mark.parametrize(
    ("asked", "taught", "told"),
    [
        ({}, {}, ["template"]),
        ({"template": "auto"}, {}, []),
        ({"template": "auto"}, {"system": "Be short."}, ["system"]),
        ({"template": "auto", "system": "Be short."}, {"system": "Be short."}, []),
        ({}, {"template": "none"}, []),
    ],
)
def test_who_is_asked_otherwise_than_it_learned_is_told_of(asked, taught, told, model, caplog):
    warn_asked_otherwise(InstructionsConfig(path="x", **asked), makd.DataConfig(path="y", **taught), model)
    assert [re.match(r"instructions\.(\w+) is", line)[1] for line in caplog.messages] == told


def test_an_evaluation_tells_of_a_student_that_is_asked_otherwise_than_it_learned(
    file, tokenizer, model, tmp_path, caplog
):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(10)))
    makd.evaluate(
        model, model, makd.DataConfig(path=str(chats), max_length=64),
        makd.Recipe(evaluation=makd.EvaluationConfig(latency=False), device="cpu"),
        instructions=InstructionsConfig(path=file(), **FEW), tokenizer=with_template(tokenizer, PLAIN),
    )  # fmt: skip
    assert "instructions.template is 'none', and data.template is 'auto'" in caplog.text
