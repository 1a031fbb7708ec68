"""Tiny models of every architecture that makd knows, with random weights, and batches for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    **SPECIAL,
}
DECODER = {**ENCODER, "num_key_value_heads": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": 2, **SPECIAL}  # fmt: skip

GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}
GPTJ = {**GPT2, "rotary_dim": 4}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}
GEMMA2 = {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", ENCODER),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
         "max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "electra": ("Electra", {**ENCODER, "embedding_size": 16}),
    "deberta_v2": (
        "DebertaV2",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "share_att_key": True},
    ),
    "modernbert": ("ModernBert", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8,
                                  "global_attn_every_n_layers": 2}),
    "albert": ("Albert", {**ENCODER, "embedding_size": 16}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", ENCODER),
    "opt": ("OPT", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64,
                    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **SPECIAL}),
    "llama": ("Llama", DECODER),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi3": ("Phi3", DECODER),
    "t5": ("T5", T5),
    "t5_gated": ("T5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("Bart", BART),
    "mobilebert": ("MobileBert", {**ENCODER, "hidden_size": 48, "embedding_size": 16, "intra_bottleneck_size": 32,
                                  "num_feedforward_networks": 2, "trigram_input": False}),
    "falcon": ("Falcon", {**DECODER, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 64}),
    "bloom": ("Bloom", BLOOM),
    "codegen": ("CodeGen", GPTJ),
    "gpt_bigcode": ("GPTBigCode", {**GPT2, "n_inner": 64}),
}  # fmt: skip
"""Name -> (prefix of transformers' classes, settings): one for every way of building a layer."""

RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "xlm_roberta": ("XLMRoberta", ENCODER),
    "camembert": ("Camembert", ENCODER),
    "data2vec_text": ("Data2VecText", ENCODER),
    "ernie": ("Ernie", ENCODER),
    "gemma": ("Gemma", {**DECODER, "head_dim": 8}),
    "smollm3": ("SmolLM3", DECODER),
    "olmo2": ("Olmo2", DECODER),
    "granite": ("Granite", DECODER),
    "mt5": ("MT5", T5),
    "mbart": ("MBart", BART),
    "gemma3_images": ("Gemma3", {"text_config": {**GEMMA2, "sliding_window": 8}, "mm_tokens_per_image": 4,
                                 "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                                   "num_attention_heads": 4, "image_size": 16, "patch_size": 8}}),
    "deberta": ("Deberta", {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
                    **SPECIAL}),
    "starcoder2": ("Starcoder2", {**DECODER, "sliding_window": None}),
    "glm4": ("Glm4", {**DECODER, "head_dim": 8}),
    "modernbert_decoder": ("ModernBertDecoder", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2,
                                                  "local_attention": 8}),
    "t5gemma": ("T5Gemma", {"encoder": GEMMA2, "decoder": GEMMA2, "vocab_size": VOCABULARY, **SPECIAL}),
    "led": ("LED", {**{key: value for key, value in BART.items() if key != "max_position_embeddings"},
                    "attention_window": [4, 4], "max_encoder_position_embeddings": 64,
                    "max_decoder_position_embeddings": 64}),
    "falcon_multi_query": ("Falcon", {**DECODER, "multi_query": True, "ffn_hidden_size": 64}),
    "falcon_alibi": ("Falcon", {**DECODER, "multi_query": False, "alibi": True, "ffn_hidden_size": 64}),
    "gpt_bigcode_heads": ("GPTBigCode", {**GPT2, "n_inner": 64, "multi_query": False}),
    "persimmon": ("Persimmon", {**ENCODER, "qk_layernorm": False}),
    "openai_gpt": ("OpenAIGPT", GPT2),
    "gptj": ("GPTJ", GPTJ),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    "gpt_neox_japanese": ("GPTNeoXJapanese", {**ENCODER, "intermediate_multiple_size": 2}),
    "ctrl": ("CTRL", {**GPT2, "dff": 64}),
    "glm": ("Glm", {**DECODER, "head_dim": 8}),
    "phi": ("Phi", DECODER),
    "umt5": ("UMT5", T5),
    "longt5": ("LongT5", {**T5, "local_radius": 4}),
    "longt5_global": (
        "LongT5",
        {
            **T5,
            "local_radius": 4,
            "encoder_attention_type": "transient-global",
            "feed_forward_proj": "gated-gelu",
            "global_block_size": 4,
        },
    ),
    "pegasus": ("Pegasus", BART),
    "marian": ("Marian", BART),
    "blenderbot": ("Blenderbot", BART),
    "blenderbot_small": ("BlenderbotSmall", BART),
    "plbart": ("PLBart", BART),
    "m2m_100": ("M2M100", BART),
    "mvp": ("Mvp", BART),
    "pegasus_x": ("PegasusX", {**BART, "block_size": 4, "num_global_tokens": 2}),
    "bigbird_pegasus": ("BigBirdPegasus", {**BART, "attention_type": "original_full"}),
    "prophetnet": (
        "ProphetNet",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
}  # fmt: skip
"""The same for model types that are built much like one of `CONFIGS`; not in `TINY`, to keep the tests short."""

_HEADED = {**DECODER, "head_dim": 8}
_FULL = {"layer_types": ["full_attention"] * 2}
_MOE = {**DECODER, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    **_MOE,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

STRUCTURAL: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {**DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "arcee": ("Arcee", DECODER),
    "bert_generation": ("BertGeneration", ENCODER),
    "biogpt": ("BioGpt", ENCODER),
    "bitnet": ("BitNet", DECODER),
    "clip_text": ("CLIPText", ENCODER),
    "cohere": ("Cohere", DECODER),
    "cohere2": ("Cohere2", {**_HEADED, **_FULL}),
    "diffllama": ("DiffLlama", DECODER),
    "ernie4_5": ("Ernie4_5", DECODER),
    "esm": ("Esm", {**ENCODER, "mask_token_id": 4}),
    "eurobert": ("EuroBert", {**DECODER, "mask_token_id": 4}),
    "exaone4": ("Exaone4", {**_HEADED, **_FULL}),
    "helium": ("Helium", _HEADED),
    "layoutlm": ("LayoutLM", {**ENCODER, "max_2d_position_embeddings": 64}),
    "lilt": ("Lilt", {**ENCODER, "hidden_size": 48, "max_2d_position_embeddings": 64}),
    "megatron_bert": ("MegatronBert", ENCODER),
    "ministral": ("Ministral", _HEADED),
    "mpnet": ("MPNet", ENCODER),
    "nanochat": ("NanoChat", DECODER),
    "nemotron": ("Nemotron", _HEADED),
    "olmo": ("Olmo", DECODER),
    "olmo3": ("Olmo3", {**DECODER, **_FULL}),
    "rembert": ("RemBert", {**ENCODER, "input_embedding_size": 16, "output_embedding_size": 16}),
    "roberta_prelayernorm": ("RobertaPreLayerNorm", ENCODER),
    "roformer": ("RoFormer", {**ENCODER, "embedding_size": 32}),
    "seed_oss": ("SeedOss", _HEADED),
    "stablelm": ("StableLm", DECODER),
    "tapas": ("Tapas", {**ENCODER, "type_vocab_sizes": [3, 64, 64, 2, 64, 64, 10]}),
    "vaultgemma": ("VaultGemma", {**_HEADED, **_FULL, "query_pre_attn_scalar": 8}),
    "visual_bert": ("VisualBert", {**ENCODER, "visual_embedding_dim": 16}),
    "xglm": ("XGLM", {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
                      "max_position_embeddings": 64, **SPECIAL}),
    "xlm_roberta_xl": ("XLMRobertaXL", ENCODER),
    "nomic_bert": ("NomicBert", DECODER),
    "gte": ("Gte", ENCODER),
    # mixtures of experts with a shared one
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "glm4_moe": ("Glm4Moe", {**_MOE, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
                             "topk_group": 1, "first_k_dense_replace": 0}),
    "aria": ("AriaText", {**_MOE, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_topk": 2}),
    "granitemoeshared": ("GraniteMoeShared", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2,
                                              "shared_intermediate_size": 32}),
    "qwen2_moe_mixed": ("Qwen2Moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 32,
                                     "mlp_only_layers": [0]}),
    "glm4_moe_mixed": ("Glm4Moe", {**_MOE, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
                                   "topk_group": 1, "first_k_dense_replace": 1}),
    # feed-forwards that are nothing but routed experts, in all layers or in some
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 8, "num_experts": 4}),
    "qwen3_moe_mixed": ("Qwen3Moe", {**_MOE, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]}),
    "gpt_oss": ("GptOss", {**_HEADED, **_FULL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # latent attention
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "q_lora_rank": None, "num_experts": 4, "n_shared_experts": 1}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "n_routed_experts": 4, "n_shared_experts": 1}),
    # something is not what its name says
    "convbert": ("ConvBert", {**ENCODER, "embedding_size": 32}),
    "yoso": ("Yoso", ENCODER),
    "nystromformer": ("Nystromformer", {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 4}),
    "doge": ("Doge", DECODER),
    "llama4": ("Llama4Text", {**_HEADED, **_FULL, "num_local_experts": 4, "intermediate_size_mlp": 64,
                              "moe_layers": [0, 1], "no_rope_layers": [1, 1], "attention_chunk_size": 16}),
    "gemma3n": ("Gemma3nText", {**_HEADED, **_FULL, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY,
                                "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4,
                                "activation_sparsity_pattern": [0.0, 0.0]}),
    "longformer": ("Longformer", {**ENCODER, "attention_window": [4, 4], "sep_token_id": 2}),
    "big_bird": ("BigBird", {**ENCODER, "max_position_embeddings": 128, "block_size": 4, "num_random_blocks": 1,
                             "sep_token_id": 2}),
}  # fmt: skip
"""The same for model types that no family names, and that are read from their structure."""

MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe_mixed", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe_mixed", "llama4",
)  # fmt: skip
"""Of `STRUCTURAL`, those whose routed experts get factors: one for every way of building them."""

AUTO = {
    "base": transformers.AutoModel,
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}


def tiny(name: str, head: str = "base", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The architecture called `name` with two layers, in eval mode; the same weights for the same seed.

    `changes` go into its config.
    """
    prefix, settings = (CONFIGS | RELATIVES | STRUCTURAL)[name]
    torch.manual_seed(seed)
    model = AUTO[head].from_config(getattr(transformers, f"{prefix}Config")(**(settings | changes))).eval()
    for module in model.modules():
        # biases, and weights as wide as in trained models: near-zero attention scores would make every test easy
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            torch.nn.init.normal_(module.weight, std=0.15)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:  # stacks of matrices, which are no modules
            torch.nn.init.normal_(parameter, std=0.15)
    model.tie_weights()
    return model


def _builder(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: tiny(name)


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(name) for name in CONFIGS}


def batch(model: PreTrainedModel, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Four rows of up to twelve tokens, padded on the right; with target tokens for encoder-decoders."""
    inputs = _ids(seed, 12, padded)
    batch = {"input_ids": inputs[0], "attention_mask": inputs[1]}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = _ids(seed + 1, 9, padded)
    return batch


def _ids(seed: int, length: int, padded: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask = (torch.arange(length) < torch.tensor([length, length - 3, length - 5, 4])[:, None]).long()
        ids = ids * mask
    return ids, mask


def numbers_in(folder: Path) -> int:
    """How many weights the files of a saved model hold; a student's identities are none."""
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
