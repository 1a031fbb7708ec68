"""Rows of the table: encoders."""

from makd.anatomy.families import (
    BY_HEAD,
    THIRDS,
    Family,
    Place,
    Stack,
    fused_gate_up,
    fused_qkv,
    self_attention,
)
from makd.anatomy.roles import Role

_BERT_ATTENTION = self_attention(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
)
_BERT_FEED_FORWARD: dict[Role, Place] = {Role.UP: "intermediate.dense", Role.DOWN: "output.dense"}
_DISENTANGLED = {"attention": "DeBERTa computes its disentangled attention by itself, outside the attention interface"}

ENCODERS: tuple[Family, ...] = (
    Family(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"),
        (Stack("encoder", "encoder.layer", _BERT_ATTENTION | _BERT_FEED_FORWARD, "attention.self"),),
    ),
    Family(
        ("mobilebert",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                # the last of several feed-forwards: the others (ffn.*) and the bottlenecks stay dense
                _BERT_ATTENTION | _BERT_FEED_FORWARD,
                "attention.self",
                apart=frozenset({Role.VALUE}),  # it reads the layer's input, Q and K a bottleneck of it
            ),
        ),
        dense_vocabulary="MobileBERT's LM head is put together of two weights, and never called as a linear",
    ),
    Family(
        ("deberta-v2",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                # pos_key_proj and pos_query_proj read relative positions, not tokens: they stay as they are
                self_attention(
                    "attention.self.query_proj",
                    "attention.self.key_proj",
                    "attention.self.value_proj",
                    "attention.output.dense",
                )
                | _BERT_FEED_FORWARD,
                None,
            ),
        ),
        off=_DISENTANGLED,
    ),
    Family(
        ("deberta",),
        (
            Stack(
                "encoder",
                "encoder.layer",
                fused_qkv("attention.self.in_proj", BY_HEAD)
                | {Role.OUTPUT: "attention.output.dense"}
                | _BERT_FEED_FORWARD,
                None,
            ),
        ),
        off=_DISENTANGLED,
    ),
    Family(
        ("distilbert",),
        (
            Stack(
                "encoder",
                "transformer.layer",
                self_attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
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
                self_attention("attention.query", "attention.key", "attention.value", "attention.dense")
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
                fused_qkv("attn.Wqkv", THIRDS)
                | {Role.OUTPUT: "attn.Wo"}
                | fused_gate_up("mlp.Wi")
                | {Role.DOWN: "mlp.Wo"},
                "attn",
            ),
        ),
    ),
)
