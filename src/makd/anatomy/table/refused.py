"""Model types that makd cannot take in, and why, as far as a row would not do."""

from collections.abc import Mapping

_SEPARATE = "it keeps attentions and feed-forwards in lists of their own, so no module is a layer"
_NO_ATTENTION = "not all of its layers have attention: a state space, a recurrence or a convolution stands for it"
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
    "fnet": "it mixes tokens by a Fourier transform, without queries, keys and values",
    "squeezebert": "its linears are convolutions",
    "ibert": "its linears are quantized ones of its own, which transformers trains and saves otherwise",
    "fsmt": "tokens stand before texts in its layers, and its base model already ends in logits",
    "funnel": "its layers have fewer and fewer tokens",
}
"""`config.model_type` -> the reason."""
