"""Station 2, continued: how much of the text its tokenizer knows.

A word piece tokenizer of English reads a Thai sentence as one token, which stands for whatever it does not know. Such
rows are alike whatever they say: any student agrees with its teacher on them.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.errors import DataError

logger = logging.getLogger(__name__)

MANY, NEARLY_ALL = 0.05, 0.9
"""Shares of the tokens that stand for what is not known, from which on it is told, and refused."""


class Known(NamedTuple):
    """What tokens of texts are: `own` are all but special ones, `unknown` those of them that stand for anything."""

    own: int
    unknown: int

    @classmethod
    def sum(cls, counts: Iterable[tuple[int, int]]) -> "Known":
        """Of all of them together."""
        own = unknown = 0
        for one, other in counts:
            own, unknown = own + one, unknown + other
        return cls(own, unknown)


class KnownTokens:
    """Counts what a tokenizer's tokens are.

    One that reads bytes knows everything; GPT-2's calls its end of text the unknown token, and never means it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Nothing is counted yet."""
        unknown = tokenizer.unk_token_id
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.unknown = -1 if unknown is None or unknown in marks else unknown
        self.special = (frozenset(tokenizer.all_special_ids) | {IGNORE_INDEX}) - {self.unknown}

    def count(self, ids: Sequence[int]) -> Known:
        """Of one text, or of its labels."""
        return Known(len(ids) - sum(map(self.special.__contains__, ids)), ids.count(self.unknown))


def check_known(found: Known, tokenizer: PreTrainedTokenizerBase, of: str = "the texts") -> None:
    """Refuse text of which `tokenizer` knows nearly nothing, and tell where it does not know much of it.

    Args:
        found: of all texts together.
        tokenizer: that read them.
        of: what the log and the error call them.

    Raises:
        DataError: `NEARLY_ALL` of the tokens are unknown.
    """
    share = found.unknown / max(1, found.own)
    if share < MANY:
        return
    told = f"{found.unknown:,} of {found.own:,} tokens of {of} ({share:.0%}) are {tokenizer.unk_token!r}"
    if share >= NEARLY_ALL:
        raise DataError(
            f"{told}, which stands for what the tokenizer does not know: whatever they say, they are read alike. Give "
            "text in a language and script that the model was trained on, or a model that was trained on these."
        )
    logger.warning("%s: the tokenizer does not know what they say, and nothing is learned or measured of it", told)
