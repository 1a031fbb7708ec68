"""Station 7: the completions of a training batch, written anew by the student or the teacher as `Completions` says.

Prompts are the data's, and what is written takes the place of the data's completions, in labels as well. So every
objective is a plan's terms on somebody's text: forward KL on the teacher's is sequence-level distillation, a
Jensen-Shannon divergence on the student's is GKD, a skew KL on kept ones of the student's DistiLLM.
"""

import itertools
import json
import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX, encoder_tokens
from makd.aspects import Completions
from makd.data import Batch, prompt_of
from makd.distill.losses.shares import in_order, own_places
from makd.distill.packing import is_packed
from makd.errors import DataError
from makd.generation import Sampling, generate, stop_tokens

Text = tuple[list[int], list[int]]
"""A prompt and its completion, in tokens."""
Writer = Literal["data", "teacher", "student", "kept"]

_logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Rows that tell how completions end."""
_MOST_ROWS = 2**20
"""Rows of a batch, at most: what numbers the rows of a step."""
FILE = "completions.json"
RISE = 0.1
"""By which the student's share rises where it is adaptive, as in DistiLLM's code (arXiv 2402.03898)."""


class Rollouts:
    """Writes completions; knows those that are kept, and how often it is the student's turn."""

    def __init__(
        self, settings: Completions, seed: int, stops: Collection[int] = (), tokens_per_batch: int | None = None
    ) -> None:
        """Nothing is written yet.

        Args:
            settings: who writes, and how.
            seed: of whose turn it is, of the sampling, and of which kept completions are drawn.
            stops: tokens that end a completion, besides those that the models name.
            tokens_per_batch: of a batch that is drawn from the kept ones, padding counted; None sets no bound.
        """
        self.settings = settings
        self.seed = seed
        self.stops = frozenset(stops)
        self.tokens_per_batch = tokens_per_batch
        self.share = settings.student_share
        self.kept: deque[Text] = deque(maxlen=settings.replay)
        self.by_teacher: dict[tuple[int, ...], list[int]] = {}
        self.last_loss: float | None = None
        self.last_step = -1
        """Of the last evaluation that counted."""
        self.tokens = {"teacher": 0, "student": 0}
        """Tokens that each has written."""

    def rewrite(
        self,
        batches: Sequence[Batch],
        step: int,
        progress: float,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
    ) -> list[Batch]:
        """The batches of one optimizer step, with completions by whoever's turn it is.

        The student writes for all of them at once: a step of generation takes hardly longer for more rows. With several
        processes each writes for its own, and all know what all have written: whose turn it is, what is drawn and what
        is kept does not depend on how a step's batches are split among them.

        Args:
            batches: of this process: `input_ids`, and `labels` of -100 at all but completions; without an
                `attention_mask` all tokens are real.
            step: optimizer steps before this one.
            progress: share of the training that is over, in [0, 1].
            student: as it is now.
            teacher: frozen.

        Raises:
            DataError: a row has no prompt or no completion, or several texts.
        """
        _check_apart(batches)
        random = np.random.default_rng([self.seed, step])
        rows = in_order([len(batch["input_ids"]) for batch in batches])
        writers = [self._writer(float(random.random()), progress, count) for count in rows]
        here = own_places(len(batches))
        prompts = {
            place: prompts_of(batch)
            for place, batch in zip(here, batches, strict=True)
            if writers[place] in ("student", "teacher")
        }
        written = {place: self._by_teacher(teacher, prompts[place], step, place)
                   for place in prompts if writers[place] == "teacher"}  # fmt: skip
        mine = {place: prompts[place] for place in prompts if writers[place] == "student"}
        if "student" in writers:  # in some process: one that has none of its batches may have a part of its weights
            written |= self._write("student", student, mine, step)
        everyone = in_order([written.get(place) for place in here])
        for who, texts in zip(writers, everyone, strict=True):
            if who == "student" and texts is not None:
                self.kept.extend(texts)
                self.tokens["student"] += sum(len(text) for _, text in texts)
            elif who == "teacher" and texts is not None:
                for prompt, text in texts:
                    if tuple(prompt) not in self.by_teacher:
                        self.by_teacher[tuple(prompt)] = text
                        self.tokens["teacher"] += len(text)
        for place, (who, count) in enumerate(zip(writers, rows, strict=True)):
            if who == "kept":
                drawn = random.choice(len(self.kept), count, replace=False)
                everyone[place] = self._within([self.kept[row] for row in drawn.tolist()])
        found = [(everyone[place], batch) for place, batch in zip(here, batches, strict=True)]
        return [batch if texts is None else to_batch(texts, batch) for texts, batch in found]

    def note(self, loss: float, step: int) -> None:
        """The loss on held-out rows, of which an adaptive share makes what `Completions.adaptive` says; once a step."""
        if self.settings.adaptive and step > self.last_step:
            if self.last_loss is not None and loss >= self.last_loss:
                self.share = min(1.0, self.share + RISE)
            self.last_loss, self.last_step = loss, step

    def warn_unwritten(self) -> None:
        """Warn where the student was to write, and has not by the end of the training."""
        if self.settings.by_student and not self.tokens["student"]:
            why = "its share did not rise: the held-out loss fell from each evaluation to the next"
            _logger.warning(
                "The student wrote no completion in the whole training: %s. It learned from the data's alone; give "
                "plan.completions.student_share, or evaluate more often (training.evaluate_every)",
                why if self.settings.adaptive and self.share == 0 else "it was never its turn in so few steps",
            )

    def save(self, folder: str | Path) -> None:
        """Beside a checkpoint."""
        state = {
            "share": self.share,
            "last_loss": self.last_loss,
            "last_step": self.last_step,
            "tokens": self.tokens,
            "kept": list(self.kept),
            "by_teacher": [[list(prompt), text] for prompt, text in self.by_teacher.items()],
        }
        (Path(folder) / FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """As `save` left it."""
        state: dict[str, Any] = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        self.share, self.last_loss, self.tokens = state["share"], state["last_loss"], state["tokens"]
        self.last_step = state.get("last_step", -1)
        self.kept = deque(((prompt, text) for prompt, text in state["kept"]), maxlen=self.settings.replay)
        self.by_teacher = {tuple(prompt): text for prompt, text in state["by_teacher"]}

    def _writer(self, chance: float, progress: float, rows: int) -> Writer:
        """Whose turn it is, for a number drawn from [0, 1)."""
        if chance < self.share:
            if self.settings.replay == 0 or chance < self.share * (1 - progress) or len(self.kept) < rows:
                return "student"
            return "kept"
        return "teacher" if chance < self.share + self.settings.teacher_share else "data"

    def _within(self, texts: list[Text]) -> list[Text]:
        """The first of them that a batch has room for; one at least. Kept rows are of any length."""
        widths = itertools.accumulate((len(prompt) + len(text) for prompt, text in texts), max)
        most = self.tokens_per_batch
        fit = len(texts) if most is None else sum(rows * width <= most for rows, width in enumerate(widths, start=1))
        return texts[: max(1, fit)]

    def _by_teacher(self, teacher: PreTrainedModel, prompts: list[list[int]], step: int, place: int) -> list[Text]:
        """What the teacher wrote after these prompts; `place` is the batch's among those of the step."""
        new = [prompt for prompt in prompts if tuple(prompt) not in self.by_teacher]
        known = dict(self.by_teacher)
        if new:
            known |= {
                tuple(prompt): text for prompt, text in self._write("teacher", teacher, {place: new}, step)[place]
            }
        return [(prompt, known[tuple(prompt)]) for prompt in prompts]

    def _write(
        self, who: str, model: PreTrainedModel, prompts: Mapping[int, list[list[int]]], step: int
    ) -> dict[int, list[Text]]:
        """What a model writes after the prompts of some batches of a step, each drawn by its place among all."""
        settings, stops = self.settings, sorted({*stop_tokens(model), *self.stops})
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p
        )
        flat = [prompt for batch in prompts.values() for prompt in batch]
        numbers = [place * _MOST_ROWS + row for place, batch in prompts.items() for row in range(len(batch))]
        seed, padding = (self.seed, step, int(who == "teacher")), stops[0] if stops else 0
        texts = generate(model, flat, sampling, stops, padding, seed=seed, batch_size=max(1, len(flat)), places=numbers)
        pairs = iter(zip(flat, texts, strict=True))
        return {place: [next(pairs) for _ in batch] for place, batch in prompts.items()}


def find_tokenizer(given: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Trainer's `processing_class`, if it has one."""
    found = getattr(given, "tokenizer", given)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def warn_other_ends(rows: Any, stops: Collection[int]) -> None:
    """Warn where none of the first rows ends its completion with one of the tokens that end what is written."""
    if not hasattr(rows, "__len__") or "labels" not in getattr(rows, "column_names", ()):
        return
    few = rows.select(range(min(len(rows), _LOOKED_AT)))
    ends = [next((label for label in reversed(labels) if label != IGNORE_INDEX), None) for labels in few["labels"]]
    if ends and not set(stops) & set(ends):
        _logger.warning(
            "Completions are written up to one of the tokens %s, and none of the first %d rows' completions ends with "
            "one: what is written ends otherwise than the data. Give the token that ends them (eos_token_id of the "
            "model's generation config; stops or processing_class of a DistillTrainer), or longer rows if all are cut",
            sorted(stops), len(ends),
        )  # fmt: skip


def _check_apart(batches: Sequence[Batch]) -> None:
    """Refuse rows of several texts, whoever's turn it is: of such a row the last completion alone would be written."""
    if any(map(is_packed, batches)):
        raise DataError(
            "Completions are to be written, and a batch has several texts in a row (its position_ids begin anew): all "
            "but the last one's would be taken for its prompt. Give each text a row of its own, padded."
        )


def prompts_of(batch: Batch) -> list[list[int]]:
    """The tokens of each row before its last completion.

    Raises:
        DataError: a row has none, or no completion.
    """
    if "labels" not in batch:
        raise DataError("Completions are to be written, and a batch has no labels: nothing says where prompts end.")
    found = []
    for ids, mask, labels in zip(batch["input_ids"], encoder_tokens(batch), batch["labels"], strict=True):
        prompt = prompt_of({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()})
        if not prompt:
            raise DataError(
                "Completions are to be written, and a row of the data has no prompt. Give data of prompts with "
                "responses, or messages."
            )
        found.append(prompt)
    return found


def to_batch(texts: Sequence[Text], like: Batch) -> Batch:
    """Rows of prompt and completion, padded on the right, on the device of the batch that they replace."""
    width = max(len(prompt) + len(text) for prompt, text in texts)
    device = like["input_ids"].device

    def rows(of: Sequence[list[int]], filler: int) -> Int[Tensor, "rows tokens"]:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in of], device=device)

    return {
        "input_ids": rows([prompt + text for prompt, text in texts], 0),
        "attention_mask": rows([[1] * (len(prompt) + len(text)) for prompt, text in texts], 0),
        "labels": rows([[IGNORE_INDEX] * len(prompt) + text for prompt, text in texts], IGNORE_INDEX),
    }
