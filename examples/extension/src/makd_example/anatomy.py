"""A model of one's own, and where makd finds its linears: anatomy `twostroke`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from makd.anatomy import Family, Layout, Role, Stack, fused_qkv


class TwostrokeConfig(PretrainedConfig):
    """Of a small encoder."""

    model_type = "twostroke"

    def __init__(self, vocab_size: int = 100, hidden_size: int = 32, num_hidden_layers: int = 2, **others: Any) -> None:
        """Sizes; heads have 8 channels."""
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = hidden_size // 8
        super().__init__(**{"pad_token_id": 0, **others})


class TwostrokeLayer(nn.Module):
    """Attention, of one linear for queries, keys and values, then a feed-forward. No name says which is which."""

    def __init__(self, size: int) -> None:
        """Of a hidden size."""
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.mixed, self.merge = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.widen, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, size) -> the same."""
        heads = self.mixed(self.norms[0](states)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in heads)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        states = states + self.merge(seen.transpose(1, 2).flatten(2))
        found: Tensor = states + self.narrow(nn.functional.gelu(self.widen(self.norms[1](states))))
        return found


class TwostrokeModel(PreTrainedModel):
    """The encoder."""

    config_class = TwostrokeConfig
    base_model_prefix = "model"

    def __init__(self, config: TwostrokeConfig) -> None:
        """With random weights."""
        super().__init__(config)
        self.embed: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.strokes = nn.ModuleList(TwostrokeLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of tokens."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Others in their place."""
        self.embed = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> BaseModelOutput:
        """Token ids -> hidden states."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.embed(input_ids)
        for layer in self.strokes:
            states = layer(states, mask.bool())
        return BaseModelOutput(last_hidden_state=states)


AutoConfig.register("twostroke", TwostrokeConfig)
AutoModel.register(TwostrokeConfig, TwostrokeModel)

TWOSTROKE = Family(
    ("twostroke",),
    (
        Stack(
            "encoder",
            layers="strokes",
            linears=fused_qkv("mixed", Layout(1, (1, 1, 1)))
            | {Role.OUTPUT: "merge", Role.UP: "widen", Role.DOWN: "narrow"},
            attention=None,
        ),
    ),
    off={"attention": "it computes attention by itself, outside transformers' attention interface"},
)
