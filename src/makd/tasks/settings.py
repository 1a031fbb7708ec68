"""The settings of a task: its name, and whatever differs from what that name stands for."""

from dataclasses import dataclass

from makd.errors import SettingError
from makd.kinds import checked
from makd.tasks.known import KINDS, TASKS, Kind, KnownTask
from makd.tasks.metrics import METRICS

PAIRS_AND_SINGLES = (1, 2)
COLUMNS = {
    "classification": PAIRS_AND_SINGLES,
    "multi_label": PAIRS_AND_SINGLES,
    "regression": PAIRS_AND_SINGLES,
    "token_classification": (1,),
    "question_answering": (2,),
}
"""Kind -> how many text columns it may have."""
NAMED = ("classification", "multi_label", "token_classification")
"""Kinds whose labels have names."""


@dataclass(frozen=True, kw_only=True)
@checked("task")
class TaskConfig:
    """What is to be predicted, from which data. None takes what the task's name stands for."""

    name: str
    """`glue/cola`, … `squad`, `squad_v2`; or `classification`, `multi_label`, `regression`, `token_classification` or
    `question_answering`, for data of one's own."""
    path: str | None = None
    """A hub id, a folder (as `datasets.load_dataset` takes it) or a .jsonl, .csv or .parquet file."""
    configuration: str | None = None
    """Configuration of a hub data set; not taken from the name when `path` is given."""
    train_split: str = "train"
    """The split to train on."""
    evaluation_splits: tuple[str, ...] | None = None
    """Splits to measure on; the first one is also the held-out text. None: the official ones; else the first split
    called `validation…` or `dev…`; else `held_out` of the training rows, which `("held_out",)` asks for in any case."""
    text_columns: tuple[str, ...] | None = None
    """One column, or two for pairs. Token classification: a column of lists of words. Question answering: the
    question's and the context's."""
    label_column: str | None = None
    """Classes, lists of labels (names, numbers, or a 0 or 1 for each), numbers, lists of numbers, lists of tags, or
    answers as SQuAD has them."""
    labels: tuple[str, ...] | None = None
    """Names of the classes in the order of the model's head, which its config keeps; of data that has only numbers, in
    the order of these. None: the official ones, or the data's, matched by name with those of a model that has some."""
    metrics: tuple[str, ...] | None = None
    """Names in `makd.tasks.METRICS` of the task's kind; the mean of those that count is its score."""
    max_length: int | None = None
    """Tokens of a row, at most; of question answering, of a window of the context with its question."""
    stride: int = 128
    """Tokens by which two windows of a long context overlap; of token classification, at most a quarter of a window."""
    longest_answer: int = 30
    """Question answering: tokens of an answer that is predicted, at most; 30 as in transformers' `run_qa.py`."""
    held_out: float = 0.1
    """Share of the training rows to measure on, where the data has no split for it or none is to be used, in (0, 1)."""
    tuning: float | None = None
    """Share of the training rows to measure on in the place of the others, in (0, 1): settings that are chosen by them
    have not seen what None measures on, whether that has a split of its own or is held out."""
    rows: int | None = None
    """At most so many training rows, the first ones; None takes all."""
    evaluation_rows: int | None = None
    """At most so many rows of each split to measure on; None takes all, which alone is official."""
    extra_text: str | None = None
    """Unlabelled text to distil on besides, wherever `path` may be: with the task's text columns, or `text`."""

    def __post_init__(self) -> None:
        TASKS[self.name]
        if self.metrics is not None:
            for name in self.metrics:
                METRICS[self.known.kind][name]
        allowed = COLUMNS[self.known.kind]
        checks = {
            "metrics": (self.metrics != (), "at least one name, or null"),
            "evaluation_splits": (self.evaluation_splits != (), "at least one name, or null"),
            "labels": (self.labels is None or len(set(self.labels)) == len(self.labels) > 1, "two or more names"),
            "text_columns": (
                self.text_columns is None or len(set(self.text_columns)) == len(self.text_columns) in allowed,
                f"{' or '.join(map(str, allowed))} of {self.known.kind}, each another column",
            ),
            "max_length": (self.max_length is None or self.max_length >= 4, "at least 4 tokens, or null"),
            "stride": (self.stride >= 0, "at least 0"),
            "longest_answer": (self.longest_answer >= 1, "at least 1 token"),
            "held_out": (0 < self.held_out < 1, "a share of the rows, in (0, 1)"),
            "tuning": (self.tuning is None or 0 < self.tuning < 1, "a share of the training rows, in (0, 1), or null"),
            "rows": (self.rows is None or self.rows >= 1, "at least 1, or null for all rows"),
            "evaluation_rows": (self.evaluation_rows is None or self.evaluation_rows >= 1, "at least 1, or null"),
        }  # fmt: skip
        for name, (fine, meaning) in checks.items():
            if not fine:
                raise SettingError(f"task.{name} is {meaning}; got {getattr(self, name)}.")
        if self.labels is not None and self.known.kind not in NAMED:
            raise SettingError(
                f"task.labels are the names of classes; a {self.known.kind} task has none. Leave them out."
            )
        if self.path is None and self.known.path is None:
            raise SettingError(f"task.path says where the data of a {self.name} task is: a hub id, a folder or a file.")

    @property
    def known(self) -> KnownTask:
        """What the name stands for."""
        return TASKS[self.name]

    @property
    def kind(self) -> Kind:
        """What tasks of this kind have in common."""
        return KINDS[self.known.kind]

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the metrics, as they will be reported."""
        return self.metrics or self.known.metrics or self.kind.metrics

    @property
    def length(self) -> int:
        """Tokens of a row, at most."""
        return self.max_length or self.kind.max_length
