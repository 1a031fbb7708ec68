"""Model types that makd cannot take in, and why: no row would do, or none does yet."""

from collections.abc import Mapping

_SEPARATE = "it keeps attentions and feed-forwards in lists of their own, so no module is a layer"
_NO_ATTENTION = "not all of its layers have attention: a state space, a recurrence or a convolution stands for it"
_GATED_ATTENTION = (
    "its attention has a gate, whose linear is called as the feed-forward's, so structure does not tell them apart, "
    "and there is no row yet"
)
_EXPERTS_IN_TWO_STACKS = "it is an encoder-decoder with routed experts in some layers, and there is no row yet"
_TRANSLATOR = "its text encoder and decoder are parts of a translator of speech, and there is no row yet"
_SOUND = "its encoder reads sound, not token ids"

REFUSED: Mapping[str, str] = {
    "whisper": _SOUND,
    "speech_to_text": _SOUND,
    "moonshine": _SOUND,
    "xlnet": "queries, keys and values are made by bare parameters of (hidden, heads, width), not by linears",
    "xlm": _SEPARATE,
    "flaubert": _SEPARATE,
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "falcon_mamba": _NO_ATTENTION,
    "rwkv": _NO_ATTENTION,
    "xlstm": _NO_ATTENTION,
    "recurrent_gemma": _NO_ATTENTION,
    "lfm2": _NO_ATTENTION,
    "bamba": _NO_ATTENTION,
    "falcon_h1": _NO_ATTENTION,
    "jamba": _NO_ATTENTION,
    "zamba": _NO_ATTENTION,
    "zamba2": _NO_ATTENTION,
    "qwen3_next": _NO_ATTENTION,
    "qwen3_5_text": _NO_ATTENTION,
    "olmo_hybrid": _NO_ATTENTION,
    "minimax": _NO_ATTENTION,
    "lfm2_moe": _NO_ATTENTION,
    "nemotron_h": _NO_ATTENTION,
    "jetmoe": "queries and outputs of its attention are made by routed experts, not by linears",
    "afmoe": _GATED_ATTENTION,
    "beam": _GATED_ATTENTION,
    "hrm_text": "two stacks of layers are run by turns, each several times in a forward",
    "cpmant": "it puts a prompt of its own before each text, so its layers see other tokens than a batch has",
    "switch_transformers": _EXPERTS_IN_TWO_STACKS,
    "nllb-moe": _EXPERTS_IN_TWO_STACKS,
    "seamless_m4t": _TRANSLATOR,
    "seamless_m4t_v2": _TRANSLATOR,
    "moshi": "its linears stand in wrappers (self_attn.q_proj.linear), unknown by their names, and there is no row yet",
    "fnet": "it mixes tokens by a Fourier transform, without queries, keys and values",
    "squeezebert": "its linears are convolutions",
    "ibert": "its linears are quantized ones of its own, which transformers trains and saves otherwise",
    "fsmt": "tokens stand before texts in its layers, and its base model already ends in logits",
    "funnel": "its layers have fewer and fewer tokens",
}
"""`config.model_type` -> the reason."""
