"""sentence-transformers folders around a tiny BERT, written by hand, and embeddings computed slowly in float64."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

WIDTH = 32
FLAGS = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean_tokens",
    "last": "lasttoken",
}


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_folder(path: Path, tokenizer, pooling: str = "mean", after: tuple[str, ...] = (), transformer: str = "",
                settings: dict | None = None, common: dict | None = None) -> Path:  # fmt: skip
    """A folder with `pooling` (several joined by +) and the modules `after` it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(path / transformer)
    tokenizer.save_pretrained(path / transformer)
    kinds = ["Transformer", "Pooling", *after]
    paths = [transformer, *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    write_json(
        path / "modules.json",
        [
            {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, place) in enumerate(zip(kinds, paths, strict=True))
        ],
    )
    modes = {f"pooling_mode_{flag}": name in pooling.split("+") for name, flag in FLAGS.items()}
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **modes})
    write_json(path / transformer / "sentence_bert_config.json", settings or {"max_seq_length": 48})
    write_json(path / "config_sentence_transformers.json", common or {"prompts": {"query": "find: "}})
    width = WIDTH * len(pooling.split("+"))
    for kind, place in zip(kinds[2:], paths[2:], strict=True):
        if kind == "Dense":
            add_dense(path / place, width)
            width = 16
    return path


def add_dense(folder: Path, width: int, **settings) -> None:
    write_json(
        folder / "config.json",
        {"in_features": width, "out_features": 16, "bias": True, **settings}
        | {"activation_function": settings.get("activation_function", "torch.nn.modules.activation.Tanh")},
    )
    weights = {"linear.weight": torch.randn(16, width) / 4, "linear.bias": torch.randn(16) / 4}
    save_file(weights, folder / "model.safetensors")


def embed(folder: Path, texts: list[str], pooling: str, dense: Path | None = None, max_length: int = 48) -> Tensor:
    """Embeddings of the texts, one after another, in float64: no batches, no padding, no makd."""
    model, tokenizer = AutoModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        batch = tokenizer([text], truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            tokens = model(**batch)[0][0]
        vectors.append(torch.cat([by_hand(tokens, how) for how in pooling.split("+")]))
    found = torch.stack(vectors)
    if dense is not None:
        weights = {name: tensor.double() for name, tensor in load_file(dense / "model.safetensors").items()}
        found = torch.tanh(found @ weights["linear.weight"].T + weights["linear.bias"])
    return found


def by_hand(tokens: Tensor, how: str) -> Tensor:
    """A text's vector of its (tokens, hidden)."""
    count = len(tokens)
    weights = torch.arange(1, count + 1, dtype=tokens.dtype)
    return {
        "mean": lambda: sum(tokens) / count,
        "cls": lambda: tokens[0],
        "last": lambda: tokens[count - 1],
        "max": lambda: tokens.max(0).values,
        "mean_sqrt_len": lambda: sum(tokens) / count**0.5,
        "weighted_mean": lambda: sum(w * t for w, t in zip(weights, tokens, strict=True)) / weights.sum(),
    }[how]()


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
