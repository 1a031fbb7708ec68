"""Linears that a server runs as one: queries, keys and values, say, or gate and up.

Each of them, a *shard*, keeps its own rank, shares the A of another shard, or is dense. All A stand below each other in
one matrix, so that x is read once; the B that read the same product stand below each other, too (a *block*).

    x -> [A_q; A_k; A_v] x = [z_q, z_k, z_v] -> [B_q z_q, B_k z_k, B_v z_v]
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import UnsupportedModelError
from makd.student.config import StudentConfig

WAY_OUT = "Serve a dense copy instead: `makd export STUDENT --to dense`, or `makd.fold` of what is named here."
"""What to do where a server cannot run a student as it is."""
BERT_QUERIES = re.compile(r"attention\.output\.(query|key|value)$")
"""What vLLM calls them; transformers has them in `attention.self`, and nothing of these names in `attention.output`."""


@dataclass(frozen=True)
class Shard:
    """One of the linears that were merged."""

    name: str
    """In the student."""
    rank: int | None = None
    """None where it is dense."""
    leader: str = ""
    """Name of the linear that holds its A: often its own."""


@dataclass(frozen=True)
class Block:
    """Shards that stand one after the other and read the same product."""

    first: int
    """The first of them."""
    count: int
    product: int | None
    """Which of the products A x they read; None where they are dense and read x."""


@dataclass(frozen=True)
class MergedLinear:
    """What stands where in a merged linear."""

    shards: tuple[Shard, ...]

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """The shards that hold an A, in the order in which these stand below each other."""
        return tuple(index for index, shard in enumerate(self.shards) if shard.rank and shard.leader == shard.name)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rows of each A."""
        return tuple(self.shards[index].rank or 0 for index in self.leaders)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All shards, those together that can be multiplied together."""
        blocks: list[Block] = []
        for index, shard in enumerate(self.shards):
            product = None
            if shard.rank is not None:
                product = [self.shards[leader].name for leader in self.leaders].index(shard.leader)
            if blocks and blocks[-1].product == product:
                blocks[-1] = Block(blocks[-1].first, blocks[-1].count + 1, product)
            else:
                blocks.append(Block(index, 1, product))
        return tuple(blocks)

    def multiply(
        self,
        inputs: Float[Tensor, "*batch inp"],
        reduce: Callable[[Tensor], Tensor],
        expands: Sequence[Callable[[Tensor], Tensor]],
    ) -> Float[Tensor, "*batch out"]:
        """The outputs of all shards, one after the other.

        Args:
            inputs: what the linears read.
            reduce: [A; A; ...], which gives all products.
            expands: for each block its B, or the dense weight, with the biases.
        """
        products = reduce(inputs).split(self.ranks, dim=-1)
        outputs = [
            expand(inputs if block.product is None else products[block.product])
            for block, expand in zip(self.blocks, expands, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def find_merged(
    module: str, parts: Sequence[str], config: StudentConfig, names: Mapping[str, str]
) -> MergedLinear | None:
    """What stands in the linear that a server calls `module`; None where nothing of it is factored.

    Args:
        module: with its path.
        parts: last names of the linears that were merged into it; empty where it is one linear.
        config: of the student.
        names: the server's name of a linear -> the student's.

    Raises:
        UnsupportedModelError: one of the linears has its A in a linear that is not part of this one.
    """
    path = module.rpartition(".")[0]
    called = [f"{path}.{part}" if path else part for part in parts]
    if not parts or _student_name(module, names) is not None:  # merged in the student, too
        called = [module]
    leaders = {other: leader for leader, others in config.shared.items() for other in others}
    shards = []
    for server_name in called:
        name = _student_name(server_name, names)
        if name is None:
            shards.append(Shard(server_name))
        else:
            shards.append(Shard(name, config.ranks[name], leaders.get(name, name)))
    if all(shard.rank is None for shard in shards):
        return None
    inside = {shard.name for shard in shards}
    for shard in shards:
        if shard.rank is not None and shard.leader not in inside:
            raise UnsupportedModelError(
                f"{shard.name!r} shares its A with {shard.leader!r}, which stands in another linear of the server than "
                f"{module!r}. Factorize with share_input: never. {WAY_OUT}"
            )
    return MergedLinear(tuple(shards))


def _student_name(server_name: str, names: Mapping[str, str]) -> str | None:
    """What the student calls it, whose names may lack the base model's prefix, or have it where the server has not."""
    name = BERT_QUERIES.sub(r"attention.self.\1", server_name)
    for candidate in (name, f"model.{name}", name.removeprefix("model.")):
        if candidate in names:
            return names[candidate]
    return None
