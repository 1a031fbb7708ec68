"""Station 8: what models answer to instructions, and how much of the references is in it: ROUGE-L.

Scored as MiniLLM does (Gu et al., 2024): F1 of the longest common subsequence of stemmed words, the best over a row's
references, a mean over rows, times 100; then mean and standard deviation over seeds.
"""

import importlib.util
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.errors import SettingError
from makd.evaluation.instructions import Instructions, InstructionsConfig, load_instructions
from makd.evaluation.prompts import Prompts, encode_prompts
from makd.evaluation.rouge import mean_rouge_l, warn_wordless
from makd.generation import generate, stop_tokens
from makd.kinds import takes
from makd.progress import OnProgress, Progress, nobody
from makd.words import words_of

SHOWN = 3
"""Rows whose answers stand in the results in full."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered."""

    seeds: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]
    """Of each seed, an answer to each row."""
    rouge_l: tuple[float, ...]
    """Of each seed, 0 to 100."""
    tokens: float
    """Mean number of tokens of an answer."""
    unfinished: float
    """Share of the answers that had not ended at `max_answer_tokens`."""

    @property
    def mean(self) -> float:
        """ROUGE-L over seeds."""
        return statistics.fmean(self.rouge_l)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of ROUGE-L over seeds; None of one seed."""
        return statistics.stdev(self.rouge_l) if len(self.rouge_l) > 1 else None


@takes
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: InstructionsConfig,
    on_progress: OnProgress | None = None,
) -> Answers:
    """What `model` answers to `instructions`, with each seed, and its ROUGE-L.

    Args:
        model: that writes text.
        tokenizer: of the model.
        instructions: what is asked, and how it answers.
        on_progress: called with a `Progress` after each batch.

    Raises:
        SettingError: the model writes no text, there is no chat template, or rouge-score is not installed.
        DataError: rows without prompt or reference, unknown columns, a prompt that is too long.
    """
    prompts = encode_prompts(open_instructions(instructions), tokenizer, model)
    return answer_prompts(model, tokenizer, prompts, on_progress or nobody)


def open_instructions(config: InstructionsConfig) -> Instructions:
    """The rows, once it is known that answers can be scored here.

    Raises:
        SettingError: rouge-score is not installed.
        DataError: as `load_instructions`.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise SettingError(
            "ROUGE-L needs rouge-score, which is not installed. `pip install 'makd[language]'` brings it."
        )
    rows = load_instructions(config)
    warn_wordless(rows.references)
    return rows


def answer_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, progress: OnProgress
) -> Answers:
    """What `model` answers to prompts that were read before, with each seed, and its ROUGE-L."""
    config, stops = prompts.rows.config, stop_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    of, texts, scores, lengths, open_ends = len(config.seeds) * len(prompts.ids), [], [], [], 0
    for number, seed in enumerate(config.seeds):
        before = number * len(prompts.ids)
        written = generate(
            model, prompts.ids, config.sampling, stops, padding, seed=seed, batch_size=config.batch_size,
            on_batch=partial(_report, progress, before, of),
        )  # fmt: skip
        answers = tuple(text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True))
        texts.append(answers)
        scores.append(mean_rouge_l(answers, prompts.rows.references))
        lengths += [len(row) for row in written]
        open_ends += sum(row[-1] not in stops for row in written)
    return Answers(
        seeds=config.seeds,
        texts=tuple(texts),
        rouge_l=tuple(scores),
        tokens=statistics.fmean(lengths),
        unfinished=open_ends / len(lengths),
    )


def _report(progress: OnProgress, before: int, of: int, done: int, _rows: int) -> None:
    """A seed's rows that are done, as those of all seeds."""
    progress(Progress("answer", before + done, of, "prompts"))


def compare_answers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    progress: OnProgress,
) -> dict[str, Any]:
    """Both models' answers to the same prompts with the same seeds: what `metrics.json` holds of them."""
    pair = {"teacher": teacher, "student": student}
    found = {side: answer_prompts(model, tokenizer, prompts, progress) for side, model in pair.items()}
    rows = prompts.rows
    return {
        "path": rows.config.path,
        "rows": len(prompts.ids),
        "cut": prompts.cut,
        "dropped": prompts.dropped,
        "seeds": list(rows.config.seeds),
        "words": words_of(rows.references),
        "rouge_l": {
            side: {"mean": one.mean, "deviation": one.deviation, "seeds": list(one.rouge_l)}
            for side, one in found.items()
        },
        "answer_tokens": {side: one.tokens for side, one in found.items()},
        "unfinished": {side: one.unfinished for side, one in found.items()},
        "samples": [
            {
                "prompt": rows.prompts[place],
                "references": rows.references[place],
                **{side: one.texts[0][place] for side, one in found.items()},
            }
            for place in range(min(SHOWN, len(prompts.ids)))
        ],
    }
