"""A task that a model can be taught and measured on: tokenized rows, and the official metrics.

rows = read_task(TaskConfig(name="glue/mrpc", path="data/glue_mrpc"))
model = load_task_model("bert-base-uncased", rows, tokenizer)
task = tokenize_task(rows, tokenizer, model)        # load_task does both, for a model that has the head
task.evaluate(model)                                # {"accuracy": 0.32, "f1": 0.0, "score": 0.16}
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.eval_mode import in_eval
from makd.data import check_room, collator, count_tokens
from makd.default_modes import default_modes
from makd.kinds import takes
from makd.progress import OnProgress, nobody, track
from makd.tasks.answers import best_answer
from makd.tasks.features import encode, encode_windows, plain_inputs, without_targets
from makd.tasks.heads import check_head
from makd.tasks.labels import number_by_outputs
from makd.tasks.metrics import METRICS, measurable, score
from makd.tasks.rows import TaskRows, read_task
from makd.tasks.settings import TaskConfig
from makd.tasks.words import NO_WORD
from makd.weights.finite import check_measured, check_outputs
from makd.words import words_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Tokenized rows for `makd.data.collator`, and what is measured."""

    config: TaskConfig
    labels: tuple[str, ...]
    """In the order of the model's head, as the rows number them."""
    order: tuple[int, ...]
    """For each of `labels` its place in the data's order, which metrics go by; empty where labels have no names."""
    train: Dataset
    """With labels, in shuffled order."""
    extra: Dataset | None
    """Unlabelled rows in the same form: labels that no loss looks at."""
    evaluation: Mapping[str, Dataset]
    """By split, with labels."""
    references: Mapping[str, Dataset]
    """Question answering and token classification: the whole rows, which the windows in `evaluation` point to."""
    tokenizer: PreTrainedTokenizerBase
    may_be_none: bool = False
    """Question answering: whether "no answer" may be predicted, as `TaskRows` says."""

    @property
    def distillation(self) -> Dataset:
        """All that a student may be taught on: the training rows, and those without labels."""
        return self.train if self.extra is None else concatenate_datasets([self.train, self.extra])

    @property
    def held_out(self) -> Dataset:
        """The first split to measure on."""
        return next(iter(self.evaluation.values()))

    @default_modes()
    def evaluate(
        self, model: PreTrainedModel, batch_size: int = 32, on_progress: OnProgress = nobody
    ) -> dict[str, float]:
        """The task's metrics, and their `score`.

        Of several splits each metric is told for each, with what distinguishes the splits' names: `accuracy_matched`.
        The score is the mean over splits.
        """
        found: dict[str, float] = {}
        scores = []
        for split, rows in self.evaluation.items():
            predicted, true = self._predict(model, split, rows, batch_size, on_progress)
            kind = self.config.known.kind
            values = {name: METRICS[kind][name](predicted, true) for name in measurable(self.config.measured, true)}
            check_measured(values, f"on the split {split} of {self.config.name}")
            scores.append(score(kind, values))
            suffix = "" if len(self.evaluation) == 1 else f"_{split.removeprefix('validation_')}"
            found |= {name + suffix: value for name, value in values.items()}
        return found | {"score": sum(scores) / len(scores)}

    def count_tokens(self, model: PreTrainedModel) -> int:
        """Real tokens of all rows to measure on, as `model` reads them: of both sides of an encoder-decoder."""
        loaders = (_loader(rows, self.tokenizer, model, 32) for rows in self.evaluation.values())
        return sum(count_tokens(loader) for loader in loaders)

    def _predict(
        self, model: PreTrainedModel, split: str, rows: Dataset, batch_size: int, tell: OnProgress
    ) -> tuple[Any, Any]:
        """What `model` predicts and what is true, as the metrics of the kind take them."""
        kind = self.config.known.kind
        if kind == "question_answering":
            logits = _outputs(model, rows, self.tokenizer, batch_size, ("start_logits", "end_logits"), True, tell)
            return self._answers(rows, logits, self.references[split])
        if kind == "token_classification":
            logits = _outputs(model, rows, self.tokenizer, batch_size, ("logits",), True, tell)
            return self._tags(rows, logits, self.references[split])
        outputs = _outputs(model, rows, self.tokenizer, batch_size, ("logits",), False, tell)
        values, true = np.stack([row[0] for row in outputs]), np.asarray(list(rows["label"]))
        if kind == "multi_label":
            return (values > 0).astype(int), true.astype(int)
        if kind == "regression":
            return (values[:, 0] if true.ndim == 1 else values), true
        return self.in_data_order(values.argmax(-1)), self.in_data_order(true)

    def in_data_order(self, numbers: Any) -> np.ndarray:
        """Numbers of classes as the data has them, from those of the head."""
        places: np.ndarray = np.asarray(self.order)[np.asarray(numbers)]
        return places

    def _tags(self, rows: Dataset, logits: Sequence[Sequence[np.ndarray]], whole: Dataset) -> tuple[Any, Any]:
        """Names of the tags of all words that have one. A word that no token stands for is predicted to be `O`."""
        found = [["O"] * len(words) for words in whole["tokens"]]
        for (output,), row, words in zip(logits, rows["row"], rows["words"], strict=True):
            for choice, word in zip(output.argmax(-1), words, strict=True):
                if word != NO_WORD:
                    found[row][word] = self.labels[choice]
        real = [[word for word, tag in enumerate(tags) if tag >= 0] for tags in whole["tags"]]
        true = [[self.labels[tags[word]] for word in words] for tags, words in zip(whole["tags"], real, strict=True)]
        return [[tags[word] for word in words] for tags, words in zip(found, real, strict=True)], true

    def _answers(self, rows: Dataset, logits: Sequence[Sequence[np.ndarray]], questions: Dataset) -> tuple[Any, Any]:
        windows: dict[int, list[int]] = {}
        for place, question in enumerate(rows["question"]):
            windows.setdefault(question, []).append(place)
        predicted = []
        for number, context in enumerate(questions["context"]):
            own = windows[number]
            starts, ends = ([logits[place][side] for place in own] for side in (0, 1))
            own_rows = [rows[place] for place in own]
            predicted.append(best_answer(context, own_rows, starts, ends, self.config.longest_answer, self.may_be_none))
        return predicted, [answers["text"] for answers in questions["answers"]]


@takes
def load_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int = 0) -> Task:
    """The task of `config` for a model that has its head.

    Args:
        config: which task, from which data.
        tokenizer: of the model.
        model: teacher or student; says how long a row may be.
        seed: of the order of the training rows.

    Raises:
        DataError: see `read_task`; or the rows are longer than the model can read.
        SettingError: the model's head is not the task's.
    """
    return tokenize_task(read_task(config), tokenizer, model, seed)


def tokenize_task(rows: TaskRows, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int = 0) -> Task:
    """The tokenized rows of a task, as `model` reads them.

    Raises:
        DataError: the rows are longer than the model can read, or the tokenizer is not this model's.
        SettingError: the model's head is not the task's.
    """
    order = check_head(model, rows.config, rows.labels)
    whole = {split: number_by_outputs(data, order) for split, data in rows.evaluation.items()}
    outputs = max(1, len(rows.labels))
    tokenizer = copy.deepcopy(tokenizer)  # encoding leaves its truncation in it, and it may be saved with a student
    texts = 2 if {"text_pair", "context"} & set(rows.train.column_names) else 1
    check_room(tokenizer, model, rows.config.length, "task.max_length", texts)
    by_window = rows.config.known.kind in ("question_answering", "token_classification")

    if rows.config.known.kind == "question_answering":
        _tell_words(rows)

    def encoded(data: Dataset) -> Dataset:
        return encode(rows.config, data, tokenizer, model, outputs)

    return Task(
        config=rows.config,
        labels=tuple(rows.labels[place] for place in order) or rows.labels,
        order=order,
        train=encoded(number_by_outputs(rows.train, order)).shuffle(seed=seed),
        extra=None if rows.extra is None else encoded(rows.extra).shuffle(seed=seed),
        evaluation={
            split: encode_windows(rows.config, data, tokenizer) if by_window else encoded(data)
            for split, data in whole.items()
        },
        references=whole if by_window else {},
        tokenizer=tokenizer,
        may_be_none=rows.may_be_none,
    )


def _loader(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, batch_size: int
) -> DataLoader[Any]:
    """What `model` is given of rows to measure on, in their order."""
    inputs = without_targets(plain_inputs(rows))
    return DataLoader(inputs, batch_size=batch_size, collate_fn=collator(tokenizer, model))


def _tell_words(rows: TaskRows) -> None:
    """Log which splits' answers are not compared by SQuAD's words."""
    for split, data in rows.evaluation.items():
        if words_of([answers["text"] for answers in data["answers"]]) == "unicode":
            logger.info("answers of the split %s are compared by words of any script, not by SQuAD's", split)


@torch.no_grad()
def _outputs(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    names: Sequence[str],
    by_token: bool,
    on_progress: OnProgress,
) -> list[list[np.ndarray]]:
    """What `model` puts out under `names` for each row, in the order of `rows`; `by_token`, without padding's.

    Rows of one length go together, so that little is padding.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    found: list[list[np.ndarray]] = [[]] * len(rows)
    places = iter(order)
    with in_eval(model):
        for batch in track(_loader(rows.select(order), tokenizer, model, batch_size), "evaluate", on_progress):
            output = model(**{name: value.to(model.device) for name, value in batch.items()})
            real = batch["attention_mask"].bool()
            for name in names:
                outputs = output[name][real.to(output[name].device)] if by_token else output[name]
                check_outputs(outputs, f"The predictions of the {type(model).__name__}")
            sides = [output[name].float().cpu().numpy() for name in names]
            for line, mask in enumerate(real.numpy()):
                found[next(places)] = [side[line][mask] if by_token else side[line] for side in sides]
    return found
