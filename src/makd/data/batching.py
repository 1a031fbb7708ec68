"""Station 2: which rows share a batch, so that tokens are computed and not padding.

Rows of about one length stand together, as many as a budget of tokens holds: many short ones or few long ones. On
short texts that leaves 1 % of padding or less (docs/explanation/cost.md), which is all that packing could still save;
and a packed row's mask would be one of (tokens, tokens), which no kernel of the CPU skips the empty parts of.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler


def token_batches(lengths: Sequence[int], tokens: int, seed: int | Sequence[int] = 0) -> list[list[int]]:
    """Indices of the rows of each batch: every row in one batch, rows of like length together, batches in any order.

    Args:
        lengths: tokens of each row.
        tokens: at most so many in a batch, padding counted: rows times the longest of them. A row that is longer than
            this is a batch of its own.
        seed: of the order of the batches, and of which rows of one length meet. How many batches there are, and of
            which lengths, does not depend on it.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(lengths))
    order = order[np.argsort(np.asarray(lengths)[order], kind="stable")[::-1]] if len(order) else order
    batches: list[list[int]] = []
    room = 0
    for index in order.tolist():  # from the longest on, so that a batch's first row says how many it holds
        if room == 0:
            batches.append([])
            room = max(1, tokens // max(1, lengths[index]))
        batches[-1].append(index)
        room -= 1
    return [batches[place] for place in random.permutation(len(batches)).tolist()]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the computed tokens that are padding, in [0, 1)."""
    computed = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    real = sum(lengths[index] for batch in batches for index in batch)
    return 1 - real / computed if computed else 0.0


class TokenBatchSampler(BatchRebalanceSampler):
    """`token_batches`, anew in every epoch, as `transformers.Trainer` takes them.

    Its base is what the Trainer recognises as a sampler of batches, each process its own. With several processes, as
    many of the first batches come twice as are missing for all to have equally many.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int = 0, rank: int = 0, processes: int = 1) -> None:
        """The n-th epoch's batches depend on `seed` and n only, so that a run that is resumed goes on with them."""
        super().__init__(
            lengths=list(lengths),
            effective_batch_size=processes,
            dp_size=processes,
            grad_accum=1,
            seed=seed,
            rank=rank,
            drop_last=False,
        )
        self.tokens = tokens
        self.count = len(token_batches(lengths, tokens))

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        return -(-self.count // self.dp_size)

    @property
    def ends_in_repetition(self) -> bool:
        """Whether the last batch of this process is one of the first again."""
        missing = len(self) * self.dp_size - self.count
        return self.rank >= self.dp_size - missing

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of rows, a batch at a time."""
        batches = token_batches(self.lengths, self.tokens, (self.seed, self.epoch))
        wanted = len(self) * self.dp_size
        yield from [batches[place % len(batches)] for place in range(wanted)][self.rank :: self.dp_size]
