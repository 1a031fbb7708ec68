"""Station 8: perplexity of one long text, read in windows that move on by a stride.

Every token of the text is predicted once. The numbers are those of lm-evaluation-harness where the stride is the window
(`tests/evaluation/test_rolling.py` holds them to it).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.limits import token_limit
from makd.data import reads_blocks
from makd.data.marks import find_marks
from makd.errors import DataError, NumericsError, SettingError
from makd.kinds import takes
from makd.weights.finite import check_outputs


@dataclass(frozen=True, kw_only=True)
class RollingPerplexity:
    """What a text costs a model."""

    nats: float
    """Negative log-likelihood of the whole text."""
    tokens: int
    """Tokens that were predicted: those of the text, not the one that it is given to begin with."""
    words: int
    """Words between white space, as lm-evaluation-harness counts them."""
    bytes: int
    """Of the text in UTF-8."""

    @property
    def token(self) -> float:
        """Perplexity of a token; another tokenizer's is not comparable."""
        return self._perplexity(self.tokens)

    @property
    def word(self) -> float:
        """Perplexity of a word: comparable between tokenizers."""
        return self._perplexity(self.words)

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of the text costs."""
        return self.nats / self.bytes / math.log(2)

    @property
    def scores(self) -> dict[str, float]:
        """What `metrics.json` holds of it."""
        return {"token": self.token, "word": self.word, "bits_per_byte": self.bits_per_byte}

    def _perplexity(self, count: int) -> float:
        try:
            return math.exp(self.nats / count)
        except OverflowError as error:
            raise NumericsError(
                f"The rolling perplexity is infinite: a token costs {self.nats / self.tokens:,.0f} nats. The model's "
                "weights are broken, or it was made too small."
            ) from error


@dataclass(frozen=True, kw_only=True)
class LongText:
    """A text, and how it is read."""

    text: str
    window: int
    stride: int

    def perplexity(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> RollingPerplexity:
        """What it costs `model`: see `rolling_perplexity`."""
        return rolling_perplexity(model, tokenizer, self.text, self.window, self.stride, batch_size)


@takes
@torch.no_grad()
def rolling_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> RollingPerplexity:
    """Predict every token of `text` once, given those before it in a window of `window` tokens.

    The text is read without the tokenizer's own tokens. Its first token is given what the tokenizer puts before a text;
    where it puts nothing, its BOS token, else its EOS token. That token is never predicted, and stands before the first
    window alone.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        text: one long text.
        window: tokens that the model reads at once; None takes as many as it has positions for.
        stride: tokens that a window predicts after the first: each has at least `window - stride` tokens before it
            besides its own place. None takes `window`, which reads every token once.
        batch_size: windows of a forward.

    Raises:
        DataError: the text is blank, or the tokenizer has nothing to begin a text with.
        SettingError: the model is no causal language model, the window is beyond its positions, or the stride beyond
            the window.
        NumericsError: the predictions hold NaN or infinity.
    """
    if not text.strip():
        raise DataError("Rolling perplexity needs a text; this one is blank.")
    prefix = _first_tokens(tokenizer)
    window, stride = check_window(model, window, stride, len(prefix))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    nats = 0.0
    with in_eval(model):
        for batch in _batches(list(windows([*prefix, *ids], len(prefix), window, stride)), batch_size):
            inputs = torch.tensor([given for given, _ in batch], device=model.device)
            with without_cache(model):
                logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
            for scores, (_, wanted) in zip(logits, batch, strict=True):  # a window at a time: a vocabulary is wide
                last = scores[-len(wanted) :]
                check_outputs(last, f"The predictions of the {type(model).__name__}")
                nats += float(cross_entropy(last.float(), torch.tensor(wanted, device=last.device), reduction="sum"))
    return RollingPerplexity(nats=nats, tokens=len(ids), words=len(re.split(r"\s+", text)), bytes=len(text.encode()))


def windows(ids: Sequence[int], given: int, window: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens that are read, those that are predicted: the next of each of the last read ones), in order.

    Args:
        ids: the tokens, the first `given` of which are not predicted.
        given: at least 1.
        window: tokens that are read at once, at most.
        stride: tokens that are predicted at once after the first window.
    """
    read = min(window, len(ids) - 1)
    yield list(ids[:read]), list(ids[given : read + 1])
    place = read + 1
    while place < len(ids):
        end = min(place + stride, len(ids))
        yield list(ids[end - 1 - window : end - 1]), list(ids[place:end])
        place = end


def _batches(all_windows: list[tuple[list[int], list[int]]], size: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Windows of one length in each batch: only the first of a text may be shorter, and then it is the only one."""
    for start in range(0, len(all_windows), size):
        yield all_windows[start : start + size]


def check_window(model: PreTrainedModel, window: int | None, stride: int | None, given: int = 1) -> tuple[int, int]:
    """Refuse a window and stride that do not fit; gives those that are meant for a text begun with `given` tokens.

    Raises:
        SettingError: as `rolling_perplexity` does.
    """
    if not reads_blocks(model):
        raise SettingError(
            f"Rolling perplexity (evaluation.stride) is for causal language models; {type(model).__name__} is none."
        )
    limit = token_limit(model)
    window = limit if window is None else window
    if window is None:
        raise SettingError(f"{type(model).__name__} sets no bound on its positions: say how long a window is.")
    if window <= given or (limit is not None and window > limit):
        most = "" if limit is None else f" and at most {limit}, the positions of {type(model).__name__}"
        raise SettingError(f"A window has at least {given + 1} tokens{most}; got {window}.")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise SettingError(
            f"A stride (evaluation.stride) is 1 to {window} tokens, which a window has (data.max_length); got {stride}."
        )
    return window, stride


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text begins with and is given."""
    before = list(find_marks(tokenizer).before)
    if before:
        return before
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise DataError("The tokenizer has neither a BOS nor an EOS token, so a text's first token cannot be predicted.")
