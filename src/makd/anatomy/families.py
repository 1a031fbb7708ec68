"""Station 1: what is said of architectures: what a row of `table` holds.

Names are relative to a layer (linears, attention) and to the base model (layers), as `get_submodule` takes them.
Whether a linear is an `nn.Linear` or transformers' transposed `Conv1D` does not matter here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from makd.anatomy.roles import OutputSlice, Role
from makd.errors import UnsupportedModelError

Count = int | Literal["heads", "key_heads", "qk_nope_head_dim", "v_head_dim"]
"""A number, or what the config has of it."""


@dataclass(frozen=True)
class Layout:
    """How several roles share the output of one linear: groups one after the other, a part of every role in each."""

    groups: Count
    parts: tuple[Count, ...]
    """Widths of the roles over all groups, in proportion, in the order of the output."""

    def locate(self, index: int, out_features: int, config: Any) -> OutputSlice | None:
        """The slice of the part `index`, given the model's config; None where the output does not divide into them."""
        groups = _count(self.groups, config)
        parts = [_count(part, config) for part in self.parts]
        width, rest = divmod(out_features, sum(parts))
        if rest or any(part * width % groups for part in parts):
            return None
        start = sum(parts[:index]) * width // groups
        return OutputSlice(start, start + parts[index] * width // groups, groups)

    def counted(self, config: Any) -> str:
        """The layout for a person, with the numbers that the config has."""
        parts = " + ".join(str(_count(part, config)) for part in self.parts)
        groups = _count(self.groups, config)
        return parts if groups == 1 else f"{parts}, in {groups} groups"

    def __str__(self) -> str:
        parts = " + ".join(map(str, self.parts))
        return parts if self.groups == 1 else f"{parts}, in {self.groups} groups"


HALVES = Layout(1, (1, 1))
THIRDS = Layout(1, (1, 1, 1))
GROUPED_QUERY = Layout(1, ("heads", "key_heads", "key_heads"))
"""Q as wide as all heads, then K and V as wide as the key heads."""
BY_HEAD = Layout("heads", (1, 1, 1))
"""Q, K and V head by head."""
BY_KEY_HEAD = Layout("key_heads", ("heads", "key_heads", "key_heads"))
"""For each key head its queries, the key, the value."""
LATENT = Layout("heads", ("qk_nope_head_dim", "v_head_dim"))
"""Head by head a key without its rotary part, then a value: both are made from a latent."""


def key_heads(config: Any) -> int:
    """How many heads of keys and values a config means, by the names that it has.

    Those that speak of `multi_query` have one or as many as heads; but Falcon's new decoder has groups for all that.
    """
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    heads = int(config.num_attention_heads)
    if hasattr(config, "multi_query"):
        return 1 if config.multi_query else heads
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _count(count: Count, config: Any) -> int:
    if isinstance(count, int):
        return count
    if count == "key_heads":
        return key_heads(config)
    return int(getattr(config, "num_attention_heads" if count == "heads" else count))


@dataclass(frozen=True)
class Fused:
    """One of several roles that one linear plays."""

    module: str
    index: int
    """Which of the parts, in the order of the output."""
    layout: Layout

    def locate(self, out_features: int, config: Any) -> OutputSlice:
        """The role's slice of an output with `out_features`, given the model's config.

        Raises:
            UnsupportedModelError: the output does not divide into the parts, so the model is not built as its family.
        """
        found = self.layout.locate(self.index, out_features, config)
        if found is None:
            raise UnsupportedModelError(
                f"The fused linear {self.module} has {out_features} output features, which do not divide into the "
                f"parts that its family has by its config ({self.layout}: {self.layout.counted(config)}). Check the "
                "config's head counts, or add a row for this variant to makd/anatomy/table."
            )
        return found


Place = str | Fused


@dataclass(frozen=True)
class Stack:
    """A list of layers with the same build."""

    kind: Literal["encoder", "decoder"]
    layers: str
    """The ModuleList of layers."""
    linears: Mapping[Role, Place]
    """Role -> where it is, in forward order. Every one must be there."""
    attention: str | None
    """The module that calls transformers' attention interface; None when the architecture has its own attention."""
    cross_attention: str | None = None
    variants: tuple[Mapping[Role, Place], ...] = ()
    """Feed-forwards that differ between models of the family: the first whose linears are all there is taken."""
    down: Mapping[Role, Place] = field(default_factory=dict)
    """Linears that come after the variant."""
    shared_in_groups: str | None = None
    """For layers that are called again and again (ALBERT): name of the inner list of a group in `layers`."""
    apart: frozenset[Role] = frozenset()
    """Roles that read another tensor than the ones they have their input in common with elsewhere (MobileBERT's V)."""


@dataclass(frozen=True)
class Family:
    """Architectures with the same names."""

    model_types: tuple[str, ...]
    """`config.model_type` of each."""
    stacks: tuple[Stack, ...]
    off: Mapping[str, str] = field(default_factory=dict)
    """Aspects that they cannot offer, and why."""
    dense_vocabulary: str | None = None
    """Why embeddings and LM head cannot be factored where there is an LM head, if so."""


def self_attention(query: str, key: str, value: str, output: str) -> dict[Role, Place]:
    """The roles of self-attention, in forward order."""
    return {Role.QUERY: query, Role.KEY: key, Role.VALUE: value, Role.OUTPUT: output}


def cross_attention(query: str, key: str, value: str, output: str) -> dict[Role, Place]:
    """The roles of cross-attention, in forward order."""
    return {Role.CROSS_QUERY: query, Role.CROSS_KEY: key, Role.CROSS_VALUE: value, Role.CROSS_OUTPUT: output}


def fused_qkv(module: str, layout: Layout) -> dict[Role, Place]:
    """Queries, keys and values of one linear, in this order."""
    roles = (Role.QUERY, Role.KEY, Role.VALUE)
    return {role: Fused(module, index, layout) for index, role in enumerate(roles)}


def fused_gate_up(module: str) -> dict[Role, Place]:
    """A feed-forward whose linear gives in its first half what the activation is applied to."""
    return {Role.GATE: Fused(module, 0, HALVES), Role.UP: Fused(module, 1, HALVES)}


def projections(of: str, output: str) -> tuple[str, str, str, str]:
    """`q_proj`, `k_proj` and `v_proj` of a module, and the linear called `output`."""
    return f"{of}.q_proj", f"{of}.k_proj", f"{of}.v_proj", f"{of}.{output}"


FC: Mapping[Role, Place] = {Role.UP: "fc1", Role.DOWN: "fc2"}
GATED: Mapping[Role, Place] = {Role.GATE: "mlp.gate_proj", Role.UP: "mlp.up_proj", Role.DOWN: "mlp.down_proj"}

OWN_ATTENTION: Mapping[str, str] = {
    "attention": "the architecture computes attention by itself, outside the attention interface"
}
"""What is off where an architecture has no call of transformers' attention to look at."""
