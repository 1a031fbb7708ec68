"""Whether it pays to keep the products A x of factored keys and values instead of these: one layer, one new token.

    python benchmarks/kv_cache.py                              # a table; about a minute
    python benchmarks/kv_cache.py --device cuda --dtype bfloat16

Three ways to read `context` kept tokens for one new token, which take turns and give the same output:

- `kept`: keys (rotated) and values are kept, as transformers does.
- `values`: keys are kept, of values the products. Attention weights are applied to the products, and what comes out
  goes through B once a head: B (sum of p A x) is the sum of p B A x.
- `both`: of keys the products too. A key is rotated by its place, which stands between the query and B: so every kept
  key is multiplied out and rotated anew for each new token.

Each time is that of the fastest turn, the least disturbed by other work; ratios are of these, to `kept`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from makd.evaluation.clock import take_turns

WAYS = ("kept", "values", "both")


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention."""

    name: str
    hidden: int
    heads: int
    key_heads: int
    size: int
    """Numbers of a head."""

    @property
    def width(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.key_heads * self.size

    def rank(self, keep: float) -> int:
        """Of a factored key or value linear with `keep` of its parameters."""
        return int(keep * self.width * self.hidden / (self.width + self.hidden))


SHAPES = (
    Shape("SmolLM2-135M", 576, 9, 3, 64),
    Shape("Llama-3-8B", 4096, 32, 8, 128),
    Shape("Llama-7B", 4096, 32, 32, 128),
)


@dataclass(frozen=True)
class Kept:
    """What stands for the earlier tokens, and a new token's query."""

    query: Tensor
    """(batch, heads, 1, size), rotated."""
    keys: Tensor
    """(batch, key heads, context, size), rotated."""
    values: Tensor
    key_products: Tensor
    """(batch, context, rank)."""
    value_products: Tensor
    key_expand: Tensor
    """B: (key heads x size, rank)."""
    value_expand: Tensor
    cos: Tensor
    """(context, size)."""
    sin: Tensor
    groups: int
    """Query heads that read one key head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    print("| shape | keep | rank | context | numbers a token: values, both | ms: kept | values | both | linears |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in SHAPES:
        for keep in (0.8, 0.5):
            for context in settings.contexts:
                print(row(shape, keep, context, settings.batch, settings.repeats, dtype, device), flush=True)


@torch.no_grad()
def row(
    shape: Shape, keep: float, context: int, batch: int, repeats: int, dtype: torch.dtype, device: torch.device
) -> str:
    """One line of the table."""
    kept = make(shape, keep, context, batch, dtype, device)
    calls: dict[str, Callable[[], Tensor]] = {
        "kept": partial(attend_kept, kept), "values": partial(attend_values, kept), "both": partial(attend_both, kept)
    }  # fmt: skip
    outputs = {name: call() for name, call in calls.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for name in WAYS[1:]:
        torch.testing.assert_close(outputs[name], outputs["kept"], atol=tolerance, rtol=tolerance)
    times = take_turns(
        {**calls, "linears": partial(linears, *layer(shape, keep, batch, dtype, device))}, repeats, device
    )
    rank, width = shape.rank(keep), shape.width
    shares = f"{(width + rank) / (2 * width):.2f}, {rank / width:.2f} of {2 * width}"
    fastest = {name: times[name].fastest for name in times}
    told = [f"{fastest['kept']:.2f}"]
    told += [f"{fastest[name]:.2f} ({fastest[name] / fastest['kept']:.1f}x)" for name in WAYS[1:]]
    told.append(f"{fastest['linears']:.2f}")
    return f"| {shape.name} | {keep} | {rank} | {context} | {shares} | {' | '.join(told)} |"


def make(shape: Shape, keep: float, context: int, batch: int, dtype: torch.dtype, device: torch.device) -> Kept:
    """Random keys, values and their products."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    rank = shape.rank(keep)
    key_products, value_products = random(batch, context, rank), random(batch, context, rank)
    key_expand, value_expand = random(shape.width, rank) / rank**0.5, random(shape.width, rank) / rank**0.5
    places = torch.arange(context)[:, None] / 10000 ** (torch.arange(0, shape.size, 2) / shape.size)
    angles = torch.cat((places, places), -1)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    keys = rotate(in_heads(key_products @ key_expand.T, shape.size), cos, sin)
    return Kept(
        query=random(batch, shape.heads, 1, shape.size), keys=keys.contiguous(),
        values=in_heads(value_products @ value_expand.T, shape.size).contiguous(), key_products=key_products,
        value_products=value_products, key_expand=key_expand, value_expand=value_expand, cos=cos, sin=sin,
        groups=shape.heads // shape.key_heads,
    )  # fmt: skip


def in_heads(flat: Tensor, size: int) -> Tensor:
    """(batch, context, heads x size) -> (batch, heads, context, size)."""
    apart: Tensor = flat.unflatten(-1, (-1, size))
    return apart.transpose(1, 2)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, as Llama has it."""
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat((-second, first), -1) * sin


def attention_weights(kept: Kept) -> Tensor:
    """(batch, key heads, groups, context); query heads of one key head share its product, without copies of keys."""
    grouped = kept.query.flatten(1, 2).unflatten(1, (-1, kept.groups))
    weights: Tensor = (grouped @ kept.keys.transpose(-1, -2) * kept.query.shape[-1] ** -0.5).softmax(-1)
    return weights


def attend_kept(kept: Kept) -> Tensor:
    return torch.matmul(attention_weights(kept), kept.values).reshape(kept.query.shape)


def attend_values(kept: Kept) -> Tensor:
    weights = attention_weights(kept)
    products = (weights.flatten(1, 2) @ kept.value_products).unflatten(1, weights.shape[1:3])
    per_head = kept.value_expand.unflatten(0, (-1, kept.query.shape[-1]))
    return torch.matmul(products, per_head.transpose(-1, -2)).reshape(kept.query.shape)


def attend_both(kept: Kept) -> Tensor:
    keys = rotate(in_heads(kept.key_products @ kept.key_expand.T, kept.query.shape[-1]), kept.cos, kept.sin)
    return attend_values(Kept(**{**kept.__dict__, "keys": keys}))


def layer(
    shape: Shape, keep: float, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A new token, and the factors of a layer's linears (of an MLP 2.7 times as wide as the layer)."""
    hidden, middle = shape.hidden, int(shape.hidden * 2.7)
    sizes = [(hidden, hidden)] * 2 + [(shape.width, hidden)] * 2 + [(middle, hidden)] * 2 + [(hidden, middle)]
    factors = []
    for out, inp in sizes:
        rank = int(keep * out * inp / (out + inp))
        factors.append((torch.randn(rank, inp).to(device, dtype), torch.randn(out, rank).to(device, dtype)))
    return torch.randn(batch, middle).to(device, dtype), factors


def linears(token: Tensor, factors: list[tuple[Tensor, Tensor]]) -> None:
    for first, second in factors:
        token[:, : first.shape[1]] @ first.T @ second.T


if __name__ == "__main__":
    main()
