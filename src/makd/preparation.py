"""Station 2 for a whole run: from what the user names (text, texts in hand, a task) to rows and batches of tokens."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy import resolve
from makd.anatomy.limits import token_limit
from makd.calibration.counted import CountedBatches
from makd.config import Recipe
from makd.data import (
    HELD_OUT_SEED,
    Batch,
    DataConfig,
    calibration_batches,
    has_completions,
    hold_out,
    load_texts,
    make_batches,
    reads_blocks,
    tokenize,
)
from makd.data.conversations import MESSAGES
from makd.data.settings import BUILT_IN
from makd.distill.resuming.identity import hash_all_columns, hash_splits
from makd.errors import DataError
from makd.evaluation.rolling import LongText, check_window
from makd.sentence_encoder import Origin, default_prompt, origin_of, shortest, with_prompt
from makd.tasks import Task, TaskConfig, load_task
from makd.tasks.features import TARGETS, without_targets

logger = logging.getLogger(__name__)

NO_LABELS = "the rows have no labels"
"""Why `task` is off in a run on unlabelled text."""
IN_HAND = "the length of texts in hand (of those in a file, data.max_length)"
"""What a log line calls the tokens that they are cut at."""

Data = DataConfig | TaskConfig | str | list[str] | list[dict[str, Any]]
"""What a run calibrates, trains and evaluates on: text, a task, a path, or texts or conversations in hand."""


def names_of(data: Data) -> list[str | None]:
    """The paths that data have."""
    if isinstance(data, TaskConfig):
        return [data.path or data.known.path, data.extra_text]
    return [*data.paths] if isinstance(data, DataConfig) else [data if isinstance(data, str) else None]


@dataclass(frozen=True)
class RunData:
    """What a run calibrates, trains and evaluates on."""

    config: DataConfig | TaskConfig | None
    """None for texts in hand, which no file can name."""
    train: Dataset
    calibration: CountedBatches
    held_out: Dataset
    held_out_batches: list[Batch]
    task: Task | None
    """With labels and official metrics, if the data are a task's."""
    has_labels: bool = True
    """Whether there is something that the model's own loss is of: labels, responses, or text that it predicts."""
    texts: Dataset | None = None
    """The rows to train on as they were read; None of a task."""
    long_text: LongText | None = None
    """The held-out texts as one, where the recipe asks for its perplexity."""

    @property
    def max_length(self) -> int | None:
        """Tokens of a row, at most; None is the task's own."""
        return (self.config or DataConfig()).max_length

    @property
    def has_completions(self) -> bool:
        """Whether the rows are prompts with completions, and labels say where these are."""
        return self.task is None and has_completions(self.train)

    @property
    def measured_on(self) -> dict[str, str]:
        """Digests of the rows that are measured on, tokens and labels: `held_out`, and a `task`'s own.

        Measurements of two runs may be compared where they are equal.
        """
        found = {"held_out": hash_all_columns(self.held_out)[:16]}
        if self.task is not None:
            found["task"] = hash_splits(self.task.evaluation, self.task.references)[:16]
        return found

    def predicts_text(self, model: PreTrainedModel) -> bool:
        """Whether the rows are text that `model` predicts: all of it, or responses to prompts."""
        return reads_blocks(model) or self.has_completions


def prepare(data: Data, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, recipe: Recipe) -> RunData:
    """Load and tokenize `data` as `model` reads it.

    Raises:
        DataError: the data are not there, not readable, or too long for the model.
            Or the plan counts completions alone, and they have none; or it has a term of labels, and they have none.
        SettingError: they are a task's, and the model has not its head.
    """
    data = DataConfig(path=data) if isinstance(data, str) else data
    task = long_text = read = None
    stride = recipe.evaluation.stride
    window = (data if isinstance(data, DataConfig) else _defaults(model)).max_length
    if stride is not None:
        check_window(model, window, stride)
    if isinstance(data, TaskConfig):
        task = load_task(data, tokenizer, model, recipe.seed)
        train, held_out = task.distillation.shuffle(seed=recipe.seed), task.held_out.shuffle(seed=HELD_OUT_SEED)
        seen = without_targets(task.train)
    else:
        settings = data if isinstance(data, DataConfig) else _defaults(model)
        texts = load_texts(data, recipe.seed) if isinstance(data, DataConfig) else hold_out(data, settings)
        # a sentence encoder's text is what sentence-transformers makes of it; a head's is its own affair
        origin = origin_of(model) if resolve(model).head is None else Origin()
        length, prompt = shortest(settings.max_length, origin, tokenizer), default_prompt(origin)
        in_hand = isinstance(data, list)  # nobody has chosen their length
        setting, level = (IN_HAND, logging.WARNING) if in_hand else ("data.max_length", logging.INFO)
        train, held_out = (
            tokenize(with_prompt(rows, prompt), tokenizer, model, length, seed, setting, settings.rendering, level)
            for rows, seed in ((texts.train, recipe.seed), (texts.evaluation, HELD_OUT_SEED))
        )
        seen, read = train, texts.train
        if stride is not None:
            if "text" not in texts.evaluation.column_names:
                raise DataError(
                    f"evaluation.stride = {stride} asks for the perplexity of a long text, and the data are prompts "
                    "with responses. Take evaluation.stride null, or plain text."
                )
            joined = _joined(texts.first_held_out(recipe.evaluation.rows))
            long_text = LongText(text=joined, window=window, stride=stride)
    held_out = held_out.select(range(min(len(held_out), recipe.evaluation.rows)))
    compared = held_out if task is None else without_targets(held_out)
    few = recipe.calibration
    made = RunData(
        config=None if isinstance(data, list) else data,
        train=train,
        calibration=calibration_batches(seen, tokenizer, model, few.batch_size, few.rows),
        held_out=held_out,
        held_out_batches=make_batches(compared, tokenizer, model, recipe.evaluation.batch_size, by_length=True),
        task=task,
        has_labels=reads_blocks(model) or bool(set(TARGETS) & set(train.column_names)),
        texts=read,
        long_text=long_text,
    )
    _check_plans(made, recipe)
    told = f"{len(train):,} rows to learn from, {len(made.held_out):,} held out are measured on"
    logger.info("text: %s: %s", _named(data), told)
    return made


def _named(data: Data) -> str:
    """What a person calls the text."""
    if isinstance(data, TaskConfig):
        return f"rows of the task {data.name}"
    if not isinstance(data, DataConfig):
        return "given in hand"
    return ", ".join(f"{path}, Python's own documentation" if path == BUILT_IN else path for path in data.paths)


def is_labelled(data: Data, model: PreTrainedModel) -> bool:
    """Whether there will be something in `data` that the own loss of `model` is of, told from what it reads.

    Raises:
        DataError: the data are not there, or not readable.
    """
    if isinstance(data, TaskConfig) or reads_blocks(model):
        return True
    if isinstance(data, list):
        return MESSAGES in hold_out(data, _defaults(model)).train.column_names
    return MESSAGES in load_texts(DataConfig(path=data) if isinstance(data, str) else data).train.column_names


def _check_plans(data: RunData, recipe: Recipe) -> None:
    if data.has_completions:
        return
    for stage in recipe.trainings:
        terms = [term for term in stage.plan.wanted if term.tokens == "completion"]
        reason = ""
        if stage.plan.writers.written:
            reason = "has completions written in the place of the data's (completions)"
        elif terms:
            reason = f"counts completions alone (tokens: completion) for {terms[0].aspect!r}"
        if reason:
            raise DataError(
                f"The plan {reason}, and the data have none: they are plain text. Name prompts and responses "
                "(data.prompt_columns and data.response_column, or data.messages_column), or take a plan of all tokens."
            )
        own = [term.aspect for term in stage.plan.wanted if stage.plan.terms or len(stage.plan.wanted) == 1]
        if "task" in own and not data.has_labels and stage.training.steps != 0:
            asks = "has a term 'task'" if stage.plan.terms else f"is {stage.plan.preset}, which is 'task' alone"
            raise DataError(
                f"The plan {asks}, the model's own loss on labels, and {NO_LABELS}: it would teach nothing. Give a "
                "task with labels (--task NAME --task_data PATH), or take a plan without that term."
            )


def _joined(rows: Dataset) -> str:
    """The texts as one, each on a line of its own: what a file was before it was read by lines."""
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in rows["text"])


def _defaults(model: PreTrainedModel) -> DataConfig:
    """How texts in hand are read, for which there are no settings: cut where the model's positions end."""
    settings, limit = DataConfig(), token_limit(model)
    return settings if limit is None else replace(settings, max_length=min(settings.max_length, limit))
