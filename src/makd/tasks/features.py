"""From a task's rows to token ids with targets. Padding waits for the batch: rows are as long as they are."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data import tokenize
from makd.errors import DataError
from makd.mapped import map_rows
from makd.tasks.answer_spans import LOST
from makd.tasks.settings import TaskConfig
from makd.tasks.windows import check_questions
from makd.tasks.words import encode_words

NOWHERE = 1_000_000
"""An answer's place where there is none to learn: transformers takes places beyond the row's end out of the loss."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TARGETS = ("label", "labels", "start_positions", "end_positions")


def encode(
    config: TaskConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, outputs: int = 0
) -> Dataset:
    """Token ids of `rows`, with targets; rows without a label get one that is ignored (numbers: NaN).

    Args:
        config: of the task.
        rows: as `read_task` gives them.
        tokenizer: of the model.
        model: says how rows are read.
        outputs: how many labels, or numbers, a row has; below 2 it has one class or number.
    """
    kind = config.known.kind
    if kind == "token_classification":
        return plain_inputs(encode_words(config, rows, tokenizer))
    if kind == "question_answering":
        return plain_inputs(_encode_places(config, rows, tokenizer))
    encoded = tokenize(rows, tokenizer, model, config.length, setting="task.max_length")
    several = kind == "multi_label" or (kind == "regression" and outputs > 1)
    absent: Any = IGNORE_INDEX if kind == "classification" else float("nan")
    form: Any = Value("int64" if kind == "classification" else "float32")
    if several:
        absent, form = [absent] * outputs, List(form)
    if "label" not in encoded.column_names:
        encoded = encoded.add_column("label", [absent] * len(encoded), feature=form)
    return plain_inputs(encoded.cast_column("label", form))


def encode_windows(config: TaskConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """All windows of all rows, with what is needed to put their predictions together.

    Of questions what `answers.best_answer` and the plan's loss need; of words `row` and `words`.
    """
    if config.known.kind == "token_classification":
        return encode_words(config, rows, tokenizer)
    return _encode_places(config, rows, tokenizer)


def plain_inputs(rows: Dataset) -> Dataset:
    """Only what a model reads, and targets."""
    return rows.select_columns([name for name in (*INPUTS, *TARGETS) if name in rows.column_names])


def without_targets(rows: Dataset) -> Dataset:
    """Only what a model reads."""
    return rows.select_columns([name for name in INPUTS if name in rows.column_names])


def _encode_places(config: TaskConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Windows over each context, with the first and last token of the answer; 0, or [CLS]'s place, without one."""
    length, stride = config.length, config.stride
    if not tokenizer.is_fast:
        raise DataError(f"{config.name} needs a fast tokenizer, which says where in the text each token stands.")
    if stride >= length:
        raise DataError(
            f"task.stride is {stride} tokens, and windows are only task.max_length = {length} long; lower it."
        )

    def windows(batch: Mapping[str, Any], numbers: list[int]) -> dict[str, Any]:
        questions = [question.strip() for question in batch["question"]]
        check_questions(config, tokenizer, questions, batch["context"], numbers)
        encoded = tokenizer(
            questions, batch["context"], truncation="only_second", max_length=length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        made: dict[str, list[Any]] = {"offsets": [], "first": [], "question": []}
        made |= {"start_positions": [], "end_positions": []}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            parts = encoded.sequence_ids(window)
            offsets = [
                list(place) if part == 1 else [-1, -1]
                for place, part in zip(encoded["offset_mapping"][window], parts, strict=True)
            ]
            ids = encoded["input_ids"][window]
            first = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            answers = batch["answers"][row] if "answers" in batch else None
            start, end = (NOWHERE, NOWHERE) if answers is None else _span(answers, offsets, first)
            for name, value in zip(made, (offsets, first, numbers[row], start, end), strict=True):
                made[name].append(value)
        return {name: encoded[name] for name in INPUTS if name in encoded} | made

    return map_rows(rows, windows, batched=True, with_indices=True, remove_columns=rows.column_names)


def _span(answers: Mapping[str, Any], offsets: list[list[int]], first: int) -> tuple[int, int]:
    """First and last token of the first answer in a window that holds all of it, else twice `first`."""
    if not answers["text"]:
        return first, first
    begin = answers["answer_start"][0]
    if begin == LOST:
        return NOWHERE, NOWHERE
    end = begin + len(answers["text"][0])
    inside = [place for place, (left, right) in enumerate(offsets) if left >= 0 and right > begin and left < end]
    real = [place for place, (left, _) in enumerate(offsets) if left >= 0]
    if not inside or offsets[real[0]][0] > begin or offsets[real[-1]][1] < end:
        return first, first
    return inside[0], inside[-1]
