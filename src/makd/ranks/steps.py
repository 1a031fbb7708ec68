"""Station 3: which ranks linears may have, by the setting `rank_multiple`."""

from dataclasses import dataclass

USUAL_MULTIPLE = 8
"""What ranks are multiples of where nobody asked for another number; hardware likes it."""


@dataclass(frozen=True)
class RankSteps:
    """Ranks from the lowest up."""

    lowest: int
    """Of a factored linear."""
    multiple: int
    """What ranks are multiples of, above the first of them."""
    fill: int
    """What the ranks are multiples of that take up the rest of a budget."""

    @staticmethod
    def of(rank_multiple: int | None) -> "RankSteps":
        """Every rank a multiple of `rank_multiple`; None: of 8, but for low ranks and those that take up the rest."""
        if rank_multiple is None:
            return RankSteps(1, USUAL_MULTIPLE, 1)
        return RankSteps(rank_multiple, rank_multiple, rank_multiple)

    def up_to(self, highest: int) -> list[int]:
        """The ranks to choose from, none above `highest`; single ones take up the rest of a budget besides."""
        # below the first multiple every step is a rung: at such budgets 8 instead of 5 would starve another linear
        small = range(self.lowest, self.multiple, self.fill)
        large = (rank for rank in range(self.multiple, highest + 1, self.multiple) if rank > self.lowest)
        return [rank for rank in (*(small or [self.lowest]), *large) if rank <= highest]

    def rounded(self, rank: int) -> int:
        """The highest rank that may take up the rest of a budget and is no higher than `rank`."""
        return rank // self.fill * self.fill
