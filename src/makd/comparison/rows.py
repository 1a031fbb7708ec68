"""Station 10: what a comparison asks of rows, be they a task's with labels or text of a language model."""

from typing import Protocol, runtime_checkable

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class Rows(Protocol):
    """Tokenized rows that students are taught on, and what is measured of them."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, and its students'."""

    @property
    def distillation(self) -> Dataset:
        """All that a student may be taught on."""

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics, and their `score`: higher is better."""
