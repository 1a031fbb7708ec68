"""Station 10: the rows of a language model's comparison, and what is measured of its students on them.

The score is what is left of the probability that the teacher gives a token: the geometric mean, over the tokens of a
text and then over the kinds of text, of a student's probability of the true token divided by the teacher's. Its
logarithm is the gap between their log-perplexities. The teacher has 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.comparison.language import LanguageConfig, instructions_name
from makd.data import (
    HELD_OUT_SEED,
    Batch,
    DataConfig,
    Texts,
    has_completions,
    load_texts,
    log_prompts_seen,
    log_rows_seen,
    make_batches,
    reads_blocks,
    tokenize,
)
from makd.errors import SettingError
from makd.evaluation import perplexity
from makd.evaluation.answers import answer_prompts, open_instructions
from makd.evaluation.held_out import fidelity_and_perplexities
from makd.evaluation.prompts import Prompts, encode_prompts
from makd.progress import OnProgress

TEXT, OTHER = "text", "other"
"""The kinds of text, as metrics call them."""


@dataclass(frozen=True)
class LanguageTexts:
    """What students learn from, and what they are measured on, as their teacher reads it."""

    config: LanguageConfig
    tokenizer: PreTrainedTokenizerBase
    distillation: Dataset
    """Blocks to learn from."""
    texts: Mapping[str, list[Batch]]
    """Kind of text -> held-out batches."""
    counted: Mapping[str, Literal["all", "completion"]]
    """Kind of text -> which of its tokens count: those of completions, where it has some."""
    prompts: Mapping[str, Prompts]


@dataclass(frozen=True)
class LanguageRows(LanguageTexts):
    """The same, with the teacher's own scores."""

    teacher: PreTrainedModel
    teacher_scores: dict[str, float]
    progress: OnProgress

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics of `model` beside the teacher's, and the `score`."""
        found, agreements = {}, {}
        for kind, batches in self.texts.items():
            close, cost = fidelity_and_perplexities(model, self.teacher, batches, tokens=self.counted[kind])
            found[f"perplexity_{kind}"], agreements[f"agreement_{kind}"] = cost["student"], close["top1_agreement"]
        found |= _answers(model, self.tokenizer, self.prompts, self.progress) | agreements
        gaps = [
            math.log(found[f"perplexity_{kind}"] / self.teacher_scores[f"perplexity_{kind}"]) for kind in self.texts
        ]
        return {"score": math.exp(-sum(gaps) / len(gaps)), **found}


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, Prompts], progress: OnProgress
) -> dict[str, float]:
    """ROUGE-L of each set of instructions."""
    return {
        f"rouge_l_{name}": answer_prompts(model, tokenizer, asked, progress).mean for name, asked in prompts.items()
    }


def load_rows(
    config: LanguageConfig,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: OnProgress,
) -> LanguageRows:
    """The rows as `teacher` reads them, and its own scores; raises what `read_texts` raises."""
    read = read_texts(config, teacher, tokenizer, seed)
    own = {f"perplexity_{kind}": perplexity(teacher, batches) for kind, batches in read.texts.items()}
    own |= {"score": 1.0, **_answers(teacher, tokenizer, read.prompts, progress)}
    own |= {f"agreement_{kind}": 1.0 for kind in read.texts}
    return LanguageRows(**vars(read), teacher=teacher, teacher_scores=own, progress=progress)


def read_texts(
    config: LanguageConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> LanguageTexts:
    """The rows as `teacher` reads them, which is not run.

    Raises:
        SettingError: it is no causal language model.
        DataError: a text or a set of instructions is not there, or not as it should be, or too short for a block.
    """
    if not reads_blocks(teacher):
        raise SettingError(
            f"language[] of an experiment is for causal language models; {type(teacher).__name__} is none. "
            "Give `tasks` instead."
        )
    read = load_texts(config.text, seed)
    train, held_out = _split(read, config, teacher, tokenizer, seed)
    kinds = {TEXT: held_out}
    if config.other is not None:
        other = load_texts(config.other).evaluation
        log_rows_seen(read.train, other, ", ".join(config.other.paths))
        kinds[OTHER] = _blocks(other, config.other, teacher, tokenizer, HELD_OUT_SEED)
    texts = {
        kind: make_batches(rows, tokenizer, teacher, config.batch_size, config.rows) for kind, rows in kinds.items()
    }
    asked = {instructions_name(one): open_instructions(one) for one in config.instructions}
    for one in asked.values():
        log_prompts_seen(read.train, one.messages, one.config.path)
    prompts = {name: encode_prompts(one, tokenizer, teacher) for name, one in asked.items()}
    counted: dict[str, Literal["all", "completion"]] = {
        kind: "completion" if has_completions(rows) else "all" for kind, rows in kinds.items()
    }
    return LanguageTexts(config, tokenizer, train, texts, counted, prompts)


def _split(
    read: Texts, config: LanguageConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Dataset, Dataset]:
    """What is learned from, in the order of `seed`, and what is measured on, the same for every seed."""
    if config.held_out is None:
        train = _blocks(read.train, config.text, teacher, tokenizer, seed)
        return train, _blocks(read.evaluation, config.text, teacher, tokenizer, HELD_OUT_SEED)
    parts = _blocks(read.train, config.text, teacher, tokenizer, HELD_OUT_SEED).train_test_split(
        test_size=config.held_out, seed=HELD_OUT_SEED
    )
    return parts["train"].shuffle(seed=seed), parts["test"]


def _blocks(
    rows: Dataset, data: DataConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Dataset:
    """Rows of `data` as the model reads them."""
    return tokenize(rows, tokenizer, model, data.max_length, seed, rendering=data.rendering)
