"""Station 1: what is known of architectures, as a table. A new architecture is a new row here, and nothing else.

Names are relative to a layer (linears, attention) and to the base model (layers), as `get_submodule` takes them.
Whether a linear is an `nn.Linear` or transformers' transposed `Conv1D` does not matter here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from makd.anatomy.roles import OutputSlice, Role
from makd.errors import UnsupportedModelError

Layout = Literal["equal", "grouped_query", "interleaved", "latent"]


@dataclass(frozen=True)
class Fused:
    """One of several roles that one linear plays."""

    module: str
    index: int
    """Which of the parts, in the order of the output."""
    parts: int
    layout: Layout = "equal"
    """`equal` parts, one after the other; `grouped_query`: Q as wide as all heads, K and V as wide as the key heads;
    `interleaved`: equal parts inside each head; `latent`: in each head a key without its rotary part, then a value."""

    def locate(self, out_features: int, config: Any) -> OutputSlice:
        """The role's slice of an output with `out_features`, given the model's config.

        Raises:
            UnsupportedModelError: the output does not divide into the parts, so the model is not built as its family.
        """
        if self.layout == "equal":
            width = self._width(out_features, self.parts)
            return OutputSlice(self.index * width, (self.index + 1) * width)
        heads: int = config.num_attention_heads
        if self.layout == "interleaved":
            width = self._width(out_features, heads * self.parts)
            return OutputSlice(self.index * width, (self.index + 1) * width, groups=heads)
        if self.layout == "latent":
            ends = (0, config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim)
            if out_features != heads * ends[-1]:
                self._refuse(out_features, f"{heads} heads of {ends[1]} + {config.v_head_dim}")
            return OutputSlice(ends[self.index], ends[self.index + 1], groups=heads)
        key_heads: int = config.num_key_value_heads
        width = self._width(out_features, heads + 2 * key_heads)
        stops = (0, heads * width, (heads + key_heads) * width, out_features)
        return OutputSlice(stops[self.index], stops[self.index + 1])

    def _width(self, out_features: int, units: int) -> int:
        """Output features of one of `units` equal units."""
        if out_features % units:
            self._refuse(out_features, f"{units} equal units")
        return out_features // units

    def _refuse(self, out_features: int, units: str) -> NoReturn:
        raise UnsupportedModelError(
            f"The fused linear {self.module} has {out_features} output features, which do not divide into the "
            f"{units} that its family has by its config ({self.layout} layout). Check the config's head counts, or add "
            "a row for this variant to makd/anatomy/families.py."
        )


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


@dataclass(frozen=True)
class Family:
    """Architectures with the same names."""

    model_types: tuple[str, ...]
    """`config.model_type` of each."""
    stacks: tuple[Stack, ...]
    off: Mapping[str, str] = field(default_factory=dict)
    """Aspects that they cannot offer, and why."""


def _self_attention(query: str, key: str, value: str, output: str) -> dict[Role, Place]:
    return {Role.QUERY: query, Role.KEY: key, Role.VALUE: value, Role.OUTPUT: output}


def _cross_attention(query: str, key: str, value: str, output: str) -> dict[Role, Place]:
    return {Role.CROSS_QUERY: query, Role.CROSS_KEY: key, Role.CROSS_VALUE: value, Role.CROSS_OUTPUT: output}


def _fused(module: str, layout: Layout = "equal") -> dict[Role, Place]:
    roles = (Role.QUERY, Role.KEY, Role.VALUE)
    return {role: Fused(module, index, 3, layout) for index, role in enumerate(roles)}


_BERT_FEED_FORWARD: dict[Role, Place] = {Role.UP: "intermediate.dense", Role.DOWN: "output.dense"}
_GATED: dict[Role, Place] = {Role.GATE: "mlp.gate_proj", Role.UP: "mlp.up_proj", Role.DOWN: "mlp.down_proj"}
_FC: dict[Role, Place] = {Role.UP: "fc1", Role.DOWN: "fc2"}


def _projections(of: str, output: str) -> tuple[str, str, str, str]:
    return f"{of}.q_proj", f"{of}.k_proj", f"{of}.v_proj", f"{of}.{output}"


def _t5_attention(of: str) -> tuple[str, str, str, str]:
    return f"{of}.q", f"{of}.k", f"{of}.v", f"{of}.o"


def _t5_stack(kind: Literal["encoder", "decoder"]) -> Stack:
    feed_forward = "layer.1.DenseReluDense" if kind == "encoder" else "layer.2.DenseReluDense"
    linears = _self_attention(*_t5_attention("layer.0.SelfAttention"))
    if kind == "decoder":
        linears |= _cross_attention(*_t5_attention("layer.1.EncDecAttention"))
    return Stack(
        kind,
        f"{kind}.block",
        linears,
        "layer.0.SelfAttention",
        "layer.1.EncDecAttention" if kind == "decoder" else None,
        variants=(
            {Role.GATE: f"{feed_forward}.wi_0", Role.UP: f"{feed_forward}.wi_1"},  # T5 1.1 and mT5
            {Role.UP: f"{feed_forward}.wi"},
        ),
        down={Role.DOWN: f"{feed_forward}.wo"},
    )


_BART_DECODER = (
    _self_attention(*_projections("self_attn", "out_proj"))
    | _cross_attention(*_projections("encoder_attn", "out_proj"))
    | _FC
)

FAMILIES: tuple[Family, ...] = (
    Family(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"),
        (
            Stack(
                "encoder",
                "encoder.layer",
                _self_attention(
                    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
                )
                | _BERT_FEED_FORWARD,
                "attention.self",
            ),
        ),
    ),
    Family(
        ("deberta-v2",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                # pos_key_proj and pos_query_proj read relative positions, not tokens: they stay as they are
                _self_attention(
                    "attention.self.query_proj",
                    "attention.self.key_proj",
                    "attention.self.value_proj",
                    "attention.output.dense",
                )
                | _BERT_FEED_FORWARD,
                None,
            ),
        ),
        off={"attention": "DeBERTa computes its disentangled attention by itself, outside the attention interface"},
    ),
    Family(
        ("distilbert",),
        (
            Stack(
                "encoder",
                "transformer.layer",
                _self_attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
                | {Role.UP: "ffn.lin1", Role.DOWN: "ffn.lin2"},
                "attention",
            ),
        ),
    ),
    Family(
        ("albert",),
        (
            Stack(
                "encoder",
                "encoder.albert_layer_groups",
                _self_attention("attention.query", "attention.key", "attention.value", "attention.dense")
                | {Role.UP: "ffn", Role.DOWN: "ffn_output"},
                "attention",
                shared_in_groups="albert_layers",
            ),
        ),
    ),
    Family(
        ("modernbert",),
        (
            Stack(
                "encoder",
                "layers",
                _fused("attn.Wqkv")
                | {
                    Role.OUTPUT: "attn.Wo",
                    Role.GATE: Fused("mlp.Wi", 0, 2),  # the half that the activation is applied to
                    Role.UP: Fused("mlp.Wi", 1, 2),
                    Role.DOWN: "mlp.Wo",
                },
                "attn",
            ),
        ),
    ),
    Family(
        ("gpt2",),
        (
            Stack(
                "decoder",
                "h",
                _fused("attn.c_attn") | {Role.OUTPUT: "attn.c_proj", Role.UP: "mlp.c_fc", Role.DOWN: "mlp.c_proj"},
                "attn",
            ),
        ),
    ),
    Family(
        ("gpt_neox",),
        (
            Stack(
                "decoder",
                "layers",
                _fused("attention.query_key_value", "interleaved")
                | {Role.OUTPUT: "attention.dense", Role.UP: "mlp.dense_h_to_4h", Role.DOWN: "mlp.dense_4h_to_h"},
                "attention",
            ),
        ),
    ),
    Family(
        ("opt",),
        (
            Stack(
                "decoder",
                "decoder.layers",
                _self_attention(*_projections("self_attn", "out_proj")) | _FC,
                "self_attn",
            ),
        ),
    ),
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite"),
        (Stack("decoder", "layers", _self_attention(*_projections("self_attn", "o_proj")) | _GATED, "self_attn"),),
    ),
    Family(
        ("phi3",),
        (
            Stack(
                "decoder",
                "layers",
                _fused("self_attn.qkv_proj", "grouped_query")
                | {
                    Role.OUTPUT: "self_attn.o_proj",
                    Role.GATE: Fused("mlp.gate_up_proj", 0, 2),
                    Role.UP: Fused("mlp.gate_up_proj", 1, 2),
                    Role.DOWN: "mlp.down_proj",
                },
                "self_attn",
            ),
        ),
    ),
    Family(("t5", "mt5"), (_t5_stack("encoder"), _t5_stack("decoder"))),
    Family(
        ("bart", "mbart"),
        (
            Stack(
                "encoder",
                "encoder.layers",
                _self_attention(*_projections("self_attn", "out_proj")) | _FC,
                "self_attn",
            ),
            Stack("decoder", "decoder.layers", _BART_DECODER, "self_attn", "encoder_attn"),
        ),
    ),
)

KNOWN: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
"""`config.model_type` -> its family."""
