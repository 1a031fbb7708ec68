"""The token embeddings of a student in bands: frequent tokens have more numbers each than rare ones.

Stands beside `embedding`, whose one rank holds for all tokens: `vocabulary` makes the factors, `hub` saves and loads
the layer. Bands are those of adaptive input representations (Baevski & Auli, arXiv 1809.10853), and each is a low-rank
matrix of its own, as in GroupReduce (Chen et al., arXiv 1806.06950).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from makd.anatomy import StandIn
from makd.student.embedding import Directions, LowRankEmbedding


class Band(nn.Module):
    """The embeddings of some tokens: (rows, rank) times (rank, d), or (rows, d) as they are."""

    def __init__(
        self,
        rows: int,
        embedding_dim: int,
        rank: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With torch's random start; rank None is dense."""
        super().__init__()
        self.table = nn.Embedding(rows, rank or embedding_dim, device=device, dtype=dtype)
        self.directions = None if rank is None else Directions(embedding_dim, rank, device, dtype)

    def dense_weight(self) -> Float[Tensor, "rows dim"]:
        """The embeddings that it stands for."""
        weight: Tensor = self.table.weight
        return weight if self.directions is None else weight @ self.directions.weight

    def forward(self, rows: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Embeddings of these rows."""
        found: Tensor = self.table(rows)
        return found if self.directions is None else self.directions(found)


class AdaptiveEmbedding(StandIn):
    """Token embeddings of several ranks: tokens in order of frequency are cut into bands, each with a rank of its own.

    Besides its bands' weights it has one whole number a token, `order`: which row it has when all bands are one below
    the other. They count as parameters wherever makd counts.
    """

    order: Int[Tensor, " vocabulary"]

    def __init__(
        self,
        embedding_dim: int,
        rows: Sequence[int],
        ranks: Sequence[int | None],
        padding_idx: int | None = None,
        order: Int[Tensor, " vocabulary"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Bands with torch's random start.

        Args:
            embedding_dim: of what it gives.
            rows: tokens in each band, from the most frequent on.
            ranks: of each band; None where its embeddings are as they were.
            padding_idx: the token whose embedding is not learned, if any.
            order: token -> row; as they stand if it is not given.
            device: of the weights.
            dtype: of the weights.

        Raises:
            ValueError: there is not one rank for each band, or one is not in 1..min(rows, embedding_dim).
        """
        super().__init__()
        if len(rows) != len(ranks) or not rows:
            raise ValueError(f"Each band has a rank; got {len(rows)} bands and {len(ranks)} ranks.")
        for count, rank in zip(rows, ranks, strict=True):
            if rank is not None and not 1 <= rank <= min(count, embedding_dim):
                raise ValueError(f"rank is in 1..{min(count, embedding_dim)} for a band of {count} rows; got {rank}.")
        self.num_embeddings = sum(rows)
        self.embedding_dim = embedding_dim
        self.rows, self.ranks = tuple(rows), tuple(ranks)
        self.padding_idx = padding_idx
        self.whole_numbers = self.num_embeddings
        if order is None:
            order = torch.arange(self.num_embeddings, dtype=torch.int32, device=device)
        self.register_buffer("order", order.to(dtype=torch.int32, device=device))
        self.bands = nn.ModuleList(
            Band(count, embedding_dim, rank, device, dtype) for count, rank in zip(rows, ranks, strict=True)
        )

    @property
    def weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The embeddings that the bands stand for: for code that reads dtype, device or the number of tokens off it."""
        return self.dense_weight()

    def dense_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The embeddings that the bands stand for, in the order of token ids."""
        bands = [band for band in self.bands if isinstance(band, Band)]
        return torch.cat([band.dense_weight() for band in bands])[self.order]

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Embeddings of token ids."""
        rows = self.order[ids]
        begin, found = 0, []
        for band, count in zip(self.bands, self.rows, strict=True):
            inside = (rows >= begin) & (rows < begin + count)
            # rows of other bands read one of this band's, which is then left out
            values = band((rows - begin).clamp(0, count - 1))
            found.append(torch.where(inside[..., None], values, values.new_zeros(())))
            begin += count
        embeddings = torch.stack(found).sum(0)
        if self.padding_idx is None or not torch.is_grad_enabled():
            return embeddings
        return torch.where((ids == self.padding_idx)[..., None], embeddings.detach(), embeddings)

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.rows}, ranks={self.ranks}"


FactoredEmbedding = LowRankEmbedding | AdaptiveEmbedding
"""Whatever stands in the place of token embeddings."""
