"""Station 1 of the flow: the words in which every later station speaks of a model.

A model is layers; a layer has linears with a `Role`; a fused linear holds several roles as slices of its output.
Nothing here knows an architecture by name (that is `table`), and nothing after this station does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from makd.anatomy.predictions import Predictions
from makd.sentence_encoder import Origin


class Role(StrEnum):
    """What a linear does in its layer. The values are the names that plans and recipes use.

    With latent attention (DeepSeek) `q`, or `k` and `v`, are made from what `q_latent` and `kv_latent` give.
    """

    QUERY = "q"
    KEY = "k"
    VALUE = "v"
    OUTPUT = "o"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    CROSS_QUERY = "cross_q"
    CROSS_KEY = "cross_k"
    CROSS_VALUE = "cross_v"
    CROSS_OUTPUT = "cross_o"
    QUERY_LATENT = "q_latent"
    KEY_VALUE_LATENT = "kv_latent"

    @property
    def base(self) -> "Role":
        """The role in self-attention that a cross-attention role answers to; any other role itself."""
        return Role(self.value.removeprefix("cross_"))


SAME_INPUT = (
    (Role.QUERY_LATENT, Role.KEY_VALUE_LATENT),
    (Role.QUERY, Role.KEY, Role.VALUE),
    (Role.CROSS_KEY, Role.CROSS_VALUE),
    (Role.GATE, Role.UP),
)
"""Roles of a layer that read the same tensor, but for those that are `apart`."""

FEED_FORWARD_ROLES = (Role.GATE, Role.UP, Role.DOWN)


@dataclass(frozen=True)
class OutputSlice:
    """Where one role's output stands in the output of a fused linear.

    The last axis is seen as (groups, width); the role has `start:stop` of every group. One group is a plain slice
    (GPT-2, Phi-3); one group per head is GPT-NeoX's interleaving.
    """

    start: int
    stop: int
    groups: int = 1

    @property
    def features(self) -> int:
        """Output features that belong to the role."""
        return self.groups * (self.stop - self.start)

    def select(self, output: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch role_out"]:
        """The role's part of a fused linear's `output`."""
        if self.groups == 1:
            return output[..., self.start : self.stop]
        grouped: Tensor = output.unflatten(-1, (self.groups, -1))
        return grouped[..., self.start : self.stop].flatten(-2)


@dataclass(frozen=True)
class RoleLinear:
    """The linear (or the slice of one) that plays a role."""

    module: str
    """Name of the linear in the model, as `model.get_submodule` takes it."""
    part: OutputSlice | None = None
    """Its slice of the linear's output; None when the whole output is the role's."""


@dataclass(frozen=True)
class Layer:
    """One layer of one stack, in forward order."""

    index: int
    """Counts over all stacks, the encoder's first."""
    stack: Literal["encoder", "decoder"]
    """Whose tokens the layer sees: with `decoder` in an encoder-decoder, the target's."""
    module: str
    """Name of the layer in the model. Its output (the first, of several) is the layer's hidden states."""
    call: int
    """Which call of `module` in one forward this layer is: 0, but for shared layers (ALBERT), where it counts up."""
    roles: Mapping[Role, RoleLinear]
    attention: str | None
    """Name of the module that calls transformers' attention interface with this layer's self-attention, if any."""
    cross_attention: str | None = None
    """Name of the module that calls the interface with this layer's cross-attention, if any."""
    apart: frozenset[Role] = frozenset()
    """Roles that read another tensor than the ones which `SAME_INPUT` puts them beside."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Its linears, in forward order, each once."""
        return tuple(dict.fromkeys(linear.module for linear in self.roles.values()))

    @property
    def is_skipped(self) -> bool:
        """Whether a student does without it: it then has no linears and no attention, and gives on what it gets."""
        return not self.roles


@dataclass(frozen=True)
class ExpertStack:
    """One matrix of each routed expert of a layer, all in one parameter: a linear that each expert has for itself."""

    module: str
    """Name of the experts' module in the model."""
    leaf: str
    """Name of the parameter in that module; where the stack has factors, of what holds them."""
    layer: int
    """Index of its layer."""
    experts: int
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def name(self) -> str:
        """Of the parameter in the model."""
        return f"{self.module}.{self.leaf}"

    @property
    def parameters(self) -> int:
        """Weights and biases of all experts, while it is dense."""
        return self.experts * self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps what makd works on. All names are as `model.get_submodule` takes them."""

    family: str
    """The row of `table` that fitted, or "resolved from structure"."""
    layers: tuple[Layer, ...]
    linears: tuple[str, ...]
    """The linears that may be factorized: each once, in forward order. Not the embeddings, pooler, classifier, head."""
    embeddings: tuple[str, ...]
    """Token embeddings (one name, also for encoder-decoders that share them)."""
    head: str | None
    """The linear that gives logits over the vocabulary or the labels; None for a model that ends in hidden states."""
    predictions: Predictions | None = None
    """What the head predicts; None without one."""
    is_encoder_decoder: bool = False
    experts: tuple[str, ...] = ()
    """Parameters of routed experts, by their names while they are dense: linears in all but name."""
    stacks: tuple[ExpertStack, ...] = ()
    """Those of `experts` that may be factorized, in forward order."""
    off: Mapping[str, str] = field(default_factory=dict)
    """Aspects that this model cannot offer, and why: aspect name -> reason."""
    dense_vocabulary: str | None = None
    """Why embeddings and LM head cannot be factored where there is an LM head, if so."""
    origin: Origin = field(default_factory=Origin, compare=False)
    """Where the model came from: a sentence encoder's folder says how embeddings are made."""
    solvers_off: Mapping[str, str] = field(default_factory=dict)
    """What a solver cannot look at in this model, and why: field of `makd.solvers.Solver` -> reason."""
    notes: tuple[str, ...] = ()
    """Lines for the person who reads the log: what was resolved from structure, and what was not found."""

    def stacks_of(self, layer: Layer) -> tuple[ExpertStack, ...]:
        """The experts' matrices of a layer that may be factorized."""
        return tuple(stack for stack in self.stacks if stack.layer == layer.index)

    def mixture_of(self, layer: Layer) -> str | None:
        """Name of the module that adds up what a layer's experts give, shared ones too; None where there is none.

        It holds the experts that may be factorized, and is not the layer itself.
        """
        stacks = self.stacks_of(layer)
        name = stacks[0].module.rpartition(".")[0] if stacks else ""
        return name if name.startswith(f"{layer.module}.") else None

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same input, in forward order: two or more, and each linear in one group at most.

        A fused linear, which plays several of the roles itself, makes no group.
        """
        groups = (
            tuple(
                dict.fromkeys(
                    layer.roles[role].module for role in roles if role in layer.roles and role not in layer.apart
                )
            )
            for layer in self.layers
            for roles in SAME_INPUT
        )
        return tuple(dict.fromkeys(group for group in groups if len(group) > 1))
