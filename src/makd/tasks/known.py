"""The tasks that have names, as a table: where each is on the hub, its columns, labels and official metrics.

A task that is not here is one of `KINDS`, with its columns named in the settings.
"""

from dataclasses import dataclass

from makd.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tasks of one kind have in common."""

    head: str
    """Name of the head in `makd.loading.HEADS`."""
    classes: str
    """How transformers' classes with this head end."""
    metrics: tuple[str, ...]
    """What is measured unless the settings say otherwise."""
    text_columns: tuple[str, ...] | None = None
    """None: `text`, or the only column that holds text."""
    label_column: str = "label"
    max_length: int = 128


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """A task by name."""

    kind: str
    """One of `KINDS`."""
    path: str | None = None
    """Where it is on the hub; None: the settings have to say."""
    configuration: str | None = None
    text_columns: tuple[str, ...] | None = None
    evaluation_splits: tuple[str, ...] | None = None
    """None: `validation`, else what `makd.data` would take."""
    labels: tuple[str, ...] | None = None
    """In the official order."""
    metrics: tuple[str, ...] | None = None
    """Official ones; their mean is the task's score. None: the kind's."""


KINDS: Registry[Kind] = Registry(
    "kind of task",
    {
        "classification": Kind(
            head="sequence_classification", classes="ForSequenceClassification", metrics=("accuracy", "macro_f1")
        ),
        "multi_label": Kind(
            head="sequence_classification",
            classes="ForSequenceClassification",
            metrics=("micro_f1", "macro_f1", "subset_accuracy"),
            label_column="labels",
        ),
        "regression": Kind(
            head="sequence_classification", classes="ForSequenceClassification", metrics=("pearson", "spearman")
        ),
        "token_classification": Kind(
            head="token_classification",
            classes="ForTokenClassification",
            metrics=("entity_f1", "entity_precision", "entity_recall"),
            text_columns=("tokens",),
            label_column="ner_tags",
        ),
        "question_answering": Kind(
            head="question_answering",
            classes="ForQuestionAnswering",
            metrics=("f1", "exact_match"),
            text_columns=("question", "context"),
            label_column="answers",
            max_length=384,
        ),
    },
)
"""Kind -> what it needs."""


def _glue(
    name: str,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...] = ("accuracy",),
    evaluation_splits: tuple[str, ...] = ("validation",),
) -> KnownTask:
    return KnownTask(
        kind="classification" if labels else "regression",
        path="nyu-mll/glue",
        configuration=name,
        text_columns=text_columns,
        labels=labels,
        metrics=metrics,
        evaluation_splits=evaluation_splits,
    )


SENTENCES = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")
MNLI = ("validation_matched", "validation_mismatched")

TASKS: Registry[KnownTask] = Registry(
    "task",
    {
        # metrics: Wang et al. (2019), GLUE, table 1
        "glue/cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        "glue/sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
        "glue/mrpc": _glue("mrpc", SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        "glue/stsb": _glue("stsb", SENTENCES, None, ("pearson", "spearman")),
        "glue/qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        "glue/mnli": _glue(
            "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), evaluation_splits=MNLI
        ),
        "glue/qnli": _glue("qnli", ("question", "sentence"), ENTAILED),
        "glue/rte": _glue("rte", SENTENCES, ENTAILED),
        "glue/wnli": _glue("wnli", SENTENCES, ("not_entailment", "entailment")),
        "squad": KnownTask(kind="question_answering", path="rajpurkar/squad"),
        "squad_v2": KnownTask(
            kind="question_answering",
            path="rajpurkar/squad_v2",
            metrics=("f1", "exact_match", "answerable_f1", "unanswerable_f1"),
        ),
        **{kind: KnownTask(kind=kind) for kind in KINDS},
    },
)
"""Name in `task.name` -> the task. The kinds are names too: of tasks that the settings describe."""
