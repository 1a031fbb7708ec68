"""A task that a model can be taught and measured on: tokenized rows, and the official metrics.

rows = read_task(TaskConfig(name="glue/mrpc", path="data/glue_mrpc"))
model = load_task_model("bert-base-uncased", rows, tokenizer)
task = tokenize_task(rows, tokenizer, model)        # load_task does both, for a model that has the head
task.evaluate(model)                                # {"accuracy": 0.32, "f1": 0.0, "score": 0.16}
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.data import collator
from makd.errors import DataError
from makd.kinds import takes
from makd.tasks.answers import best_answer
from makd.tasks.features import IGNORED, encode, encode_windows, plain_inputs, without_targets
from makd.tasks.heads import check_head
from makd.tasks.metrics import METRICS, score
from makd.tasks.rows import TaskRows, read_task
from makd.tasks.settings import TaskConfig


@dataclass(frozen=True)
class Task:
    """Tokenized rows for `makd.data.collator`, and what is measured."""

    config: TaskConfig
    labels: tuple[str, ...]
    train: Dataset
    """With labels, in shuffled order."""
    extra: Dataset | None
    """Unlabelled rows in the same form: labels that no loss looks at."""
    evaluation: Mapping[str, Dataset]
    """By split, with labels."""
    references: Mapping[str, Dataset]
    """Question answering: the questions with their contexts and answers, which the windows in `evaluation` point to."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def distillation(self) -> Dataset:
        """All that a student may be taught on: the training rows, and those without labels."""
        return self.train if self.extra is None else concatenate_datasets([self.train, self.extra])

    @property
    def held_out(self) -> Dataset:
        """The first split to measure on."""
        return next(iter(self.evaluation.values()))

    def evaluate(self, model: PreTrainedModel, batch_size: int = 32) -> dict[str, float]:
        """The task's metrics, and their `score`.

        Of several splits each metric is told for each, with what distinguishes the splits' names: `accuracy_matched`.
        The score is the mean over splits.
        """
        found: dict[str, float] = {}
        scores = []
        for split, rows in self.evaluation.items():
            predicted, true = self._predict(model, split, rows, batch_size)
            kind = self.config.known.kind
            values = {name: METRICS[kind][name](predicted, true) for name in self.config.measured}
            scores.append(score(kind, values))
            suffix = "" if len(self.evaluation) == 1 else f"_{split.removeprefix('validation_')}"
            found |= {name + suffix: value for name, value in values.items()}
        return found | {"score": sum(scores) / len(scores)}

    def _predict(self, model: PreTrainedModel, split: str, rows: Dataset, batch_size: int) -> tuple[Any, Any]:
        """What `model` predicts and what is true, as the metrics of the kind take them."""
        kind = self.config.known.kind
        if kind == "question_answering":
            logits = _outputs(model, rows, self.tokenizer, batch_size, ("start_logits", "end_logits"), by_token=True)
            return self._answers(rows, logits, self.references[split])
        by_token = kind == "token_classification"
        outputs = [row[0] for row in _outputs(model, rows, self.tokenizer, batch_size, ("logits",), by_token)]
        if by_token:
            true = [[self.labels[tag] for tag in tags if tag != IGNORED] for tags in rows["labels"]]
            predicted = [
                [self.labels[tag] for tag, real in zip(output.argmax(-1), tags, strict=True) if real != IGNORED]
                for output, tags in zip(outputs, rows["labels"], strict=True)
            ]
            return predicted, true
        values = np.stack(outputs)
        return (values[:, 0] if kind == "regression" else values.argmax(-1)), np.asarray(list(rows["label"]))

    def _answers(self, rows: Dataset, logits: Sequence[Sequence[np.ndarray]], questions: Dataset) -> tuple[Any, Any]:
        windows: dict[int, list[int]] = {}
        for place, question in enumerate(rows["question"]):
            windows.setdefault(question, []).append(place)
        predicted = []
        for number, context in enumerate(questions["context"]):
            own = windows[number]
            starts, ends = ([logits[place][side] for place in own] for side in (0, 1))
            own_rows = [rows[place] for place in own]
            predicted.append(best_answer(context, own_rows, starts, ends, self.config.known.has_unanswerable))
        return predicted, [answers["text"] for answers in questions["answers"]]


@takes
def load_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int = 0) -> Task:
    """The task of `config` for a model that has its head.

    Args:
        config: which task, from which data.
        tokenizer: of the model.
        model: teacher or student; says how long a row may be.
        seed: of the order of the training rows, and of which are held out.

    Raises:
        DataError: see `read_task`; or the rows are longer than the model can read.
        SettingError: the model's head is not the task's.
    """
    rows = read_task(config, seed)
    check_head(model, config, rows.labels)
    return tokenize_task(rows, tokenizer, model, seed)


def tokenize_task(rows: TaskRows, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int = 0) -> Task:
    """The tokenized rows of a task, as `model` reads them.

    Raises:
        DataError: the rows are longer than the model can read, or the tokenizer is not this model's.
    """
    tokenizer = copy.deepcopy(tokenizer)  # encoding leaves its truncation in it, and it may be saved with a student
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < rows.config.length:
        raise DataError(
            f"task.max_length is {rows.config.length} tokens, but {type(model).__name__} has positions for {limit}; "
            "lower it."
        )
    return Task(
        config=rows.config,
        labels=rows.labels,
        train=encode(rows.config, rows.train, tokenizer, model).shuffle(seed=seed),
        extra=None if rows.extra is None else encode(rows.config, rows.extra, tokenizer, model).shuffle(seed=seed),
        evaluation={
            split: encode_windows(rows.config, data, tokenizer)
            if rows.config.known.kind == "question_answering"
            else encode(rows.config, data, tokenizer, model)
            for split, data in rows.evaluation.items()
        },
        references=rows.evaluation if rows.config.known.kind == "question_answering" else {},
        tokenizer=tokenizer,
    )


@torch.no_grad()
def _outputs(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    names: Sequence[str],
    by_token: bool,
) -> list[list[np.ndarray]]:
    """What `model` puts out under `names` for each row, in the order of `rows`; `by_token`, without padding's.

    Rows of one length go together, so that little is padding.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    inputs = without_targets(plain_inputs(rows)).select(order)
    found: list[list[np.ndarray]] = [[]] * len(rows)
    was_training = model.training
    model.eval()
    places = iter(order)
    for batch in DataLoader(inputs, batch_size=batch_size, collate_fn=collator(tokenizer, model)):
        output = model(**{name: value.to(model.device) for name, value in batch.items()})
        sides = [output[name].float().cpu().numpy() for name in names]
        for line, mask in enumerate(batch["attention_mask"].bool().numpy()):
            found[next(places)] = [side[line][mask] if by_token else side[line] for side in sides]
    model.train(was_training)
    return found
