"""Rows of the table: decoders."""

from makd.anatomy.families import (
    BY_HEAD,
    BY_KEY_HEAD,
    FC,
    GATED,
    GROUPED_QUERY,
    OWN_ATTENTION,
    THIRDS,
    Family,
    Fused,
    Layout,
    Place,
    Stack,
    fused_gate_up,
    fused_qkv,
    projections,
    self_attention,
)
from makd.anatomy.roles import Role

_H_TO_4H: dict[Role, Place] = {Role.UP: "mlp.dense_h_to_4h", Role.DOWN: "mlp.dense_4h_to_h"}
_FC_IN: dict[Role, Place] = {Role.UP: "mlp.fc_in", Role.DOWN: "mlp.fc_out"}
_C_FC: dict[Role, Place] = {Role.UP: "mlp.c_fc", Role.DOWN: "mlp.c_proj"}
_GATE_UP = fused_gate_up("mlp.gate_up_proj") | {Role.DOWN: "mlp.down_proj"}
_SHARDED = Layout(4, (1, 1, 1))
"""CodeGen was trained on four machines, each with a part of Q, of V and of K."""
_QKV = "self_attention.query_key_value"
_AFTER_QKV: dict[Role, Place] = {Role.OUTPUT: "self_attention.dense", **_H_TO_4H}
_CODEGEN_ATTENTION: dict[Role, Place] = {
    Role.QUERY: Fused("attn.qkv_proj", 0, _SHARDED),
    Role.KEY: Fused("attn.qkv_proj", 2, _SHARDED),
    Role.VALUE: Fused("attn.qkv_proj", 1, _SHARDED),
    Role.OUTPUT: "attn.out_proj",
}


def _decoder(layers: str, linears: dict[Role, Place], attention: str | None) -> tuple[Stack]:
    return (Stack("decoder", layers, linears, attention),)


DECODERS: tuple[Family, ...] = (
    Family(("gpt2",), _decoder("h", fused_qkv("attn.c_attn", THIRDS) | {Role.OUTPUT: "attn.c_proj"} | _C_FC, "attn")),
    Family(
        ("gpt_bigcode",),
        _decoder("h", fused_qkv("attn.c_attn", BY_KEY_HEAD) | {Role.OUTPUT: "attn.c_proj"} | _C_FC, "attn"),
    ),
    Family(
        ("gpt_neox",),
        _decoder(
            "layers",
            fused_qkv("attention.query_key_value", BY_HEAD) | {Role.OUTPUT: "attention.dense"} | _H_TO_4H,
            "attention",
        ),
    ),
    Family(
        ("persimmon",),
        _decoder(
            "layers",
            fused_qkv("self_attn.query_key_value", BY_HEAD) | {Role.OUTPUT: "self_attn.dense"} | _H_TO_4H,
            "self_attn",
        ),
    ),
    Family(("bloom",), _decoder("h", fused_qkv(_QKV, BY_HEAD) | _AFTER_QKV, None), OWN_ATTENTION),
    Family(("falcon",), _decoder("h", fused_qkv(_QKV, BY_KEY_HEAD) | _AFTER_QKV, None), OWN_ATTENTION),
    Family(
        ("mpt",),
        _decoder(
            "blocks",
            fused_qkv("attn.Wqkv", THIRDS)
            | {Role.OUTPUT: "attn.out_proj", Role.UP: "ffn.up_proj", Role.DOWN: "ffn.down_proj"},
            None,
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("openai-gpt",),
        _decoder("h", fused_qkv("attn.c_attn", THIRDS) | {Role.OUTPUT: "attn.c_proj"} | _C_FC, None),
        off=OWN_ATTENTION,
    ),
    Family(
        ("gpt_neo",),
        _decoder("h", self_attention(*projections("attn.attention", "out_proj")) | _C_FC, None),
        OWN_ATTENTION,
    ),
    Family(
        ("gpt_neox_japanese",),
        _decoder(
            "layers",
            fused_qkv("attention.query_key_value", BY_HEAD) | {Role.OUTPUT: "attention.dense"} | _H_TO_4H,
            None,
        ),
        off=OWN_ATTENTION,
    ),
    Family(
        ("ctrl",),
        _decoder(
            "h",
            self_attention(*(f"multi_head_attention.{name}" for name in ("Wq", "Wk", "Wv", "dense")))
            | {Role.UP: "ffn.0", Role.DOWN: "ffn.2"},
            None,
        ),
        off=OWN_ATTENTION,
    ),
    Family(("gptj",), _decoder("h", self_attention(*projections("attn", "out_proj")) | _FC_IN, "attn")),
    Family(
        ("codegen",),
        _decoder(
            "h",
            _CODEGEN_ATTENTION | _FC_IN,
            "attn",
        ),
    ),
    Family(
        ("opt",),
        _decoder("decoder.layers", self_attention(*projections("self_attn", "out_proj")) | dict(FC), "self_attn"),
    ),
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite"),
        _decoder("layers", self_attention(*projections("self_attn", "o_proj")) | dict(GATED), "self_attn"),
    ),
    Family(  # with images: what reads them stays dense
        ("gemma3",),
        _decoder(
            "language_model.layers", self_attention(*projections("self_attn", "o_proj")) | dict(GATED), "self_attn"
        ),
    ),
    Family(
        ("starcoder2",), _decoder("layers", self_attention(*projections("self_attn", "o_proj")) | _C_FC, "self_attn")
    ),
    Family(
        ("phi",),
        _decoder(
            "layers",
            self_attention(*projections("self_attn", "dense")) | {Role.UP: "mlp.fc1", Role.DOWN: "mlp.fc2"},
            "self_attn",
        ),
    ),
    Family(
        ("phi3",),
        _decoder(
            "layers",
            fused_qkv("self_attn.qkv_proj", GROUPED_QUERY) | {Role.OUTPUT: "self_attn.o_proj"} | _GATE_UP,
            "self_attn",
        ),
    ),
    Family(
        ("glm", "glm4"),
        _decoder("layers", self_attention(*projections("self_attn", "o_proj")) | _GATE_UP, "self_attn"),
    ),
    Family(
        ("modernbert-decoder",),
        _decoder(
            "layers",
            self_attention(*projections("attn", "Wo")) | fused_gate_up("mlp.Wi") | {Role.DOWN: "mlp.Wo"},
            "attn",
        ),
    ),
)
