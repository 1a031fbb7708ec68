"""Station 2: what a user says about the text of a run."""

import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from makd.errors import DataError, SettingError
from makd.kinds import checked
from makd.registry import make_settings

BUILT_IN = "pydoc"
"""Name of the text that every Python has: the topics of `pydoc_data`, 65 000 words of technical English."""
AUTO, NONE = "auto", "none"
"""Templates: the tokenizer's own for chats; and a response right after its prompt."""
PROMPT = "{prompt}"
"""Where the prompt stands in a template that is written out."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How texts and conversations become rows of a causal language model."""

    template: str = AUTO
    """As `DataConfig.template`."""
    system: str | None = None
    """As `DataConfig.system`."""
    documents: Literal["joined", "apart"] = "joined"
    """As `DataConfig.documents`."""


@dataclass(frozen=True, kw_only=True)
@checked("data.mixture[]")
class Source:
    """One of the sources of a mixture; the other settings of `DataConfig` are those of all."""

    path: str
    """As `DataConfig.path`."""
    weight: float = 1.0
    """Its share of the rows is its weight over the sum of all; above 0."""
    name: str | None = None
    train_split: str = "train"
    """The split to train on."""
    evaluation_split: str | None = None
    text_columns: tuple[str, ...] | None = None
    prompt_columns: tuple[str, ...] | None = None
    response_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise SettingError(f"A weight of data.mixture is above 0; got {self.weight} for {self.path}. Leave it out.")


_OF_SOURCES = tuple(field.name for field in fields(Source) if field.name != "weight")
"""Settings that each source of a mixture has for itself."""


@dataclass(frozen=True, kw_only=True)
@checked("data")
class DataConfig:
    """Which text a run uses, for calibration, training and evaluation."""

    path: str | None = None
    """A hub id, a folder (as `datasets.load_dataset` takes it) or a .jsonl, .csv, .parquet or .txt file; or `pydoc`,
    Python's own documentation, to try things out. There is no default: only a user knows what the student will read."""
    name: str | None = None
    """Configuration of a hub data set, such as `cola` of `nyu-mll/glue`."""
    train_split: str = "train"
    """The split to train on."""
    evaluation_split: str | None = None
    """None takes `validation`, else `test`, else holds out `held_out` of the training rows."""
    text_columns: tuple[str, ...] | None = None
    """One column, or two for pairs (of encoders). None takes `text`, else conversations by the names of their columns,
    else the only column that holds text."""
    prompt_columns: tuple[str, ...] | None = None
    """With `response_column`: what makes a prompt, joined by a blank line; blank ones are left out."""
    response_column: str | None = None
    """What answers the prompt: text, or a list of texts of which the first is learned."""
    messages_column: str | None = None
    """A column of conversations: lists of messages with a role and a content."""
    template: str = AUTO
    """How conversations become text: `auto`, by the tokenizer's chat template; `none`, response right after prompt; or
    what stands before the response, with {prompt} in it once. For an encoder-decoder `auto` is `none`: the prompt as it
    is."""
    system: str | None = None
    """With template `auto`: the system message of conversations that have none."""
    documents: Literal["joined", "apart"] = "joined"
    """How causal language models read plain text: `joined`, and cut into blocks; or `apart`, a row each, so that none
    attends to another or is predicted from it."""
    max_length: int = 128
    """Tokens of a row (encoders, conversations, documents apart), a side (prompts, responses) or block (decoders)."""
    held_out: float = 0.1
    """Share of rows held out for evaluation where the data has no split for it, in (0, 1)."""
    rows: int | None = None
    """At most so many training rows, the first ones; None takes all."""
    stream: bool = False
    """Whether `rows` training rows are drawn from a stream, and the rest of the data is never read; `held_out` of them
    besides from a split for evaluation."""
    mixture: tuple[Source, ...] = ()
    """In the place of `path`: several sources, each with its share of the rows."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise SettingError(f"data.max_length is at least 2 tokens; got {self.max_length}.")
        if not 0 < self.held_out < 1:
            raise SettingError(f"data.held_out is a share of the rows, in (0, 1); got {self.held_out}.")
        if self.rows is not None and self.rows < 1:
            raise SettingError(f"data.rows is at least 1, or null for all rows; got {self.rows}.")
        if self.stream and (self.rows is None or (self.path in (None, BUILT_IN) and not self.mixture)):
            raise SettingError(
                f"data.stream draws data.rows rows from a file, a folder or a hub id; got data.rows {self.rows} and "
                f"data.path {self.path!r}. Give both."
            )
        self._check_mixture()
        self._check_columns()
        plain = {field.name: field.default for field in fields(DataConfig)}
        given = [name for name in _OF_SOURCES if name != "path" and getattr(self, name) != plain[name]]
        if self.path == BUILT_IN and given:
            raise SettingError(
                f"data.path {BUILT_IN} is Python's documentation, which has no {given[0]}; got "
                f"{getattr(self, given[0])!r}. Leave data.{given[0]} out."
            )
        if self.template not in (AUTO, NONE) and self.template.count(PROMPT) != 1:
            raise SettingError(
                f"data.template is {AUTO}, {NONE}, or text with {PROMPT} in it once; got {self.template!r}."
            )
        if self.system is not None and self.template != AUTO:
            raise SettingError(
                f"data.system is a message for the tokenizer's chat template; data.template is {self.template!r}. "
                "Write it into the template instead."
            )

    def _check_mixture(self) -> None:
        if not self.mixture:
            return
        own = {field.name: field.default for field in fields(DataConfig)}
        given = [name for name in _OF_SOURCES if getattr(self, name) != own[name]]
        if given or len(self.mixture) < 2:
            raise SettingError(
                f"data.mixture has two sources or more, each with its own path, splits and columns; got "
                f"{len(self.mixture)}, and besides {', '.join(f'data.{name}' for name in given) or 'nothing'}."
            )
        read = [replace(source, path=os.path.normpath(source.path), weight=1.0) for source in self.mixture]
        twice = next((source for place, source in enumerate(read) if source in read[:place]), None)
        if twice is not None:
            raise SettingError(
                f"data.mixture has {twice.path} twice, read alike, and each of its rows would come twice. Name it "
                "once, with a larger weight."
            )
        for source in self.mixture:
            self.of_source(source)

    def of_source(self, source: Source) -> "DataConfig":
        """The settings of one source of the mixture, with its share of the rows if these are counted."""
        share = source.weight / sum(each.weight for each in self.mixture)
        rows = math.ceil(share * self.rows) if self.stream and self.rows is not None else None
        own = {name: getattr(source, name) for name in _OF_SOURCES}
        return replace(self, mixture=(), rows=rows, **own)

    @property
    def is_named(self) -> bool:
        """Whether anybody has said where it is."""
        return self.path is not None or bool(self.mixture)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where all of it is.

        Raises:
            DataError: nobody has said so.
        """
        if not self.is_named:
            raise no_text("No text was given")
        return tuple(source.path for source in self.mixture) or (str(self.path),)

    @property
    def place(self) -> str:
        """Where it is, if it is in one place; the first of several."""
        return self.paths[0]

    def _check_columns(self) -> None:
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise SettingError(f"data.text_columns names one column, or two for pairs; got {self.text_columns}.")
        if self.text_columns is not None and len(set(self.text_columns)) < len(self.text_columns):
            raise SettingError(
                f"data.text_columns names {self.text_columns[0]!r} twice. Name one column, or two for pairs."
            )
        if (self.prompt_columns is None) != (self.response_column is None) or self.prompt_columns == ():
            raise SettingError(
                f"data.prompt_columns and data.response_column belong together; got {self.prompt_columns} and "
                f"{self.response_column!r}. Give both."
            )
        columns = [*(self.prompt_columns or ()), *([self.response_column] if self.response_column else [])]
        if len(set(columns)) < len(columns):
            raise SettingError(f"data.prompt_columns and data.response_column name a column twice: {columns}.")
        kinds = {
            "data.text_columns": self.text_columns,
            "data.prompt_columns": self.prompt_columns,
            "data.messages_column": self.messages_column,
        }
        named = [name for name, value in kinds.items() if value is not None]
        if len(named) > 1:
            raise SettingError(f"{' and '.join(named)} exclude each other: rows are read in one way. Keep one.")

    @property
    def rendering(self) -> Rendering:
        """How texts and conversations become rows of a causal language model."""
        return Rendering(template=self.template, system=self.system, documents=self.documents)


def no_text(reason: str) -> DataError:
    """The error where text is needed and nobody has said which."""
    return DataError(
        f"{reason}: a student learns from text of the kind that it will read, a few hundred rows at least, better "
        "10,000. Give --data.path FILE (data.path; .txt with a text a line, .jsonl, .csv, .parquet, a folder or a hub "
        "id), or of a model for a task --task NAME --task_data PATH: `makd compress --teacher MODEL "
        "--budget.keep_linears 0.5 --data.path texts.txt --output runs/student`. To try things out, --data.path pydoc "
        "is Python's own documentation."
    )


def read_settings(written: Mapping[str, Any]) -> DataConfig:
    """The settings that a file holds.

    Raises:
        UnknownNameError: `written` has a setting that there is not.
    """
    sources = [make_settings(Source, "setting of a source", each) for each in written.get("mixture") or ()]
    return make_settings(DataConfig, "setting of data", {**written, "mixture": sources})
