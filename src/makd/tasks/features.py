"""From a task's rows to token ids with targets. Padding waits for the batch: rows are as long as they are."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data import tokenize
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError
from makd.mapped import map_rows
from makd.tasks.answer_spans import LOST
from makd.tasks.settings import TaskConfig
from makd.tasks.windows import check_questions
from makd.tasks.words import encode_words

logger = logging.getLogger(__name__)

NOWHERE = 1_000_000
"""An answer's place where there is none to learn: transformers takes places beyond the row's end out of the loss."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TARGETS = ("label", "labels", "start_positions", "end_positions")
FEW = 0.01
"""Share of answers below which it is no warning that they are too long to be predicted: SQuAD has as many."""

Offsets = Sequence[Sequence[int]]
"""Of each token of a window its [first, last + 1] letter in the context; [-1, -1] where it is not of it."""


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
        of = encoded["overflow_to_sample_mapping"]
        made: dict[str, list[Any]] = {"offsets": [], "first": [], "question": [numbers[row] for row in of]}
        made |= {"start_positions": [], "end_positions": []}
        for window in range(len(of)):
            places = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
            made["offsets"].append([list(place) if part == 1 else [-1, -1] for place, part in places])
            ids = encoded["input_ids"][window]
            made["first"].append(ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0)
        for row, context in enumerate(batch["context"]):
            own = [window for window, sample in enumerate(of) if sample == row]
            offsets, firsts = ([made[name][window] for window in own] for name in ("offsets", "first"))
            spans = _spans(batch["answers"][row] if "answers" in batch else None, context, offsets, firsts)
            made["start_positions"] += [start for start, _ in spans]
            made["end_positions"] += [end for _, end in spans]
        return {name: encoded[name] for name in INPUTS if name in encoded} | made

    encoded = map_rows(rows, windows, batched=True, with_indices=True, remove_columns=rows.column_names)
    check_known(Known.sum(map(KnownTokens(tokenizer).count, encoded["input_ids"])), tokenizer)
    if "answers" in rows.column_names:
        _tell_lengths(config, rows, encoded)
    return encoded


def _spans(
    answers: Mapping[str, Any] | None, context: str, windows: Sequence[Offsets], firsts: Sequence[int]
) -> list[tuple[int, int]]:
    """For each of a row's windows the first and last token of the row's first answer.

    A window without all of it has twice its place in `firsts`, as one whose row has no answer has. Where no window has
    all of it, there is nothing to learn: it has one.
    """
    nowhere = [(NOWHERE, NOWHERE)] * len(windows)
    if answers is None:
        return nowhere
    if not answers["text"] or not answers["text"][0]:
        return [(first, first) for first in firsts]
    if answers["answer_start"][0] == LOST:
        return nowhere
    begin = answers["answer_start"][0]
    letters = _read_letters(context, begin, begin + len(answers["text"][0]), windows)
    found = [_tokens_of(offsets, letters[0], letters[-1] + 1) if letters else None for offsets in windows]
    if not any(found):
        return nowhere
    return [span or (first, first) for span, first in zip(found, firsts, strict=True)]


def _read_letters(context: str, begin: int, end: int, windows: Sequence[Offsets]) -> list[int]:
    """Places of the letters from `begin` to before `end` that tokens stand for; not blanks, or what is dropped."""
    read: set[int] = set()
    for offsets in windows:
        for left, right in offsets:
            if right > begin and left < end:
                read.update(range(max(left, begin), min(right, end)))
    return [place for place in sorted(read) if not context[place].isspace()]


def _tokens_of(offsets: Offsets, begin: int, end: int) -> tuple[int, int] | None:
    """First and last token of the letters from `begin` to before `end`; None where the window has not all of them."""
    inside = [place for place, (left, right) in enumerate(offsets) if left >= 0 and right > begin and left < end]
    real = [place for place, (left, _) in enumerate(offsets) if left >= 0]
    if not inside or offsets[real[0]][0] > begin or offsets[real[-1]][1] < end:
        return None
    return inside[0], inside[-1]


def _tell_lengths(config: TaskConfig, rows: Dataset, encoded: Dataset) -> None:
    """Log how many answers are in no window whole, and how many are longer than any that may be predicted."""
    columns = ("question", "first", "start_positions", "end_positions")
    sizes = {
        question: end - start + 1
        for question, first, start, end in zip(*(encoded[name] for name in columns), strict=True)
        if start not in (first, NOWHERE)
    }
    there = [
        number
        for number, answers in enumerate(rows["answers"])
        if answers["text"] and answers["text"][0] and answers["answer_start"][0] != LOST
    ]
    missed = sum(number not in sizes for number in there)
    if missed:
        logger.warning(
            "%d of %d answers are in no window of task.max_length = %d whole, or of no letters that the tokenizer "
            "knows: no place is learned for them. Raise task.stride (%d), by which windows overlap, or max_length",
            missed, len(there), config.length, config.stride,
        )  # fmt: skip
    longer = sum(size > config.longest_answer for size in sizes.values())
    if longer:
        logger.log(
            logging.WARNING if longer >= FEW * len(there) else logging.INFO,
            "%d of %d answers have more than task.longest_answer = %d tokens: they cannot be predicted whole. Raise it",
            longer, len(there), config.longest_answer,
        )  # fmt: skip
