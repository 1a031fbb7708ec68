"""Rows of the table: encoder-decoders. The encoder's stack comes first."""

from dataclasses import replace
from typing import Literal

from makd.anatomy.families import (
    FC,
    GATED,
    OWN_ATTENTION,
    Family,
    Place,
    Stack,
    cross_attention,
    projections,
    self_attention,
)
from makd.anatomy.roles import Role


def _t5_attention(of: str) -> tuple[str, str, str, str]:
    return f"{of}.q", f"{of}.k", f"{of}.v", f"{of}.o"


def _t5_stack(kind: Literal["encoder", "decoder"]) -> Stack:
    feed_forward = "layer.1.DenseReluDense" if kind == "encoder" else "layer.2.DenseReluDense"
    linears = self_attention(*_t5_attention("layer.0.SelfAttention"))
    if kind == "decoder":
        linears |= cross_attention(*_t5_attention("layer.1.EncDecAttention"))
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


def _longt5_encoder() -> Stack:
    """T5's, with the attention of the config."""
    gated, plain = _t5_stack("encoder").variants
    attentions = [
        self_attention(*_t5_attention(f"layer.0.{name}SelfAttention")) for name in ("Local", "TransientGlobal")
    ]
    variants = tuple(attention | dict(up) for attention in attentions for up in (gated, plain))
    return replace(_t5_stack("encoder"), linears={}, attention=None, variants=variants)


_BART_SELF = self_attention(*projections("self_attn", "out_proj"))
_BART_CROSS = cross_attention(*projections("encoder_attn", "out_proj"))
_PROPHETNET_FEED_FORWARD: dict[Role, Place] = {Role.UP: "feed_forward.intermediate", Role.DOWN: "feed_forward.output"}


def _prophetnet(of: str) -> tuple[str, str, str, str]:
    return f"{of}.query_proj", f"{of}.key_proj", f"{of}.value_proj", f"{of}.out_proj"


_PROPHETNET_SELF = self_attention(*_prophetnet("self_attn"))


def _bart_decoder(attention: str | None, cross: str | None) -> Stack:
    return Stack("decoder", "decoder.layers", _BART_SELF | _BART_CROSS | dict(FC), attention, cross)


ENCODER_DECODERS: tuple[Family, ...] = (
    Family(("t5", "mt5", "umt5"), (_t5_stack("encoder"), _t5_stack("decoder"))),
    Family(
        ("longt5",),
        (_longt5_encoder(), replace(_t5_stack("decoder"), attention=None, cross_attention=None)),
        off=OWN_ATTENTION,
    ),
    Family(
        ("bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "plbart", "m2m_100"),
        (
            Stack("encoder", "encoder.layers", _BART_SELF | dict(FC), "self_attn"),
            _bart_decoder("self_attn", "encoder_attn"),
        ),
    ),
    Family(
        ("mvp", "pegasus_x"),
        (
            Stack("encoder", "encoder.layers", _BART_SELF | dict(FC), None),
            _bart_decoder(None, None),
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("prophetnet",),
        (
            Stack("encoder", "encoder.layers", _PROPHETNET_SELF | _PROPHETNET_FEED_FORWARD, None),
            Stack(
                "decoder",
                "decoder.layers",
                _PROPHETNET_SELF | cross_attention(*_prophetnet("cross_attn")) | _PROPHETNET_FEED_FORWARD,
                None,
            ),
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("led",),
        (
            Stack(
                "encoder",
                "encoder.layers",
                # query_global, key_global and value_global read only tokens with global attention: they stay dense
                self_attention(
                    "self_attn.longformer_self_attn.query",
                    "self_attn.longformer_self_attn.key",
                    "self_attn.longformer_self_attn.value",
                    "self_attn.output",
                )
                | dict(FC),
                None,
            ),
            _bart_decoder(None, None),
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("bigbird_pegasus",),
        (
            Stack(
                "encoder",
                "encoder.layers",
                self_attention("self_attn.self.query", "self_attn.self.key", "self_attn.self.value", "self_attn.output")
                | dict(FC),
                None,
            ),
            _bart_decoder(None, None),
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("t5gemma",),
        (
            Stack(
                "encoder",
                "encoder.layers",
                self_attention(*projections("self_attn", "o_proj")) | dict(GATED),
                "self_attn",
            ),
            Stack(
                "decoder",
                "decoder.layers",
                self_attention(*projections("self_attn", "o_proj"))
                | cross_attention(*projections("cross_attn", "o_proj"))
                | dict(GATED),
                "self_attn",
                "cross_attn",
            ),
        ),
    ),
)
